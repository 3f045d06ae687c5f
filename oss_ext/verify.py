"""Check what a schedule says of itself: that the model is its own, and that its cost comes again.

A schedule names its model by fingerprint, its teacher by times and solver, and its cost by a number
of samples: the first ones of a seed, whatever else was drawn from it. Which seed that was it does
not say, but whether it was a given one. All of that can be run once more. What a file does not
record is said to be so, not guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments, cpu, solvers
from oss_ext.calibrate import calibrate
from oss_ext.models import GRIDS, Model, teacher_times
from oss_ext.sampling import sample
from oss_ext.schedule import Schedule
from oss_ext.teacher import teacher
from oss_ext.trajectory import Trajectory, noise_hash

MOST_SAMPLES = 1024
"""That are drawn for a claim unless more are asked for: a file may name any number."""

ROUNDING = 8
"""How far a root mean square may be off, in roundings of the model's precision at the size of the
states: the bits of a model call depend on how many rows it has."""

RELATIVE = 1e-5
"""And as a share of itself: the error model of ``oss_ext.ops.dp_step``."""

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Claim:
    """What a schedule says of itself, and what came of checking it.

    Attributes:
        name: the schedule's attribute.
        holds: None where it cannot be checked.
        found: what was found, or why it could not be checked.
    """

    name: str
    holds: bool | None
    found: str

    def __str__(self) -> str:
        verdict = {True: "holds: ", False: "does not hold: ", None: ""}[self.holds]
        return f"{self.name}: {verdict}{self.found}"


@arguments.takes(model=Model, schedule=Schedule)
def verify(
    model: Model,
    schedule: Schedule,
    *,
    seed: int = 0,
    samples: int = MOST_SAMPLES,
    max_batch: int | None = None,
    progress: bool = False,
) -> list[Claim]:
    """Check the claims of ``schedule`` against ``model``; its teacher is run once more.

    Args:
        model: which should be the one that the schedule was found with.
        schedule: of any origin.
        seed: of the calibration noise.
        samples: claims over more than these are not checked.
        max_batch: rows per model call; None: all samples in one.
        progress: show a progress bar.

    Returns:
        A claim for each attribute that says what can be run again. ``cost`` and ``amplitude`` rest
        on the others, and are not checked where one of those does not hold.

    Raises:
        ValueError: bad arguments.
        NonFiniteError: the model returned NaN or inf.
    """
    arguments.whole_number("samples", samples)
    claims = [
        _model(model, schedule),
        _path(model, schedule),
        _grid(model, schedule),
        _timesteps(model, schedule),
        _solver("teacher_solver", schedule.teacher_solver),
        _student(schedule),
    ]
    claims.append(_noise(model, schedule, seed, claims))
    counts = {
        "cost": None if schedule.cost is None else schedule.samples,
        "amplitude": None if schedule.amplitude is None else schedule.amplitude.samples,
    }
    unable = {name: _why_not(claims, count, samples) for name, count in counts.items()}
    drawn = max((counts[name] or 0 for name, why in unable.items() if why is None), default=0)
    if drawn:
        trajectory = teacher(
            model,
            model.noise(drawn, seed, start=schedule.teacher_times[-1]),
            times=cpu.tensor(schedule.teacher_times, dtype=torch.float64),
            solver=schedule.teacher_solver,
            max_batch=max_batch,
            progress=progress,
        )
        size = float(trajectory.final.double().square().mean().sqrt())
        slack = ROUNDING * torch.finfo(model.dtype).eps * size
    for name, why in unable.items():
        if why is not None:
            claims.append(Claim(name, None, why))
        elif name == "cost":
            seen = trajectory.first(schedule.samples)
            final = sample(model, seen.noise, schedule, max_batch=max_batch, progress=progress)
            errors = (final - seen.final).double().square().flatten(1).mean(dim=1)
            claims.append(_cost(schedule, errors, slack, seed))
        else:
            claims.append(_amplitude(schedule, trajectory, slack, seed))
    return claims


def _model(model: Model, schedule: Schedule) -> Claim:
    if not schedule.model_hash:
        return Claim("model_hash", None, NOT_RECORDED)
    own = model.fingerprint()
    if own == schedule.model_hash:
        return Claim("model_hash", True, f"{own}, this {model.name!r}")
    expected = f"{schedule.model_hash} of {schedule.model!r}"
    return _differs("model_hash", expected, f"{own} of {model.name!r}")


def _path(model: Model, schedule: Schedule) -> Claim:
    if model.path == schedule.path:
        return Claim("path", True, schedule.path.name)
    return _differs("path", f"{schedule.path!r:.200}", f"{model.path!r:.200}")


def _grid(model: Model, schedule: Schedule) -> Claim:
    """Whose grid the teacher's times are; any that the network knows can be run."""
    times = cpu.tensor(schedule.teacher_times, dtype=torch.float64)
    steps = len(times) - 1
    try:
        model.path.within_span(times[1:])
    except ValueError as error:
        return Claim("teacher_times", False, str(error).removeprefix("times: "))
    for grid in GRIDS:
        try:
            made = teacher_times(model, steps, grid)
        except ValueError:
            continue
        if len(made) == len(times) and torch.allclose(made, times, rtol=1e-9, atol=1e-12):
            whose = "the model's own" if grid == "own" else f"the grid {grid!r}"
            return Claim("teacher_times", True, f"{steps} steps, {whose}")
    return Claim("teacher_times", True, f"{steps} steps that the network knows, of no usual grid")


