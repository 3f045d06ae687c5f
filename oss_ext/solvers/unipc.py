"""UniPC (Zhao et al. 2023): a predictor, and a corrector that costs no evaluation.

In half the log-SNR lambda, by the data prediction, with s and k of ``exponent``. A step goes from
the corrected state at t to a prediction at t', where the model is evaluated once, for the next step
and for the correction of this one:

    predicted  x_p = t'/t x_c + (1 - t'/t) O_0 - s sum_j w_j (O_j - O_0)     over earlier outputs
    corrected  x_c = the same with O' at x_p as a further node

w integrates the polynomial through the differences exactly (``lagrange``), except that a single
difference has weight B / 2 at r = 1: B = exp(k) - 1 in the variant bh2 and k in bh1.

In the form that all solvers here have, the state that is carried is the prediction x_p. The last
step was the same without the new output O_0, so x_c - x_p is a combination of differences alone,

    x_c - x_p = sum_r e_r (O_r - O_0)        and        x' = Euler(x_p) + t'/t (x_c - x_p) + ...

known from the times and the order of that step: no corrected state needs to be kept, only one more
output than a predictor of this order has. The path ends with a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oss_ext.solvers.base import (
    Multistep,
    exponent,
    exponential_moments,
    half_log_snr,
    lagrange,
)


class UniPC(Multistep):
    """Of order 2 or 3, variant bh1 or bh2."""

    output = "data"

    def __init__(self, order: int, variant: str = "bh2") -> None:
        self.order, self.variant = order, variant
        self.name = f"unipc-{order}" if variant == "bh2" else f"unipc-{order}-{variant}"
        self.title = f"UniPC of order {order}, {variant} (Zhao et al. 2023)"

    @property
    def remembers(self) -> int:
        return self.order  # a step back, for its correction

    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        known = min(len(times) - 1, self.remembers)
        changes = [torch.zeros_like(times[0]) for _ in range(known)]
        for past in range(1, known + 1):
            # Only where the last step was of this order; else there may be nothing finite.
            for r, change in enumerate(self._correction(times, past)):
                changes[r] = changes[r] + torch.where(arrived == past, change, 0.0)
        total = [t_next / times[0] * change for change in changes]
        for r, weight in enumerate(self._step(times[0], times[1:order], t_next)):
            total[r] = total[r] + weight
        return total

    def _correction(self, times: Sequence[Tensor], past: int) -> list[Tensor]:
        """e_1, e_2, ...: the corrected state less the predicted one after a step of ``past``."""
        earlier = times[2 : past + 1]
        of_new, *corrected = self._step(times[1], earlier, times[0], corrector=True)
        predicted = self._step(times[1], earlier, times[0])
        changes = [c - p for c, p in zip(corrected, predicted, strict=True)]
        # To differences from O_0, the new output, instead of from O_1, where the step began.
        return [-sum(changes, of_new), *changes]

    def _step(
        self, t: Tensor, earlier: Sequence[Tensor], t_next: Tensor, corrector: bool = False
    ) -> list[Tensor]:
        """Weights of the differences from the output at ``t``: at ``t_next`` for the corrector,
        then at ``earlier`` times."""
        s, k = exponent(self.output, t, t_next)
        begin = half_log_snr(t)
        nodes = [torch.ones_like(k)] * corrector + [-k / (half_log_snr(u) - begin) for u in earlier]
        count = len(nodes)
        moments = [self._single(k) / 2] if count == 1 else exponential_moments(k, count)
        return [-s * weight for weight in lagrange(nodes, moments)]

    def _single(self, k: Tensor) -> Tensor:
        if self.variant == "bh2":
            return torch.expm1(k)
        # From pure noise k is infinite, and there is no correction.
        return torch.where(k.isinf(), 0.0, k)


FAMILY = tuple(UniPC(order, variant) for variant in ("bh2", "bh1") for order in (2, 3))
