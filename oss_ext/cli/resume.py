"""Commands that can be cut off and continued: their checkpoint, and ``--resume``."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from oss_ext import words
from oss_ext.checkpoint import Checkpoint, settings_of
from oss_ext.cli.base import ARGUMENTS, PathTo, note
from oss_ext.files import existing_folder
from oss_ext.machine import configuration
from oss_ext.models import Model
from oss_ext.version import __version__

COMMAND = "command"
"""Among what a checkpoint says of its run: the name of the command."""

FOLDER = "checkpoint"
"""Within that of a run, as long as the run lasts."""


class Resumable(click.Command):
    """A command whose ``--resume RUN`` stands for the arguments that RUN was begun with."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        rest = super().parse_args(ctx, args)
        run: Path | None = ctx.params["resume"]
        if run is None:
            return rest
        for parameter in self.params:
            name = parameter.name or ""
            given = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
            if given and name not in ("resume", "quiet", "log"):
                raise click.UsageError(
                    f"{parameter.opts[0]}: expected none beside --resume, which takes all options "
                    "from the run"
                )
        quiet, log = ctx.params["quiet"], ctx.params["log"]
        settings = settings_of(run / FOLDER)
        begun, whose = settings.get(ARGUMENTS), settings.get(COMMAND, ctx.info_name)
        if whose != ctx.info_name:
            raise click.UsageError(
                f"--resume: expected a run of `oss {ctx.info_name}`, got one of `oss {whose}`, "
                f"which `oss {whose} --resume {shlex.quote(str(run))}` goes on with"
            )
        if not isinstance(begun, list) or not all(isinstance(part, str) for part in begun):
            raise click.UsageError(f"--resume: expected a run of `oss {ctx.info_name}` in {run}")
        ctx.meta[ARGUMENTS] = begun
        click.echo(f"resuming: oss {ctx.info_name} {shlex.join(begun)}", err=True)
        rest = super().parse_args(ctx, list(begun))
        log = log or ctx.params["log"]
        ctx.params |= {"resume": run, "out": run, "quiet": quiet, "log": log}
        return rest


def resume_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--resume RUN`` and ``--no-checkpoint``, given as ``resume`` and ``keep``."""
    command = click.option(
        "--resume", type=PathTo(file_okay=False), metavar="RUN",
        help="Go on with what was cut off in this folder; all options are taken from it.",
    )(command)  # fmt: skip
    return click.option(
        "--checkpoint/--no-checkpoint", "keep", default=True, show_default=True,
        help="Keep the model's answers in the folder of the run while it lasts, to go on from.",
    )(command)  # fmt: skip


@contextmanager
def resumable(
    model: Model, run: Path | None, *, resume: bool, keep: bool, size: int, **inputs: Any
) -> Iterator[tuple[Model, list[str]]]:
    """``model`` with its answers kept in ``run`` while the block lasts, and what is to be said of
    those that were there.

    Args:
        model: of the run.
        run: folder of it; None: there is none, and nothing is kept.
        resume: go on from what is kept there.
        keep: whether anything is to be kept.
        size: bytes that this takes at most.
        inputs: what the run depends on beside model and arguments.
    """
    if run is None or not keep:
        yield model, []
        return
    existing = existing_folder(run)
    free = shutil.disk_usage(existing).free
    if size > free and not resume:
        note(
            f"no checkpoint: the answers take up to {words.size(size)}, and {existing} has "
            f"{words.size(free)} left"
        )
        yield model, []
        return
    ctx = click.get_current_context()
    again = f"oss {ctx.info_name} --resume {shlex.quote(str(run))}"
    settings: dict[str, Any] = {
        COMMAND: ctx.info_name,
        ARGUMENTS: ctx.meta[ARGUMENTS],
        "directory": str(Path.cwd()),
        "model": f"{model.name} with hash {model.fingerprint()}",
        "oss_ext": __version__,
        **inputs,
    }
    machine = {name: str(fact) for name, fact in configuration(model.device.type).items()}
    with Checkpoint(run / FOLDER, settings, machine=machine, resume=resume) as checkpoint:
        try:
            yield checkpoint.recorded(model), checkpoint.notes
        except BaseException:
            if checkpoint.is_there():
                click.echo(f"what the model answered is kept: `{again}` goes on", err=True)
            raise
        if resume:
            click.echo(
                f"resumed: {checkpoint.taken} of {checkpoint.kept} model calls were there; times "
                "are of this process"
            )
        for text in checkpoint.notes:
            note(text)
        checkpoint.remove()
