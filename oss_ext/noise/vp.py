"""Variance-preserving paths (DDPM): ``alpha = sqrt(alpha_bar)``, ``beta = sqrt(1 - alpha_bar)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.noise.base import Path, check_grid

STABLE_DIFFUSION = (0.00085, 0.012)
BETAS = {"linear": (0.0001, 0.02), "scaled_linear": STABLE_DIFFUSION, "cosine": STABLE_DIFFUSION}
"""The usual first and last of each recipe; cosine has no use for them."""
SPACINGS = ("leading", "trailing", "linspace")
FINALS = ("clean", "first")
MAX_BETA = 0.999  # the cosine schedule's cap


class VariancePreserving(Path):
    """``alpha^2 + beta^2 = 1``, whatever the clock."""

    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.hypot(t, 1 - t)
        return (1 - t) / norm, t / norm

    def noise_scale(self, t: float) -> float:
        """Hosts start a VP path from unscaled noise: ``1 / (alpha + beta)``."""
        return math.hypot(t, 1 - t)


@dataclass(frozen=True)
class VPPath(VariancePreserving):
    """A discrete DDPM path, by the recipe of its betas or by its ``alphas_cumprod``.

    The network is told the timestep, 0 to T - 1; between two of them it is interpolated linearly
    in log sigma, as k-diffusion does.

    Attributes:
        betas: ``linear``, ``scaled_linear`` (Stable Diffusion; uniform in the square root) or
            ``cosine`` (improved DDPM, capped at 0.999).
        beta_start, beta_end: of the first two; by default DDPM's 0.0001 and 0.02 where ``linear``,
            Stable Diffusion's 0.00085 and 0.012 where ``scaled_linear``.
        train_steps: T.
        zero_terminal_snr: rescaled so that the last timestep is pure noise (Lin et al. 2023).
        alphas_cumprod: the T values themselves, falling within [0, 1]; goes before the recipe.
    """

    betas: str = "scaled_linear"
    beta_start: float | None = None
    beta_end: float | None = None
    train_steps: int = 1000
    zero_terminal_snr: bool = False
    alphas_cumprod: tuple[float, ...] | None = None

    name: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        steps = arguments.whole_number("train_steps", self.train_steps, least=2, most=1_000_000)
        object.__setattr__(self, "train_steps", steps)
        arguments.one_of("betas", self.betas, BETAS)
        for name, usual in zip(("beta_start", "beta_end"), BETAS[self.betas], strict=True):
            if getattr(self, name) is None:  # what is stored and compared is the number
                object.__setattr__(self, name, usual)
            self._store_float(name, 0, 1)
        arguments.flag("zero_terminal_snr", self.zero_terminal_snr)
        given = self.alphas_cumprod is not None
        if given:
            self._store_levels()
        levels = self.knots
        if not bool((levels.diff() > 0).all() & (levels[0] > 0) & (levels[-1] <= 1)):
            name = "alphas_cumprod" if given else "betas"
            raise ValueError(f"{name}: expected alphas_cumprod falling strictly from below 1")

    def _store_levels(self) -> None:
        """``alphas_cumprod`` as a tuple, and how many there are."""
        values: Any = self.alphas_cumprod
        try:
            numbers = cpu.as_tensor(values, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            numbers = cpu.empty(0)
        if numbers.dim() != 1 or len(numbers) < 2:
            raise ValueError(f"alphas_cumprod: expected 2 or more numbers, got {values!r:.100}")
        object.__setattr__(self, "alphas_cumprod", tuple(numbers.tolist()))
        object.__setattr__(self, "train_steps", len(numbers))

    @cached_property
    def knots(self) -> Tensor:
        """The flow times of the timesteps 0 to T - 1, ``[T]`` float64 ascending."""
        if self.alphas_cumprod is not None:
            log_bar = cpu.tensor(self.alphas_cumprod, dtype=torch.float64).log()
        else:
            log_bar = torch.log1p(-self._make_betas()).cumsum(0)
        alpha = (log_bar / 2).exp()
        if self.zero_terminal_snr and self.alphas_cumprod is None:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
            beta = ((1 - alpha) * (1 + alpha)).sqrt()
        else:
            beta = (-torch.expm1(log_bar)).sqrt()
        return beta / (alpha + beta)

    def _make_betas(self) -> Tensor:
        count = self.train_steps
        if self.betas == "cosine":
            u = cpu.arange(count + 1, dtype=torch.float64) / count
            bar = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
            return (1 - bar[1:] / bar[:-1]).clamp(max=MAX_BETA)
        assert self.beta_start is not None
        assert self.beta_end is not None
        power = 0.5 if self.betas == "scaled_linear" else 1.0
        ends = self.beta_start**power, self.beta_end**power
        return cpu.linspace(*ends, count, dtype=torch.float64) ** (1 / power)

    @property
    def span(self) -> tuple[float, float]:
        return float(self.knots[0]), float(self.knots[-1])

    @cached_property
    def _levels(self) -> Tensor:
        """log sigma of the timesteps; one step above the last finite one for pure noise."""
        levels = self.knots.logit()
        return levels.nan_to_num(posinf=float(levels[-2]) + 1)

    def model_times(self, t: Tensor) -> Tensor:
        t = self.within_span(t)
        known = self._levels.to(t.device)
        level = t.double().logit().clamp(known[0], known[-1])
        # In torch, so that gradients pass. Beyond the last timestep there is nothing to go on to.
        slope = torch.cat([1 / known.diff(), torch.zeros_like(known[:1])])
        below = torch.searchsorted(known, level.detach(), right=True) - 1
        return below + slope[below] * (level - known[below])

    def flow_times(self, model_times: Tensor) -> Tensor:
        m = model_times.double()
        outside = ~((m >= 0) & (m <= self.train_steps - 1))
        if bool(outside.any()):
            raise ValueError(
                f"timesteps: expected 0 to {self.train_steps - 1}, got {float(m[outside][0])}"
            )
        level = np.interp(m.cpu(), np.arange(self.train_steps), self._levels)
        t = torch.as_tensor(level, dtype=torch.float64, device=m.device).sigmoid()
        # At a timestep itself the interpolation has nothing to add but rounding.
        whole = m == m.round()
        return torch.where(whole, self.knots.to(m.device)[m.round().long()], t)

    def grid(self, steps: int) -> Tensor:
        """DDIM's timesteps, trailing, and the clean end."""
        return ddim_grid(self, steps)


