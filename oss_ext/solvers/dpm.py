"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (Lu et al. 2022b), in half the log-SNR lambda.

They differ in what they extrapolate: the noise, or the data. With s and k of ``exponent`` for the
whole step, r for the share of the step in lambda and D_1, D_2 the first and second divided
differences of the output over r at its beginning:

    2M:  x = Euler - s (exp(k) - 1) / 2 D_1
    3M:  x = Euler - s (exp(k) - 1 - k) / k D_1 - s (exp(k) - 1 - k - k^2 / 2) / k^2 D_2
    2S:  O_1 at r = 1/2 by Euler
         x = Euler - s (exp(k) - 1) (O_1 - O_0)
    3S:  O_1 at r = 1/3 by Euler
         O_2 at r = 2/3 by 3M's formula without D_2, D_1 = 3 (O_1 - O_0)
         x = Euler - s (exp(k) - 1 - k) / k 3/2 (O_2 - O_0)

M takes its differences from earlier steps, S from stages of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oss_ext.solvers.base import (
    Multistep,
    Singlestep,
    exponent,
    exponential_moments,
    half_log_snr,
    lagrange,
)

PAPERS = {
    "noise": ("dpm", "DPM-Solver", "Lu et al. 2022a"),
    "data": ("dpmpp", "DPM-Solver++", "Lu et al. 2022b"),
}


class MultistepDPM(Multistep):
    """2M or 3M."""

    def __init__(self, output: str, order: int) -> None:
        name, title, paper = PAPERS[output]
        self.name, self.title = f"{name}-{order}m", f"{title} {order}M ({paper})"
        self.output, self.order = output, order

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        if order == 1:
            return []
        s, k = exponent(self.output, times[0], t_next)
        begin, *marks = (half_log_snr(t) for t in times[:order])
        nodes = [(half_log_snr(t_next) - begin) / (mark - begin) for mark in marks]
        if order == 2:
            moments = [torch.expm1(k) / 2]
        else:
            first, second = exponential_moments(k, 2)
            moments = [first, second / 2]  # as published; the integral of r^2 has no half
        return [-s * weight for weight in lagrange(nodes, moments)]


class SinglestepDPM(Singlestep):
    """2S or 3S."""

    def __init__(self, output: str, order: int) -> None:
        name, title, paper = PAPERS[output]
        self.name, self.title = f"{name}-{order}s", f"{title} {order}S ({paper})"
        self.output, self.order = output, order

    def stages(
        self, order: int, t: Tensor, t_next: Tensor
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        begin, end = half_log_snr(t), half_log_snr(t_next)
        between = [torch.sigmoid(-torch.lerp(begin, end, r / order)) for r in range(1, order)]
        s, k = exponent(self.output, t, t_next)
        if order == 2:
            return between, [[], [-s * torch.expm1(k)]]
        weights: list[list[Tensor]] = [[]]
        # The differences reach over 1/2 of the way to the second stage, over 2/3 of the step.
        for place, reach in ((between[1], 1 / 2), (t_next, 2 / 3)):
            s, k = exponent(self.output, t, place)
            weights.append([-s * exponential_moments(k, 1)[0] / reach])
        weights[-1].insert(0, torch.zeros_like(t))
        return between, weights


FAMILY = (
    MultistepDPM("noise", 2),
    MultistepDPM("noise", 3),
    SinglestepDPM("noise", 2),
    SinglestepDPM("noise", 3),
    MultistepDPM("data", 2),
    MultistepDPM("data", 3),
    SinglestepDPM("data", 2),
)
