"""Judge schedules on samples the search has not seen: distance to the teacher's own result."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from oss_ext.models.base import Model
from oss_ext.sampling import student_states
from oss_ext.schedule import Schedule
from oss_ext.statistics import (
    Statistics,
    check_features,
    frechet_distance,
    statistics_of,
)
from oss_ext.teacher import Trajectory


@dataclass(frozen=True, eq=False)
class Score:
    """How near a schedule comes to the teacher.

    Attributes:
        name: what the schedule is called in the comparison.
        schedule: what was run.
        mse: ``[B]`` float64, mean squared error per held-out sample.
        data_range: R of the PSNR.
        images: the student's samples ``[B, *dims]``.
        along: ``[steps]`` float64, geometric mean over the samples of the mean squared distance to
            the teacher after every step.
        seconds: wall time of the student's run per sample, judging it not included.
        frechet: squared Frechet distance of the samples' features to those of the teacher's; None
            without ``features``.
    """

    name: str
    schedule: Schedule
    mse: Tensor
    data_range: float
    images: Tensor
    along: Tensor
    seconds: float
    frechet: float | None = None

    @property
    def steps(self) -> int:
        """Model evaluations per sample of the student."""
        return self.schedule.steps

    @cached_property
    def statistics(self) -> Statistics:
        """What the errors come to, dB."""
        return statistics_of(self.mse, self.data_range)

    @property
    def psnr_of_mean(self) -> float:
        """PSNR of the mean error, dB: ruled by the worst samples."""
        return self.statistics.psnr_of_mean

    @property
    def mean_psnr(self) -> float:
        """Mean over samples of each one's PSNR, dB."""
        return self.statistics.mean_psnr

    @property
    def median_psnr(self) -> float:
        """Median over samples of each one's PSNR, dB."""
        return self.statistics.median_psnr

    @property
    def worst_decile(self) -> float:
        """PSNR of the mean error of the worst tenth of the samples, dB."""
        return self.statistics.worst_decile


def compare(
    model: Model,
    held_out: Trajectory,
    schedules: Mapping[str, Schedule],
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    max_batch: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """Run every schedule from the held-out trajectory's noise and measure its distance to it.

    Between the teacher's rows its state is taken to be linear in flow time, as Euler steps have it.

    Args:
        model: the model that made ``held_out``.
        held_out: a teacher trajectory on samples that no search has used.
        schedules: schedules by name; the scores come in the same order.
        features: from all samples ``[B, *dims]`` to ``[B, F]``, e.g. a network's, for
            ``Score.frechet``; called once for the teacher and once a schedule.

    Raises:
        ValueError: a model other than that of ``held_out``; features of another shape, of fewer
            than 2 samples, or not finite.
    """
    held_out.check_model(model)
    model.check_noise(held_out.noise)
    # Before any run, which can be long.
    aim = None if features is None else _features(features, held_out.final, "the teacher")
    scores = []
    for name, schedule in schedules.items():
        states = student_states(
            model, held_out.noise, schedule, max_batch=max_batch, progress=progress
        )
        along, seconds, begin = [], 0.0, time.perf_counter()
        for t, images in zip(schedule.times[1:], states, strict=True):
            seconds += time.perf_counter() - begin
            along.append(_distance(images, _teacher_at(held_out, t)).log().mean().exp())
            begin = time.perf_counter()
        frechet = None
        if features is not None and aim is not None:
            frechet = frechet_distance(aim, _features(features, images, repr(name)))
        scores.append(
            Score(
                name=name,
                schedule=schedule,
                mse=_distance(images, held_out.final),
                data_range=held_out.data_range,
                images=images,
                along=torch.stack(along),
                seconds=seconds / held_out.samples,
                frechet=frechet,
            )
        )
    return scores


def _distance(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of every sample, ``[B]`` float64 on the CPU."""
    return (x - target).double().square().flatten(1).mean(dim=1).cpu()


def _teacher_at(held_out: Trajectory, t: float) -> Tensor:
    """The teacher's states ``[B, *dims]`` at flow time t; beyond its ends those at the end."""
    times = held_out.times.tolist()
    row = min(bisect_left(times, t), held_out.steps)
    if row == 0 or times[row] <= t:
        return held_out.states[row]
    weight = (t - times[row - 1]) / (times[row] - times[row - 1])
    return torch.lerp(held_out.states[row - 1], held_out.states[row], weight)


def _features(features: Callable[[Tensor], Tensor], images: Tensor, whose: str) -> Tensor:
    with torch.no_grad():
        found = features(images)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"features: expected [{len(images)}, F] for {whose}, got {got}")
    return check_features(f"features of {whose}", found)


def score_table(scores: list[Score]) -> str:
    """The comparison as text: a line per schedule, dB against the teacher."""
    if not scores:
        raise ValueError("scores: expected at least one, got none")
    width = max(len("schedule"), *(len(score.name) for score in scores))
    lines = [f"{'schedule':{width}}  steps  PSNR of mean error  mean PSNR"]
    lines += [
        f"{s.name:{width}}  {s.steps:5d}  {s.psnr_of_mean:15.2f} dB  {s.mean_psnr:6.2f} dB"
        for s in scores
    ]
    held_out, data_range = len(scores[0].mse), scores[0].data_range
    lines.append(f"{held_out} held-out samples; PSNR with data range {data_range:.4g}")
    return "\n".join(lines)
