"""What a person would rather see: schedules as a table and a plot, samples side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import Tensor

from oss_ext.files import replacing
from oss_ext.schedule import Schedule


def schedule_table(schedule: Schedule) -> str:
    """A schedule in full, one line per step."""
    s = schedule
    made = "not searched"
    if s.objective is not None:
        o = s.objective
        made = f"{o.scope}, {o.aggregate or o.reduce}, {o.start} start, metric {o.metric}"
    lines = [
        f"{s.steps} steps, {s.method}: {made}",
        f"model {s.model} ({s.model_hash}), path {s.path.name}, solver {s.solver}; "
        f"teacher {len(s.teacher_times) - 1} steps of {s.teacher_solver}",
    ]
    if s.samples:
        cost = "not measured" if s.cost is None else f"{s.cost:.4e}"
        lines.append(
            f"searched on {s.samples} samples with {s.search_nfe} evaluations each; "
            f"mean squared error there: {cost}"
        )
    if s.initial_scale != 1:
        lines.append(f"starts from {s.initial_scale:.6g} x the initial noise in model coordinates")
    lines.append("step  teacher row         time        sigma     stepsize")
    rows: Sequence[object] = s.indices or ["-"] * len(s.times)
    for k, (row, t, sigma) in enumerate(zip(rows, s.times, s.sigmas, strict=True)):
        size = f"{t - s.times[k + 1]:12.6f}" if k < s.steps else ""
        lines.append(f"{k:4d}  {row!s:>11}  {t:11.6f}  {sigma:11.6f} {size}".rstrip())
    return "\n".join(lines)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture whose margins fit, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")


def plot_schedules(schedules: Mapping[str, Schedule], path: str | os.PathLike[str]) -> None:
    """Write a picture of the times that each schedule visits, one row of marks per schedule."""
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(schedules)), layout="constrained")
    axes = figure.subplots()
    for y, (name, schedule) in enumerate(schedules.items()):
        color = "#9aa0a6" if schedule.method == "uniform" else "#1a73e8"
        axes.plot(schedule.times, [y] * len(schedule.times), "-", color=color, lw=1, alpha=0.6)
        axes.plot(schedule.times, [y] * len(schedule.times), "o", color=color, ms=6, label=name)
    axes.set_yticks(range(len(schedules)), list(schedules))
    axes.set_ylim(len(schedules) - 0.5, -0.5)
    axes.set_xlim(1.03, -0.03)
    axes.set_xlabel("flow time t: noise (1) to clean (0)")
    axes.set_title("where each schedule evaluates the model")
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    write_figure(figure, path)


def is_image(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be shown: one or three channels of pixels."""
    return len(shape) == 3 and shape[0] in (1, 3)


def is_picture_file(path: str | os.PathLike[str]) -> bool:
    """Whether pictures can be written in the format that the name's ending stands for."""
    return Path(path).suffix[1:].lower() in FigureCanvasBase.get_supported_filetypes()


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
    height, width = next(iter(rows.values())).shape[-2:]
    # Inches: 0.8 a row, the names to the left, and strips that keep the images' proportions.
    size = (1.3 + 0.8 * columns * width / height, 0.84 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (name, images) in zip(grid, rows.items(), strict=True):
        strip = torch.cat(list(images[:columns].float().cpu()), dim=-1)
        pixels = ((strip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        axes.imshow(np.squeeze(pixels), cmap=matplotlib.colormaps["gray"], vmin=0, vmax=255)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    write_figure(figure, path)
