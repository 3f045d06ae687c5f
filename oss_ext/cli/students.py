"""``oss sample`` and ``oss compare``: run schedules and judge them."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from oss_ext.baselines import uniform
from oss_ext.cli.base import (
    Choice,
    batch_option,
    check_images,
    check_picture,
    check_writable,
    force_option,
    load_for,
    load_schedule,
    model_options,
    quiet_option,
    schedules_argument,
)
from oss_ext.evaluate import compare as compare_schedules
from oss_ext.evaluate import score_table
from oss_ext.export import attach
from oss_ext.files import replacing
from oss_ext.models.pipeline import PipelineModel
from oss_ext.report import is_picture_file, plot_samples
from oss_ext.sampling import sample as sample_schedule
from oss_ext.schedule import Schedule
from oss_ext.teacher import teacher as make_teacher


@click.command()
@click.argument("schedule_file", metavar="SCHEDULE")
@model_options
@click.option("--samples", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Seed of the noise.")
@batch_option
@force_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="samples.png",
              show_default=True, help="A picture (.png, .pdf) or .safetensors.")  # fmt: skip
@quiet_option
def sample(
    schedule_file: str,
    choice: Choice,
    samples: int,
    seed: int,
    max_batch: int | None,
    force: bool,
    out: Path,
    quiet: bool,
) -> None:
    """Sample the schedule's model with SCHEDULE."""
    tensors = out.suffix == ".safetensors"
    if not tensors and not is_picture_file(out):
        raise click.UsageError(f"--out: expected a picture or a .safetensors file, got {out}")
    schedule = load_schedule(schedule_file)
    check_writable(out.parent)
    model = load_for([schedule], choice, force)
    if isinstance(model, PipelineModel) and not tensors:
        result = draw(model, schedule, samples, seed, force)
    else:
        if not tensors:
            check_images("--out", model)
        noise = model.noise(samples, seed, start=schedule.teacher_times[-1])
        result = sample_schedule(model, noise, schedule, max_batch=max_batch, progress=not quiet)
    out.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        with replacing(out) as temporary:
            save_file({"samples": result.contiguous()}, temporary)
    else:
        plot_samples({f"{schedule.method} {schedule.steps}": result}, out)
    click.echo(f"wrote {samples} samples to {out}")


def draw(model: PipelineModel, schedule: Schedule, samples: int, seed: int, force: bool) -> Tensor:
    """What the pipeline itself makes with the schedule, ``[samples, 3, H, W]`` in [-1, 1].

    Of videos, the frame in the middle.
    """
    images: list[Tensor] = []
    with attach(schedule, model.pipe, force=force):
        for first in range(0, samples, model.slots):
            call = model.call(first // model.slots, model.seeds(first, seed))
            made = model.pipe(**call | {"num_inference_steps": schedule.steps})
            pictures = getattr(made, "images", None)
            if pictures is None:
                pictures = [video[len(video) // 2] for video in made.frames]
            for picture in pictures:
                pixels = torch.from_numpy(np.array(picture))
                scale = 127.5 if pixels.dtype == torch.uint8 else 0.5
                images.append((pixels / scale - 1).permute(2, 0, 1).float())
    return torch.stack(images[:samples])


@click.command()
@schedules_argument
@model_options
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True,
              help="Held-out samples.")  # fmt: skip
@click.option("--seed", default=1, show_default=True,
              help="Seed of the held-out noise; not the search's.")  # fmt: skip
@batch_option
@force_option
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write teacher and students side by side (image models).")  # fmt: skip
@quiet_option
def compare(
    schedule_files: tuple[str, ...],
    choice: Choice,
    samples: int,
    seed: int,
    max_batch: int | None,
    force: bool,
    picture: Path | None,
    quiet: bool,
) -> None:
    """Held-out PSNR to the teacher: each SCHEDULE beside uniform spacing of as many steps.

    A SCHEDULE is a file, or preset:NAME beside files: it is then judged by their teacher.
    """
    if picture is not None:
        check_picture("--picture", picture)
    loaded = [load_schedule(name) for name in schedule_files]
    searched = [s for s in loaded if s.model_hash] or loaded[:1]
    grids = {(s.teacher_times, s.teacher_solver) for s in searched}
    if len(grids) > 1:
        raise click.UsageError("the schedules have different teachers; compare them one by one")
    model = load_for(loaded, choice, force)
    if picture is not None:
        check_images("--picture", model)
    times, solver = grids.pop()
    held_out = make_teacher(
        model,
        model.noise(samples, seed, start=times[-1]),
        times=torch.tensor(times, dtype=torch.float64),
        solver=solver,
        max_batch=max_batch,
        progress=not quiet,
    )
    contest = {f"uniform {s.steps}": uniform(held_out, s.steps) for s in loaded}
    names = [Path(name).stem for name in schedule_files]
    unique = len(set(names)) == len(names)
    contest |= dict(zip(names if unique else schedule_files, loaded, strict=True))
    contest = dict(sorted(contest.items(), key=lambda item: item[1].steps))
    scores = compare_schedules(model, held_out, contest, max_batch=max_batch, progress=not quiet)
    click.echo(score_table(scores))
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        rows = {f"teacher {held_out.steps}": held_out.final}
        plot_samples(rows | {score.name: score.images for score in scores}, picture)
        click.echo(f"wrote {picture}")
