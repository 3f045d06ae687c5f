"""What a noise path is: the coordinates of a model, seen from the ones that all models share.

Everything is searched in flow-matching coordinates: ``x_t = (1 - t) x0 + t eps``, ``t = 0`` clean,
``t = 1`` noise, velocity ``v = eps - x0``. A model lives on its own path ``x' = alpha x0 + beta
eps`` and counts time in its own way; equal signal-to-noise ratio gives ``t = beta / (alpha +
beta)`` and ``x' = (alpha + beta) x`` (paper section 4 and appendix C). Times are float64
throughout, because ``1 - alpha_bar`` cancels.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from oss_ext import arguments, cpu

SPAN_TOLERANCE = 1e-5
"""Hosts count time in float32: how far past its ends a path still takes a time for the end."""


@dataclass(frozen=True)
class Path(abc.ABC):
    """A noise path, parametrised by the flow time ``t`` of equal signal-to-noise ratio.

    Subclasses are frozen dataclasses of plain values, which schedules store.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``beta`` of the model's own path at flow times ``t``, float64."""

    @abc.abstractmethod
    def model_times(self, t: Tensor) -> Tensor:
        """What the network is told at flow times ``t``: timesteps, sigmas, ..., float64.

        Raises:
            ValueError: a time outside ``span``, which the network does not know.
        """

    @abc.abstractmethod
    def flow_times(self, model_times: Tensor) -> Tensor:
        """The inverse of ``model_times``."""

    @abc.abstractmethod
    def grid(self, steps: int) -> Tensor:
        """The usual teacher grid of such models, ``[steps + 1]`` float64 ascending flow times.

        Raises:
            ValueError: ``steps`` no whole number from 1 on, or more than the path has times for.
        """

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest flow time at which the network can be asked."""
        return 0.0, 1.0

    def sigmas(self, t: Tensor) -> Tensor:
        """The noise levels that hosts call sigma at flow times ``t``: ``beta / alpha``."""
        return t / (1 - t)

    def times_of(self, sigmas: Tensor) -> Tensor:
        """The inverse of ``sigmas``."""
        return sigmas / (1 + sigmas)

    def noise_scale(self, t: float) -> float:
        """What multiplies standard normal noise to make the first state, in flow coordinates.

        Hosts start from noise of the size ``beta``, and from unscaled noise on a flow path.
        """
        alpha, beta = self.alpha_beta(cpu.tensor(t, dtype=torch.float64))
        return float(beta / (alpha + beta))

    def within_span(self, t: Tensor) -> Tensor:
        """Flow times ``t``, those that rounding put just outside moved to the end of ``span``.

        Raises:
            ValueError: a time that the network does not know.
        """
        first, last = self.span
        outside = ~((t >= first - SPAN_TOLERANCE) & (t <= last + SPAN_TOLERANCE))
        if bool(outside.any()):
            raise ValueError(
                f"times: expected flow times that the {self.name} network knows, {first:.6g} to "
                f"{last:.6g}, got {float(t[outside][0]):.6g}"
            )
        return t.clamp(first, last)

    def _store_float(self, name: str, least: float = 0.0, most: float = math.inf) -> None:
        """Check that an attribute is a number between ``least`` and ``most``; keep it as float."""
        value = arguments.between(name, getattr(self, name), least, most)
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The path as JSON can hold it; ``path_from_dict`` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name} | {name: v for name, v in values.items() if v is not None}


def as_numbers(name: str, values: Any) -> Tensor:
    """A copy of ``values`` as float64 on the CPU; ``ValueError`` if they are no numbers."""
    try:
        return cpu.as_tensor(values, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected [N+1] numbers, got {values!r:.100}") from None


def is_clean(times: Tensor) -> bool:
    """Whether ascending flow times begin at t = 0."""
    return float(times[0]) == 0


def check_grid(times: Any, name: str = "times") -> Tensor:
    """A copy of ``times`` as float64 ``[N+1]`` on the CPU, or ``ValueError`` saying what is wrong.

    Teacher times ascend strictly from the clean end within [0, 1]: a repeated time would be a
    step of length zero.
    """
    times = as_numbers(name, times)
    if times.dim() != 1 or len(times) < 2:
        raise ValueError(f"{name}: expected [N+1] with N >= 1, got shape {tuple(times.shape)}")
    outside = (~((times >= 0) & (times <= 1))).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ValueError(
            f"{name}: expected finite values in [0, 1], got {float(times[at])} at index {at}"
        )
    gaps = times.diff()
    falls = (gaps <= 0).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        repeated = int((gaps == 0).sum())
        advice = f"; {repeated} times repeat: use fewer steps or `distinct`" if repeated else ""
        raise ValueError(
            f"{name}: expected strictly increasing values from the clean end, got "
            f"{float(times[at])} after {float(times[at - 1])} at index {at}{advice}"
        )
    return times


def distinct(times: Any) -> Tensor:
    """``times`` in ascending order without repetitions, float64 ``[N+1]``.

    Grids of whole timesteps repeat some where they are denser than the timesteps are.

    Raises:
        ValueError: what remains is no grid; see ``check_grid``.
    """
    return check_grid(as_numbers("times", times).unique())
