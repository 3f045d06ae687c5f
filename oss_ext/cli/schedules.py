"""``oss show``, ``oss export`` and ``oss presets``: schedules without their models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from oss_ext import export, presets
from oss_ext.cli.base import (
    PRESET,
    PathTo,
    check_picture,
    check_writable,
    load_schedule,
    note,
    schedule_argument,
    schedules_argument,
)
from oss_ext.files import read_text, replacing
from oss_ext.models import pipeline_load
from oss_ext.report import plot_schedules, schedule_table


@click.command()
@schedules_argument
@click.option("--plot", type=PathTo(dir_okay=False), help="Also write a plot.")
def show(schedule_files: tuple[str, ...], plot: Path | None) -> None:
    """Print schedules as tables, and plot them. A SCHEDULE is a file or preset:NAME."""
    if plot is not None:
        check_picture("--plot", plot)
    schedules = {name: load_schedule(name) for name in schedule_files}
    click.echo("\n\n".join(schedule_table(schedule) for schedule in schedules.values()))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_schedules(schedules, plot)
        click.echo(f"wrote {plot}")


@click.command("export")
@schedule_argument
@click.option("--to", "host", required=True,
              type=click.Choice([*export.FORMATS, export.DIFFUSERS]), help="Host.")  # fmt: skip
@click.option("--shift", type=float, default=1.0, show_default=True,
              help="Shift that the host applies again (lightx2v, sdnext).")  # fmt: skip
@click.option("--scheduler", "scheduler_folder", metavar="DIR",
              help="For diffusers: the folder of the pipeline, for what its call takes, or of its "
              "scheduler, for set_timesteps.")  # fmt: skip
@click.option("--mu", type=float,
              help="For diffusers: the resolution shift that the pipeline computes.")  # fmt: skip
@click.option("--out", type=PathTo(dir_okay=False),
              help="Write to a file. [default: print]")  # fmt: skip
@click.option("--force", is_flag=True, help="Also where the host would run something else.")
def export_schedule(
    schedule_file: str,
    host: str,
    shift: float,
    scheduler_folder: str | None,
    mu: float | None,
    out: Path | None,
    force: bool,
) -> None:
    """Turn SCHEDULE, a file or preset:NAME, into what a host takes.

    \b
    oss export schedules/digits-10.json --to comfyui
    oss export preset:sdxl-ays-10 --to diffusers --scheduler DIR
    """
    shifting = [name for name, form in export.FORMATS.items() if form.shifts]
    for option, there, hosts in (
        ("--scheduler", scheduler_folder is not None, [export.DIFFUSERS]),
        ("--mu", mu is not None, [export.DIFFUSERS]),
        ("--shift", shift != 1, shifting),
    ):
        if there and host not in hosts:
            beside = ", ".join(hosts)
            raise click.UsageError(f"{option}: expected --to {beside} beside it, got --to {host}")
    if out is not None:
        check_writable(out.parent)
    schedule = load_schedule(schedule_file)
    if schedule.amplitude is not None:
        note("no host calibrates amplitudes; this is the schedule without")
    if host == export.DIFFUSERS:
        if scheduler_folder is None:
            raise click.UsageError(
                "--scheduler: expected the folder of the pipeline or of its scheduler, because "
                "schedulers shift and respace what they are given"
            )
        scheduler = load_scheduler(scheduler_folder)
        pipeline, name = load_pipeline_class(scheduler_folder), type(scheduler).__name__
        if pipeline is None:
            given = export.arguments(schedule, scheduler, mu=mu, force=force)
            about = f"arguments of set_timesteps for {name}"
        else:
            given = export.class_arguments(schedule, pipeline, scheduler, mu=mu, force=force)
            about = f"arguments of pipe(...) for {pipeline.__name__} with {name}"
        text = json.dumps({name: list(map(float, values)) for name, values in given.items()})
    else:
        text = export.to(schedule, host, shift=shift, force=force)
        form = export.FORMATS[host]
        about = form.about(schedule.solver, shift)
        if form.final_zero is not None:
            about += f"; {'ends with' if form.final_zero else 'without'} the final sigma"
    click.echo(about, err=True)
    if out is None:
        click.echo(text)
        return
    with replacing(out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    click.echo(f"wrote {out}", err=True)


def load_scheduler(folder: str) -> Any:
    """The scheduler of a pipeline's folder, or the one that the folder holds."""
    diffusers = pipeline_load.import_diffusers()
    inside = Path(folder) / "scheduler"
    where = inside if inside.is_dir() else Path(folder)
    try:
        # Not ``parse_json``: diffusers writes infinities.
        config = json.loads(read_text(where / "scheduler_config.json"))
        kind = config.get("_class_name") if isinstance(config, dict) else None
        return pipeline_load.diffusers_class(diffusers, kind, "_class_name").from_config(config)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"--scheduler: expected a scheduler in {where}: {error}") from None


def load_pipeline_class(folder: str) -> type | None:
    """The class of the pipeline in a folder; None without one, or where diffusers has it not."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return None
    try:
        config = json.loads(read_text(index))
    except ValueError as error:
        raise ValueError(f"--scheduler: expected a pipeline's {index}: {error}") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    found = getattr(pipeline_load.import_diffusers(), name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) else None


@click.command("presets")
def list_presets() -> None:
    """List the published schedules, usable as preset:NAME in place of a file."""
    for name in presets.names():
        preset = presets.load(name)
        click.echo(f"{PRESET}{name}\n    {preset.about}\n    from {preset.source}")
