"""The exact flow of a Gaussian mixture: a model in closed form, for tests and for theory.

``x0`` comes from an equal mixture of isotropic Gaussians with means ``mu`` and standard deviation
``sd``. With ``a = 1 - t`` and ``var = a^2 sd^2 + t^2`` the posterior mean is

    w = softmax_k(-|x - a mu_k|^2 / (2 var)),  m = sum_k w_k mu_k
    x0_hat = m + a sd^2 / var (x - a m),       v = (x - x0_hat) / t
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from oss_ext import arguments
from oss_ext.models.base import Model, hash_of
from oss_ext.noise import flow_grid


class GaussianMixture(Model):
    """Velocity of the mixture with means ``mu`` [components, D] and deviation ``sd``.

    Args:
        mu: ``[components, D]``; its dtype and device are the model's.
        sd: standard deviation of every component, positive.
        shape: dims of a sample with D elements; None: ``(D,)``.
        shift: time shift of the default teacher grid.
    """

    name = "analytic"

    def __init__(
        self, mu: Tensor, sd: float, shape: Sequence[int] | None = None, shift: float = 1.0
    ) -> None:
        if mu.dim() != 2 or not mu.is_floating_point():
            raise ValueError(f"mu: expected floating-point [components, D], got {mu.shape}")
        self.mu = mu
        self.sd = arguments.number("sd", sd, positive=True)
        self.shift = arguments.number("shift", shift, positive=True)
        self.shape = tuple(shape) if shape is not None else (mu.shape[1],)
        if math.prod(self.shape) != mu.shape[1]:
            raise ValueError(f"shape: expected {mu.shape[1]} elements as mu, got {self.shape}")
        self.dtype, self.device = mu.dtype, mu.device
        self.data_range = float(mu.max() - mu.min()) + 4 * self.sd

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        flat, time = x.flatten(1), t.to(x.dtype)[:, None]
        a = 1 - time
        var = a**2 * self.sd**2 + time**2
        # |x|^2 is common to all components and drops out of the softmax.
        log_w = (a * (flat @ self.mu.T) - a**2 / 2 * self.mu.square().sum(1)) / var
        m = log_w.softmax(dim=1) @ self.mu
        x0 = m + a * self.sd**2 / var * (flat - a * m)
        return ((flat - x0) / time).view_as(x)

    def times(self, steps: int) -> Tensor:
        return flow_grid(steps, self.shift)

    def fingerprint(self) -> str:
        return hash_of([self.mu, self.sd, self.shape])


def load(
    shape: Sequence[int] = (3, 8, 8),
    components: int = 8,
    sd: float = 0.1,
    seed: int = 0,
    shift: float = 1.0,
    device: str = "cpu",
) -> GaussianMixture:
    """The exact flow of a Gaussian mixture whose means are drawn with seed, in float32.

    They come from another generator than noise does: of the same one, the noise of the same seed
    would begin with the means themselves.
    """
    if not isinstance(shape, list | tuple) or not shape:
        raise ValueError(f"shape: expected a list of sizes, got {shape!r}")
    shape = [arguments.whole_number("shape", size) for size in shape]
    components = arguments.whole_number("components", components)
    seed = arguments.whole_number("seed", seed, least=0)
    size = components, math.prod(shape)
    mu = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    return GaussianMixture(
        torch.from_numpy(mu).to(arguments.device("device", device)), sd, shape, shift
    )
