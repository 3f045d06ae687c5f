"""Adams-Bashforth on unequal steps: the polynomial through the last derivatives, integrated.

In flow coordinates the derivative is the velocity, in sigma coordinates the noise. k-diffusion
calls the second LMS, and takes full orders to the clean end, as both do here.

    x' = Euler + (t' - t) sum_j w_j (v_j - v_0)
    x' / (1 - t') = x / (1 - t) + (sigma' - sigma) (eps_0 + sum_j w_j (eps_j - eps_0))

with sigma = t / (1 - t). Two different solvers: a polynomial in one is none in the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oss_ext.solvers.base import Multistep, lagrange


class Adams(Multistep):
    """Of order 2, 3 or 4, with the velocity in flow time or the noise in sigma."""

    def __init__(self, output: str, order: int) -> None:
        self.output, self.order = output, order
        self.to_clean = order  # nothing is infinite there
        sigma = output == "noise"
        self.name = f"adams-sigma-{order}" if sigma else f"adams-{order}"
        place = "sigma coordinates, LMS" if sigma else "flow coordinates"
        self.title = f"Adams-Bashforth of order {order} in {place}, on unequal steps"

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        begin, *marks = (self._clock(t) for t in times[:order])
        nodes = [(self._clock(t_next) - begin) / (mark - begin) for mark in marks]
        moments = [torch.ones_like(t_next) / (i + 2) for i in range(len(nodes))]
        scale = t_next - times[0]
        if self.output == "noise":
            scale = scale / (1 - times[0])  # (1 - t') (sigma' - sigma)
        return [scale * weight for weight in lagrange(nodes, moments)]

    def _clock(self, t: Tensor) -> Tensor:
        """Infinite at pure noise in sigma, where an earlier output then has no weight."""
        return t / (1 - t) if self.output == "noise" else t


FAMILY = tuple(Adams(output, order) for output in ("velocity", "noise") for order in (2, 3, 4))
