"""Heun's method: Euler, then again with the mean of the derivatives at both ends.

    flow:   x' = Euler + (t' - t) / 2 (v_1 - v_0)
    sigma:  x' = Euler + (1 - t') (sigma' - sigma) / 2 (eps_1 - eps_0)        sigma = t / (1 - t)

O_1 is the model's at t' after Euler. In sigma coordinates it is EDM's sampler without noise (Karras
et al. 2022, algorithm 1). The step to the clean end is Euler's, as its authors have it.
"""

from __future__ import annotations

from torch import Tensor

from oss_ext.solvers.base import Singlestep


class Heun(Singlestep):
    """With the velocity in flow time or the noise in sigma."""

    order = 2

    def __init__(self, output: str) -> None:
        self.output = output
        if output == "noise":
            self.name, self.title = "heun-sigma", "Heun in sigma coordinates (Karras et al. 2022)"
        else:
            self.name, self.title = "heun", "Heun in flow coordinates"
            self.from_noise = 2  # where sigma is infinite, flow time is not

    def stages(
        self, order: int, t: Tensor, t_next: Tensor
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        scale = t_next - t
        if self.output == "noise":
            scale = scale / (1 - t)  # (1 - t') (sigma' - sigma)
        return [t_next], [[], [scale / 2]]


FAMILY = (Heun("velocity"), Heun("noise"))
