"""DEIS (Zhang and Chen 2023), t-AB in the logarithm of the noise level: ``deis`` in diffusers.

The noise is a polynomial in log sigma through its last values and is integrated exactly,

    x' / (1 - t') = x / (1 - t) + int eps(log sigma) d sigma        sigma = t / (1 - t)

which is the exponential integrator of the noise in half the log-SNR, because that is -log sigma.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from oss_ext.solvers.base import (
    Multistep,
    exponent,
    exponential_moments,
    half_log_snr,
    lagrange,
)


class DEIS(Multistep):
    """Of order 2 or 3."""

    output = "noise"

    def __init__(self, order: int) -> None:
        self.order = order
        self.name = f"deis-{order}"
        self.title = f"DEIS of order {order}, log-rho (Zhang and Chen 2023)"

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        s, k = exponent(self.output, times[0], t_next)
        begin, *marks = (half_log_snr(t) for t in times[:order])
        nodes = [k / (mark - begin) for mark in marks]
        return [-s * weight for weight in lagrange(nodes, exponential_moments(k, len(nodes)))]


FAMILY = (DEIS(2), DEIS(3))
