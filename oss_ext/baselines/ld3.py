"""LD3: gradient descent on the student's final error, through the student (Tong et al. 2024).

The times are ``t_k = t_N + (low - t_N) sum_{m <= k} softmax(theta)_m``, which descend whatever
theta is, and the objective the mean squared distance of the final states to the teacher's. Not
taken over are the paper's times that only the network is told and its slack in the initial noise,
which a schedule cannot hold, and its perceptual loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.baselines.base import (
    Baseline,
    Calibration,
    UnableError,
    even_lambdas,
    even_rows,
    schedule_through,
)
from oss_ext.baselines.ld3_gradients import check_gradients, differentiating, velocity
from oss_ext.sampling import sample
from oss_ext.schedule import Schedule

EPOCHS = 40
BATCH = 2
RATE = 0.1
LEAST_GAP = 1e-6  # of flow time, at the start: a step of length zero would stay one


@torch.inference_mode(False)  # of the caller's, in which there are no gradients
def ld3(calibration: Calibration, steps: int, epochs: int = EPOCHS, rate: float = RATE) -> Schedule:
    """Descend from the better of ``uniform`` and ``logsnr``; the best epoch by calibration error.

    Adam's ``rate`` falls linearly to zero over the ``epochs``, of minibatches of 2 or as the model
    is called. ``search_nfe`` counts the backward pass of an evaluation as two evaluations; the
    first step has none, for its inputs are constants.

    Raises:
        ValueError: ``steps`` not within 1 to N, a bad ``epochs`` or ``rate``.
        UnableError: the model gives no gradients of its velocity (pipelines do not), or wrong ones.
        NonFiniteError: the model returned NaN or inf.
    """
    steps = arguments.whole_number("steps", steps, most=calibration.trajectory.steps)
    epochs = arguments.whole_number("epochs", epochs)
    rate = arguments.number("rate", rate, positive=True)
    if calibration.model.slots:
        raise UnableError("ld3: needs gradients of the velocity; a pipeline's loop gives none")
    return Descent(calibration, steps).run(epochs if steps > 1 else 0, rate)


class Descent:
    """One descent; ``evaluations`` counts rows of model calls, as ``ld3`` says."""

    def __init__(self, calibration: Calibration, steps: int) -> None:
        self._model, self._trajectory = calibration.model, calibration.trajectory
        self._steps, self._max_batch = steps, calibration.max_batch
        self._batch = self._model.fixed_batch or min(BATCH, self._max_batch or BATCH)
        self._first, self._last = self._trajectory.times[[-1, 0]].unbind()
        self._low = self._last.clamp(min=self._trajectory.path.span[0])
        self.evaluations = 0

    def run(self, epochs: int, rate: float) -> Schedule:
        """The best schedule of the starts and of all epochs."""
        teacher = self._trajectory
        first = self._filled(cpu.arange(min(self._batch, teacher.samples)))
        with differentiating():
            self.evaluations += check_gradients(self._model, teacher, first)
        uniform = teacher.times[even_rows(teacher.steps, self._steps)[:-1]]
        logsnr = (-even_lambdas(teacher, self._steps)[:-1]).sigmoid()
        error, best = min(map(self._measured, (uniform, logsnr)), key=lambda found: found[0])
        knots = cpu.tensor([*best.times[:-1], float(self._low)], dtype=torch.float64)
        theta = (-knots.diff()).clamp_min(LEAST_GAP).log().requires_grad_()
        optimizer = torch.optim.Adam([theta], rate)
        generator = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = rate * (1 - epoch / epochs)
            for rows in cpu.randperm(teacher.samples, generator=generator).split(self._batch):
                with differentiating():
                    theta.grad = self._gradient(theta, rows)
                optimizer.step()
            found = self._measured(torch.cat([self._first[None], self._inner(theta.detach())]))
            error, best = min((error, best), found, key=lambda found: found[0])
        nfe = teacher.nfe + math.ceil(self.evaluations / teacher.samples)
        return replace(best, samples=teacher.samples, search_nfe=nfe)

    def _inner(self, theta: Tensor) -> Tensor:
        """Where the network is asked below the teacher's start, ``[steps - 1]``."""
        return self._first + (self._low - self._first) * theta.softmax(0).cumsum(0)[:-1]

    def _measured(self, times: Tensor) -> tuple[float, Schedule]:
        """The mean squared final error on all samples, and the schedule."""
        schedule = schedule_through(self._trajectory, times, "ld3")
        noise, final = self._trajectory.noise, self._trajectory.final
        images = sample(self._model, noise, schedule, max_batch=self._max_batch)
        self.evaluations += self._steps * len(noise)
        return float((images - final).double().square().mean()), schedule

    def _gradient(self, theta: Tensor, rows: Tensor) -> Tensor:
        """Of the mean squared final error of the samples ``rows``."""
        rows = self._filled(rows)
        x = self._trajectory.noise[rows.to(self._trajectory.noise.device)]
        for t, t_next in pairwise([self._first, *self._inner(theta), self._last]):
            x = x + (t_next - t) * velocity(self._model, x, t, rows)
        final = self._trajectory.final[rows.to(x.device)]
        (gradient,) = torch.autograd.grad((x - final).square().mean(), theta)
        self.evaluations += (3 * self._steps - 2) * len(rows)
        if not gradient.isfinite().all():
            raise UnableError("ld3: the gradient of the final error is NaN or infinite")
        return gradient

    def _filled(self, rows: Tensor) -> Tensor:
        """``rows``, repeated where the model has a fixed number of them."""
        return rows[cpu.arange(self._model.fixed_batch or len(rows)) % len(rows)]


LD3 = Baseline(
    "ld3", "gradient descent on the final error (in the manner of Tong et al. 2024)", ld3
)
