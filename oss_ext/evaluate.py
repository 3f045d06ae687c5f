"""Judge schedules on samples the search has not seen: distance to the teacher's own result."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor

from oss_ext import arguments, solvers
from oss_ext.amplitude import quantiles
from oss_ext.events import tell
from oss_ext.models.base import Model
from oss_ext.sampling import student_states
from oss_ext.schedule import Schedule
from oss_ext.statistics import (
    LEVEL,
    RESAMPLES,
    Interval,
    Statistics,
    bootstrap,
    check_features,
    frechet_distance,
    paired,
    statistics_of,
    worst_count,
)
from oss_ext.trajectory import Trajectory

WIDTH = 80
AMPLITUDE = " amplitude"
"""What names of schedules that run with amplitude calibration end with, beside the plain ones."""


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
        sharpness: mean gradient magnitude of the samples over that of the teacher's; None where
            they are no pictures. See ``sharpness``.
        calibrated: whether it ran with amplitude calibration.
        quantiles: ``[2, steps + 1, 2]`` float64, of a schedule with an ``amplitude`` only: of the
            student's states and of the teacher's, at every time of the schedule, the low and the
            high quantile, mean over the samples; the student's before they are calibrated there.
    """

    name: str
    schedule: Schedule
    mse: Tensor
    data_range: float
    images: Tensor
    along: Tensor
    seconds: float
    frechet: float | None = None
    sharpness: float | None = None
    calibrated: bool = False
    quantiles: Tensor | None = None

    @property
    def steps(self) -> int:
        """Steps of the student: model evaluations per sample, where its solver has one a step."""
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


@dataclass(frozen=True)
class Unable:
    """A line of a table for a method without a schedule of ``steps`` steps that works, and why."""

    name: str
    steps: int
    reason: str


@arguments.takes(model=Model, held_out=Trajectory, schedules=Mapping)
def compare(
    model: Model,
    held_out: Trajectory,
    schedules: Mapping[str, Schedule],
    *,
    amplitude: Collection[str] = (),
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
        amplitude: names of those that are to run with amplitude calibration.
        features: from all samples ``[B, *dims]`` to ``[B, F]``, e.g. a network's, for
            ``Score.frechet``; called once for the teacher and once a schedule.

    Raises:
        ValueError: a model other than that of ``held_out``; ``amplitude`` of a schedule that is
            not there or has none; a solver that is not known, or orders that it does not have;
            features of another shape, of fewer than 2 samples, or not finite.
        NonFiniteError: the model returned NaN or inf; the message names time and sample.
    """
    for name, schedule in schedules.items():
        arguments.of_type(f"schedules[{name!r}]", schedule, Schedule)
    able = [name for name, schedule in schedules.items() if schedule.amplitude is not None]
    if not set(amplitude) <= set(able):
        raise ValueError(
            f"amplitude: expected names of schedules with the teacher's quantiles, "
            f"{', '.join(map(repr, able)) or 'of which there are none'}, got {list(amplitude)}"
        )
    held_out.check_model(model)
    model.check_noise(held_out.noise)
    # Before any run, which can be long.
    for schedule in schedules.values():
        solvers.get(schedule.solver).check_orders(schedule.orders, schedule.times)
    aim = None if features is None else _features(features, held_out.final, "the teacher")
    scores = []
    for name, schedule in schedules.items():
        states = student_states(
            model, held_out.noise, schedule, amplitude=name in amplitude, max_batch=max_batch,
            progress=progress,
        )  # fmt: skip
        found = _quantiles(schedule, held_out, schedule.times[0], held_out.noise)
        along, seconds, begin = [], 0.0, time.perf_counter()
        with closing(states):  # its stage ends where ours does, also after an error here
            for t, images in zip(schedule.times[1:], states, strict=True):
                seconds += time.perf_counter() - begin
                found += _quantiles(schedule, held_out, t, images)
                along.append(_distance(images, held_out.at(t)).log().mean().exp())
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
                sharpness=_relative(sharpness(images), sharpness(held_out.final)),
                calibrated=name in amplitude,
                quantiles=torch.stack(found, dim=1) if found else None,
            )
        )
        tell("score", name=name, steps=schedule.steps, cost=float(scores[-1].mse.mean()))
    return scores


def sharpness(images: Tensor) -> float | None:
    """Mean gradient magnitude, in the values' unit per pixel.

    ``sqrt(d_x^2 + d_y^2)`` of the differences to the next element along the last two dimensions,
    mean over all places that have both, channels, frames and samples. Blur lowers it, contrast and
    noise raise it: it says how much detail there is, not whether it is right.

    Args:
        images: ``[B, C, ..., H, W]``.

    Returns:
        None for what is no picture: samples of fewer than three dimensions, or H or W of 1.
    """
    if images.ndim < 4 or min(images.shape[-2:]) < 2:
        return None
    x = images.double()
    corner = x[..., :-1, :-1]
    return float(torch.hypot(x[..., :-1, 1:] - corner, x[..., 1:, :-1] - corner).mean())


def _relative(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _quantiles(schedule: Schedule, held_out: Trajectory, t: float, x: Tensor) -> list[Tensor]:
    """``[2, 2]``: mean quantiles of the student's states ``x`` and of the teacher's at time t.

    None in the list where the schedule has no amplitude, which says which ones.
    """
    if schedule.amplitude is None:
        return []
    both = (quantiles(states, schedule.amplitude.levels) for states in (x, held_out.at(t)))
    return [torch.stack([values.mean(dim=0).cpu() for values in both])]


def _distance(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of every sample, ``[B]`` float64 on the CPU."""
    return (x - target).double().square().flatten(1).mean(dim=1).cpu()


def _features(features: Callable[[Tensor], Tensor], images: Tensor, whose: str) -> Tensor:
    with torch.no_grad():
        found = features(images)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"features: expected [{len(images)}, F] for {whose}, got {got}")
    return check_features(f"features of {whose}", found)


