"""Charts as inline SVG: positions in percent of the width, so that text keeps its size anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

from oss_ext.report.markup import NOTHING, Html, element, join, signed

EDGE = 6.0
"""Percent on either side that belong to infinite values, on an axis that has any."""


def percent(value: float) -> str:
    return f"{value:.2f}%"


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Attributes:
        label: of the axis.
        first, last: finite values at its left and right; ``first`` may be the larger one.
        log: logarithmic; zero and below then count as infinite.
        whole: its numbers are whole ones.
        ends: names of the infinite values to the left and right, empty where there is none; None
            for an axis without any.
    """

    label: str
    first: float
    last: float
    log: bool = False
    whole: bool = False
    ends: tuple[str, str] | None = None

    @property
    def _margin(self) -> float:
        return EDGE if self.ends else 0.0

    def _scaled(self, value: float) -> float:
        if self.log:
            return math.log(value) if value > 0 else -math.inf
        return value

    def at(self, value: float) -> float:
        """Percent of the width."""
        first, last = self._scaled(self.first), self._scaled(self.last)
        share = (self._scaled(value) - first) / (last - first) if last != first else 0.5
        if math.isinf(share):
            return 0.0 if share < 0 else 100.0
        return self._margin + share * (100 - 2 * self._margin)

    def ticks(self) -> list[tuple[float, str]]:
        """Percent and text."""
        low, high = sorted((self.first, self.last))
        if self.log:
            lowest, highest = math.floor(math.log10(low)), math.ceil(math.log10(high))
            every = max(1, math.ceil((highest - lowest) / 6))
            digits = (1, 2, 5) if highest - lowest <= 3 else (1,)
            ticks = [d * 10.0**k for k in range(lowest, highest + 1, every) for d in digits]
        else:
            ticks = [float(v) for v in MaxNLocator(6, integer=self.whole).tick_values(low, high)]
        found = [(self.at(v), signed(f"{v:.6g}")) for v in ticks if low <= v <= high]
        ends = zip((0.0, 100.0), self.ends or (), strict=False)
        return found + [(x, name) for x, name in ends if name]

    def grid(self) -> Html:
        """Vertical lines at the ticks, over the whole height."""
        return join(*(line(x, 0, x, "100%", class_="grid") for x, _ in self.ticks()))

    def scale(self) -> Html:
        """The numbers below a chart and what they are."""
        texts = [
            element("text", text, x=percent(x), y=14, text_anchor="middle")
            for x, text in self.ticks()
        ]
        label = element("text", self.label, x="50%", y=34, text_anchor="middle", class_="axis")
        return element("svg", *texts, label, class_="scale", height=40, aria_hidden="true")


def line(x1: float, y1: object, x2: float, y2: object, **attributes: object) -> Html:
    return element("line", x1=percent(x1), y1=y1, x2=percent(x2), y2=y2, **attributes)


def mark(shape: str, x: float, y: float, title: str = "") -> Html:
    """A mark of page.html, with a text for the pointer."""
    drawn = element("use", href=f"#mark-{shape}", x=percent(x), y=y)
    return element("g", element("title", title), drawn) if title else drawn


def key(shape: str) -> Html:
    """A mark for a legend."""
    return element(
        "svg", element("use", href=f"#mark-{shape}", x=8, y=8), class_="key", width=16, height=16,
        aria_hidden="true",
    )  # fmt: skip


def figure(rows: Sequence[tuple[Html, Html]], caption: str) -> Html:
    """Rows of a label and a drawing, one below the other on one axis, and what they show."""
    cells = [
        element("div", element("div", label, class_="name"), drawing, class_="row")
        for label, drawing in rows
    ]
    return element("figure", *cells, element("figcaption", caption))


@dataclass(frozen=True)
class Curve:
    """Points joined by lines.

    Attributes:
        name: in the legend and in the texts for the pointer.
        css: class that gives it its colour.
        shape: of its marks.
        points: flow time and value.
    """

    name: str
    css: str
    shape: str
    points: Sequence[tuple[float, float]]


def line_chart(
    curves: Sequence[Curve],
    axis: Axis,
    y: Callable[[float], float],
    ticks: Sequence[tuple[float, Html]],
    height: int,
    about: str,
    caption: str,
) -> Html:
    """Curves over flow time, in the order of the legend, the first one on top.

    Args:
        curves: what is drawn.
        axis: of the flow times.
        y: where a value is, in pixels from above.
        ticks: values with a line across and what stands beside it.
        height: in pixels.
        about: what it is to those who do not see it.
        caption: below.
    """
    parts = [axis.grid(), *(line(0, y(v), 100, y(v), class_="grid") for v, _ in ticks)]
    for c in reversed(curves):
        segments = [
            line(axis.at(t), y(v), axis.at(u), y(w)) for (t, v), (u, w) in pairwise(c.points)
        ]
        marks = [
            mark(c.shape, axis.at(t), y(v), f"{c.name}: {v:.3g} at t = {t:.4g}")
            for t, v in c.points
        ]
        spoken = f"{c.name}: " + ", ".join(f"{v:.2g} at {t:.3g}" for t, v in c.points)
        parts.append(element("g", *segments, *marks, class_=f"curve {c.css}", role="img",
                             aria_label=spoken))  # fmt: skip
    numbers = [element("text", text, x="100%", y=y(v) + 4, text_anchor="end") for v, text in ticks]
    legend = [element("li", key(c.shape), c.name, class_=c.css) for c in curves]
    left = element("svg", *numbers, class_="scale", height=height, aria_hidden="true")
    plot = element("svg", *parts, class_="plot", height=height, role="group", aria_label=about)
    return join(
        element("ul", *legend, class_="legend"),
        element("div", figure([(left, plot), (NOTHING, axis.scale())], caption), class_="xy"),
    )
