"""The command line ``oss``: parse, call, print."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

import oss_ext
from oss_ext import models, ops
from oss_ext.baselines import uniform
from oss_ext.evaluate import compare as compare_schedules
from oss_ext.evaluate import score_table
from oss_ext.files import replacing
from oss_ext.models import Model
from oss_ext.report import (
    is_image,
    is_picture_file,
    plot_samples,
    plot_schedules,
    schedule_table,
)
from oss_ext.sampling import sample as sample_schedule
from oss_ext.schedule import AGGREGATES, SCOPES, STARTS, Schedule
from oss_ext.search import check_budgets, make_objective
from oss_ext.search import search as search_schedules
from oss_ext.teacher import teacher as make_teacher

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


class Budgets(click.ParamType):  # type: ignore[type-arg]
    """Step counts such as ``5,10``."""

    name = "INT[,INT...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"expected whole numbers separated by commas, got {value!r}", param, ctx)


class ModelOption(click.ParamType):  # type: ignore[type-arg]
    """``key=value`` for the model's ``load``; a value with commas is a list."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"expected key=value, got {value!r}", param, ctx)
        whole = _literal(text)
        if isinstance(whole, str) and "," in text:
            return key, [_literal(part) for part in text.split(",")]
        return key, whole


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


model_option = click.option(
    "--model", "model_name", default="digits", show_default=True, help="Model; see `oss models`."
)
set_option = click.option(
    "--set",
    "options",
    type=ModelOption(),
    multiple=True,
    help="Option of the model, e.g. --set labels=3,1,4 --set guidance=2. Repeatable.",
)
batch_option = click.option(
    "--max-batch", type=click.IntRange(1), help="Rows per model call. [default: all samples]"
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(oss_ext.__version__, prog_name="oss")
def cli() -> None:
    """Optimal few-step sampling schedules for diffusion and flow-matching models.

    \b
    oss search --model digits --steps 5,10 --out schedules
    oss show schedules/digits-10.json
    oss compare schedules/digits-5.json schedules/digits-10.json
    oss sample schedules/digits-10.json --out samples.png
    """


@cli.command()
@model_option
@set_option
@click.option("--steps", type=Budgets(), default="5,10", show_default=True,
              help="Budgets to write a schedule for; one search serves all.")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=16, show_default=True,
              help="Calibration samples.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the calibration noise.")
@click.option("--teacher-steps", type=click.IntRange(1), default=200, show_default=True)
@click.option("--scope", type=click.Choice(SCOPES), default="joint", show_default=True,
              help="One schedule for all samples, or one each.")  # fmt: skip
@click.option("--reduce", type=click.Choice(["log_mean", "mean"]),
              help="Joint search: geometric or arithmetic mean of the errors. "
              "[default: log_mean]")  # fmt: skip
@click.option("--aggregate", type=click.Choice(AGGREGATES),
              help="Instance search: write the mean or median schedule.")  # fmt: skip
@click.option("--start", type=click.Choice(STARTS), default="free", show_default=True,
              help="Whether the first step may start below the teacher's first time.")  # fmt: skip
@batch_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="schedules",
              show_default=True, help="Folder for the schedules and their plot.")  # fmt: skip
