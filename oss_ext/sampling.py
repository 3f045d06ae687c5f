"""Run a student: sample with a schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oss_ext import solvers
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.progress import progress_bar
from oss_ext.schedule import Schedule


def student_states(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    max_batch: int | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Yield the student's states ``[B, *dims]`` at ``schedule.times[1:]``; see ``sample``."""
    solver = solvers.get(schedule.solver)
    evaluations = schedule.steps * solver.evaluations * len(noise)
    with progress_bar("sample", evaluations, progress) as bar:
        evaluator = Evaluator(model, len(noise), max_batch, bar.update)
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        if schedule.orders:
            solver.check_orders(schedule.orders, schedule.times)
        yield from solvers.integrate(
            solver, evaluator.at, noise.to(dtype), schedule.times, schedule.orders
        )


def sample(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    max_batch: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The student's samples ``[B, *dims]`` from ``noise`` in ``schedule.steps`` steps.

    The first step starts at ``schedule.times[0]`` from the noise as it is, also where that lies
    below the teacher's last time. States are float32 (float64 for float64 noise).

    Raises:
        ValueError: noise of the wrong shape or a velocity of the wrong shape; a solver that is
            not known, or orders that it does not have.
        NonFiniteError: the model returned NaN or inf; the message names time and sample.
    """
    model.check_noise(noise)
    states = student_states(model, noise, schedule, max_batch=max_batch, progress=progress)
    *_, last = states
    return last
