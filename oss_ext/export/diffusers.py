"""diffusers: the call arguments that a scheduler turns into exactly the schedule.

Schedulers shift, stretch and respace what they are given. ``arguments`` inverts that for the very
configuration and then asks the scheduler itself whether it has the schedule. Where pipelines take
no schedule, schedulers could not hold it, or it starts below the teacher's first time, ``attach``
(diffusers_attach.py) is the way.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.arguments import takes
from oss_ext.export.base import NOISE_APART, ExportError
from oss_ext.export.diffusers_attach import (
    check_host,
    check_shift,
    first_scale,
    known_to_call,
    shifts_by_steps,
    told_timesteps,
)
from oss_ext.export.diffusers_steps import takes_steps_of
from oss_ext.hosts import Host, original_of, read_host, scheduler_of
from oss_ext.noise import unshifted
from oss_ext.schedule import Schedule
from oss_ext.solvers import SOLVERS

RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
SIGMA_TOLERANCE = 1e-5
"""Relative; hosts hold levels and sigmas in float32. Neighbouring timesteps are 1e-3 apart or more.
"""


@takes(schedule=Schedule)
def arguments(
    schedule: Schedule, scheduler: Any, *, mu: float | None = None, force: bool = False
) -> dict[str, Any]:
    """The call arguments with which ``scheduler`` ends up with exactly this schedule.

    And takes the steps that were searched from one time to the next: its solver and the schedule's,
    with the schedule's orders, are both run on a small problem and have to end at the same place.

    Args:
        schedule: what was searched.
        scheduler: a diffusers scheduler; left alone.
        mu: the resolution shift that the pipeline will pass, for ``use_dynamic_shifting``.
        force: also for a schedule of another path or another solver.

    Returns:
        ``{"sigmas": array}`` or ``{"timesteps": list}``, for ``pipe(...)`` or ``set_timesteps``;
        both where the pipeline that was searched would tell its network other timesteps.

    Raises:
        ExportError: the scheduler takes no schedule, respaces what it is given, would start from
            scaled noise, ends up with something else or takes other steps, or the pipeline that
            was searched has another shift for another number of steps; ``attach`` is the way then.
        ValueError: a ``mu`` that leaves no times between the ends.
    """
    scheduler = original_of(scheduler)
    host = read_host(scheduler)
    check_host(schedule, host, force)
    named = getattr(sys.modules.get("diffusers"), schedule.model, None)
    searched_for = named if isinstance(named, type) else None
    if searched_for is not None and not force:
        _check_kind(searched_for)
    _check_configuration(schedule, host, mu)
    if searched_for is None and not force:  # pipelines were searched from their own noise
        _check_noise(schedule, host)
    check_shift(schedule, host, mu, force)
    known = inspect.signature(type(scheduler).set_timesteps).parameters
    times = cpu.tensor(schedule.times, dtype=torch.float64)
    sigmas = host.sigmas(times)
    if "sigmas" in known and (host.state == "flow" or host.state == "ve"):
        given: dict[str, Any] = {"sigmas": _before_shift(host, sigmas, mu)}
    elif "timesteps" in known and host.state != "flow":
        given = {"timesteps": [int(t) for t in host.timesteps(times[:-1]).round().tolist()]}
    else:
        raise ExportError(f"{host.name} takes no schedule; {ATTACH}")
    trial = copy.deepcopy(scheduler)
    shift = {"mu": mu} if mu is not None and "mu" in known else {}
    trial.set_timesteps(**given, **shift)
    _check_result(given, cpu.as_tensor(trial.sigmas).double(), sigmas, host)
    if not force:
        _check_steps(schedule, trial)
    if "sigmas" in given and searched_for is not None:
        given |= _beside_sigmas(searched_for, schedule, scheduler)
    return given


def _check_kind(kind: type) -> None:
    """``ExportError`` if what the scheduler is told depends on the number of steps."""
    if shifts_by_steps(kind):
        raise ExportError(
            f"{kind.__name__} shifts by the number of steps that it is called with; {ATTACH}"
        )


ATTACH = "use export.attach(schedule, pipe)"


def _check_noise(schedule: Schedule, host: Host) -> None:
    """``ExportError`` if the scheduler starts from other noise than a network of this path."""
    first = schedule.teacher_times[-1]
    apart = host.noise_scale(first) / schedule.path.noise_scale(first) - 1
    if abs(apart) > NOISE_APART:
        raise ExportError(
            f"{host.name} starts from {abs(apart):.1%} {'more' if apart > 0 else 'less'} noise "
            "than the teacher did; expected timestep_spacing='leading', or a teacher that starts "
            "at a higher sigma"
        )


def _check_configuration(schedule: Schedule, host: Host, mu: float | None) -> None:
    config, name = host.config, host.name
    for key in RESPACED:
        if config.get(key, False):
            raise ExportError(f"{name} with {key}=True respaces what it is given; {ATTACH}")
    if config.get("use_dynamic_shifting", False) and mu is None:
        raise ExportError(
            f"mu: {name} shifts by resolution; expected the mu that the pipeline computes (FLUX at "
            f"1024 x 1024 has 1.15), or {ATTACH}"
        )
    if config.get("shift_terminal") and host.state == "flow":
        least, terminal = schedule.times[-2], float(config["shift_terminal"])
        if abs(least - terminal) > 1e-6:
            raise ExportError(
                f"{name} stretches every schedule so that its last step starts at {terminal}, but "
                f"this one's starts at {least:.6g}; {ATTACH}"
            )
    if schedule.starts_below and host.state in ("ve", "edm"):
        raise ExportError(
            f"{name} scales its noise by its first sigma, but the schedule starts at "
            f"{schedule.sigmas[0]:.6g} from the noise as it is (free start); {ATTACH}, or search "
            "with start='pinned'"
        )
    if schedule.starts_below and host.state == "vp":
        raise ExportError(
            f"{name} starts from noise of variance 1, but the schedule starts from "
            f"{first_scale(schedule, host):.6g} times that (free start); {ATTACH}, or search with "
            "start='pinned'"
        )


def _before_shift(host: Host, sigmas: Tensor, mu: float | None) -> Any:
    """What the host turns into ``sigmas``: before its shift, with the final 0 or without."""
    if host.state == "ve":
        return sigmas.tolist()
    inner, shift = sigmas[:-1], host.shift(mu)
    if host.config.get("invert_sigmas", False):
        inner = 1 - inner
    assert shift is not None  # _check_configuration has asked for mu
    values = unshifted(inner, shift)
    # UniPC multiplies what it is given, which a list cannot be.
    return values.numpy() if host.name == "UniPCMultistepScheduler" else values.tolist()


def _check_result(given: dict[str, Any], got: Tensor, wanted: Tensor, host: Host) -> None:
    """The scheduler has the schedule; else ``ExportError`` says what it has."""
    got = got.cpu()
    if host.scheduler.order == 2:  # two-stage solvers repeat every inner level
        got = torch.cat([got[:1], got[1:-1:2], got[-1:]])
    if len(got) == len(wanted):
        error = (got - wanted).abs() / wanted.abs().clamp(min=1e-3)
        # UniPC takes 1e-6 off a sigma of exactly 1.
        if float(error.max()) <= SIGMA_TOLERANCE:
            return
        if "timesteps" in given:
            worst = int(error.argmax())
            raise ExportError(
                f"{host.name} takes whole timesteps only: at step {worst} it would have sigma "
                f"{float(got[worst]):.6g} for {float(wanted[worst]):.6g}; search on whole "
                f"timesteps (oss search --for diffusers), or {ATTACH}"
            )
    raise ExportError(
        f"{host.name} would make {[round(v, 6) for v in got.tolist()]} of it; {ATTACH}"
    )


def _check_steps(schedule: Schedule, trial: Any) -> None:
    """``ExportError`` unless ``trial``, whose steps are set, takes those that were searched."""
    host = read_host(trial)

    def same(solver: str, orders: Sequence[int] = ()) -> bool:
        return takes_steps_of(copy.deepcopy(trial), host, schedule, solver, orders)

    if same(schedule.solver, schedule.orders):
        return
    own = [name for name in SOLVERS if same(name)]
    what = f"{host.name} takes other steps than the {schedule.solver!r} ones that were searched"
    if schedule.solver in own:
        what = (
            f"{host.name} takes every step of {schedule.solver!r} in its usual order, and the "
            "schedule has others; search with fixed_order=True (--fixed-order)"
        )
    elif own:
        what += f"; search with solver={own[0]!r}, which is what it has"
    raise ExportError(f"{what}; or {ATTACH}")


@takes(schedule=Schedule)
def call_arguments(
    schedule: Schedule, pipe: Any, *, mu: float | None = None, force: bool = False
) -> dict[str, Any]:
    """``arguments`` for ``pipe(...)``: refused where the pipeline would drop them.

    Raises:
        ExportError: as ``arguments``, or the pipeline takes no such argument, or drops it.
        ValueError: ``pipe`` is no pipeline.
    """
    return class_arguments(schedule, type(pipe), scheduler_of(pipe), mu=mu, force=force)


@takes(schedule=Schedule)
def class_arguments(
    schedule: Schedule, pipeline: type, scheduler: Any, *, mu: float | None = None,
    force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """``call_arguments`` for pipelines of the class ``pipeline`` that have such a scheduler.

    Raises:
        ExportError: as ``call_arguments``.
    """
    _check_kind(pipeline)
    name = pipeline.__name__
    given = arguments(schedule, scheduler, mu=mu, force=force)
    kind = next(iter(given))
    if kind not in inspect.signature(pipeline.__call__).parameters:
        raise ExportError(f"{name} takes no {kind}; {ATTACH}")
    drops = scheduler.config.get("use_flow_sigmas", False)
    if kind == "sigmas" and drops and "use_flow_sigmas" in inspect.getsource(pipeline.__call__):
        raise ExportError(f"{name} drops sigmas when its scheduler has use_flow_sigmas; {ATTACH}")
    if kind == "sigmas" and "timesteps" not in given:  # of a class that diffusers does not have
        given |= _beside_sigmas(pipeline, schedule, original_of(scheduler))
    return given


def _beside_sigmas(kind: type, schedule: Schedule, scheduler: Any) -> dict[str, Any]:
    """The timesteps, for pipelines that hand them over beside sigmas (most refuse to): they would
    else tell the network evenly spaced ones, whatever the sigmas are (CogView4)."""
    retrieve = known_to_call(kind, "retrieve_timesteps")
    if retrieve is None:
        return {}
    if not {"sigmas", "timesteps"} <= set(inspect.signature(kind.__call__).parameters):
        return {}
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting", False) else {}
    trial = copy.deepcopy(scheduler)
    try:
        retrieve(trial, timesteps=[1000.0, 500.0], sigmas=[1.0, 0.5], **shift)
    except ValueError:
        return {}
    return {"timesteps": told_timesteps(schedule, read_host(scheduler)).tolist()}
