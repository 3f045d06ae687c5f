"""All contenders in one table; with scripts, a click on a heading sorts it."""

from __future__ import annotations

import math

from oss_ext.report.base import Judgement, Part, by_budget, judged, looks, nearest
from oss_ext.report.chart import Axis, key, line, mark
from oss_ext.report.markup import Html, decibels, element, join, plural, scrolling, spoken
from oss_ext.runs import Contender, Run

COLUMNS = {
    "psnr_of_mean": "PSNR of the mean error",
    "interval": "95 % interval",
    "mean_psnr": "Mean PSNR",
    "median_psnr": "Median",
    "worst_decile": "Worst decile",
}


def _render(run: Run) -> Html | None:
    if not run.contenders:
        return None
    scores = judged(run)
    groups = by_budget(run.contenders).values()
    best = {c.name for group in groups if (c := nearest(group, scores)) is not None}
    ends = [v for s in scores.values() for v in s.interval or () if math.isfinite(v)]
    axis = Axis("", min(ends), max(ends)) if ends else None
    titles = ["Method", "Steps", *(COLUMNS.values() if scores else ()), "Evaluations", "Seconds"]
    head = element(
        "tr", *(element("th", title, scope="col", class_=None if title == "Method" else "number")
                for title in titles)
    )  # fmt: skip
    rows = [_row(run, c, scores.get(c.name), axis, len(titles), c.name in best)
            for c in run.contenders]  # fmt: skip
    table = element("table", element("thead", head), element("tbody", *rows), class_="sortable")
    note = "Evaluations: of the model per calibration sample to find this schedule, the teacher's "
    note += "included."
    if scores:
        note = (
            f"Distance to the teacher's result in dB, data range {run.data_range:g}, on "
            f"{plural(run.held_out, 'sample')} that no search has seen; bootstrapped intervals of "
            f"the PSNR of the mean error. Bold: the best of its budget. {note}"
        )
    return join(scrolling(table, "Comparison"), element("p", note, class_="note"))


def _number(text: str, value: float, best: bool = False) -> Html:
    shown = element("strong", text, spoken(" (best of its budget)")) if best else text
    sort = f"{value:.9g}" if math.isfinite(value) else None
    return element("td", shown, class_="number", data_value=sort)


def _row(
    run: Run, c: Contender, s: Judgement | None, axis: Axis | None, columns: int, best: bool
) -> Html:
    look = looks(run)[c.name]
    unable = c.schedule is None or (s is None and run.held_out > 0)
    remark = element("small", c.note) if c.note and not unable else ""
    name = element(
        "th", element("span", key(look.mark), c.name, class_=look.css), remark,
        scope="row", data_value=c.name,
    )  # fmt: skip
    steps = _number(str(c.steps), c.steps)
    if c.schedule is None or unable:
        why = element("td", "unable: " + (c.note or "no reason given"), colspan=columns - 2)
        return element("tr", name, steps, why, class_="unable")
    cells = []
    if s is not None:
        values = {name: getattr(s.statistics, name) for name in COLUMNS if name != "interval"}
        cells = [_number(decibels(v), v, best and name == "psnr_of_mean")
                 for name, v in values.items()]  # fmt: skip
        cells.insert(1, _interval(s, axis, look.css))
    nfe = c.schedule.search_nfe
    cost = (_number(f"{nfe:,}", nfe), _number(f"{c.seconds:.1f}", c.seconds))
    return element("tr", name, steps, *cells, *cost, class_="ours" if look.ours else None)


def _interval(s: Judgement, axis: Axis | None, css: str) -> Html:
    if s.interval is None:  # of one sample
        return element("td", "", class_="number interval")
    low, high = s.interval
    drawing: str | Html = ""
    at = s.statistics.psnr_of_mean
    if axis is not None and all(map(math.isfinite, (low, high, at))):
        drawing = element(
            "svg", line(axis.at(low), 8, axis.at(high), 8), mark("small", axis.at(at), 8),
            class_=f"whisker {css}", height=16, aria_hidden="true",
        )  # fmt: skip
    text = element("span", f"{decibels(low)} to {decibels(high)}")
    value = f"{low:.9g}" if math.isfinite(low) else None
    return element("td", element("div", drawing, text), class_="number interval", data_value=value)


PART = Part("comparison", "Comparison", _render)
