"""``oss sample``: run a schedule."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from oss_ext.cli.base import (
    Choice,
    PathTo,
    batch_option,
    check_images,
    check_writable,
    force_option,
    load_for,
    load_schedule,
    model_options,
    quiet_option,
    schedule_argument,
)
from oss_ext.export import attach
from oss_ext.files import replacing
from oss_ext.models.pipeline import PipelineModel
from oss_ext.models.pipeline_call import full_strength
from oss_ext.report import is_picture_file, plot_samples, write_images
from oss_ext.sampling import sample as sample_schedule
from oss_ext.schedule import Schedule


@click.command()
@schedule_argument
@model_options
@click.option("--samples", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Seed of the noise.")
@click.option("--amplitude", is_flag=True,
              help="With the amplitude calibration that SCHEDULE holds.")  # fmt: skip
@batch_option
@force_option
@click.option("--out", type=PathTo(), default="samples.png", show_default=True,
              help="A picture of all (.png, .pdf), .safetensors, or a folder, without an ending, "
              "for pictures of each in full size.")  # fmt: skip
@quiet_option
def sample(
    schedule_file: str,
    choice: Choice,
    samples: int,
    seed: int,
    amplitude: bool,
    max_batch: int | None,
    force: bool,
    out: Path,
    quiet: bool,
) -> None:
    """Sample the schedule's model with SCHEDULE."""
    tensors, each = out.suffix == ".safetensors", not out.suffix or out.is_dir()
    if not (tensors or each or is_picture_file(out)):
        raise click.UsageError(
            f"--out: expected a picture, a .safetensors file or a folder without an ending, got "
            f"{out}"
        )
    if each and out.exists() and not out.is_dir():
        raise click.UsageError(f"--out: expected a folder, {out} is a file")
    schedule = load_schedule(schedule_file)
    check_writable(out.parent)
    model = load_for([schedule], choice, force)
    if isinstance(model, PipelineModel) and not tensors:
        if amplitude:
            raise click.UsageError(
                "--amplitude: a pipeline that draws a picture takes its own steps, uncalibrated; "
                "write the states, --out FILE.safetensors"
            )
        if quiet:
            model.pipe.set_progress_bar_config(disable=True)
        result = draw(model, schedule, samples, seed, force)
    else:
        if not tensors:
            check_images("--out", model)
        noise = model.noise(samples, seed, start=schedule.teacher_times[-1])
        result = sample_schedule(
            model, noise, schedule, amplitude=amplitude, max_batch=max_batch, progress=not quiet
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        with replacing(out) as temporary:
            save_file({"samples": result.contiguous()}, temporary)
    elif each:
        write_images(result, out)
    else:
        plot_samples({f"{schedule.method} {schedule.steps}": result}, out)
    click.echo(f"wrote {samples} samples to {out}")


def draw(model: PipelineModel, schedule: Schedule, samples: int, seed: int, force: bool) -> Tensor:
    """What the pipeline itself makes with the schedule, ``[samples, 3, H, W]`` in [-1, 1].

    Of videos, the frame in the middle.
    """
    images: list[Tensor] = []
    fixed = {"num_inference_steps": schedule.steps, **full_strength(model.pipe)}
    with attach(schedule, model.pipe, force=force):
        for first in range(0, samples, model.slots):
            call = model.call(first // model.slots, model.seeds(first, seed))
            made = model.pipe(**call | fixed)
            pictures = getattr(made, "images", None)
            if pictures is None:
                pictures = [video[len(video) // 2] for video in made.frames]
            for picture in pictures:
                pixels = torch.from_numpy(np.array(picture))
                scale = 127.5 if pixels.dtype == torch.uint8 else 0.5
                images.append((pixels / scale - 1).permute(2, 0, 1).float())
    return torch.stack(images[:samples])