def score_table(scores: Sequence[Score | Unable], against: str | None = None) -> str:
    """The comparison as text of 80 columns: a line per schedule, dB against the teacher.

    Sharpness has a column where a schedule ran with amplitude calibration, which is about it.

    Args:
        scores: of one ``compare``; names are cut where the figures need the room.
        against: name of the score that the others' paired differences are from; ``{steps}`` in it
            stands for the number of steps of the other.

    Raises:
        ValueError: no scores, scores of different samples, or no score ``against``.
    """
    if not scores:
        raise ValueError("scores: expected at least one, got none")
    judged = [score for score in scores if isinstance(score, Score)]
    if len({(len(s.mse), s.data_range) for s in judged}) > 1:
        raise ValueError("scores: expected those of one comparison, got several's")
    by_name = {s.name: s for s in judged}
    baselines = {s.name: by_name.get(_name_for(s, against)) for s in judged}
    if against is not None and not any(baselines.values()):
        names = ", ".join(repr(s.name) for s in judged) or "none: no schedule was judged"
        raise ValueError(f"against: expected one of {names}, got {against!r}")

    frechet = any(s.frechet is not None for s in judged)
    top = ["", "PSNR of", "mean", "worst", "search"]
    bottom = ["steps", "mean error", "PSNR", "decile", "evals"]
    sharp = any(s.calibrated and s.sharpness is not None for s in judged)
    if sharp:
        top, bottom = [*top, ""], [*bottom, "sharp"]
    if frechet:
        top, bottom = [*top, ""], [*bottom, "Frechet"]
    if against is not None:
        top, bottom = [*top, "paired"], [*bottom, "difference"]
    rows = [
        _figures(s, sharp, frechet, baselines[s.name]) if isinstance(s, Score) else [str(s.steps)]
        for s in scores
    ]
    columns = zip_longest(top, bottom, *rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    room = max(1, WIDTH - sum(width + 2 for width in widths))
    first = min(room, max(len(name) for name in ("schedule", *(s.name for s in scores))))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{_cut(name, first):{first}}" + "".join(
            f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=False)
        )

    lines = [line("", top), line("schedule", bottom)]
    for score, row in zip(scores, rows, strict=True):
        text = line(score.name, row)
        lines += _wrapped(score.reason, text + "  ") if isinstance(score, Unable) else [text]
    if judged:
        lines += _footer(len(judged[0].mse), judged[0].data_range, against, sharp)
    return "\n".join(lines)


def _name_for(score: Score, against: str | None) -> str:
    """Whom ``score`` is compared with."""
    return (against or "").replace("{steps}", str(score.steps))


def _cut(name: str, room: int) -> str:
    """``name`` in ``room`` characters; that it ran with amplitude calibration stays readable."""
    if len(name) <= room:
        return name
    end = AMPLITUDE if name.endswith(AMPLITUDE) and room > len(AMPLITUDE) + 1 else ""
    return name[: room - 1 - len(end)] + "…" + end


def _figures(score: Score, sharp: bool, frechet: bool, baseline: Score | None) -> list[str]:
    """What a line of the table says of a score."""
    interval = bootstrap(score.mse, "psnr_of_mean", score.data_range)
    cells = [
        str(score.steps),
        _with_interval(f"{score.psnr_of_mean:.2f}", interval),
        f"{score.mean_psnr:.2f}",
        f"{score.worst_decile:.2f}",
        str(score.schedule.search_nfe),
    ]
    if sharp:
        cells.append("-" if score.sharpness is None else f"{score.sharpness:.3f}")
    if frechet:
        cells.append("-" if score.frechet is None else f"{score.frechet:.3g}")
    if score is baseline:
        cells.append("-")
    elif baseline is not None:
        gain = paired(score.mse, baseline.mse)
        ends = gain.interval and (gain.interval[0].psnr_of_mean, gain.interval[1].psnr_of_mean)
        cells.append(_with_interval(f"{gain.value.psnr_of_mean:+.2f}", ends))
    return cells


def _with_interval(value: str, interval: Interval | None) -> str:
    """``value`` and half the width of its interval; alone if there is none or it is infinite."""
    if interval is None or not math.isfinite(float(value)):
        return value
    low, high = interval
    return f"{value}±{(high - low) / 2:.2f}"


def _footer(samples: int, data_range: float, against: str | None, sharp: bool) -> list[str]:
    noun = "sample" if samples == 1 else "samples"
    notes = [
        f"{samples} held-out {noun}; PSNR with data range {data_range:.4g}, in dB",
        f"worst decile: PSNR of the mean error of the worst {worst_count(samples)}",
        "search evals: model evaluations per calibration sample, the teacher's included",
        f"±: half of the {100 * LEVEL:g} % interval, from {RESAMPLES} resamples of the samples"
        if samples > 1
        else "no intervals: they need two samples or more",
    ]
    if sharp:
        notes.append("sharp: mean gradient magnitude over that of the teacher's samples")
    if against is not None:
        whom = against.replace("{steps}", "of as many steps")
        notes.append(f"paired difference: PSNR of the mean error above that of {whom}")
    return [line for note in notes for line in _wrapped(note)]


def _wrapped(text: str, start: str = "") -> list[str]:
    """``text`` after ``start`` in lines of the table's width, indented to stand below itself."""
    after = " " * len(start)
    lines = textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=after)
    return lines or [start.rstrip()]
