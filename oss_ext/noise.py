"""Paths from data to noise, the flow-matching coordinates they share, and teacher time grids.

Everything is searched in flow-matching coordinates: ``x_t = (1 - t) x0 + t eps``, ``t = 0`` clean,
``t = 1`` noise, velocity ``v = eps - x0``. A model lives on its own path ``x' = alpha x0 + beta
eps``; equal signal-to-noise ratio gives ``t = beta / (alpha + beta)`` and ``x' = (alpha + beta) x``
(paper section 4 and appendix C). Times are float64 throughout.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from oss_ext import arguments


class Path(Protocol):
    """A noise path, parametrised by the flow time ``t`` of equal signal-to-noise ratio."""

    name: str

    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``beta`` of the model's own path at flow times ``t``, float64."""
        ...

    def sigmas(self, t: Tensor) -> Tensor:
        """The noise levels that hosts of this family call sigma, at flow times ``t``."""
        ...


class FlowPath:
    """Flow matching: ``alpha = 1 - t``, ``beta = t``; hosts call ``t`` itself sigma."""

    name = "flow"

    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def sigmas(self, t: Tensor) -> Tensor:
        return t.clone()


PATHS: dict[str, Path] = {"flow": FlowPath()}
"""Every path by the name that schedules store."""


def flow_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Teacher times of a flow model, ``[steps + 1]`` float64 ascending from 0 to 1.

    Uniform in the model's time ``u`` and then shifted, ``t = s u / (1 + (s - 1) u)``, as SD3 and
    FLUX do for larger images.

    Raises:
        ValueError: ``steps`` no whole number from 1 on, or ``shift`` not positive.
    """
    steps = arguments.whole_number("steps", steps)
    shift = arguments.number("shift", shift, positive=True)
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return u / (u + (1 - u) / shift)  # in this form the ends are exactly 0 and 1


def check_grid(times: Any, name: str = "times") -> Tensor:
    """A copy of ``times`` as float64 ``[N+1]`` on the CPU, or ``ValueError`` saying what is wrong.

    Teacher times ascend strictly from the clean end within [0, 1]: a repeated time would be a
    step of length zero.
    """
    try:
        times = torch.as_tensor(times, dtype=torch.float64, device="cpu").clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected [N+1] numbers, got {times!r}") from None
    if times.dim() != 1 or len(times) < 2:
        raise ValueError(f"{name}: expected [N+1] with N >= 1, got shape {tuple(times.shape)}")
    outside = (~((times >= 0) & (times <= 1))).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ValueError(
            f"{name}: expected finite values in [0, 1], got {float(times[at])} at index {at}"
        )
    falls = (times.diff() <= 0).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        raise ValueError(
            f"{name}: expected strictly increasing values from the clean end, got "
            f"{float(times[at])} after {float(times[at - 1])} at index {at}"
        )
    return times
