"""The table of the dynamic programme as a heat map, with the paths that were chosen."""

from __future__ import annotations

from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oss_ext.report.base import Part, able, data_uri, looks, plain
from oss_ext.report.chart import Axis, figure, line, percent
from oss_ext.report.markup import NOTHING, Html, element, join, signed
from oss_ext.runs import Run

COLORS = "viridis"


def _paths(run: Run, steps: int) -> dict[str, tuple[int, ...]]:
    """Rows of the searched schedules on the table's grid, by name; equal ones once."""
    ours = [c for c in able(run) if looks(run)[c.name].ours]
    paths: dict[str, tuple[int, ...]] = {}
    # What other methods made of a search is not the way through this table.
    for c in [c for c in ours if c.method == "dp"] or ours:
        s = c.schedule
        if s is None or s.indices is None:
            continue
        same_grid = len(s.teacher_times) - 1 == run.teacher_steps
        if same_grid and s.steps <= steps and s.indices not in paths.values():
            paths[c.name] = s.indices
    return paths


def _heat(run: Run) -> tuple[np.ndarray, float, float] | None:
    """``[M, N + 1]`` log10 cost from noise to clean, NaN where there is none, and its range."""
    if run.table is None:
        return None
    cost = run.table.double().flip(1).numpy()
    with np.errstate(divide="ignore"):
        heat = np.where(np.isfinite(cost) & (cost > 0), np.log10(cost), np.nan)
    if np.isnan(heat).all():
        return None
    return heat, float(np.nanmin(heat)), float(np.nanmax(heat))


def _render(run: Run) -> Html | None:
    found = _heat(run)
    if found is None:
        return None
    heat, least, most = found
    steps, columns = heat.shape
    cell = max(8, min(24, 300 // (steps + 1)))
    height = cell * (steps + 1)
    share = (heat - least) / ((most - least) or 1.0)
    colors = matplotlib.colormaps[COLORS](np.nan_to_num(share), bytes=True)
    colors[np.isnan(heat), 3] = 0

    def x(row: int) -> float:
        return (columns - 1 - row + 0.5) / columns * 100

    # The image begins below the line of step 0, where nothing has been paid yet.
    parts = [
        element("image", href=data_uri(colors), x="0", y=cell, width="100%", height=height - cell,
                preserveAspectRatio="none", aria_hidden="true")
    ]  # fmt: skip
    for name, rows in _paths(run, steps).items():
        at = [(x(row), (k + 0.5) * cell) for k, row in enumerate(rows)]
        segments = [line(a, b, c, d) for (a, b), (c, d) in pairwise(at)]
        halo = element("g", *segments, class_="halo")
        knots = [
            element("circle", element("title", f"{name}, step {k}: row {row}"), cx=percent(a), cy=b,
                    r=min(4, cell / 3))
            for k, (row, (a, b)) in enumerate(zip(rows, at, strict=True))
        ]  # fmt: skip
        spoken = f"{name}: rows {', '.join(map(str, rows))}"
        parts.append(element("g", halo, *segments, *knots, class_="path", role="img",
                             aria_label=spoken))  # fmt: skip
    every = max(1, -(-14 // cell) if cell < 14 else 1)
    numbers = [
        element("text", k, x="100%", y=(k + 0.5) * cell + 4, text_anchor="end")
        for k in range(0, steps + 1, max(every, round(steps / 12)))
    ]
    left = element("svg", *numbers, class_="scale", height=height, aria_hidden="true")
    plot = element("svg", *parts, class_="plot", height=height, role="group",
                   aria_label="Cost of the dynamic programme")  # fmt: skip
    axis = Axis("teacher row: noise to clean", columns - 0.5, -0.5, whole=True)
    ramp = matplotlib.colormaps[COLORS](np.linspace(0, 1, 64)[None], bytes=True)
    bar = element(
        "p", "log10 cost ", element("span", signed(f"{least:.2f}")),
        element("img", src=data_uri(ramp), alt="to"),
        element("span", signed(f"{most:.2f}")), class_="ramp",
    )  # fmt: skip
    paths = ", ".join(_paths(run, steps))
    caption = (
        "Mean squared distance to the teacher at every row (across) after every number of steps "
        "(down), at best; geometric mean over the calibration samples. Empty: out of reach."
        + (f" Lines: {paths}." if paths else "")
    )
    body = figure([(left, plot), (NOTHING, axis.scale())], caption)
    return join(bar, element("div", body, class_="xy heat"))


def _draw(run: Run) -> Figure | None:
    found = _heat(run)
    if found is None:
        return None
    heat = found[0]
    steps, columns = heat.shape
    drawn = Figure(figsize=(9, 1.6 + 0.2 * steps), layout="constrained")
    axes = drawn.subplots()
    image = axes.imshow(heat, aspect="auto", cmap=COLORS, interpolation="nearest",
                        extent=(columns - 0.5, -0.5, steps + 0.5, 0.5))  # fmt: skip
    drawn.colorbar(image, ax=axes, label="log10 cost")
    for name, rows in _paths(run, steps).items():
        axes.plot(rows, range(len(rows)), "-", color="black", lw=3, alpha=0.5)
        axes.plot(rows, range(len(rows)), "o-", color="white", mec="black", lw=1.2, ms=5)
        axes.annotate(plain(name), (rows[-1], len(rows) - 1), xytext=(-6, -8), ha="right",
                      textcoords="offset points", color="white", fontsize=8)  # fmt: skip
    axes.set_ylim(steps + 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("teacher row: noise to clean")
    axes.set_ylabel("steps taken")
    axes.set_title("cost of the dynamic programme, and the paths chosen")
    return drawn


PART = Part("table", "Table of the dynamic programme", _render, _draw)
