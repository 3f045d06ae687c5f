"""The clean sample that the model sees in a state: the paper's best pixel metric, in two readings.

``x0`` takes it from the velocity that the step starts with. It costs nothing, but where the step
goes has no part in it. ``x0-candidate`` takes it from an evaluation where the step ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext.metrics.base import (
    WHOLE,
    AffineMetric,
    EvaluatedMetric,
    Selection,
    Sources,
    check_selection,
)


@dataclass(frozen=True)
class DataMetric(AffineMetric):
    """``(z[i] - t[i] v[i]) - (x[j] - t[j] u[j])``, with the teacher's velocity u; x[0] at j = 0.

    It does not depend on where the source goes: all targets of a source see the same features.
    """

    selection: Selection = WHOLE
    needs_x0 = True

    def __post_init__(self) -> None:
        check_selection(self.selection)

    @property
    def name(self) -> str:
        return f"x0{self.selection}"

    @property
    def varies(self) -> bool:
        return self.selection.how == "random"

    def sources(self, given: Sources) -> tuple[list[Tensor], Tensor | None]:
        parts = [self.selection.of(tensor, given.step) for tensor in given.basis[:2]]
        return parts, torch.stack([torch.ones_like(given.times), -given.times])

    def targets(self, states: Tensor, x0: Tensor | None, step: int) -> Tensor:
        assert x0 is not None
        return self.selection.of(x0, step)


@dataclass(frozen=True)
class CandidateDataMetric(EvaluatedMetric):
    """``(z[j] - t[j] v(z[j], t[j])) - (x[j] - t[j] u[j])`` at the candidate ``z[j]`` itself."""

    selection: Selection = WHOLE
    module = None

    def __post_init__(self) -> None:
        check_selection(self.selection)

    @property
    def name(self) -> str:
        return f"x0-candidate{self.selection}"

    def features(self, state: Tensor, velocity: Tensor, t: Tensor, hidden: Tensor | None) -> Tensor:
        return state - t.to(state).view(-1, *[1] * (state.dim() - 1)) * velocity