@quiet_option
def search(
    model_name: str,
    options: tuple[tuple[str, Any], ...],
    steps: list[int],
    samples: int,
    seed: int,
    teacher_steps: int,
    scope: str,
    reduce: str | None,
    aggregate: str | None,
    start: str,
    max_batch: int | None,
    out: Path,
    quiet: bool,
) -> None:
    """Search schedules and write one JSON file per budget.

    Files are called MODEL-STEPS.json (MODEL-STEPS-SAMPLE.json for an instance search without
    --aggregate). Nothing is written before the search has ended.
    """
    # Whatever can be wrong is found before the teacher takes its time.
    check_budgets(steps, teacher_steps)
    make_objective(scope, reduce, aggregate, start)
    check_writable(out)
    model = models.load(model_name, **dict(options))
    trajectory = make_teacher(
        model, model.noise(samples, seed), teacher_steps, max_batch=max_batch, progress=not quiet
    )
    result = search_schedules(
        model,
        trajectory,
        steps,
        scope=scope,
        reduce=reduce,
        aggregate=aggregate,
        start=start,
        max_batch=max_batch,
        progress=not quiet,
    )
    click.echo(result.summary())
    out.mkdir(parents=True, exist_ok=True)
    plotted = {}
    for budget in result.steps:
        plotted[f"uniform {budget}"] = uniform(trajectory, budget)
        if scope == "instance" and aggregate is None:
            for b, schedule in enumerate(result.schedules(budget)):
                schedule.save(out / f"{model_name}-{budget}-{b}.json")
                plotted[f"OSS {budget}, sample {b}"] = schedule
            continue
        schedule = result.schedule(budget)
        schedule.save(out / f"{model_name}-{budget}.json")
        plotted[f"OSS {budget}"] = schedule
    plot_schedules(plotted, out / "schedules.png")
    click.echo(f"wrote {len(plotted) - len(result.steps)} schedules and schedules.png to {out}")


@cli.command()
@click.argument("schedule_file", metavar="SCHEDULE", type=click.Path(path_type=Path))
@set_option
@click.option("--samples", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Seed of the noise.")
@batch_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="samples.png",
              show_default=True, help="A picture (.png, .pdf) or .safetensors.")  # fmt: skip
@quiet_option
def sample(
    schedule_file: Path,
    options: tuple[tuple[str, Any], ...],
    samples: int,
    seed: int,
    max_batch: int | None,
    out: Path,
    quiet: bool,
) -> None:
    """Sample the schedule's model with SCHEDULE."""
    tensors = out.suffix == ".safetensors"
    if not tensors and not is_picture_file(out):
        raise click.UsageError(f"--out: expected a picture or a .safetensors file, got {out}")
    schedule = Schedule.load(schedule_file)
    check_writable(out.parent)
    model = load_for([schedule], options)
    if not tensors:
        check_images("--out", model)
    noise = model.noise(samples, seed)
    result = sample_schedule(model, noise, schedule, max_batch=max_batch, progress=not quiet)
    out.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        with replacing(out) as temporary:
            save_file({"samples": result.contiguous()}, temporary)
    else:
        plot_samples({f"{schedule.method} {schedule.steps}": result}, out)
    click.echo(f"wrote {samples} samples to {out}")


@cli.command()
@click.argument("schedule_files", metavar="SCHEDULE...", type=click.Path(path_type=Path),
                nargs=-1, required=True)  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Also write a plot.")
def show(schedule_files: tuple[Path, ...], plot: Path | None) -> None:
    """Print schedules as tables, and plot them."""
    if plot is not None:
        check_picture("--plot", plot)
    schedules = {str(path): Schedule.load(path) for path in schedule_files}
    click.echo("\n\n".join(schedule_table(schedule) for schedule in schedules.values()))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_schedules(schedules, plot)
        click.echo(f"wrote {plot}")


@cli.command()
@click.argument("schedule_files", metavar="SCHEDULE...", type=click.Path(path_type=Path),
                nargs=-1, required=True)  # fmt: skip
@set_option
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True,
              help="Held-out samples.")  # fmt: skip
@click.option("--seed", default=1, show_default=True,
              help="Seed of the held-out noise; not the search's.")  # fmt: skip
