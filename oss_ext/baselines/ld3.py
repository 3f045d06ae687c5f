"""LD3: gradient descent on the student's final error, through the student (Tong et al. 2024).

The times are ``t_k = t_N + (low - t_N) sum_{m <= k} softmax(theta)_m``, which descend whatever
theta is, and the objective the mean squared distance of the final states to the teacher's. With a
free start the first time is learned as the others are; the paper's stays. Not taken over are the
paper's times that only the network is told and its slack in the initial noise, which a schedule
cannot hold, and its perceptual loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.baselines.base import (
    SHIFT,
    Baseline,
    Calibration,
    UnableError,
    even_lambdas,
    even_rows,
    schedule_through,
    shifted_times,
)
from oss_ext.baselines.ld3_gradients import check_gradients, differentiating, velocity
from oss_ext.schedule import Schedule

EPOCHS = 40
BATCH = 2
RATE = 0.1
LEAST_GAP = 1e-6  # of flow time, at the start: a step of length zero would stay one


@torch.inference_mode(False)  # of the caller's, in which there are no gradients
def ld3(calibration: Calibration, steps: int, epochs: int = EPOCHS, rate: float = RATE) -> Schedule:
    """Descend from the best of some closed forms; the best epoch by calibration error.

    They are ``uniform``, ``logsnr`` and ``flow-shift``, with a free start ``flow-shift-free`` too.
    Adam's ``rate`` falls linearly to zero over the ``epochs``, of minibatches of 2 or as the model
    is called. ``search_nfe`` counts the backward pass of an evaluation as two evaluations; a first
    step at a time that is not learned has none, for its inputs are constants.

    Raises:
        ValueError: ``steps`` not within 1 to N, a bad ``epochs`` or ``rate``.
        UnableError: the model gives no gradients of its velocity (pipelines do not), or wrong
            ones; students of another solver than Euler's.
        NonFiniteError: the model returned NaN or inf.
    """
    steps = arguments.whole_number("steps", steps, most=calibration.trajectory.steps)
    epochs = arguments.whole_number("epochs", epochs)
    rate = arguments.number("rate", rate, positive=True)
    if calibration.model.slots:
        raise UnableError("ld3: needs gradients of the velocity; a pipeline's loop gives none")
    if calibration.solver != "euler":
        raise UnableError(f"ld3: descends through Euler steps, not those of {calibration.solver}")
    return Descent(calibration, steps).run(epochs, rate)


class Descent:
    """One descent; ``evaluations`` counts rows of model calls, as ``ld3`` says."""

    def __init__(self, calibration: Calibration, steps: int) -> None:
        self._calibration, self._steps = calibration, steps
        self._model, self._trajectory = calibration.model, calibration.trajectory
        self._free = calibration.start == "free"
        self._batch = self._model.fixed_batch or min(BATCH, calibration.max_batch or BATCH)
        self._first, self._last = self._trajectory.times[[-1, 0]].unbind()
        self._low = self._last.clamp(min=self._trajectory.path.span[0])
        self.evaluations = 0

    def run(self, epochs: int, rate: float) -> Schedule:
        """The best schedule of the starts and of all epochs."""
        teacher = self._trajectory
        first = self._filled(cpu.arange(min(self._batch, teacher.samples)))
        with differentiating():
            self.evaluations += check_gradients(self._model, teacher, first)
        error, best = min(map(self._measured, self._starts()), key=lambda found: found[0])
        knots = [float(self._first)] * self._free + [*best.times[:-1], float(self._low)]
        gaps = -cpu.tensor(knots, dtype=torch.float64).diff()
        if len(gaps) == 1:
            epochs = 0  # nothing to learn
        theta = gaps.clamp_min(LEAST_GAP).log().requires_grad_()
        optimizer = torch.optim.Adam([theta], rate)
        generator = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = rate * (1 - epoch / epochs)
            for rows in cpu.randperm(teacher.samples, generator=generator).split(self._batch):
                with differentiating():
                    theta.grad = self._gradient(theta, rows)
                with torch.device("cpu"):  # torch 2.11's Adam counts its steps on the default one
                    optimizer.step()
            found = self._measured(self._asked(theta.detach()))
            error, best = min((error, best), found, key=lambda found: found[0])
        nfe = teacher.nfe + math.ceil(self.evaluations / teacher.samples)
        return replace(best, samples=teacher.samples, search_nfe=nfe)

    def _starts(self) -> Iterator[Tensor]:
        """Times ``[steps]`` that some closed forms ask the network at."""
        teacher, steps = self._trajectory, self._steps
        yield teacher.times[even_rows(teacher.steps, steps)[:-1]]
        yield (-even_lambdas(teacher, steps)[:-1]).sigmoid()
        yield shifted_times(teacher, steps, SHIFT)
        if self._free:
            yield shifted_times(teacher, steps + 1, SHIFT)[1:]

    def _asked(self, theta: Tensor) -> Tensor:
        """Where the network is asked, ``[steps]``."""
        learned = self._first + (self._low - self._first) * theta.softmax(0).cumsum(0)[:-1]
        return learned if self._free else torch.cat([self._first[None], learned])

    def _measured(self, times: Tensor) -> tuple[float, Schedule]:
        """The mean squared final error on all samples, and the schedule."""
        schedule = schedule_through(self._trajectory, times, "ld3", pinned=not self._free)
        self.evaluations += self._steps * self._trajectory.samples
        return self._calibration.error(schedule), schedule

    def _gradient(self, theta: Tensor, rows: Tensor) -> Tensor:
        """Of the mean squared final error of the samples ``rows``."""
        rows = self._filled(rows)
        x = self._trajectory.noise[rows.to(self._trajectory.noise.device)]
        for t, t_next in pairwise([*self._asked(theta), self._last]):
            x = x + (t_next - t) * velocity(self._model, x, t, rows)
        final = self._trajectory.final[rows.to(x.device)]
        (gradient,) = torch.autograd.grad((x - final).square().mean(), theta)
        self.evaluations += (3 * self._steps - (0 if self._free else 2)) * len(rows)
        if not gradient.isfinite().all():
            raise UnableError("ld3: the gradient of the final error is NaN or infinite")
        return gradient

    def _filled(self, rows: Tensor) -> Tensor:
        """``rows``, repeated where the model has a fixed number of them."""
        return rows[cpu.arange(self._model.fixed_batch or len(rows)) % len(rows)]


LD3 = Baseline(
    "ld3", "gradient descent on the final error (in the manner of Tong et al. 2024)", ld3
)
