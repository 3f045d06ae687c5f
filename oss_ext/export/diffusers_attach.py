"""A diffusers pipeline that runs exactly a schedule, whatever its scheduler and arguments are.

A stand-in of the scheduler's own class is put in its place. It keeps the scheduler's state and
shows the network what the original would, and takes the steps that were searched: their times,
solver and orders, and the initial scale of a free start.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.arguments import takes
from oss_ext.export.base import ExportError
from oss_ext.hosts import (
    Host,
    StandIn,
    StepOutput,
    check_step,
    original_of,
    read_host,
    scheduler_of,
    stand_in,
)
from oss_ext.noise import same_clock, same_noise, shift_of
from oss_ext.schedule import Schedule
from oss_ext.solvers import SOLVERS, History, Multistep, get

SHIFT_TOLERANCE = 0.05
"""Of the logarithm: hosts that cut timesteps to whole numbers blur their shift."""


def check_host(schedule: Schedule, host: Host, force: bool = False) -> None:
    """``ExportError`` if the schedule was searched on another noise path, unless ``force``."""
    ours, theirs = schedule.path, host.path
    if not (same_noise(ours, theirs) or force):
        raise ExportError(
            f"schedule: searched on the path {ours!r:.150}, but {host.name} is configured for "
            f"{theirs!r:.150}"
        )


def check_shift(
    schedule: Schedule,
    host: Host,
    mu: float | None = None,
    force: bool = False,
    before: Sequence[float] | None = None,
) -> None:
    """``ExportError`` if the teacher had another time shift than the host, unless ``force``.

    The steps would be those that were searched, but for a model at another resolution or
    configuration. Teachers that are not evenly spaced before a shift say nothing of it. ``before``:
    the sigmas that the host is to shift, descending, if they are shifted already.
    """
    if force or host.state != "flow":
        return
    if host.config.get("shift_terminal"):
        return  # a stretched grid is even before another shift
    theirs = host.shift(mu)
    if theirs is not None and before is not None and len(before) > 0:
        given = cpu.as_tensor(before, dtype=torch.float64).flatten().flip(0)
        theirs *= shift_of(torch.cat([given.new_zeros(1), given])) or 1.0
    grid = cpu.tensor(schedule.teacher_times, dtype=torch.float64)
    ours = shift_of(grid) or shift_of(grid[:-1])  # a part's last may be no time of the teacher's
    if ours is None or theirs is None or abs(math.log(ours / theirs)) < SHIFT_TOLERANCE:
        return
    raise ExportError(
        f"schedule: searched at a time shift of {ours:.4g}, but {host.name} is at {theirs:.4g} "
        "here (resolution or configuration); force=True (--force) goes on"
    )


def first_scale(schedule: Schedule, host: Host) -> float:
    """What multiplies standard normal noise to make the first state, as the scheduler has it.

    The search starts every run from ``x[N]``, in flow coordinates, whatever its first time.
    """
    return host.scale(schedule.times[0]) * host.noise_scale(schedule.teacher_times[-1])


def told_timesteps(schedule: Schedule, host: Host) -> Tensor:
    """What the network is told in every step, ``[steps]`` float64: as in the search, if the host
    can tell it that."""
    told = cpu.tensor(schedule.timesteps, dtype=torch.float64)
    fractions = host.whole_timesteps and bool((told != told.round()).any())
    if fractions or not same_clock(schedule.path, host.path):
        told = host.timesteps(cpu.tensor(schedule.times[:-1], dtype=torch.float64))
    return told


class Scheduled(StandIn):
    """A scheduler that takes the steps of ``schedule``, whatever it is asked for."""

    schedule: Schedule
    solver: Multistep
    host: Host
    force: bool
    by_steps = False
    """Whether the pipeline's shift depends on how many steps it is called with."""
    under: Any
    """The scheduler whose place it took in a pipeline."""
    order = 1
    INSTEAD: ClassVar = {"add_noise": "_add_noise", "scale_noise": "_scale_noise"}
    _asked_for_start = False

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, **options: Any
    ) -> None:
        # Some pipelines shift the sigmas that they hand in, and leave nothing for the scheduler.
        before = options.get("sigmas")
        if not self.by_steps:
            check_shift(self.schedule, self.host, options.get("mu"), self.force, before)
        self.begin(device)

    def begin(self, device: Any = None) -> None:
        """Before the first step."""
        times = cpu.tensor(self.schedule.times, dtype=torch.float64)
        self.timesteps = told_timesteps(self.schedule, self.host).to(
            device=device, dtype=torch.int64 if self.host.whole_timesteps else torch.float32
        )
        self.sigmas = self.host.sigmas(times).float()
        self.num_inference_steps = self.schedule.steps
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._orders = self.schedule.orders or self.solver.usual_orders(self.schedule.times)
        self._history: History | None = None

    @property
    def init_noise_sigma(self) -> float:
        self._asked_for_start = True
        return first_scale(self.schedule, self.host)

    def _add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, **options: Any
    ) -> Tensor:
        state = self._free_start(original_samples, noise, timesteps)
        if state is None:
            state = super().add_noise(original_samples, noise, timesteps, **options)  # type: ignore[misc]
        return state

    def _scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor, **options: Any) -> Tensor:
        state = self._free_start(sample, noise, timestep)
        if state is None:
            state = super().scale_noise(sample, timestep, noise, **options)  # type: ignore[misc]
        return state

    def _free_start(self, clean: Tensor, noise: Tensor, timestep: Any) -> Tensor | None:
        """What a free start from an image begins with: the image and noise at the teacher's level.

        None anywhere else, where noise is added as the host does it.
        """
        at = cpu.as_tensor(timestep).flatten()
        if at.numel() == 0:
            raise ExportError(self._part_way("beyond the last step"))
        self._asked_for_start = True
        if not self.schedule.starts_below or float(at[0]) != float(self.timesteps[0]):
            return None
        t = self.schedule.teacher_times[-1]
        return ((1 - t) * clean + t * noise) * self.host.scale(self.schedule.times[0])

    def _part_way(self, where: str) -> str:
        return (
            f"schedule: the pipeline begins {where} of {self.schedule.steps}, but would not run "
            "what was searched; call it with strength=1 and no denoising_start: schedule.cut(...) "
            "and schedule.split(...) give parts that are run whole"
        )

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def _index(self, timestep: Any) -> int:
        if self._step_index is None:
            k = self._begin_index
            if k is None:
                at = torch.as_tensor(timestep, device=self.timesteps.device)
                wanted = at.to(self.timesteps).flatten()[0]
                k = int((self.timesteps - wanted).abs().argmin())
            self._check_start(k)
            self._step_index = k
        return self._step_index

    def _check_start(self, k: int) -> None:
        """``ExportError`` if step ``k`` is not the first, or not taken from the right state."""
        if k > 0:
            raise ExportError(self._part_way(f"at step {k + 1}"))
        # From noise as it is, without having asked for its scale.
        scale = first_scale(self.schedule, self.host)
        if self.schedule.starts_below and scale != 1 and not self._asked_for_start:
            raise ExportError(
                f"schedule: starts from {scale:.6g} times the noise (free start), but the pipeline "
                "does not scale its noise; search with start='pinned'"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        t = self.schedule.times[self._index(timestep)]
        factor = self.host.input_scale(t) / self.host.scale(t)
        return sample if factor == 1 else sample * factor

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> StepOutput:
        """One step of the schedule's solver in flow coordinates, in float32."""
        check_step(options)
        k = self._index(timestep)
        t, t_next = self.schedule.times[k : k + 2]
        x = sample.float() / self.host.scale(t)
        v = self.host.velocity(model_output, x, t)
        moved, self._history = self.solver.step(self._history, x, v, t, t_next, self._orders[k])
        moved = moved * self.host.scale(t_next)
        self._step_index = k + 1
        return StepOutput((moved.to(sample.dtype),), x - t * v)


def shifts_by_steps(kind: type) -> bool:
    """Whether the time shift depends on how many steps a pipeline is called with (FLUX.2).

    What it is for as many as the teacher's is not known when a few are taken.
    """
    return known_to_call(kind, "compute_empirical_mu") is not None


def known_to_call(kind: type, name: str) -> Any:
    """What ``name`` is to the code of a pipeline class's call, derived or not; None: nothing."""
    return getattr(inspect.unwrap(kind.__call__), "__globals__", {}).get(name)


def same_weights(name: str) -> str:
    """A pipeline class's name without what it does to its input: the same weights serve both."""
    return re.sub("(Img2Img|Inpaint)(?=Pipeline$)", "", name)


class Attachment:
    """A pipeline whose scheduler takes a schedule's steps, until ``detach`` or the block ends."""

    def __init__(self, pipe: Any, scheduler: Scheduled) -> None:
        self._pipe, self._attached = pipe, scheduler
        scheduler.under, self._there = pipe.scheduler, True
        # Not by attribute: setting a component rewrites configurations.
        vars(pipe)["scheduler"] = scheduler

    def detach(self) -> None:
        """Put back the scheduler that was there; one that was attached since then stays."""
        if not self._there:
            return
        self._there = False
        over = self._pipe.scheduler
        while isinstance(over, Scheduled) and over.under is not self._attached:
            over = over.under
        if isinstance(over, Scheduled):
            over.under = self._attached.under
        else:
            vars(self._pipe)["scheduler"] = self._attached.under

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


@takes(schedule=Schedule)
def scheduled(schedule: Schedule, scheduler: Any, *, force: bool = False) -> Any:
    """A copy of ``scheduler`` that takes the steps of ``schedule`` and nothing else.

    It is of the scheduler's own class, keeps its state and shows the network what the original
    would, and takes the steps of the schedule's solver whatever the class's own is.

    Raises:
        ExportError: a schedule of another path or time shift (unless ``force``), or of a solver
            that evaluates the model between the steps, which pipelines do not. A shift by
            resolution, or by the pipeline, is known, and checked, when that runs.
        ValueError: orders that the schedule's solver does not have.
        UnknownScheduler: a scheduler that cannot be read.
    """
    host = read_host(original_of(scheduler))
    check_host(schedule, host, force)
    solver = get(schedule.solver)
    if not isinstance(solver, Multistep):
        known = ", ".join(name for name, s in SOLVERS.items() if isinstance(s, Multistep))
        raise ExportError(
            f"solver: expected one of a single evaluation per step ({known}), got "
            f"{schedule.solver!r}"
        )
    solver.check_orders(schedule.orders, schedule.times)
    made = stand_in(Scheduled, scheduler)
    made.schedule, made.solver, made.host, made.force = schedule, solver, host, force
    if host.shift() != 1:  # else the pipeline may shift its sigmas itself
        check_shift(schedule, host, force=force)
    made.begin()
    return made


@takes(schedule=Schedule)
def attach(
    schedule: Schedule, pipe: Any, *, scheduler: Any = None, force: bool = False
) -> Attachment:
    """Make ``pipe(...)`` run exactly this schedule, whatever its scheduler and arguments are.

    ``with attach(schedule, pipe): pipe(prompt)`` or, until ``detach()``, ``attach(schedule,
    pipe)``. Call image-to-image pipelines with ``strength=1``, whatever the schedule was searched
    with: they would cut it once more, by index. ``schedule.cut(strength=0.6)`` is a part of one
    that was searched from noise. An ``amplitude`` of the schedule has no effect.

    Args:
        schedule: what was searched.
        pipe: the pipeline to run.
        scheduler: the one it was searched with, if that was not ``pipe.scheduler``.
        force: also for a schedule of another pipeline class, path or time shift.

    Raises:
        ExportError: a schedule of another model, path, shift or solver; where the shift depends
            on the resolution or the pipeline, that raises it when it runs, as it does where it
            begins anywhere but at the first step.
        ValueError: ``pipe`` is no pipeline; orders that the schedule's solver does not have.
        UnknownScheduler: a scheduler that cannot be read.
    """
    scheduler, name = scheduler_of(pipe, scheduler), type(pipe).__name__
    known = schedule.model.endswith("Pipeline")
    if known and same_weights(schedule.model) != same_weights(name) and not force:
        raise ExportError(
            f"schedule: searched for {schedule.model}, got {name}; force=True (--force) goes on"
        )
    made = scheduled(schedule, scheduler, force=force)
    made.by_steps = shifts_by_steps(type(pipe))
    return Attachment(pipe, made)
