"""What a person would rather see: tables, plots, and a page of a whole run.

A new part of the page is a file and an entry of PARTS.
"""

from __future__ import annotations

import base64
import hashlib
import os
from importlib import resources
from pathlib import Path
from string import Template

from oss_ext.files import replacing
from oss_ext.report import (
    along,
    amplitude,
    comparison,
    overview,
    samples,
    schedules,
    table,
    use,
)
from oss_ext.report.base import Part, is_image, is_picture_file, write_figure
from oss_ext.report.markup import element, join
from oss_ext.report.samples import plot_samples, write_images
from oss_ext.report.schedules import plot_schedules, schedule_table
from oss_ext.report.spread import plot_spread
from oss_ext.runs import Run

__all__ = [
    "PAGE",
    "PARTS",
    "is_image",
    "is_picture_file",
    "page",
    "plot_samples",
    "plot_schedules",
    "plot_spread",
    "schedule_table",
    "write_figure",
    "write_images",
    "write_report",
]

PAGE = "report.html"

PARTS: tuple[Part, ...] = (
    overview.PART,
    comparison.PART,
    samples.PART,
    schedules.PART,
    along.PART,
    amplitude.PART,
    table.PART,
    use.PART,
)
"""The parts of the page, from above."""


def page(run: Run) -> str:
    """A run as one HTML page that needs no network, no other file and, to be read, no scripts."""
    shown = [(part, body) for part in PARTS if (body := part.render(run)) is not None]
    links = [element("a", part.title, href=f"#{part.name}") for part, _ in shown]
    sections = [
        element("section", element("h2", part.title, id=f"{part.name}-title"), body, id=part.name,
                aria_labelledby=f"{part.name}-title")
        for part, body in shown
    ]  # fmt: skip
    files = resources.files("oss_ext.report")
    read = {
        name: files.joinpath(f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")
    }
    digest = base64.b64encode(hashlib.sha256(read["js"].encode()).digest()).decode()
    return Template(read["html"]).substitute(
        title=join(run.model),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=read["css"],
        script=read["js"],
        links=join(*links),
        sections=join(*sections),
    )


def write_report(run: Run, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.html`` and a picture of every plot into ``folder``, and say which.

    Raises:
        OSError: something cannot be written.
    """
    written = [Path(folder) / PAGE]
    with replacing(written[0]) as temporary:
        # A name may hold half of a character; JSON has such.
        temporary.write_text(page(run), encoding="utf-8", errors="replace")
    for part in PARTS:
        figure = None if part.draw is None else part.draw(run)
        if figure is not None:
            written.append(Path(folder) / f"{part.name}.png")
            write_figure(figure, written[-1])
    return written
