"""The clean sample that the model sees in a state: the paper's best pixel metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext.metrics.base import WHOLE, Metric, Selection, Sources


@dataclass(frozen=True)
class DataMetric(Metric):
    """``(z[i] - t[i] v[i]) - (x[j] - t[j] u[j])``, with the teacher's velocity u; x[0] at j = 0.

    It does not depend on where the source goes: all targets of a source see the same features.
    """

    selection: Selection = WHOLE
    needs_x0 = True

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
