"""Error along the trajectory: how far from the teacher a student is after every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from oss_ext.report.base import Part, able, by_budget, looks, plain
from oss_ext.report.chart import Axis, Curve, line_chart
from oss_ext.report.markup import Html, element, join, plural, signed, tabs
from oss_ext.runs import Contender, Run

HEIGHT = 260
ROUNDING = 1e-10
"""Errors of less than this share of the run's greatest are none: of a student whose first step is
the teacher's own, say."""
WIDTH = 4.5  # inches, of a panel on paper; its legend has as many columns as there is room for
LABEL = "mean squared distance to the teacher"


def _curves(run: Run, contenders: Sequence[Contender]) -> dict[str, list[tuple[float, float]]]:
    """Flow time after every step and the error there, by contender, where both can be drawn."""
    curves = {}
    finite = [errors[errors.isfinite()] for errors in run.along.values()]
    least = ROUNDING * max((float(e.max()) for e in finite if len(e)), default=0.0)
    for c in contenders:
        if c.schedule is not None and c.name in run.along:
            errors = run.along[c.name].double().tolist()
            points = zip(c.schedule.times[1:], errors, strict=True)
            curves[c.name] = [(t, e) for t, e in points if math.isfinite(e) and e > least]
    return {name: points for name, points in curves.items() if points}


def _render(run: Run) -> Html | None:
    curves = _curves(run, able(run))
    if not curves:
        return None
    errors = [e for points in curves.values() for _, e in points]
    panels = {
        plural(steps, "step"): _chart(run, own, min(errors), max(errors))
        for steps, group in by_budget(able(run)).items()
        if (own := _curves(run, group))
    }
    return tabs("along", "Steps of the curves", panels)


def _chart(
    run: Run, curves: dict[str, list[tuple[float, float]]], least: float, most: float
) -> Html:
    seen = looks(run)
    low, high = math.floor(math.log10(least) - 0.05), math.ceil(math.log10(most) + 0.05)

    def y(error: float) -> float:
        return round((high - math.log10(error)) / (high - low) * HEIGHT, 1)

    axis = Axis("flow time t after the step: noise to clean", 1.0, 0.0)
    decades = range(low, high + 1, max(1, math.ceil((high - low) / 6)))
    ticks = [
        (10.0**k, join("10", element("tspan", signed(str(k)), dy=-5, font_size="0.8em")))
        for k in decades
    ]
    ours_first = [
        Curve(name, seen[name].css, seen[name].mark, curves[name])
        for name in sorted(curves, key=lambda name: not seen[name].ours)
    ]
    caption = (
        f"{LABEL[0].upper()}{LABEL[1:]}'s state at the same time, after every step; geometric mean "
        f"over {plural(run.held_out, 'held-out sample')}, logarithmic."
    )
    return line_chart(ours_first, axis, y, ticks, HEIGHT, "Error along the trajectory", caption)


def _draw(run: Run) -> Figure | None:
    groups = by_budget(able(run))
    groups = {steps: group for steps, group in groups.items() if _curves(run, group)}
    if not groups:
        return None
    seen = looks(run)
    longest = max(len(plain(c.name)) for group in groups.values() for c in group)
    columns = max(1, min(3, int(WIDTH / (0.45 + 0.062 * longest))))
    rows = math.ceil(max(map(len, groups.values())) / columns)
    size = (1 + WIDTH * len(groups), 4.2 + 0.18 * rows)
    drawn = Figure(figsize=size, layout="constrained")
    for axes, (steps, group) in zip(
        drawn.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items(), strict=True
    ):
        for name, points in _curves(run, group).items():
            look = seen[name]
            axes.semilogy(*zip(*points, strict=True), look.line, marker=look.paper_mark, ms=5,
                          color=look.color, lw=2 if look.ours else 1,
                          zorder=3 if look.ours else 2, label=plain(name))  # fmt: skip
        axes.set_title(plural(steps, "step"))
        axes.set_xlim(1.03, -0.03)
        axes.set_xlabel("flow time t after the step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncols=columns, loc="upper center",
                    bbox_to_anchor=(0.5, -0.12))  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel(LABEL)
    return drawn


PART = Part("along", "Error along the trajectory", _render, _draw)
