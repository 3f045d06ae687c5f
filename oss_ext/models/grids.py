"""Time grids of teachers by name: the model's own, and those of the families of noise paths."""

from __future__ import annotations

from torch import Tensor

from oss_ext import arguments, noise
from oss_ext.models.base import Model

GRIDS = ("own", *noise.GRIDS)


def teacher_times(model: Model, steps: int, grid: str = "own") -> Tensor:
    """Times for ``oss_ext.teacher``, ``[steps + 1]`` float64 ascending flow times.

    Args:
        model: the model to be run at them.
        steps: of the teacher; a pipeline that starts part-way has fewer.
        grid: ``own``, what the model usually has, or a name in ``oss_ext.noise.GRIDS``.

    Raises:
        ValueError: bad ``steps``, or a grid that is not known.
    """
    arguments.one_of("grid", grid, GRIDS)
    return model.times(steps) if grid == "own" else noise.GRIDS[grid](model.path, steps)
