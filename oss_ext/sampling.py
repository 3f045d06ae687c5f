"""Run a student: sample with a schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import torch
from torch import Tensor

from oss_ext import arguments, solvers
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.progress import progress_bar
from oss_ext.schedule import Schedule


def student_states(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    amplitude: bool = False,
    max_batch: int | None = None,
    progress: bool = False,
) -> Generator[Tensor, None, None]:
    """Yield the student's states ``[B, *dims]`` at ``schedule.times[1:]``; see ``sample``.

    They are as the solver's steps leave them, before any calibration for the next.
    """
    calibration = schedule.amplitude if amplitude else None
    if amplitude and calibration is None:
        raise ValueError(
            "amplitude: expected a schedule with the teacher's quantiles (oss_ext.calibrate, "
            "oss search --amplitude), got one without"
        )
    solver = solvers.get(schedule.solver)
    solver.check_orders(schedule.orders, schedule.times)
    evaluations = solvers.evaluations(solver, schedule.times, schedule.orders) * len(noise)
    with progress_bar("sample", evaluations, progress) as bar:
        evaluator = Evaluator(model, len(noise), max_batch, bar.update)
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        yield from solvers.integrate(
            solver,
            evaluator.at,
            noise.to(dtype),
            schedule.times,
            schedule.orders,
            before=None if calibration is None else calibration.matched,
        )


@arguments.takes(model=Model, schedule=Schedule)
def sample(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    amplitude: bool = False,
    max_batch: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The student's samples ``[B, *dims]`` from ``noise`` in ``schedule.steps`` steps.

    The first step starts at ``schedule.times[0]`` from the noise as it is, also where that lies
    below the teacher's last time. States are float32 (float64 for float64 noise).

    Args:
        model: the model to run.
        noise: initial states ``[B, *dims]``.
        schedule: where to evaluate it.
        amplitude: bring every sample to the teacher's quantiles before each step, the first one
            too; stages of a solver within a step, and what it remembers of earlier ones, stay as
            the model gave them. See ``oss_ext.amplitude``.
        max_batch: rows per model call; None: all B samples in one.
        progress: show a progress bar.

    Raises:
        ValueError: ``amplitude`` with a schedule that has none; noise or a velocity of the wrong
            shape; a solver that is not known, or orders that it does not have.
        NonFiniteError: the model returned NaN or inf; the message names time and sample.
    """
    model.check_noise(noise)
    states = student_states(
        model, noise, schedule, amplitude=amplitude, max_batch=max_batch, progress=progress
    )
    return deque(states, maxlen=1).pop()  # those before it are not kept
