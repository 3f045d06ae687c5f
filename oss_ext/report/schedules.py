"""Schedules: as a table, as a picture, and on the page on the axes that people think in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from oss_ext import cpu
from oss_ext.report.base import Part, able, by_budget, looks, plain, write_figure
from oss_ext.report.chart import Axis, figure, line, mark, percent
from oss_ext.report.markup import INFINITY, MINUS, NOTHING, Html, element, join, plural, tabs
from oss_ext.runs import Contender, Run
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
    if s.orders:
        lines.append(f"orders of the steps: {', '.join(map(str, s.orders))}")
    if s.amplitude is not None:
        a = s.amplitude
        lines.append(
            f"amplitude calibration to quantiles {a.levels[0]:g} and {a.levels[1]:g} of "
            f"{a.samples} samples, where asked for"
        )
    if s.initial_scale != 1:
        lines.append(f"starts from {s.initial_scale:.6g} x the initial noise in model coordinates")
    lines.append("step  teacher row         time        sigma     stepsize")
    rows: Sequence[object] = s.indices or ["-"] * len(s.times)
    for k, (row, t, sigma) in enumerate(zip(rows, s.times, s.sigmas, strict=True)):
        size = f"{t - s.times[k + 1]:12.6f}" if k < s.steps else ""
        lines.append(f"{k:4d}  {row!s:>11}  {t:11.6f}  {sigma:11.6f} {size}".rstrip())
    return "\n".join(lines)


def plot_schedules(schedules: Mapping[str, Schedule], path: str | os.PathLike[str]) -> None:
    """Write a picture of the times that each schedule visits, one row of marks per schedule."""
    colors = {
        name: "#9aa0a6" if schedule.method == "uniform" else "#1a73e8"
        for name, schedule in schedules.items()
    }
    write_figure(_figure(schedules, colors), path)


def _figure(schedules: Mapping[str, Schedule], colors: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(schedules)), layout="constrained")
    axes = figure.subplots()
    for y, (name, schedule) in enumerate(schedules.items()):
        axes.plot(
            schedule.times, [y] * len(schedule.times), "-", color=colors[name], lw=1, alpha=0.6
        )
        axes.plot(schedule.times, [y] * len(schedule.times), "o", color=colors[name], ms=6)
    axes.set_yticks(range(len(schedules)), [plain(name) for name in schedules])
    axes.set_ylim(len(schedules) - 0.5, -0.5)
    axes.set_xlim(1.03, -0.03)
    axes.set_xlabel("flow time t: noise (1) to clean (0)")
    axes.set_title("where each schedule evaluates the model")
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def _draw(run: Run) -> Figure | None:
    contenders = [c for group in by_budget(able(run)).values() for c in group]
    seen = looks(run)
    schedules = {c.name: c.schedule for c in contenders if c.schedule is not None}
    return _figure(schedules, {name: seen[name].color for name in schedules}) if schedules else None


def _log_snr(schedule: Schedule, times: Tensor) -> Tensor:
    return 2 * ((1 - times) / times).log()


AXES: dict[str, tuple[str, Callable[[Schedule, Tensor], Tensor]]] = {
    "t": ("flow time t", lambda schedule, times: times),
    "sigma": ("sigma", lambda schedule, times: schedule.path.sigmas(times)),
    "snr": ("log-SNR", _log_snr),
}
"""What schedules are shown in: by key, a name and a function of flow times, noise first."""


def _axis(key: str, values: Sequence[float], same: bool) -> Axis:
    """From noise to clean through all finite ``values``; ``same``: sigma is t."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    if key == "t":
        also = ", which is sigma here" if same else ""
        return Axis(f"flow time t{also}: noise to clean", 1.0, 0.0)
    if key == "sigma":
        positive = [v for v in finite if v > 0] or [1.0]
        ends = (INFINITY if math.inf in values else "", "0")
        return Axis("sigma: noise to clean", max(positive), min(positive), log=True, ends=ends)
    ends = (MINUS + INFINITY if -math.inf in values else "", INFINITY)
    label = f"log-SNR, 2 ln((1 {MINUS} t) / t): noise to clean"
    return Axis(label, min(finite), max(finite), ends=ends)


