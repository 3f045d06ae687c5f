"""iPNDM (Zhang and Chen 2023): Adams-Bashforth in sigma with the weights of equal steps.

    x' / (1 - t') = x / (1 - t) + (sigma' - sigma) (3 eps_0 - eps_1) / 2        sigma = t / (1 - t)

and likewise to order 4, whatever the steps are: on unequal ones it is of a lower order, where
``adams-sigma`` has the weights that they ask for. As hosts of the k-diffusion kind run it: in the
highest order up to the last step, which goes to the data prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from oss_ext.solvers.base import Multistep

EQUAL_STEPS = {
    1: (),
    2: (-1 / 2,),
    3: (-16 / 12, 5 / 12),
    4: (-59 / 24, 37 / 24, -9 / 24),
}
"""Weights of earlier outputs; all of a step sum to 1."""


class IPNDM(Multistep):
    """Of order 2, 3 or 4."""

    output = "noise"
    tapers = False

    def __init__(self, order: int) -> None:
        self.order = order
        self.name = f"ipndm-{order}"
        self.title = f"iPNDM of order {order}, for equal steps in sigma (Zhang and Chen 2023)"

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        scale = (t_next - times[0]) / (1 - times[0])  # (1 - t') (sigma' - sigma)
        return [scale * weight for weight in EQUAL_STEPS[order]]


FAMILY = (IPNDM(2), IPNDM(3), IPNDM(4))
