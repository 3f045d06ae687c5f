"""The product: a frozen few-step schedule, its JSON file, and the mean or median of several.

A schedule is data. It holds the times the student evaluates the model at, where they came from
(model, solver, teacher grid, objective) and what finding them cost, and it can be written, read
and compared without the model or the search.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch

from oss_ext import arguments, cpu
from oss_ext.amplitude import Amplitude
from oss_ext.files import parse_json, read_text, replacing
from oss_ext.noise import FLOW, check_grid, path_from_dict
from oss_ext.noise import Path as NoisePath
from oss_ext.version import __version__

FORMAT = "oss-schedule"
FORMAT_VERSION = 1
LATER = ("orders", "amplitude", "noise_hash")
"""Attributes that files of earlier releases do not have."""

SCOPES = ("joint", "instance")
REDUCTIONS = ("none", "mean", "log_mean")
STARTS = ("free", "pinned")
AGGREGATES = ("mean", "median")


class ScheduleError(ValueError):
    """A schedule, or a file that should hold one, is not valid; the message says where."""


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ScheduleError(f"{name}: expected {expected}, got {got!r:.200}")


@dataclass(frozen=True)
class Objective:
    """What a search minimised.

    Attributes:
        scope: ``joint``, one schedule for all calibration samples, or ``instance``, one each.
        reduce: how the joint search combines the samples' costs (``none`` for instance).
        start: ``free``: the first step may start below the last teacher time; ``pinned``: not.
        aggregate: how instance schedules were combined into this one, None if they were not.
        metric: what was compared with the teacher.
    """

    scope: str = "joint"
    reduce: str = "log_mean"
    start: str = "free"
    aggregate: str | None = None
    metric: str = "xt"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scope", SCOPES),
            ("reduce", REDUCTIONS),
            ("start", STARTS),
            ("aggregate", (None, *AGGREGATES)),
        ):
            _expect(getattr(self, name) in allowed, name, f"one of {allowed}", getattr(self, name))
        _expect(isinstance(self.metric, str), "metric", "a string", self.metric)
        joint = self.scope == "joint"
        _expect((self.reduce != "none") == joint, "reduce", f"one that suits scope {self.scope!r}",
                self.reduce)  # fmt: skip
        _expect(not (joint and self.aggregate), "aggregate", "none with scope 'joint'",
                self.aggregate)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """A few-step sampling schedule.

    Attributes:
        times: flow times in order of use, ``steps + 1`` values descending to the clean end (or to
            where a part of a schedule ends).
        teacher_times: the teacher's grid, ascending; runs begin with the noise of its last.
        indices: the rows of the teacher's grid that ``times`` are, descending; None off the grid.
        teacher_timesteps: what the network is told at ``teacher_times[1:]``; as the path has it if
            empty (hosts round and interpolate in ways of their own).
        model, model_hash: name and fingerprint of the model searched with.
        path: the model's noise path.
        solver, teacher_solver: names of the student's and the teacher's solver.
        orders: of the student's solver, one per step; the solver's usual ones if empty.
        method: ``oss`` (a dynamic programme), ``refined``, ``exhaustive``, or a baseline's name.
        objective: what the search minimised; None for a schedule that was not searched.
        cost: mean squared error of the final state on the calibration samples, per element.
        samples: how many ``cost`` is the mean of (one of in scope ``instance``); not those that a
            search kept to check itself. 0: it was made without any.
        noise_hash: fingerprint of the first one's noise (see ``trajectory.noise_hash``).
        search_nfe: model evaluations of teacher and search per calibration sample.
        package_version: version of oss_ext that made it.
        amplitude: the teacher's quantiles at every step, if they were measured (``calibrate``);
            applied only where ``sample`` is asked to.
    """

    times: tuple[float, ...]
    teacher_times: tuple[float, ...]
    indices: tuple[int, ...] | None
    model: str
    model_hash: str
    path: NoisePath = FLOW
    solver: str = "euler"
    teacher_solver: str = "euler"
    method: str = "oss"
    objective: Objective | None = None
    cost: float | None = None
    samples: int = 0
    search_nfe: int = 0
    package_version: str = __version__
    teacher_timesteps: tuple[float, ...] = ()
    orders: tuple[int, ...] = ()
    amplitude: Amplitude | None = None
    noise_hash: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "model_hash", "solver", "teacher_solver", "method",
                     "package_version", "noise_hash"):  # fmt: skip
            _expect(isinstance(getattr(self, name), str), name, "a string", getattr(self, name))
        _expect(isinstance(self.path, NoisePath), "path", "a path of oss_ext.noise", self.path)
        for name in ("samples", "search_nfe"):
            value = getattr(self, name)
            _expect(type(value) is int and value >= 0, name, "a whole number >= 0", value)
        known = self.cost is None or (
            type(self.cost) in (int, float) and 0 <= self.cost <= sys.float_info.max
        )
        _expect(known, "cost", "null or a number >= 0", self.cost)
        for name in ("times", "teacher_times"):
            self._check_times(name)
        first, last = self.teacher_times[0], self.teacher_times[-1]
        within = self.times[0] <= last and self.times[-1] >= first
        _expect(within, "times", f"values within the teacher's, {first} to {last}", self.times)
        if self.indices is not None:
            rows = range(len(self.teacher_times))
            self._make_tuple("indices", int, f"whole numbers from 0 to {rows[-1]}")
            on_grid = all(i in rows for i in self.indices)
            _expect(on_grid, "indices", f"whole numbers from 0 to {rows[-1]}", self.indices)
            expected = tuple(self.teacher_times[i] for i in self.indices)
            _expect(self.times == expected, "times", "the teacher's times at indices", self.times)
        if self.objective is not None:
            _expect(isinstance(self.objective, Objective), "objective", "null or an Objective",
                    self.objective)  # fmt: skip
        self._make_tuple("orders", int, "whole numbers")
        valid = len(self.orders) in (0, self.steps) and all(order >= 1 for order in self.orders)
        _expect(valid, "orders", f"none or {self.steps} orders, 1 or more", self.orders)
        self._make_tuple("teacher_timesteps", float, "numbers")
        n = len(self.teacher_times) - 1
        valid = len(self.teacher_timesteps) in (0, n)
        valid = valid and all(map(math.isfinite, self.teacher_timesteps))
        _expect(valid, "teacher_timesteps", f"none or {n} finite numbers", self.teacher_timesteps)
        if self.amplitude is not None:
            valid = isinstance(self.amplitude, Amplitude) and self.amplitude.steps == self.steps
            _expect(valid, "amplitude", f"null or an Amplitude of {self.steps} steps",
                    self.amplitude)  # fmt: skip

    def _make_tuple(self, name: str, kind: type, expected: str) -> None:
        """Lists, as JSON gives them, become tuples, so that the schedule is frozen throughout."""
        values = getattr(self, name)
        valid = isinstance(values, list | tuple) and all(type(value) is kind for value in values)
        _expect(valid, name, expected, values)
        object.__setattr__(self, name, tuple(values))

    def _check_times(self, name: str) -> None:
        self._make_tuple(name, float, "numbers")
        values = getattr(self, name)
        try:
            check_grid(values[::-1] if name == "times" else values, name)
        except ValueError as error:
            raise ScheduleError(str(error)) from None

    @classmethod
    def from_indices(
        cls, indices: Sequence[int], teacher_times: Sequence[float], **attributes: Any
    ) -> Schedule:
        """The schedule that uses the rows ``indices`` (descending) of the teacher's grid."""
        grid = tuple(float(t) for t in teacher_times)
        rows = tuple(indices)
        valid = all(type(i) is int and 0 <= i < len(grid) for i in rows)
        _expect(valid, "indices", f"rows 0 to {len(grid) - 1}", rows)
        times = tuple(grid[i] for i in rows)
        return cls(times=times, teacher_times=grid, indices=rows, **attributes)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The times as the model's hosts count noise, descending, the final one included.

        ``t`` on a flow path, else ``beta / alpha``, which is infinite at pure noise.
        """
        values = self.path.sigmas(cpu.tensor(self.times, dtype=torch.float64))
        return tuple(values.tolist())

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told at each of the ``steps`` evaluations."""
        values = self.path.model_times(cpu.tensor(self.times[:-1], dtype=torch.float64)).tolist()
        own = dict(zip(self.teacher_times[1:], self.teacher_timesteps, strict=False))
        return tuple(own.get(t, value) for t, value in zip(self.times, values, strict=False))

    @property
    def initial_scale(self) -> float:
        """``alpha + beta`` at the first time: model coordinates start from this times x[N]."""
        alpha, beta = self.path.alpha_beta(cpu.tensor(self.times[0], dtype=torch.float64))
        return float(alpha + beta)

    @property
    def starts_below(self) -> bool:
        """Whether the first step starts below the teacher's, from the same noise (free start)."""
        return self.times[0] < self.teacher_times[-1]

    def _part(self, times: Sequence[float], level: float) -> Schedule:
        """This schedule with other times, of which nothing was measured, in the usual orders.

        The teacher's grid ends at ``level``, the time whose noise the first state has. The
        amplitude is kept if every step starts where one of this schedule does: what the teacher has
        at other times cannot be known from it.
        """
        below = [t for t in self.teacher_times if t < level]
        rows = {t: i for i, t in enumerate(self.teacher_times)}
        known = all(t in rows for t in times)
        indices = tuple(rows[t] for t in times) if known else None
        told = self.teacher_timesteps
        if told:
            own = dict(zip(self.teacher_times[1:], told, strict=True))
            by_path = self.path.model_times(cpu.tensor([level], dtype=torch.float64))
            told = (*told[: len(below) - 1], own.get(level, float(by_path)))
        amplitude = self.amplitude
        if amplitude is not None:
            starts = {t: k for k, t in enumerate(self.times[:-1])}
            same = all(t in starts for t in times[:-1])
            amplitude = amplitude.part([starts[t] for t in times[:-1]]) if same else None
        return replace(self, times=tuple(times), teacher_times=(*below, level),
                       teacher_timesteps=told, indices=indices, orders=(), cost=None,
                       amplitude=amplitude)  # fmt: skip

    def cut(self, *, sigma: float | None = None, strength: float | None = None) -> Schedule:
        """The part for image-to-image, which starts from an image with noise added.

        Cut by noise level: the first step starts at that level itself, whatever knot is near, and
        the part's teacher does, too.

        Args:
            sigma: the noise level to start at, as ``sigmas`` counts it.
            strength: or the share of the teacher's steps to go through, rounded down to whole
                ones, as Stable Diffusion pipelines count it.

        Raises:
            ScheduleError: neither or both given, or a level that the schedule does not reach.
        """
        if (sigma is None) == (strength is None):
            raise ScheduleError(f"cut: expected sigma or strength, got {sigma!r} and {strength!r}")
        name, value = ("sigma", sigma) if strength is None else ("strength", strength)
        level = _number(name, value)
        if name == "strength":
            _expect(0 < level <= 1, "strength", "a number above 0 up to 1", value)
            teacher_steps = len(self.teacher_times) - 1
            start = self.teacher_times[max(1, int(teacher_steps * level))]
        else:
            start = float(self.path.times_of(cpu.tensor(level, dtype=torch.float64)))
        valid = self.times[-1] < start <= self.teacher_times[-1]
        _expect(valid, name, f"a level above sigma {self.sigmas[-1]:g}, up to the teacher's", value)
        return self._part((start, *(t for t in self.times if t < start)), start)

    def split(self, *, at: float | Sequence[float]) -> list[Schedule]:
        """The schedule in parts that follow each other, cut where ``times`` fall below ``at``.

        For models with one expert above and one below a noise level, and for partitions of the
        steps into stages (paper section 4.2.3). A step belongs to the part that it starts in, so a
        part ends where the next one starts. Parts know nothing of the outputs before them, and
        take their steps in their solver's usual orders.

        Args:
            at: one level or several, as ``sigmas`` counts noise, descending.

        Raises:
            ScheduleError: levels that do not descend, or one with no step above or below it.
        """
        several = isinstance(at, Sequence) and not isinstance(at, str)
        given: Sequence[Any] = at if isinstance(at, Sequence) and several else [at]
        levels = [_number("at", level) for level in given]
        _expect(levels == sorted(set(levels), reverse=True), "at", "levels that descend", at)
        # A step that starts exactly at a level is above it: experts switch below.
        bounds = [sum(sigma >= level for sigma in self.sigmas[:-1]) for level in levels]
        edges = [0, *bounds, self.steps]
        valid = bool(levels) and all(low < high for low, high in pairwise(edges))
        _expect(valid, "at", "levels with a step in every part", at)
        # A free start is the first part's.
        levels = [self.teacher_times[-1], *(self.times[low] for low in edges[1:-1])]
        return [
            self._part(self.times[low : high + 1], level)
            for (low, high), level in zip(pairwise(edges), levels, strict=True)
        ]

    def to_json(self) -> str:
        """The file's text: the attributes, what derives from them, and a checksum over both."""
        body: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        body |= asdict(self) | {"path": self.path.to_dict()}
        # What other programs want; JSON has no infinity, which pure noise on a VP path is.
        sigmas = [_finite_or_none(sigma) for sigma in self.sigmas]
        scale = _finite_or_none(self.initial_scale)
        body |= {"steps": self.steps, "sigmas": sigmas, "initial_scale": scale}
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file; an interrupted write leaves no partial file behind."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule in ``text``; ``ScheduleError`` says what is wrong with it."""
        try:
            body = parse_json(text)
        except ValueError as error:
            raise ScheduleError(str(error)) from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ScheduleError(f'not a schedule of this package: no \'"format": "{FORMAT}"\'')
        version = body.get("format_version")
        if version != FORMAT_VERSION:
            raise ScheduleError(
                f"format_version: this release reads {FORMAT_VERSION}, got {version!r:.100}"
            )
        if body.pop("checksum", None) != _checksum(body):
            raise ScheduleError("checksum: the content was changed or damaged after it was written")
        given: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in body:
                given[field.name] = body[field.name]
            elif field.name not in LATER:
                raise ScheduleError(f"{field.name}: missing")
        try:
            given["path"] = path_from_dict(given["path"])
        except ValueError as error:
            raise ScheduleError(str(error)) from None
        for name, kind in (("objective", Objective), ("amplitude", Amplitude)):
            if isinstance(given.get(name), dict):
                try:
                    given[name] = kind(**given[name])
                except (TypeError, ValueError) as error:
                    raise ScheduleError(f"{name}: {error}") from None
        return cls(**given)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a file that ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ScheduleError: it holds no valid schedule; the message names file and fault.
        """
        try:
            return cls.from_json(read_text(path))
        except ValueError as error:
            raise ScheduleError(f"{os.fspath(path)}: {error}") from None


def _number(name: str, value: Any) -> float:
    try:
        return arguments.number(name, value)
    except ValueError as error:
        raise ScheduleError(str(error)) from None


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def aggregate_indices(schedules: Sequence[Sequence[int]], how: str) -> tuple[int, ...]:
    """One list of indices from several of equal length, by ``mean`` (OSS-ave) or ``median``.

    Rounded by ``floor(x + 0.5)``: strictly monotone inputs then stay so, which rounding half to
    even does not guarantee.
    """
    _expect(how in AGGREGATES, "aggregate", f"one of {AGGREGATES}", how)
    lengths = {len(indices) for indices in schedules}
    _expect(len(lengths) == 1, "schedules", "one or more, of equal length", sorted(lengths))
    centre = statistics.fmean if how == "mean" else statistics.median
    return tuple(math.floor(centre(column) + 0.5) for column in zip(*schedules, strict=True))
