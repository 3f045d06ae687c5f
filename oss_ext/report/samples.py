"""Samples side by side, the same noise in every column: as a picture, and on the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from oss_ext.files import replacing
from oss_ext.report.base import (
    Part,
    able,
    by_budget,
    data_uri,
    is_image,
    is_video,
    looks,
    pixels,
    plain,
    write_figure,
)
from oss_ext.report.markup import NOTHING, Html, decibels, element, join, plural, scrolling, tabs
from oss_ext.runs import Run

TEACHER = "teacher"
COLUMNS = 6
FRAMES = 3
"""Of a video, evenly spaced, the first and the last among them."""
SIDE = 256
"""Pixels that the longer side of a picture has at most: pages hold many."""
SMALL = 64
"""Pixels up to which single ones are shown as squares."""


def plot_samples(
    rows: Mapping[str, Tensor], path: str | os.PathLike[str], columns: int = 10
) -> None:
    """Write one picture with a row of images per entry, the same sample in every column.

    Args:
        rows: name to ``[B, 1 or 3, H, W]`` in [-1, 1]; values outside are clipped.
        path: where to write.
        columns: how many samples to show at most.

    Raises:
        ValueError: tensors that are no images.
    """
    if not rows:
        raise ValueError("rows: expected at least one row of images, got none")
    for name, images in rows.items():
        if not is_image(images.shape[1:]):
            raise ValueError(
                f"{name}: expected images [B, 1 or 3, H, W], got {tuple(images.shape)}"
            )
    columns = min(columns, min(len(images) for images in rows.values()))
    strips = {name: _strip(list(images[:columns])) for name, images in rows.items()}
    write_figure(_figure(strips), path)


def write_images(images: Tensor, folder: str | os.PathLike[str]) -> None:
    """Write every one of ``images`` ``[B, 1 or 3, H, W]`` in [-1, 1] as ``folder/0000.png``, ..."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        whole = np.ascontiguousarray(np.broadcast_to(pixels(image), (*image.shape[-2:], 3)))
        with replacing(folder / f"{number:04d}.png") as temporary:
            matplotlib.image.imsave(temporary, whole)


def _strip(images: Sequence[Tensor]) -> np.ndarray:
    """Bytes of ``[1 or 3, H, W]`` images side by side."""
    return pixels(torch.cat(list(images), dim=-1))


def _figure(strips: Mapping[str, np.ndarray]) -> Figure:
    height, width = next(iter(strips.values())).shape[:2]
    # Inches: 0.8 a row, the names to the left, and strips that keep the images' proportions.
    size = (1.3 + 0.8 * width / height, 0.84 * len(strips))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, (name, strip) in zip(grid, strips.items(), strict=True):
        axes.imshow(np.squeeze(strip), cmap=matplotlib.colormaps["gray"], vmin=0, vmax=255)
        axes.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _shown(states: Tensor) -> list[tuple[int, str, Tensor]]:
    """Pictures of the first samples: number of the sample, what it is, ``[1 or 3, H, W]``."""
    if is_image(states.shape[1:]):
        return [(b, f"sample {b}", image) for b, image in enumerate(states[:COLUMNS])]
    count = states.shape[2]
    frames = sorted({round(f) for f in np.linspace(0, count - 1, min(FRAMES, count)).tolist()})
    videos = states[: max(1, COLUMNS // len(frames))]
    return [
        (b, f"sample {b}, frame {f}", video[:, f]) for b, video in enumerate(videos) for f in frames
    ]


def _why_not(run: Run) -> str | None:
    """Why the samples cannot be shown, None if they can."""
    for name, states in run.images.items():
        shape = list(states.shape[1:])
        if not (is_image(shape) or is_video(shape)):
            return (
                f"Samples of shape {shape} cannot be shown: pictures have the shape [C, H, W], "
                "videos [C, F, H, W], with 1 or 3 channels C."
            )
        if not states.isfinite().all():
            return f"The samples of {name} are not finite."
    return None


def _render(run: Run) -> Html | None:
    if not run.images:
        return None
    why = _why_not(run)
    if why is not None:
        return element("p", why, class_="note")
    groups = by_budget([c for c in able(run) if c.name in run.images])
    panels = {
        plural(steps, "step"): join(*(_row(run, c.name, looks(run)[c.name].css) for c in group))
        for steps, group in groups.items()
    }
    teacher = run.images.get(TEACHER)
    shared = NOTHING
    note = "The same noise in every column."
    if teacher is not None:
        shared = _row(run, TEACHER, "")
        note += " Below each: PSNR to the teacher's, dB, of the whole sample."
    body = tabs("samples", "Steps of the samples", panels, shared) if panels else shared
    return join(body, element("p", note, class_="note"))


def _row(run: Run, name: str, css: str) -> Html:
    states, teacher, cells = run.images[name], run.images.get(TEACHER), []
    for b, what, picture in _shown(states):
        near = ""
        if teacher is not None and name != TEACHER and run.data_range > 0:
            error = (states[b] - teacher[b]).double().square().mean()
            near = decibels(float(10 * (run.data_range**2 / error).log10()))
        image = element(
            "img", src=data_uri(_reduced(picture)), alt=f"{name}, {what}",
            class_="small" if max(picture.shape[-2:]) <= SMALL else None,
        )  # fmt: skip
        cells.append(element("figure", image, element("figcaption", near or what)))
    strip = scrolling(element("div", *cells, class_="pictures"), f"Samples of {name}")
    title = element("div", name, class_=f"name {css}".strip())
    return element("div", title, strip, class_="samples")


def _reduced(picture: Tensor) -> np.ndarray:
    """``[H, W, 3]`` bytes, at most ``SIDE`` high and wide."""
    picture = picture.float().cpu().clamp(-1, 1)
    scale = SIDE / max(picture.shape[-2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.shape[-2:]]
        picture = torch.nn.functional.interpolate(
            picture[None], size=size, mode="bilinear", antialias=True
        )[0]
    return np.broadcast_to(pixels(picture), (*picture.shape[-2:], 3))


def _draw(run: Run) -> Figure | None:
    if not run.images or _why_not(run) is not None:
        return None
    ordered = [c.name for group in by_budget(able(run)).values() for c in group]
    names = [name for name in (TEACHER, *ordered) if name in run.images]
    strips = {name: _strip([p for _, _, p in _shown(run.images[name])]) for name in names}
    return _figure(strips) if strips else None


PART = Part("samples", "Samples", _render, _draw)
