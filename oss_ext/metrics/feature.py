"""Features of the clean sample by any network (the paper's Inception metric)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.metrics.base import AffineMetric, Sources

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FeatureMetric(AffineMetric):
    """``phi(z[i] - t[i] v[i]) - phi(x[j] - t[j] u[j])``.

    Attributes:
        phi: ``[R, *dims]`` to ``[R, ...]`` of a floating-point type, of one shape whatever it is
            given, e.g. a torch module; no gradients are taken. A candidate with a feature that is
            NaN or inf is never chosen.
        block: rows per call of ``phi``.

    Raises:
        ValueError: what cannot be called, or a block below 1; in a search, features that are not
            as it says here, or not finite where the teacher has been.
    """

    phi: Features
    block: int = 64
    name = "feature"
    needs_x0 = True

    def __post_init__(self) -> None:
        if not callable(self.phi):
            raise ValueError(f"phi: expected a function of states, got {self.phi!r:.100}")
        arguments.whole_number("block", self.block)

    def sources(self, given: Sources) -> tuple[list[Tensor], Tensor | None]:
        state, velocity = given.basis[:2]

        def clean(rows: Tensor) -> Tensor:
            row, column = rows.unbind(1)
            t = given.times[row].to(state).view(-1, *[1] * (state.dim() - 2))
            return state[row, column] - t * velocity[row, column]

        features = self._of(clean, given.live)
        return [features], cpu.ones(1, len(given.times), dtype=torch.float64)

    def targets(self, states: Tensor, x0: Tensor | None, step: int) -> Tensor:
        assert x0 is not None
        everything = cpu.ones(x0.shape[:2], dtype=torch.bool)
        features = self._of(lambda rows: x0[rows[:, 0], rows[:, 1]], everything)
        if not bool(features.isfinite().all()):
            raise ValueError(
                "phi: expected finite features of the teacher's clean samples, got NaN or inf"
            )
        return features

    def _of(self, clean: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        """``[N+1, B, *features]``, zeros where not live."""
        out: Tensor | None = None
        for rows in live.nonzero().split(self.block):
            with torch.no_grad():
                x = clean(rows)
                found = self.phi(x.float() if x.dtype.itemsize == 2 else x)
            _check(found, len(rows))
            if out is None:
                wide = found.dtype if found.dtype == torch.float64 else torch.float32
                out = torch.zeros(*live.shape, *found.shape[1:], dtype=wide, device=found.device)
            if found.shape[1:] != out.shape[2:]:
                expected, got = tuple(out.shape[2:]), tuple(found.shape[1:])
                raise ValueError(f"phi: expected features of shape {expected} again, got {got}")
            out[rows[:, 0], rows[:, 1]] = found.to(out.dtype)
        assert out is not None
        return out


def _check(found: object, rows: int) -> None:
    """``ValueError`` unless ``found`` are features of ``rows`` samples."""
    if not isinstance(found, Tensor):
        got = type(found).__name__
    elif found.shape[:1] != (rows,) or not found.numel():
        got = str(tuple(found.shape))
    elif not found.is_floating_point():
        got = str(found.dtype)
    else:
        return
    raise ValueError(f"phi: expected floating-point features of {rows} samples, got {got}")
