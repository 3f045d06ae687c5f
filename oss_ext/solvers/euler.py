"""Euler in flow coordinates, which is DDIM and DPM-Solver-1 in the model's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from oss_ext.solvers.base import Multistep


class Euler(Multistep):
    """``x + (t_next - t) v``; the difference is taken in float64 and rounded once."""

    name = "euler"
    title = "Euler = DDIM = DPM-Solver-1"
    order = 1

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        return []


FAMILY = (Euler(),)
