"""``oss compare``: schedules and methods, judged on samples that no search has seen."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from oss_ext import contest, cpu, solvers
from oss_ext.arguments import one_of
from oss_ext.baselines import uniform
from oss_ext.checkpoint import LEAST_BYTES
from oss_ext.cli.base import (
    Budgets,
    Choice,
    PathTo,
    batch_option,
    check_images,
    check_picture,
    check_writable,
    force_option,
    load_for,
    load_schedule,
    model_options,
    note,
    note_earlier_run,
    quiet_option,
    run_of,
    solver_option,
    teacher_solver_option,
)
from oss_ext.cli.log import log_option
from oss_ext.cli.resume import Resumable, resumable, resume_options
from oss_ext.evaluate import AMPLITUDE, Score, Unable, score_table
from oss_ext.models import GRIDS, Model, teacher_times
from oss_ext.models.base import hash_of
from oss_ext.noise import is_clean
from oss_ext.plan import QUALITIES, check_budgets, plan
from oss_ext.report import plot_samples
from oss_ext.runs import Contender, contender_name, file_name
from oss_ext.schedule import STARTS, Schedule
from oss_ext.teacher import teacher as make_teacher
from oss_ext.trajectory import Trajectory, noise_hash

REFERENCE = "uniform"
"""Whom paired differences are from, and what stands beside schedules from files."""


class Methods(click.ParamType):  # type: ignore[type-arg]
    """Names such as ``uniform,balanced``, or ``all``."""

    name = "all|NAME[,NAME...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        names = contest.METHODS if value == "all" else value.split(",")
        try:
            return contest.check_methods(names)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(cls=Resumable)
@click.argument("schedule_files", metavar="[SCHEDULE]...", nargs=-1)
@click.option("--methods", type=Methods(),
              help="Also make and judge these: all, or some of "
              f"{', '.join(contest.METHODS)}.")  # fmt: skip
@model_options
@click.option(
    "--steps", type=Budgets(), help="Budgets of --methods. [default: the files', or 5,10]"
)
@click.option("--calibration", type=click.IntRange(1), default=16, show_default=True,
              help="Samples that --methods may use.")  # fmt: skip
@click.option("--calibration-seed", default=0, show_default=True, help="Seed of their noise.")
@click.option("--teacher-steps", type=click.IntRange(1), default=200, show_default=True,
              help="Of the teacher, where no SCHEDULE has one.")  # fmt: skip
@click.option("--grid", type=click.Choice(GRIDS), default="own", show_default=True,
              help="Its time grid.")  # fmt: skip
@teacher_solver_option
@solver_option
@click.option("--start", type=click.Choice(STARTS), default="free", show_default=True,
              help="Of what searches or learns in --methods: whether it may choose its first time."
              )  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True,
              help="Held-out samples.")  # fmt: skip
@click.option("--seed", default=1, show_default=True,
              help="Seed of the held-out noise; not the search's.")  # fmt: skip
@click.option("--against", metavar="METHOD", help="Whom paired differences are from.")
@click.option("--amplitude", is_flag=True,
              help="Also judge each SCHEDULE that has it with amplitude calibration.")  # fmt: skip
@batch_option
@force_option
@click.option("--picture", type=PathTo(dir_okay=False),
              help="Also write teacher and students side by side (image models).")  # fmt: skip
@resume_options
@click.option("--out", type=PathTo(file_okay=False),
              help="Also write a run folder, from which `oss report` makes a page. While the "
              "comparison lasts, it holds a checkpoint.")  # fmt: skip
@quiet_option
@log_option
def compare(
    schedule_files: tuple[str, ...],
    methods: list[str] | None,
    choice: Choice,
    steps: list[int] | None,
    calibration: int,
    calibration_seed: int,
    teacher_steps: int,
    grid: str,
    teacher_solver: str,
    solver: str,
    start: str,
    samples: int,
    seed: int,
    against: str | None,
    amplitude: bool,
    max_batch: int | None,
    force: bool,
    picture: Path | None,
    resume: Path | None,
    keep: bool,
    out: Path | None,
    quiet: bool,
) -> None:
    """Held-out PSNR to the teacher: each SCHEDULE beside uniform spacing of as many steps.

    A SCHEDULE is a file, or preset:NAME beside files: it is then judged by their teacher.
    With --methods, rivals and searches are made and judged too.

    \b
    oss compare schedules/digits-10.json
    oss compare --model digits --steps 5,10,20 --methods all --out runs/digits
    """
    if not schedule_files and not methods:
        raise click.UsageError("expected a SCHEDULE or --methods")
    if picture is not None:
        check_picture("--picture", picture)
    if out is not None:
        check_writable(out)
    loaded = [load_schedule(name) for name in schedule_files]
    if amplitude and not any(s.amplitude for s in loaded):
        raise click.UsageError("--amplitude: expected a SCHEDULE that has it (oss search "
                               "--amplitude stores it), got none")  # fmt: skip
    model, times, followed = _teacher_of(loaded, choice, force, grid, teacher_steps, teacher_solver)
    if picture is not None:
        check_images("--picture", model)
    budgets = steps or [s.steps for s in loaded] or [5, 10]
    if methods and calibration_seed == seed:
        raise click.UsageError(
            f"--seed: expected another than --calibration-seed, got {seed} for both: samples that "
            "the methods have seen are not held out"
        )
    # Before the teacher takes its time.
    if methods:
        check_budgets(budgets, len(times) - 1)
    if against is not None:
        one_of("--against", against, dict.fromkeys([*(methods or ()), *[REFERENCE] * bool(loaded)]))

    def teacher(answers: Model, count: int, noise_seed: int) -> Trajectory:
        initial = model.noise(count, noise_seed, start=float(times[-1]))
        return make_teacher(
            answers, initial, times=times, solver=followed, max_batch=max_batch, progress=not quiet
        )

    beside = {contender_name(method, k) for method in methods or () for k in budgets}
    beside |= {contender_name(REFERENCE, s.steps) for s in loaded}
    entries = _from_files(schedule_files, loaded, amplitude, beside)
    made, searched = contest.Made(()), None
    per_teacher = solvers.evaluations(solvers.get(followed), times.flip(0).tolist())
    size = _most_kept(model, times, per_teacher, budgets, methods, solver, calibration, samples)
    if out is not None:
        note_earlier_run(out)
    with resumable(
        model, out, resume=resume is not None, keep=keep, size=size,
        schedules=[hash_of([s.to_json()]) for s in loaded],
    ) as (answers, _):  # fmt: skip
        if methods:
            searched = teacher(answers, calibration, calibration_seed)
            made = contest.make(
                answers, searched, budgets, methods, solver=solver, start=start,
                max_batch=max_batch, progress=not quiet,
                on_method=lambda name: None if quiet else click.echo(f"making {name}", err=True),
            )  # fmt: skip
        held_out = teacher(answers, samples, seed)
        contenders = _contenders(made, entries, loaded, held_out)
        scores = contest.judge(
            answers, held_out, contenders, max_batch=max_batch, progress=not quiet
        )
        contenders = [replace(c, note=s.reason) if isinstance(s, Unable) else c
                      for c, s in zip(contenders, scores, strict=True)]  # fmt: skip
        for score in scores:
            if isinstance(score, Score) and _is_of_its_own_samples(score, held_out):
                note(f"{score.name} was found on these very samples, which flatters it: take "
                     "another --seed")  # fmt: skip
        said = _write(model, searched, held_out, made, contenders, scores, against, picture, out)
    click.echo(said)  # once everything is written: whoever reads this may have gone


def _is_of_its_own_samples(score: Score, held_out: Trajectory) -> bool:
    """Whether a search saw what its schedule is judged on, or the first of them; said once of a
    schedule that runs twice."""
    schedule = score.schedule
    own = (schedule.model_hash, schedule.noise_hash)
    seen = schedule.samples > 0 and own == (held_out.model_hash, noise_hash(held_out.noise))
    return seen and not score.calibrated


def _write(
    model: Model,
    searched: Trajectory | None,
    held_out: Trajectory,
    made: contest.Made,
    contenders: list[Contender],
    scores: list[Score | Unable],
    against: str | None,
    picture: Path | None,
    out: Path | None,
) -> str:
    """The picture and the run to their places; gives what is to be said: the table, and which."""
    whom = against or REFERENCE
    known = any(c.method == whom and isinstance(s, Score)
                for c, s in zip(contenders, scores, strict=True))  # fmt: skip
    said = [score_table(scores, contender_name(whom, "{steps}") if known else None)]
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        rows = {f"teacher {held_out.steps}": held_out.final}
        plot_samples(rows | {s.name: s.images for s in scores if isinstance(s, Score)}, picture)
        said.append(f"wrote {picture}")
    if out is not None:
        judged = [s for s in scores if isinstance(s, Score)]
        nothing = cpu.full((held_out.samples,), torch.nan, dtype=torch.float64)
        run_of(
            model,
            searched or held_out,
            contenders,
            calibration=0 if searched is None else searched.samples,
            held_out=held_out.samples,
            mse=torch.stack([s.mse if isinstance(s, Score) else nothing for s in scores]),
            along={s.name: s.along for s in judged},
            quantiles={s.name: s.quantiles for s in judged if s.quantiles is not None},
            images={"teacher": held_out.final[: contest.SHOWN]}
            | {s.name: s.images for s in judged},
            table=made.table,
            spread=made.spread,
        ).save(out)
        said.append(f"wrote {out}; `oss report {shlex.quote(str(out))}` makes a page of it")
    return "\n".join(said)


def _contenders(
    made: contest.Made, entries: list[Contender], loaded: list[Schedule], held_out: Trajectory
) -> list[Contender]:
    """Those made, those from files, and whom these stand beside, by budget."""
    rivals = list(made.contenders)
    known = {c.name for c in rivals}
    for count, own in sorted({(s.steps, s.solver) for s in loaded}):
        name = contender_name(REFERENCE, count)
        if name not in known:  # with the solver of one that it stands beside
            known.add(name)
            schedule = replace(uniform(held_out, count), solver=own)
            rivals.append(Contender(name, REFERENCE, count, schedule))
    return sorted([*rivals, *entries], key=lambda c: c.steps)


def _most_kept(
    model: Model,
    times: torch.Tensor,
    per_teacher: int,
    budgets: list[int],
    methods: list[str] | None,
    solver: str,
    calibration: int,
    samples: int,
) -> int:
    """Bytes of a checkpoint at most: of both teachers, of the method that takes most, and of the
    runs that are judged."""
    state = model.noise(1).nbytes
    names = methods or []
    rows, clean = len(times), is_clean(times)
    plans = [
        plan(quality, rows - 1, [k], samples=calibration, solver=solver, clean=clean)
        for quality in set(names) & set(QUALITIES)
        for k in budgets
    ]
    found = [p.kept(calibration * state, rows, LEAST_BYTES) for p in plans]
    found.append(bool(names) * 3 * rows * calibration * state)  # of the paths of every sample
    runs = sum(budgets) * (len(names) + 1) * solvers.get(solver).evaluations
    teachers = per_teacher * (bool(names) * calibration + samples)
    return max(found) + LEAST_BYTES + (teachers + runs * samples) * state


def _teacher_of(
    loaded: list[Schedule],
    choice: Choice,
    force: bool,
    grid: str,
    teacher_steps: int,
    teacher_solver: str,
) -> tuple[Model, torch.Tensor, str]:
    """The model, and the teacher's times and solver: those of the schedules, if there are any."""
    if not loaded:
        model = choice.load()
        return model, teacher_times(model, teacher_steps, grid), teacher_solver
    searched = [s for s in loaded if s.model_hash] or loaded[:1]
    grids = {(s.teacher_times, s.teacher_solver) for s in searched}
    if len(grids) > 1:
        raise click.UsageError("the schedules have different teachers; compare them one by one")
    times_, solver = grids.pop()
    model = load_for(loaded, choice, force)
    return model, cpu.tensor(times_, dtype=torch.float64), solver


def _from_files(
    files: tuple[str, ...], loaded: list[Schedule], amplitude: bool, beside: set[str]
) -> list[Contender]:
    """Schedules from files by the stems of their names, or by the whole where stems do not tell
    them from one another and from those ``beside`` them, in a run's files too.

    With ``amplitude``, each that has it comes again, to run with it.
    """
    for names in ([Path(file).stem for file in files], files):
        entries = []
        for name, s in zip(names, loaded, strict=True):
            entries.append(Contender(name, "file", s.steps, s))
            if amplitude and s.amplitude is not None:
                entries.append(Contender(name + AMPLITUDE, "file", s.steps, s, amplitude=True))
        known = {file_name(name) for name in beside}.union(file_name(c.name) for c in entries)
        if len(known) == len(beside) + len(entries):
            return entries
    raise click.UsageError(f"SCHEDULE: expected every file once, got {' '.join(files)}")
