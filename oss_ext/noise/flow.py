"""Flow matching and rectified flow: ``alpha = 1 - t``, ``beta = t``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.noise.base import Path

MAX_MU = 100.0  # e^100 leaves no time but the ends
MAX_SHIFT = 100.0  # that a grid is searched for
EVEN = 1e-3  # relative to a step: grids come back from float32


@dataclass(frozen=True)
class FlowPath(Path):
    """Flow matching; hosts call ``t`` itself sigma.

    Attributes:
        scale: what the network is told is ``scale t``: 1000 where it counts timesteps.
        reverse: it is told ``scale (1 - t)``: the network's own time ends clean.
    """

    scale: float = 1.0
    reverse: bool = False

    name: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        self._store_float("scale")
        arguments.flag("reverse", self.reverse)

    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def model_times(self, t: Tensor) -> Tensor:
        t = self.within_span(t)
        return self.scale * (1 - t if self.reverse else t)

    def flow_times(self, model_times: Tensor) -> Tensor:
        t = model_times.double() / self.scale
        return 1 - t if self.reverse else t

    def sigmas(self, t: Tensor) -> Tensor:
        return t.clone()

    def times_of(self, sigmas: Tensor) -> Tensor:
        return sigmas.clone()

    def noise_scale(self, t: float) -> float:
        return 1.0

    def grid(self, steps: int) -> Tensor:
        """Uniform in ``t``."""
        return flow_grid(steps)


def shifted(u: Tensor, shift: float) -> Tensor:
    """The time shift of SD3 and FLUX for larger images, ``t = s u / (1 + (s - 1) u)``."""
    return u / (u + (1 - u) / shift)  # in this form the ends are exactly 0 and 1


def unshifted(t: Tensor, shift: float | Tensor) -> Tensor:
    """The inverse of ``shifted``."""
    return t / (shift - (shift - 1) * t)


def shift_of(times: Tensor) -> float | None:
    """The shift of a teacher grid that is evenly spaced before it, else None.

    Args:
        times: ``[N+1]`` ascending; the first, the clean end, does not count.
    """
    inner = times[1:].double()
    if len(inner) < 4:
        return None

    def unevenness(shift: Tensor) -> Tensor:
        before = unshifted(inner, shift[:, None])
        return before.diff(dim=1).diff(dim=1).abs().amax(dim=1) * len(inner)

    low, high = -math.log(MAX_SHIFT), math.log(MAX_SHIFT)
    for _ in range(4):  # each search is 50 times finer than the one before
        candidates = cpu.linspace(low, high, 201, dtype=torch.float64)
        error = unevenness(candidates.exp())
        best = float(candidates[error.argmin()])
        low, high = best - (high - low) / 100, best + (high - low) / 100
    return math.exp(best) if float(error.min()) < EVEN else None


FLOW = FlowPath()
"""The path that is its own coordinates."""


def flow_grid(
    steps: int, shift: float = 1.0, *, mu: float | None = None, terminal: float | None = None
) -> Tensor:
    """Teacher times of a flow model, ``[steps + 1]`` float64 ascending from 0 to 1.

    Uniform in the model's time ``u`` and then ``shifted``.

    Args:
        steps: N.
        shift: ``s``.
        mu: the resolution shift of FLUX and its kin, ``s = e^mu``; goes before ``shift``.
        terminal: stretch the times so that the least one above 0 is this (LTX-Video).

    Raises:
        ValueError: ``steps`` no whole number from 1 on, ``shift`` not positive, ``mu`` beyond
            100 either way, ``terminal`` not between 0 and 1.
    """
    steps = arguments.whole_number("steps", steps)
    if mu is not None:
        shift = math.exp(arguments.between("mu", arguments.number("mu", mu), -MAX_MU, MAX_MU))
    shift = arguments.number("shift", shift, positive=True)
    u = cpu.linspace(0, 1, steps + 1, dtype=torch.float64)
    times = shifted(u, shift)
    if terminal is not None:
        terminal = arguments.between("terminal", terminal, 0, 1)
        signal = 1 - times[1:]
        if steps > 1:
            times[1:] = 1 - signal * (1 - terminal) / signal[0]
    return times
