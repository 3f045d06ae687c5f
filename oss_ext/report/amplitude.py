"""Amplitudes: quantiles of a student's states beside the teacher's (paper figure 4)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oss_ext.report.base import RIVAL, Part, able, by_budget, looks, plain
from oss_ext.report.chart import Axis, Curve, line_chart
from oss_ext.report.markup import Html, element, join, plural, signed, tabs
from oss_ext.runs import Contender, Run

HEIGHT = 200
TEACHER = "teacher"
INK = {"is-teacher": "#1a1e23", "is-rival": RIVAL, "is-calibrated": "#b04a00"}
"""Who is who, on paper; on the screen as page.css has it."""


def _with_quantiles(run: Run) -> dict[int, dict[str, list[Contender]]]:
    """Contenders whose quantiles are known and finite, by number of steps and by what these are."""
    groups: dict[int, dict[str, list[Contender]]] = {}
    for steps, group in by_budget(able(run)).items():
        for c in group:
            known = run.quantiles.get(c.name)
            if c.schedule is None or c.schedule.amplitude is None or known is None:
                continue
            if bool(known.isfinite().all()):
                levels = "{:.3g} % and {:.3g} %".format(
                    *(100 * level for level in c.schedule.amplitude.levels)
                )
                groups.setdefault(steps, {}).setdefault(levels, []).append(c)
    return groups


def _curves(run: Run, group: Sequence[Contender], end: int) -> list[Curve]:
    """The low (``end`` 0) or high (1) quantile of the teacher and of each contender, over time."""
    seen, students = looks(run), []
    of_teacher: dict[float, float] = {}
    for c in group:
        assert c.schedule is not None
        student, teacher = (
            list(zip(c.schedule.times, values, strict=True))
            for values in run.quantiles[c.name][:, :, end].double().tolist()
        )
        own = ("is-calibrated", "dot") if c.amplitude else ("is-rival", seen[c.name].mark)
        students.append(Curve(c.name, *own, student))
        of_teacher |= dict(teacher)
    reference = sorted(of_teacher.items(), reverse=True)
    return [*students, Curve(TEACHER, "is-teacher", "dot", reference)]


def _render(run: Run) -> Html | None:
    panels = {}
    for steps, groups in _with_quantiles(run).items():
        for levels, group in groups.items():
            title = plural(steps, "step") + (f", {levels}" if len(groups) > 1 else "")
            panels[title] = join(*(_chart(run, group, end) for end in (0, 1)))
    return tabs("amplitude", "Steps of the amplitudes", panels) if panels else None


def _name(group: Sequence[Contender], end: int) -> str:
    """Which quantile it is."""
    schedule = group[0].schedule
    assert schedule is not None
    assert schedule.amplitude is not None
    return f"quantile of {100 * schedule.amplitude.levels[end]:.3g} %"


def _chart(run: Run, group: Sequence[Contender], end: int) -> Html:
    drawn = _curves(run, group, end)
    values = [v for c in drawn for _, v in c.points]
    marks = [float(v) for v in MaxNLocator(5).tick_values(min(values), max(values))]
    low, high = min(marks), max(marks)
    name = _name(group, end)

    def y(value: float) -> float:
        return round((high - value) / (high - low) * HEIGHT, 1)

    ticks = [(v, join(signed(f"{v:.4g}"))) for v in marks]
    caption = ""
    if end == 1:
        caption = (
            f"Quantiles over all elements of a sample, mean over "
            f"{plural(run.held_out, 'held-out sample')}: of the teacher, and of students as "
            "every step leaves them. Calibrated ones go on from the teacher's quantiles."
        )
    axis = Axis("flow time t: noise to clean", 1.0, 0.0)
    body = line_chart(drawn, axis, y, ticks, HEIGHT, name, caption)
    return join(element("h3", name[0].upper() + name[1:]), body)


def _draw(run: Run) -> Figure | None:
    rows = [
        (steps, group)
        for steps, groups in _with_quantiles(run).items()
        for group in groups.values()
    ]
    if not rows:
        return None
    figure = Figure(figsize=(10, 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (steps, group), pair in zip(rows, grid, strict=True):
        for end, axes in enumerate(pair):
            for curve in reversed(_curves(run, group, end)):
                style = "-o" if curve.name == TEACHER else "-s"
                filled = INK[curve.css] if curve.css != "is-rival" else "white"
                axes.plot(*zip(*curve.points, strict=True), style, ms=5, color=INK[curve.css],
                          mfc=filled, label=plain(curve.name))  # fmt: skip
            axes.set_title(f"{plural(steps, 'step')}: {_name(group, end)}")
            axes.set_xlim(1.03, -0.03)
            axes.set_xlabel("flow time t: noise (1) to clean (0)")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        pair[0].legend(frameon=False, fontsize=8)
    return figure


PART = Part("amplitude", "Amplitudes", _render, _draw)
