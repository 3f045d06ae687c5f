"""``oss search``: schedules for a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from oss_ext import export, solvers
from oss_ext.amplitude import LEVELS
from oss_ext.baselines import uniform
from oss_ext.baselines.base import even_rows
from oss_ext.calibrate import calibrate
from oss_ext.checkpoint import LEAST_BYTES
from oss_ext.cli.base import (
    Budgets,
    Choice,
    Levels,
    MetricName,
    PathTo,
    batch_option,
    check_writable,
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
from oss_ext.groups import estimate_groups, in_groups, search_groups
from oss_ext.metrics import XT, EvaluatedMetric, Metric
from oss_ext.models import GRIDS, Model, teacher_times
from oss_ext.models.base import to_kept, to_text
from oss_ext.models.evaluation import Evaluator
from oss_ext.models.hidden import find_module
from oss_ext.models.pipeline import PipelineModel
from oss_ext.noise import is_clean
from oss_ext.plan import QUALITIES, check_budgets, make_plan
from oss_ext.report import plot_schedules, plot_spread
from oss_ext.result import SearchResult
from oss_ext.runs import Contender, contender_name, file_name
from oss_ext.schedule import AGGREGATES, SCOPES, STARTS, Schedule
from oss_ext.scratch import Held
from oss_ext.search import make_objective
from oss_ext.search import search as search_schedules
from oss_ext.teacher import teacher as make_teacher
from oss_ext.trajectory import Trajectory


@click.command(cls=Resumable)
@model_options
@click.option("--steps", type=Budgets(), default="5,10", show_default=True,
              help="Budgets to write a schedule for.")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=16, show_default=True,
              help="Calibration samples.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the calibration noise.")
@click.option("--teacher-steps", type=click.IntRange(1), default=200, show_default=True)
@click.option("--grid", type=click.Choice(GRIDS), default="own", show_default=True,
              help="Teacher's time grid.")  # fmt: skip
@teacher_solver_option
@solver_option
@click.option("--fixed-order", is_flag=True,
              help="Only the student's solver's highest orders, for hosts that cannot vary "
              "them.")  # fmt: skip
@click.option("--metric", type=MetricName(), default="xt", show_default=True,
              help="What the dynamic programme compares: xt, x0, x0-candidate, or "
              "perceptual:MODULE of the network.")  # fmt: skip
@click.option("--scope", type=click.Choice(SCOPES), default="joint", show_default=True,
              help="One schedule for all samples, or one each.")  # fmt: skip
@click.option("--reduce", type=click.Choice(["log_mean", "mean"]),
              help="Joint search: geometric or arithmetic mean of the errors. "
              "[default: log_mean]")  # fmt: skip
@click.option("--aggregate", type=click.Choice(AGGREGATES),
              help="Instance search: write the mean or median schedule.")  # fmt: skip
@click.option("--group", type=click.IntRange(1), metavar="N",
              help="Instance search: N samples at a time, in the memory of N.")  # fmt: skip
@click.option("--start", type=click.Choice(STARTS),
              help="Whether the first step may start below the teacher's first time. "
              "[default: free]")  # fmt: skip
@click.option("--for", "host", type=click.Choice([*export.FORMATS, export.DIFFUSERS]),
              help="Keep to what this host can run: pinned start, whole timesteps.")  # fmt: skip
@click.option("--shift", type=float, default=1.0, show_default=True,
              help="With --for: shift that the host applies to whole timesteps.")  # fmt: skip
@click.option("--quality", type=click.Choice(QUALITIES),
              help="How much to spend: fast, balanced and best refine on the final error, dp is "
              "Algorithm 1 alone. [default: balanced; dp for an instance search]")  # fmt: skip
@click.option("--budget", type=click.IntRange(1),
              help="Model evaluations per sample at most, the teacher's not counted.")  # fmt: skip
@click.option("--beam", type=click.IntRange(1), default=1, show_default=True,
              help="States per row that the dynamic programme of dp and best keeps.")  # fmt: skip
@click.option("--off-grid", is_flag=True,
              help="Steps may also stand between the teacher's times.")  # fmt: skip
@click.option("--amplitude", type=Levels(), is_flag=False,
              flag_value=",".join(map(str, LEVELS)),
              help="Also store the teacher's quantiles, for amplitude calibration. "
              "[default: not; without a value the paper's, 0.05,0.95]")  # fmt: skip
@batch_option
@click.option("--storage", type=click.Choice(["float16", "bfloat16"]),
              help="Keep trajectories in 16 bits, for half the memory.")  # fmt: skip
@click.option("--host-memory", is_flag=True,
              help="Trajectories in the host's memory, beside a model on a GPU.")  # fmt: skip
@click.option("--scratch", type=PathTo(exists=True, file_okay=False),
              help="Folder for trajectories in files, in place of memory.")  # fmt: skip
@resume_options
@click.option("--out", type=PathTo(file_okay=False), default="schedules",
              show_default=True, help="Folder for the schedules and their plot.")  # fmt: skip
@quiet_option
@log_option
def search(
    choice: Choice,
    steps: list[int],
    samples: int,
    seed: int,
    teacher_steps: int,
    grid: str,
    teacher_solver: str,
    solver: str,
    fixed_order: bool,
    metric: Metric,
    scope: str,
    reduce: str | None,
    aggregate: str | None,
    group: int | None,
    start: str | None,
    host: str | None,
    shift: float,
    quality: str | None,
    budget: int | None,
    beam: int,
    off_grid: bool,
    amplitude: tuple[float, float] | None,
    max_batch: int | None,
    storage: str | None,
    host_memory: bool,
    scratch: Path | None,
    resume: Path | None,
    keep: bool,
    out: Path,
    quiet: bool,
    dry_run: bool = False,
) -> None:
    """Search schedules and write one JSON file per budget.

    Files are called MODEL-STEPS.json (MODEL-STEPS-SAMPLE.json for an instance search without
    --aggregate). While the search lasts, OUT holds a checkpoint: --resume OUT goes on from there,
    to the same schedules.

    \b
    oss search --pipeline DIR --prompts prompts.txt --teacher-steps 100 --steps 8,10,20
    """
    # Whatever can be wrong is found before the teacher takes its time.
    make_objective(scope, reduce, aggregate, start or "free")
    if group is not None and scope != "instance":
        raise click.UsageError("--group: a joint search compares all samples at every step; "
                               "expected --scope instance")  # fmt: skip
    measures: dict[str, Any] = {"samples": samples, "budget": budget, "width": beam}
    measures |= {"solver": solver, "off_grid": off_grid, "metric": metric}
    make_plan(quality, scope, teacher_steps, steps, start or "free", **measures)
    check_writable(out)
    model = choice.load()
    if isinstance(metric, EvaluatedMetric) and metric.module is not None:
        find_module(model, metric.module)
    times = teacher_times(model, teacher_steps, grid)
    needs = None if host is None else export.needs(host, model.path)
    if shift != 1 and (needs is None or not needs.shifts):
        raise click.UsageError("--shift: expected --for a host that shifts this model's timesteps")
    if host is not None and needs is not None:
        if host in export.FORMATS:
            first = float(times[-1]) if needs.pinned else float(times[-2])
            export.get(host).check_path(model.path, first)
        if needs.pinned and start == "free":
            raise click.UsageError(f"--start: {host} needs a pinned start, got free")
        if needs.whole_timesteps and off_grid:
            raise click.UsageError(f"--off-grid: {host} takes whole timesteps only")
        if solver not in needs.solvers:
            raise click.UsageError(
                f"--solver: expected one that {host} has for a {model.path.name} path "
                f"({', '.join(needs.solvers)}), got {solver}"
            )
        fixed_order = True
        start = "pinned" if needs.pinned else start
        times = export.whole_grid(times, model.path, shift) if needs.whole_timesteps else times
    if len(times) - 1 < teacher_steps:
        note(f"the teacher's grid has {len(times) - 1} steps")
    check_budgets(steps, len(times) - 1)
    if host == export.DIFFUSERS and isinstance(model, PipelineModel):
        _try_scheduler(model, times, min(steps), solver)
    measures["clean"] = is_clean(times)
    planned = make_plan(quality, scope, len(times) - 1, steps, start or "free", **measures)
    evaluations = solvers.evaluations(solvers.get(teacher_solver), times.flip(0).tolist())
    if not quiet:
        click.echo(f"teacher: {evaluations} evaluations per sample; {planned}", err=True)
    initial = model.noise(samples, seed, start=float(times[-1]))
    if host_memory or scratch is not None:
        initial = initial.cpu()
    calls = math.ceil(samples / Evaluator(model, samples, max_batch).block)
    if calls < model.at_once:
        note(
            f"{model.at_once} processes share {calls} of the model's calls at a time in the "
            f"teacher; --max-batch {max(1, samples // model.at_once)} makes them more"
        )
    teach = functools.partial(
        make_teacher,
        times=times,
        solver=teacher_solver,
        max_batch=max_batch,
        keep_x0=metric.needs_x0,
        storage=None if storage is None else getattr(torch, storage),
        scratch=scratch,
    )
    options: dict[str, Any] = {
        "quality": quality,
        "budget": budget,
        "reduce": reduce,
        "aggregate": aggregate,
        "start": start or "free",
        "solver": solver,
        "fixed_order": fixed_order,
        "metric": metric,
        "beam": beam,
        "off_grid": off_grid,
        "max_batch": max_batch,
    }
    looks_inside = isinstance(metric, EvaluatedMetric) and metric.module is not None
    if looks_inside and keep:
        note("no checkpoint: the metric looks inside the network")
    keep = keep and not looks_inside
    # Of a search in groups, the first one's teacher and that of the group at hand.
    at_once, teachers = initial[:group].nbytes, 1 if samples <= (group or samples) else 2
    moves = solver == "euler" and metric == XT and beam == 1
    kept = planned.kept(at_once, len(times) * moves, LEAST_BYTES)
    kept += teachers * evaluations * at_once
    if dry_run:
        if group is None:
            outline = teach(model, initial, dry_run=True)
            taken = search_schedules(model, outline, steps, scope=scope, dry_run=True, **options)
        else:
            taken = estimate_groups(model, initial, steps, group=group, teach=teach, **options)
            if amplitude is not None:  # for every schedule the teachers are made once more
                taken = taken.with_teachers(1 + len(steps) * (1 if aggregate else samples))
        checkpoint = [Held("checkpoint", kept, out)] * keep
        click.echo(replace(taken, kept=tuple(checkpoint)))
        return
    note_earlier_run(out)
    options["progress"] = not quiet
    with resumable(model, out, resume=resume is not None, keep=keep, size=kept) as (answers, notes):
        if group is None:
            trajectory = teach(answers, initial, progress=not quiet)
            result = search_schedules(answers, trajectory, steps, scope=scope, **options)
        else:
            result = search_groups(answers, initial, steps, group=group, teach=teach, **options)
            trajectory = result.trajectory
        found = _contenders(result, model.name, "; ".join(notes))
        if amplitude is not None:
            model.most_rows = answers.most_rows
            for n, c in enumerate(found):
                assert c.schedule is not None
                made: Iterable[Trajectory] = [trajectory]
                if group is not None:  # made once more: there was never room for all of them
                    made = (teach(*part) for part in in_groups(model, initial, group))
                schedule = _calibrated(answers, made, c.schedule, amplitude)
                found[n] = replace(c, schedule=schedule)
        wrote = _write(model, trajectory, result, found, out)
    click.echo(f"{result.summary()}\n{wrote}")  # now that whoever reads this may have gone


_UNPLANNED: dict[str, Any] = {"resume": None, "quiet": True, "log": None}
plan = click.Command(
    "plan",
    callback=functools.partial(search.callback or search, **_UNPLANNED, dry_run=True),
    params=[p for p in search.params if p.name not in _UNPLANNED],
    help="""Say what a search will take: evaluations, memory, disk and time.

    The options are those of `oss search`. The model is called a few times, and nothing is written.

    \b
    oss plan --pipeline DIR --prompts prompts.txt --teacher-steps 100 --steps 8,10,20
    """,
)


def _try_scheduler(model: PipelineModel, times: Tensor, steps: int, solver: str) -> None:
    """A note if the pipeline's own scheduler does not take a schedule of this grid and solver."""
    # Some stretch schedules so that the last step starts where the teacher's does: this one's does.
    count = len(times) - 1
    rows = [*(1 + row for row in even_rows(count - 1, steps - 1)), 0] if steps > 1 else [count, 0]
    trial = Schedule.from_indices(
        rows, times.tolist(), model=model.name, model_hash="", path=model.path, solver=solver
    )
    try:
        export.arguments(trial, model.host.scheduler, mu=model.mu)
    except ValueError as error:  # an ExportError, or the scheduler's own
        note(f"the pipeline's own scheduler cannot be given the schedules: {error}")


