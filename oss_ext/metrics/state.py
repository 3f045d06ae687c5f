"""The state itself: what the paper's algorithm compares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oss_ext.metrics.base import WHOLE, AffineMetric, Selection, Sources, check_selection


@dataclass(frozen=True)
class StateMetric(AffineMetric):
    """``candidate - x[j]``, on the whole state or on the channels and frames selected."""

    selection: Selection = WHOLE

    def __post_init__(self) -> None:
        check_selection(self.selection)

    @property
    def name(self) -> str:
        return f"xt{self.selection}"

    @property
    def varies(self) -> bool:
        return self.selection.how == "random"

    def sources(self, given: Sources) -> tuple[list[Tensor], Tensor | None]:
        return [self.selection.of(tensor, given.step) for tensor in given.basis], None

    def targets(self, states: Tensor, x0: Tensor | None, step: int) -> Tensor:
        return self.selection.of(states, step)


XT = StateMetric()
"""The whole state."""