def _render(run: Run) -> Html | None:
    contenders = able(run)
    if not contenders:
        return None
    schedules = [c.schedule for c in contenders if c.schedule is not None]
    grids = {steps: rows for steps, rows in run.spread.items() if len(rows)}
    same = all(s.times == s.sigmas for s in schedules)
    keys = [key for key in AXES if not (key == "sigma" and same)]
    axes = {
        key: _axis(key, [v for s in schedules for v in _values(key, s, s.times)], same)
        for key in keys
    }
    panels = {}
    for steps, group in by_budget(contenders).items():
        panels[plural(steps, "step")] = join(
            *(
                element("div", _chart(run, group, key, axes[key], grids.get(steps)),
                        class_=f"on-{key}")
                for key in keys
            )
        )  # fmt: skip
    choice = [
        part
        for key in keys
        for part in (
            element("input", type="radio", name="axis", id=f"axis-{key}", checked=key == "t",
                    autocomplete="off"),
            element("label", AXES[key][0], for_=f"axis-{key}"),
        )
    ]  # fmt: skip
    return element(
        "div",
        element("div", *choice, class_="choice", role="group", aria_label="Axis"),
        tabs("schedules", "Steps of the schedules", panels),
        class_="axes",
    )


def _values(key: str, schedule: Schedule, times: Sequence[float]) -> list[float]:
    converted = AXES[key][1](schedule, cpu.tensor(times, dtype=torch.float64))
    return [float(v) for v in converted.tolist()]


def _chart(
    run: Run, contenders: Sequence[Contender], key: str, axis: Axis, spread: Tensor | None
) -> Html:
    seen, rows = looks(run), []
    for c in contenders:
        s = c.schedule
        assert s is not None
        values = _values(key, s, s.times)
        shape = "dot" if seen[c.name].ours else "small"
        marks = [
            mark(shape, axis.at(v), 14, f"{c.name}, step {k}: {AXES[key][0]} {v:.5g}")
            for k, v in enumerate(values)
        ]
        through = line(axis.at(values[0]), 14, axis.at(values[-1]), 14, class_="thread")
        spoken = f"{c.name}: {AXES[key][0]} " + ", ".join(f"{v:.4g}" for v in values)
        drawing = element("svg", axis.grid(), through, *marks, class_=f"strip {seen[c.name].css}",
                          height=28, role="img", aria_label=spoken)  # fmt: skip
        rows.append((element("span", c.name, class_=seen[c.name].css), drawing))
    caption = "Marks: where the model is evaluated, and where the run ends."
    searched = [c.schedule for c in contenders if c.method == "dp"]
    grid = next((s for s in searched if s is not None and s.indices is not None), None)
    if spread is not None and grid is not None:
        rows.append(
            (
                element("span", "each sample's own", class_="is-dp"),
                _spread(spread, key, axis, grid),
            )
        )
        caption += (
            f" Last row: the steps that a search for each of the {plural(len(spread), 'sample')} "
            "alone would take; a band per step from the first to the last of them."
        )
    rows.append((NOTHING, axis.scale()))
    return figure(rows, caption)


def _spread(spread: Tensor, key: str, axis: Axis, schedule: Schedule) -> Html:
    """A band per step, and a bar at every row that a sample takes, the darker the more do."""
    parts, last = [axis.grid()], len(schedule.teacher_times) - 1
    for column in spread.T:
        taken, counts = column.clamp(0, last).unique(return_counts=True)
        times = [schedule.teacher_times[row] for row in taken.tolist()]
        at = [axis.at(v) for v in _values(key, schedule, times)]
        low, width = min(at), max(at) - min(at)
        parts.append(element("rect", x=percent(low), y=4, width=percent(width), height=20, rx=3,
                             class_="band"))  # fmt: skip
        shares = (counts / len(column)).tolist()
        parts += [
            line(x, 6, x, 22, class_="bar", opacity=0.3 + 0.7 * share)
            for x, share in zip(at, shares, strict=True)
        ]
    return element("svg", *parts, class_="strip is-dp", height=28, role="img",
                   aria_label="Spread of the schedules of single samples")  # fmt: skip


PART = Part("schedules", "Schedules", _render, _draw)