def _write(
    model: Model,
    trajectory: Trajectory,
    result: SearchResult,
    found: list[Contender],
    out: Path,
) -> str:
    """The run with its schedules and their pictures to ``out``; gives what is to be said of it."""
    each = result.objective.scope == "instance"
    spread = {count: result.spread(count) for count in result.steps} if each else {}
    run = run_of(
        model, trajectory, found, table=result.mean_cost(), spread=spread,
        calibration=result.samples,
    )  # fmt: skip
    run.save(out)
    plotted = {c.name: c.schedule for c in run.contenders if c.schedule is not None}
    plotted |= {f"uniform {count}": uniform(trajectory, count) for count in result.steps}
    plotted = dict(sorted(plotted.items(), key=lambda item: item[1].steps))
    plot_schedules(plotted, out / "schedules.png")
    pictures = ["schedules.png"]
    if result.objective.aggregate is not None:
        averaged = {c.name: c.schedule for c in found if c.schedule is not None}
        around = {c.name: spread[c.steps] for c in found}
        plot_spread(averaged, around, out / "spread.png")
        pictures.append("spread.png")
    wrote = [f"{len(run.contenders)} schedules", *pictures]
    return f"wrote {', '.join(wrote[:-1])} and {wrote[-1]} to {out}"


def _calibrated(
    model: Model, teachers: Iterable[Trajectory], schedule: Schedule, levels: tuple[float, float]
) -> Schedule:
    """A leg of the run that ``model`` answers, whose teachers may have to be made."""
    leg = model.leg()
    if leg.there:
        return leg.take(lambda there: Schedule.from_json(to_text(there["schedule"])))
    calibrated = calibrate(teachers, schedule, levels=levels)
    leg.reached({"schedule": to_kept(calibrated.to_json())})
    return calibrated


def _contenders(result: SearchResult, model: str, note: str) -> list[Contender]:
    """The schedules found, with the files they go to."""
    found = []
    for count in result.steps:
        name = contender_name(result.plan.quality, count)
        each = result.objective.scope == "instance" and result.objective.aggregate is None
        schedules = result.schedules(count) if each else [result.schedule(count)]
        for b, schedule in enumerate(schedules):
            title, file = (f"{name}, sample {b}", f"-{b}") if each else (name, "")
            found.append(
                Contender(
                    title,
                    result.plan.quality,
                    count,
                    schedule,
                    seconds=result.seconds,
                    note=note,
                    file=f"{file_name(model)}-{count}{file}.json",
                )
            )
    return found
