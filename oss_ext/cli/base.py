"""What the commands share: option types, the choice of a model, and checks before long work."""

from __future__ import annotations

import errno
import functools
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from oss_ext import metrics, models, presets, solvers
from oss_ext.amplitude import check_levels
from oss_ext.events import one_line, tell
from oss_ext.files import existing_folder
from oss_ext.machine import configuration, peak_memory
from oss_ext.models import Model, pipeline_load
from oss_ext.models.pipeline_call import TEXTS
from oss_ext.noise import same_noise
from oss_ext.report import is_image, is_picture_file
from oss_ext.runs import RUN, Contender, Run
from oss_ext.schedule import Schedule
from oss_ext.sharing import choose_device, sharing
from oss_ext.trajectory import Trajectory

PRESET = "preset:"
DEFAULT_MODEL = "digits"
ARGUMENTS = "arguments"
"""In the context of a command that can be resumed: those that it began with."""


class Budgets(click.ParamType):  # type: ignore[type-arg]
    """Step counts such as ``5,10``."""

    name = "INT[,INT...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"expected whole numbers separated by commas, got {value!r}", param, ctx)


class Levels(click.ParamType):  # type: ignore[type-arg]
    """Two levels of quantiles such as ``0.05,0.95``."""

    name = "LO,HI"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            levels = [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"expected two numbers separated by a comma, got {value!r}", param, ctx)
        try:
            return check_levels(levels)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MetricName(click.ParamType):  # type: ignore[type-arg]
    """A name that ``metrics.get`` knows."""

    name = "METRIC"

    def convert(self, value: Any, param: Any, ctx: Any) -> metrics.Metric:
        try:
            return metrics.get(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class PathTo(click.Path):
    """A path that is not empty, as a shell's variable that is not set is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":
            self.fail("expected a path, got an empty one", param, ctx)
        return super().convert(value, param, ctx)


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """``key=value``; a value is JSON where it can be, else, but for prompts, split at commas."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"expected key=value, got {value!r}", param, ctx)
        whole = _literal(text)
        if isinstance(whole, str) and "," in text and key not in TEXTS:
            return key, [_literal(part) for part in text.split(",")]
        return key, whole


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Choice:
    """The model that a command's options describe."""

    name: str | None
    pipeline: str | None
    prompts: Path | None
    options: dict[str, Any]
    pipeline_options: dict[str, Any]  # those that were given

    def load(self, name: str = DEFAULT_MODEL) -> Model:
        """The pipeline or the model that is given, else the model called ``name``.

        Its calls are shared with the other processes of the run, which end here when it does.
        """
        choose_device()
        shared = click.get_current_context().with_resource(sharing(self._load(name)))
        if shared is None:
            raise click.exceptions.Exit
        return shared

    def _load(self, name: str) -> Model:
        if self.pipeline is not None and self.name is not None:
            raise click.UsageError("--model: expected none beside --pipeline")
        if self.pipeline is None:
            given = [*self.pipeline_options] + ["prompts"] * (self.prompts is not None)
            if given:
                raise click.UsageError(f"--{given[0]} belongs to --pipeline; use --set for models")
            return models.load(name if self.name is None else self.name, **self.options)
        if "num_inference_steps" in self.options:
            raise click.UsageError(
                "--set: expected no num_inference_steps; --teacher-steps or the schedule says it"
            )
        if not sys.stderr.isatty():
            pipeline_load.hide_loading_bars()
        prompts = None if self.prompts is None else pipeline_load.read_prompts(self.prompts)
        try:
            return models.from_folder(
                self.pipeline, prompts, call=self.options, **self.pipeline_options
            )
        except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
                TypeError) as error:  # fmt: skip
            # The pipeline's own errors in a first step, which do not say where they come from.
            raise ValueError(
                f"pipeline: {self.pipeline} cannot be called with these options: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose a model; the command gets them as one ``choice``."""

    @click.option(
        "--model",
        "model_name",
        metavar="NAME|FILE.py:FUNCTION",
        help="Model, see `oss models`, or a function of yours that returns one. "
        f"[default: that of a SCHEDULE that is given, or {DEFAULT_MODEL}]",
    )
    @click.option(
        "--set",
        "options",
        type=KeyValue(),
        multiple=True,
        help="Option of the model, e.g. --set labels=3,1,4; with --pipeline, argument of its "
        "call, e.g. --set height=1024. Values are JSON, or lists with commas (prompts are not). "
        "Repeatable.",
    )
    @click.option("--pipeline", metavar="DIR", help="A diffusers pipeline: folder or name.")
    @click.option(
        "--prompts",
        type=PathTo(dir_okay=False),
        help="Prompts for --pipeline: UTF-8 text, one a line.",
    )
    @click.option("--scheduler", metavar="CLASS", help="Scheduler in place of the pipeline's own.")
    @click.option("--batch", type=click.IntRange(1), help="Prompts per call of the pipeline.")
    @click.option("--dtype", type=click.Choice(list(pipeline_load.DTYPES)),
                  help="Weights of the pipeline. [default: float32]")  # fmt: skip
    @click.option("--device", help="Where the pipeline runs. [default: cpu]")
    @click.option("--offload", type=click.Choice(pipeline_load.OFFLOADS),
                  help="Keep on the device only what runs.")  # fmt: skip
    @click.option(
        "--lora", multiple=True, metavar="FILE", help="Adapter for the pipeline. Repeatable."
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        model_name: str | None,
        options: tuple[tuple[str, Any], ...],
        pipeline: str | None,
        prompts: Path | None,
        scheduler: str | None,
        batch: int | None,
        dtype: str | None,
        device: str | None,
        offload: str | None,
        lora: tuple[str, ...],
        **rest: Any,
    ) -> None:
        of_pipeline = {"scheduler": scheduler, "batch": batch, "dtype": dtype, "device": device,
                       "offload": offload, "lora": lora}  # fmt: skip
        given = {name: value for name, value in of_pipeline.items() if value not in (None, ())}
        command(*args, choice=Choice(model_name, pipeline, prompts, dict(options), given), **rest)

    return wrapped


teacher_solver_option = click.option(
    "--teacher-solver", type=click.Choice(list(solvers.SOLVERS)), metavar="NAME", default="euler",
    show_default=True, help="Teacher's solver; see `oss solvers`.",
)  # fmt: skip
solver_option = click.option(
    "--solver", type=click.Choice(list(solvers.SOLVERS)), metavar="NAME", default="euler",
    show_default=True, help="Solver of the students searched for; see `oss solvers`.",
)  # fmt: skip
batch_option = click.option(
    "--max-batch", type=click.IntRange(1), help="Rows per model call. [default: all samples]"
)
force_option = click.option(
    "--force", is_flag=True, help="Go on with a schedule of another model, path or time shift."
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")
schedule_argument = click.argument("schedule_file", metavar="SCHEDULE")
schedules_argument = click.argument(
    "schedule_files", metavar="SCHEDULE...", nargs=-1, required=True
)


def load_schedule(name: str | Path) -> Schedule:
    """The schedule in a file, or the preset called ``preset:NAME``."""
    text = str(name)
    if text.startswith(PRESET):
        return presets.load(text.removeprefix(PRESET)).schedule
    return Schedule.load(text)


def load_for(schedules: list[Schedule], choice: Choice, force: bool = False) -> Model:
    """The model that the schedules name, or the pipeline, with the user's options."""
    searched = [schedule for schedule in schedules if schedule.model_hash]
    names = {schedule.model for schedule in searched}
    if len(names) > 1:
        raise click.UsageError(f"the schedules belong to different models: {sorted(names)}")
    named = next(iter(names), schedules[0].model)
    if choice.pipeline is choice.name is None and named not in models.MODELS:
        raise click.UsageError(
            f"the model {named!r} is not a bundled one; give its --pipeline, or --model "
            "FILE.py:FUNCTION"
        )
    model = choice.load(named)
    if names and model.name not in names and not force:
        raise click.UsageError(
            f"the schedule was searched for {names.pop()}, got {model.name}; --force goes on"
        )
    for schedule in schedules:
        if not (force or same_noise(schedule.path, model.path)):
            raise click.UsageError(
                f"the schedule is of the path {schedule.path!r:.150}, but {model.name!r} has "
                f"{model.path!r:.150}; --force goes on"
            )
    if any(schedule.model_hash != model.fingerprint() for schedule in searched):
        note(
            f"searched with other weights or options than this {model.name!r} "
            f"({model.fingerprint()})"
        )
    return model


def note(text: str) -> None:
    """Something to know of what the command gives, for the terminal and for those who follow."""
    click.echo(f"note: {text}", err=True)
    tell("note", text=text)


def check_writable(folder: Path) -> None:
    """Prove before any long work that ``folder`` can be written to, or made; leave nothing."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(errno.ENOENT, "a link to what is not there", str(path))
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def note_earlier_run(folder: Path) -> None:
    """Say so before another one is written over it."""
    if (folder / RUN).exists():
        note(f"{folder} holds an earlier run; its schedules of the same names will be replaced")


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


def run_of(model: Model, teacher: Trajectory, contenders: Sequence[Contender], **found: Any) -> Run:
    """The run that this command was, as data; ``found`` as ``Run`` has it."""
    return Run(
        command=command_line(),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        machine={name: str(fact) for name, fact in configuration(model.device.type).items()},
        model=model.name,
        data_range=teacher.data_range,
        teacher_steps=teacher.steps,
        teacher_nfe=teacher.nfe,
        teacher_seconds=teacher.seconds,
        peak_bytes=peak_memory(model.device),
        contenders=tuple(contenders),
        **{"calibration": teacher.samples, "held_out": 0} | found,
    )


def command_line() -> str:
    """Of this run; where it was resumed, as it began."""
    ctx = click.get_current_context()
    arguments = [ctx.info_name, *ctx.meta[ARGUMENTS]] if ARGUMENTS in ctx.meta else sys.argv[1:]
    # A name of bytes that are no text would make the file that keeps this unreadable.
    return "oss " + shlex.join(arguments).encode(errors="replace").decode()