def _timesteps(model: Model, schedule: Schedule) -> Claim:
    if not schedule.teacher_timesteps:
        return Claim("teacher_timesteps", None, NOT_RECORDED)
    recorded = cpu.tensor(schedule.teacher_timesteps, dtype=torch.float64)
    times = cpu.tensor(schedule.teacher_times[1:], dtype=torch.float64)
    try:
        told = model.timesteps(times).double().cpu()
    except ValueError as error:
        return Claim("teacher_timesteps", False, str(error).removeprefix("times: "))
    # Hosts count in float32.
    off = (recorded - told).abs() > 1e-6 * told.abs().max()
    if not bool(off.any()):
        return Claim("teacher_timesteps", True, "what this model tells its network")
    at = int(off.nonzero()[0])
    expected = f"{float(recorded[at]):.9g} at t = {float(times[at]):.6g}"
    return _differs("teacher_timesteps", expected, f"{float(told[at]):.9g}")


def _solver(name: str, solver: str) -> Claim:
    if solver in solvers.SOLVERS:
        return Claim(name, True, solver)
    return Claim(name, None, f"not checked: this release knows no solver {solver!r:.100}")


def _student(schedule: Schedule) -> Claim:
    """The student's solver, and that it has the orders of the steps."""
    claim = _solver("solver", schedule.solver)
    if claim.holds and schedule.orders:
        try:
            solvers.get(schedule.solver).check_orders(schedule.orders, schedule.times)
        except ValueError as error:
            return Claim("orders", False, str(error).removeprefix("orders: "))
    return claim


def _noise(model: Model, schedule: Schedule, seed: int, claims: list[Claim]) -> Claim:
    """Whether the samples are those of ``seed``; other models may have noise of their own."""
    name = "noise_hash"
    if not schedule.noise_hash:
        return Claim(name, None, NOT_RECORDED)
    broken = [claim.name for claim in claims if claim.holds is False]
    if broken:
        return Claim(name, None, _rests_on(broken))
    own = noise_hash(model.noise(1, seed, start=schedule.teacher_times[-1]))
    if own == schedule.noise_hash:
        return Claim(name, True, f"{own}, the noise of seed {seed}")
    return _differs(name, schedule.noise_hash, f"{own} of seed {seed}; what was the search's?")


def _rests_on(broken: list[str]) -> str:
    return f"not checked: it rests on {', '.join(broken)}"


def _why_not(claims: list[Claim], count: int | None, most: int) -> str | None:
    """Why a claim over ``count`` samples cannot be checked; None if it can."""
    if count is None:
        return NOT_RECORDED
    # Without recorded timesteps the network is told what the model tells it, and without a record
    # of the noise it may be this seed's.
    unneeded = ("teacher_timesteps", "noise_hash")
    needed = [c for c in claims if c.holds is False or c.name not in unneeded]
    broken = [claim.name for claim in needed if not claim.holds]
    if broken:
        return _rests_on(broken)
    if count == 0:
        return "not checked: over how many samples is not recorded"
    if count > most:
        return f"not checked: it is over {count} samples, more than the {most} to be drawn"
    return None


def _cost(schedule: Schedule, errors: Tensor, slack: float, seed: int) -> Claim:
    """``errors`` ``[B]`` are the student's own, one for every calibration sample."""
    recorded, objective = float(schedule.cost or 0), schedule.objective
    over = f"{schedule.samples} samples of seed {seed}"
    got = float(errors.mean())
    if objective is not None and objective.scope == "instance" and len(errors) > 1:
        # A schedule of one of the samples, whose number is nowhere in it.
        nearest = int((errors.sqrt() - math.sqrt(recorded)).abs().argmin())
        got, over = float(errors[nearest]), f"sample {nearest}, the nearest of {over}"
    root = math.sqrt(recorded)
    if abs(math.sqrt(got) - root) <= slack + RELATIVE * root:
        return Claim("cost", True, f"{recorded:.6g}, got {got:.6g} on {over}")
    return _differs("cost", f"{recorded:.6g}", f"{got:.6g} on {over}")


def _amplitude(schedule: Schedule, trajectory: Trajectory, slack: float, seed: int) -> Claim:
    recorded = schedule.amplitude
    assert recorded is not None
    seen = trajectory.first(recorded.samples)
    measured = calibrate(seen, schedule, levels=recorded.levels).amplitude
    assert measured is not None
    over = f"{recorded.samples} samples of seed {seed}"
    for name in ("low", "high"):
        pairs = zip(getattr(recorded, name), getattr(measured, name), strict=True)
        for step, (expected, got) in enumerate(pairs):
            if not abs(expected - got) <= slack + RELATIVE * abs(expected):
                what = f"{expected:.6g} as {name} of step {step}"
                return _differs("amplitude", what, f"{got:.6g} on {over}")
    return Claim("amplitude", True, f"the teacher's quantiles on {over}")


def _differs(name: str, expected: str, got: str) -> Claim:
    return Claim(name, False, f"expected {expected}, got {got}")