@batch_option
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write teacher and students side by side (image models).")  # fmt: skip
@quiet_option
def compare(
    schedule_files: tuple[Path, ...],
    options: tuple[tuple[str, Any], ...],
    samples: int,
    seed: int,
    max_batch: int | None,
    picture: Path | None,
    quiet: bool,
) -> None:
    """Held-out PSNR to the teacher: each SCHEDULE beside uniform spacing of as many steps."""
    if picture is not None:
        check_picture("--picture", picture)
    loaded = [Schedule.load(path) for path in schedule_files]
    grids = {(s.teacher_times, s.teacher_solver) for s in loaded}
    if len(grids) > 1:
        raise click.UsageError("the schedules have different teachers; compare them one by one")
    model = load_for(loaded, options)
    if picture is not None:
        check_images("--picture", model)
    times, solver = grids.pop()
    held_out = make_teacher(
        model,
        model.noise(samples, seed),
        times=torch.tensor(times, dtype=torch.float64),
        solver=solver,
        max_batch=max_batch,
        progress=not quiet,
    )
    contest = {f"uniform {s.steps}": uniform(held_out, s.steps) for s in loaded}
    names = [path.stem for path in schedule_files]
    unique = len(set(names)) == len(names)
    contest |= dict(zip(names if unique else map(str, schedule_files), loaded, strict=True))
    contest = dict(sorted(contest.items(), key=lambda item: item[1].steps))
    scores = compare_schedules(model, held_out, contest, max_batch=max_batch, progress=not quiet)
    click.echo(score_table(scores))
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        rows = {f"teacher {held_out.steps}": held_out.final}
        plot_samples(rows | {score.name: score.images for score in scores}, picture)
        click.echo(f"wrote {picture}")


@cli.command("models")
def list_models() -> None:
    """List the models and their options."""
    for name, load in models.MODELS.items():
        summary = (inspect.getdoc(load) or "").split("\n")[0]
        click.echo(f"{name}: {summary}")
        for option, parameter in inspect.signature(load).parameters.items():
            click.echo(f"    --set {option}=...  default {parameter.default!r}")


@cli.command()
def backends() -> None:
    """List the kernel backends: which one serves each device here, and why others cannot."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for backend in ops.BACKENDS.values():
        click.echo(f"{backend.name}: {backend.description}")
        for device in devices:
            serves = "in use" if ops.serving(device) is backend else "available"
            click.echo(f"    {device}: {backend.why_not(device) or serves}")
    for key, value in ops.native.build_info().items():
        click.echo(f"{key}: {value}")


def load_for(schedules: list[Schedule], options: tuple[tuple[str, Any], ...]) -> Model:
    """The model that the schedules name, with the user's options."""
    names = {schedule.model for schedule in schedules}
    if len(names) > 1:
        raise click.UsageError(f"the schedules belong to different models: {sorted(names)}")
    model = models.load(names.pop(), **dict(options))
    if any(schedule.model_hash != model.fingerprint() for schedule in schedules):
        click.echo(
            f"note: searched with other weights or options than this {model.name!r} "
            f"({model.fingerprint()})",
            err=True,
        )
    return model


def check_writable(folder: Path) -> None:
    """Prove before any long work that ``folder`` can be written to, or made; leave nothing."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def check_picture(option: str, path: Path) -> None:
    """``path`` can be written and stands for a picture format."""
    if not is_picture_file(path):
        raise click.UsageError(f"{option}: expected a picture such as {path.stem}.png, got {path}")
    check_writable(path.parent)


def check_images(option: str, model: Model) -> None:
    """The model's samples can be shown."""
    if not is_image(model.shape):
        raise click.UsageError(
            f"{option}: expected a model of images [1 or 3, H, W] for a picture, "
            f"got {model.name!r} with samples of shape {list(model.shape)}"
        )


def main() -> None:
    """Entry point: errors are one line on stderr; 0 done, 1 failed, 2 misused, 130 interrupted."""
    try:
        status = cli(prog_name="oss", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        status = INTERRUPTED
    except (ValueError, RuntimeError, OSError) as error:
        # torch appends stack traces to its messages.
        click.echo(f"error: {str(error).splitlines()[0] if str(error) else error!r}", err=True)
        status = 1
    sys.exit(status or 0)
