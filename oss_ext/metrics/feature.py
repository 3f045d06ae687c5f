"""Features of the clean sample by any network (the paper's Inception metric)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext.metrics.base import AffineMetric, Sources

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FeatureMetric(AffineMetric):
    """``phi(z[i] - t[i] v[i]) - phi(x[j] - t[j] u[j])``.

    Attributes:
        phi: ``[R, *dims]`` to ``[R, ...]``, e.g. a torch module; no gradients are taken.
        block: rows per call of ``phi``.
    """

    phi: Features
    block: int = 64
    name = "feature"
    needs_x0 = True

    def sources(self, given: Sources) -> tuple[list[Tensor], Tensor | None]:
        state, velocity = given.basis[:2]

        def clean(rows: Tensor) -> Tensor:
            row, column = rows.unbind(1)
            t = given.times[row].to(state).view(-1, *[1] * (state.dim() - 2))
            return state[row, column] - t * velocity[row, column]

        features = self._of(clean, given.live)
        return [features], torch.ones(1, len(given.times), dtype=torch.float64)

    def targets(self, states: Tensor, x0: Tensor | None, step: int) -> Tensor:
        assert x0 is not None
        everything = torch.ones(x0.shape[:2], dtype=torch.bool)
        return self._of(lambda rows: x0[rows[:, 0], rows[:, 1]], everything)

    def _of(self, clean: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        """``[N+1, B, *features]``, zeros where not live."""
        out: Tensor | None = None
        for rows in live.nonzero().split(self.block):
            with torch.no_grad():
                found = self.phi(clean(rows))
            if not isinstance(found, Tensor) or found.shape[:1] != (len(rows),):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"phi: expected features of {len(rows)} samples, got {got}")
            if out is None:
                wide = found.dtype if found.dtype == torch.float64 else torch.float32
                out = torch.zeros(*live.shape, *found.shape[1:], dtype=wide, device=found.device)
            out[rows[:, 0], rows[:, 1]] = found.to(out.dtype)
        assert out is not None
        return out
