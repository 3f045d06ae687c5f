"""DPM-Solver++ (Lu et al. 2022b): multistep, by the data prediction, in half the log-SNR.

With lambda = log((1 - t) / t), a step h in it and r_0, r_1 the steps before as multiples of h, the
data prediction is followed by its first and second divided differences D_1, D_2:

    2M:  x = Euler + a / 2 D_1                                   a = alpha' (1 - exp(-h))
    3M:  x = Euler + alpha' (h - 1 + exp(-h)) / h D_1 - alpha' (exp(-h) - 1 + h - h^2 / 2) / h^2 D_2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oss_ext.solvers.base import Multistep, half_log_snr


class DPMPP(Multistep):
    """DPM-Solver++ 2M or 3M."""

    output = "data"

    def __init__(self, order: int) -> None:
        self.order = order
        self.name = f"dpmpp-{order}m"
        self.title = f"DPM-Solver++ {order}M (Lu et al. 2022)"

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        if order == 1:
            return []
        marks = [half_log_snr(t) for t in (t_next, *times[:order])]
        h = marks[0] - marks[1]
        r_0 = (marks[1] - marks[2]) / h
        if order == 2:
            return [-(1 - t_next / times[0]) / (2 * r_0)]
        r_1 = (marks[2] - marks[3]) / h
        decay = torch.expm1(-h)
        of_first = (1 - t_next) * (decay / h + 1)
        of_second = -(1 - t_next) * ((decay + h) / h**2 - 0.5)
        # D_2 = (d_0 - d_1) / (r_0 + r_1) and D_1 = d_0 + r_0 D_2, with differences d over r.
        total = of_first * r_0 + of_second
        by_d_0, by_d_1 = of_first + total / (r_0 + r_1), -total / (r_0 + r_1)
        return [-by_d_0 / r_0 + by_d_1 / r_1, -by_d_1 / r_1]


FAMILY = (DPMPP(2), DPMPP(3))
