"""What a metric is: which features of candidates and of the teacher a search compares.

The cost is a mean squared difference of features (paper table 4), so one operator finds the least
for every metric. A candidate's features are affine in what a source has, either with the solver's
own coefficients (the features are elements of the state) or with the source's alone (they do not
depend on where it goes). Whatever is compared, the whole state moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments

HOWS = ("first", "even", "random")


@dataclass(frozen=True)
class Selection:
    """Which channels and frames of a sample are compared; of all of it, if nothing is said.

    Attributes:
        channels: how many of ``[C, ...]``.
        frames: how many of ``[C, F, H, W]``.
        how: ``first`` ones, ``even``ly spaced ones, or ``random`` ones, others at every step.
        seed: of the random ones.
    """

    channels: int | None = None
    frames: int | None = None
    how: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        arguments.one_of("how", self.how, HOWS)
        for name in ("channels", "frames"):
            if getattr(self, name) is not None:
                arguments.whole_number(name, getattr(self, name))

    def of(self, tensor: Tensor, step: int) -> Tensor:
        """The part of ``tensor`` ``[T, B, *dims]`` for step ``step``: a view, unless random.

        Raises:
            ValueError: more channels or frames than there are, or frames of what has none.
        """
        for dim, name, count in ((2, "channels", self.channels), (3, "frames", self.frames)):
            if count is None:
                continue
            least = 3 if name == "channels" else 6
            there = tensor.shape[dim] if tensor.dim() >= least else 0
            if count > there:
                raise ValueError(f"{name}: expected at most {there}, got {count}")
            if self.how == "first":
                tensor = tensor.narrow(dim, 0, count)
            elif self.how == "even":
                # From the first on, at the largest distance at which as many fit.
                stride = (there - 1) // (count - 1) if count > 1 else there
                every = tensor.unfold(dim, 1, stride).squeeze(-1)
                tensor = every.narrow(dim, 0, count)
            else:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step + dim)
                chosen = torch.randperm(there, generator=generator)[:count].sort().values
                tensor = tensor.index_select(dim, chosen.to(tensor.device))
        return tensor


WHOLE = Selection()


@dataclass(frozen=True, eq=False)
class Sources:
    """What the sources of a step have, rows 0 to N of every tensor.

    Attributes:
        basis: state, velocity and earlier outputs; only the first two are in row order.
        times: ``[N+1]`` float64.
        live: bool ``[N+1, B]``: other rows may hold anything.
        step: its number, from 1.
    """

    basis: list[Tensor]
    times: Tensor
    live: Tensor
    step: int


class Metric(ABC):
    """Features of candidates and of the teacher.

    Attributes:
        name: as an objective says it.
        needs_x0: whether the teacher must have kept its ``x0``.
        varies: whether other features are compared at every step.
    """

    name: str
    needs_x0 = False
    varies = False

    @abstractmethod
    def sources(self, given: Sources) -> tuple[list[Tensor], Tensor | None]:
        """Tensors ``[N+1, B, *features]`` that a candidate's features are a combination of.

        And its coefficients: ``[terms, N+1]`` float64 by source, or None: the tensors are parts of
        ``given.basis``, and the solver's coefficients hold.
        """

    @abstractmethod
    def targets(self, states: Tensor, x0: Tensor | None, step: int) -> Tensor:
        """The teacher's features ``[N+1, B, *features]``, of ``states`` and ``x0`` alike."""
