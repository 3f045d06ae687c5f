"""Amplitude calibration: a student's states brought to the teacher's quantiles before each step.

With few steps a student's states have other amplitudes than the teacher's at the same time. Before
the model is evaluated at a step, in flow coordinates, every sample x with quantiles q is moved to
the quantiles S that the teacher has there, on average over a calibration set:

    x' = (S_high - S_low) / (q_high - q_low) (x - q_low) + S_low

(paper section 3.4, in the affine form of the published code; equation 13 scales only). It trades
distance to the teacher's own result for contrast and detail, so it is never applied unasked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments

LEVELS = (0.05, 0.95)
"""The paper's."""


@dataclass(frozen=True)
class Amplitude:
    """The teacher's quantiles where a schedule's steps start.

    Attributes:
        levels: which quantiles, two numbers between 0 and 1, ascending.
        low, high: their values at the start of every step, in flow coordinates; never equal,
            which would make a constant of every sample.
        samples: how many samples they are averaged over.

    Raises:
        ValueError: naming the attribute.
    """

    levels: tuple[float, float]
    low: tuple[float, ...]
    high: tuple[float, ...]
    samples: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_levels(self.levels))
        for name in ("low", "high"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ValueError(f"{name}: expected numbers, got {values!r:.100}")
            # Lists, as JSON gives them, become tuples, so that all of it is frozen.
            object.__setattr__(self, name, tuple(arguments.number(name, v) for v in values))
        if len(self.low) != len(self.high):
            raise ValueError(f"high: expected {len(self.low)} numbers as in low, got {self.high!r}")
        for low, high in zip(self.low, self.high, strict=True):
            if low >= high:
                raise ValueError(f"high: expected numbers above low's, got {high!r} and {low!r}")
        arguments.whole_number("samples", self.samples)

    @property
    def steps(self) -> int:
        return len(self.low)

    def part(self, steps: Sequence[int]) -> Amplitude:
        """That of some of the steps."""
        low, high = (tuple(values[k] for k in steps) for values in (self.low, self.high))
        return Amplitude(self.levels, low, high, self.samples)

    def matched(self, step: int, x: Tensor) -> Tensor:
        """States ``[B, *dims]`` at the start of ``step``, moved to the teacher's quantiles there.

        A sample whose own quantiles are equal, as those of a constant one, has no amplitude that
        could be changed and stays as it is.
        """
        low, high = self.low[step], self.high[step]
        own = quantiles(x, self.levels)
        width = own[:, 1] - own[:, 0]
        factor = (high - low) / width
        bottom, factor, varied = (
            values.view(-1, *[1] * (x.ndim - 1)) for values in (own[:, 0], factor, width > 0)
        )
        moved = (x - bottom.to(x.dtype)) * factor.to(x.dtype) + low
        return torch.where(varied, moved, x)


def check_levels(levels: Sequence[float]) -> tuple[float, float]:
    """``levels`` as a pair; ``ValueError`` unless they are two ascending numbers within (0, 1)."""
    expected = "levels: expected two ascending numbers between 0 and 1"
    if not isinstance(levels, list | tuple) or len(levels) != 2:
        raise ValueError(f"{expected}, got {levels!r:.100}")
    low, high = (arguments.between("levels", level, 0, 1) for level in levels)
    if low >= high:
        raise ValueError(f"{expected}, got {levels!r:.100}")
    return low, high


def quantiles(x: Tensor, levels: Sequence[float]) -> Tensor:
    """Every sample's quantiles over all its elements, interpolated as ``torch.quantile`` has it.

    That is linearly between the two order statistics around ``level (n - 1)``. One sample after the
    other is sorted: ``torch.quantile`` refuses more than 2^24 elements, and selection
    (``torch.kthvalue``) takes quadratic time where elements are in order already.

    Args:
        x: ``[B, *dims]``.
        levels: from 0 to 1.

    Returns:
        ``[B, len(levels)]`` float64.
    """
    found = []
    for sample in x.flatten(1):
        ordered = sample.sort().values
        for level in levels:
            at = level * (len(ordered) - 1)
            below, above = ordered[[math.floor(at), math.ceil(at)]].double()
            found.append(torch.lerp(below, above, at - math.floor(at)))
    return torch.stack(found).view(len(x), len(levels))
