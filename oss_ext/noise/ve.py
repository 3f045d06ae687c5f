"""Variance-exploding paths (EDM, k-diffusion): ``alpha = 1``, ``beta = sigma``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.noise.base import Path, as_numbers, check_grid

CLOCKS = ("sigma", "log")


@dataclass(frozen=True)
class VEPath(Path):
    """EDM (Karras et al. 2022) and other variance-exploding models; ``t = sigma / (1 + sigma)``.

    Attributes:
        sigma_min, sigma_max: the noise levels the network knows.
        clock: what it is told: ``sigma``, or ``log``: ``ln(sigma) / 4``, EDM's ``c_noise``.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    clock: str = "sigma"

    name: ClassVar[str] = "ve"

    def __post_init__(self) -> None:
        self._store_float("sigma_min")
        self._store_float("sigma_max", self.sigma_min)
        arguments.one_of("clock", self.clock, CLOCKS)

    @property
    def span(self) -> tuple[float, float]:
        return self.sigma_min / (1 + self.sigma_min), self.sigma_max / (1 + self.sigma_max)

    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t / (1 - t)

    def model_times(self, t: Tensor) -> Tensor:
        t = self.within_span(t)
        return t / (1 - t) if self.clock == "sigma" else t.logit() / 4

    def flow_times(self, model_times: Tensor) -> Tensor:
        m = model_times.double()
        return m / (1 + m) if self.clock == "sigma" else (4 * m).sigmoid()

    def grid(self, steps: int) -> Tensor:
        """EDM's, from ``sigma_max`` to ``sigma_min`` and 0."""
        return karras_grid(steps, self.sigma_min, self.sigma_max)


def sigma_grid(sigmas: Tensor) -> Tensor:
    """Teacher times of noise levels ``beta / alpha``, in any order; 0 is the clean end."""
    sigmas = as_numbers("sigmas", sigmas).sort().values
    outside = ~((sigmas >= 0) & sigmas.isfinite())
    if bool(outside.any()):
        got = float(sigmas[outside][0])
        raise ValueError(f"sigmas: expected finite values from 0 on, got {got}")
    return check_grid(sigmas / (1 + sigmas), "sigmas")


def karras_grid(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Teacher times of EDM, ``[steps + 1]`` float64 ascending: uniform in ``sigma^(1/rho)``, and 0.

    ``sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``
    (Karras et al. 2022, eq. 5).

    Raises:
        ValueError: ``steps`` no whole number from 1 on, or noise levels that do not ascend.
    """
    rho = arguments.number("rho", rho, positive=True)
    first, last, steps = _check_levels(steps, sigma_min, sigma_max)
    ramp = cpu.linspace(first ** (1 / rho), last ** (1 / rho), steps, dtype=torch.float64)
    return sigma_grid(torch.cat([cpu.zeros(1, dtype=torch.float64), ramp**rho]))


def exponential_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Teacher times uniform in ``log sigma`` (log-SNR), ``[steps + 1]`` float64, and 0.

    Raises:
        ValueError: as ``karras_grid``.
    """
    first, last, steps = _check_levels(steps, sigma_min, sigma_max)
    ramp = cpu.linspace(math.log(first), math.log(last), steps, dtype=torch.float64)
    return sigma_grid(torch.cat([cpu.zeros(1, dtype=torch.float64), ramp.exp()]))


def _check_levels(steps: int, sigma_min: float, sigma_max: float) -> tuple[float, float, int]:
    """The levels to go through and how many; a single step goes from the highest."""
    steps = arguments.whole_number("steps", steps)
    arguments.between("sigma_min", sigma_min)
    arguments.between("sigma_max", sigma_max, sigma_min)
    return (sigma_min if steps > 1 else sigma_max), sigma_max, steps