@dataclass(frozen=True)
class VPContinuousPath(VariancePreserving):
    """The VP SDE: ``log alpha_bar(s) = -s^2 (beta_max - beta_min) / 2 - s beta_min``, s to 1.

    Attributes:
        beta_min, beta_max: at s = 0 and 1.
        scale: what the network is told is ``scale s``: 999 or 1000 where it counts timesteps.
        first: the least ``s`` the network is asked at.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    scale: float = 1.0
    first: float = 0.0

    name: ClassVar[str] = "vp_continuous"

    def __post_init__(self) -> None:
        self._store_float("beta_min")
        self._store_float("beta_max", self.beta_min)
        self._store_float("scale")
        if self.first != 0 or isinstance(self.first, bool):
            self._store_float("first", 0, 1)

    @property
    def span(self) -> tuple[float, float]:
        ends = cpu.tensor([self.first, 1], dtype=torch.float64) * self.scale
        first, last = self.flow_times(ends).tolist()
        return first, last

    def model_times(self, t: Tensor) -> Tensor:
        t = self.within_span(t)
        log_bar = torch.log1p((t / (1 - t)) ** 2)  # -log alpha_bar
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * log_bar).sqrt()
        return self.scale * 2 * log_bar / (self.beta_min + root)

    def flow_times(self, model_times: Tensor) -> Tensor:
        s = model_times.double() / self.scale
        log_bar = -(s**2) * (self.beta_max - self.beta_min) / 2 - s * self.beta_min
        alpha, beta = (log_bar / 2).exp(), (-torch.expm1(log_bar)).sqrt()
        return beta / (alpha + beta)

    def grid(self, steps: int) -> Tensor:
        """Uniform in ``s``, from 1 down to ``first`` or a step above the clean end, and that."""
        steps = arguments.whole_number("steps", steps)
        s = cpu.linspace(0, 1, steps + 1, dtype=torch.float64)
        if steps > 1 and s[1] < self.first:
            s[1:] = cpu.linspace(self.first, 1, steps, dtype=torch.float64)
        return self.flow_times(self.scale * s)


def ddim_timesteps(
    path: VPPath, steps: int, spacing: str = "trailing", offset: int = 0
) -> list[int]:
    """DDIM's timesteps in order of use (descending), as diffusers names the spacings.

    ``leading``: every ``T // N``-th from 0 on, plus ``offset``; ``trailing``: every ``T / N``-th
    from the last one down; ``linspace``: from the last one to 0, both included. The latter two have
    no use for an offset.

    Raises:
        ValueError: an unknown spacing, or steps that the path has too few timesteps for.
    """
    count = path.train_steps
    steps = arguments.whole_number("steps", steps, most=count)
    offset = arguments.whole_number("offset", offset, least=0, most=count)
    arguments.one_of("spacing", spacing, SPACINGS)
    if spacing == "leading":
        return [k * (count // steps) + offset for k in reversed(range(steps))]
    if spacing == "trailing":
        # As hosts count down: the way to a value decides to which side its half is rounded.
        down = np.arange(count, 0, -count / steps)[:steps]
        return [round(value) - 1 for value in down.tolist()]
    return [round(value) for value in np.linspace(0, count - 1, steps)[::-1].tolist()]


def ddim_grid(
    path: VPPath,
    steps: int,
    spacing: str = "trailing",
    *,
    offset: int = 0,
    final: str = "clean",
) -> Tensor:
    """Teacher times of DDIM, ``[steps + 1]`` float64 ascending.

    Args:
        path: whose timesteps are used.
        steps: N.
        spacing, offset: see ``ddim_timesteps``; Stable Diffusion has ``leading`` and 1.
        final: where the last step ends: ``clean`` (t = 0) or at the ``first`` timestep's noise
            level (diffusers' ``set_alpha_to_one=False``), which must not be a timestep of the grid.

    Raises:
        ValueError: bad arguments, or timesteps that repeat.
    """
    arguments.one_of("final", final, FINALS)
    timesteps = cpu.tensor(ddim_timesteps(path, steps, spacing, offset), dtype=torch.float64)
    end = cpu.zeros(1, dtype=torch.float64) if final == "clean" else path.knots[:1]
    return check_grid(torch.cat([end, path.flow_times(timesteps.flip(0))]))
