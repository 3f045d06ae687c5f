"""What a part of the page is, and what the parts share: who is who, and how near they come."""

from __future__ import annotations

import io
import itertools
import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import Tensor

from oss_ext.files import replacing
from oss_ext.report.markup import Html
from oss_ext.runs import Contender, Run
from oss_ext.statistics import Interval, Statistics, bootstrap, statistics_of

OURS = {"dp": "#0b5fc4", "fast": "#b04a00", "balanced": "#00755a", "best": "#8a3b78"}
"""Our methods with their colours on paper; those of the screen are in page.css."""
RIVAL = "#66707b"
MARKS = ("ring", "square", "triangle", "diamond", "plus", "cross", "wedge", "bar")
"""What tells rivals apart, all in one colour; drawn in page.html."""
PAPER_LINES = ("-", "--", ":")
"""And on paper, when all marks have been used."""
PAPER_MARKS = dict(zip(MARKS, ("o", "s", "^", "D", "P", "X", "v", "|"), strict=True))
NAME_LENGTH = 32
"""Characters of a name in a picture."""


@dataclass(frozen=True)
class Part:
    """A part of the page, in the order of its registry.

    Attributes:
        name: its anchor, and with ``.png`` its picture.
        title: its heading.
        render: ``render(run)``, its HTML; None where the run has nothing for it.
        draw: ``draw(run)``, the same as a picture; None where there is none.
    """

    name: str
    title: str
    render: Callable[[Run], Html | None]
    draw: Callable[[Run], Figure | None] | None = None


@dataclass(frozen=True)
class Look:
    """How a method is drawn, everywhere alike; ``line`` is matplotlib's."""

    css: str
    mark: str
    color: str
    line: str = PAPER_LINES[0]

    @property
    def ours(self) -> bool:
        return self.color != RIVAL

    @property
    def paper_mark(self) -> str:
        """The mark as matplotlib calls it."""
        return PAPER_MARKS.get(self.mark, "o")


def looks(run: Run) -> dict[str, Look]:
    """The look of every contender, by name."""
    kinds = [(c.method, c.amplitude) for c in run.contenders if c.method not in OURS]
    ways = itertools.cycle(itertools.product(PAPER_LINES, MARKS))
    rivals = {kind: Look("is-rival", mark, RIVAL, line)
              for kind, (line, mark) in zip(dict.fromkeys(kinds), ways, strict=False)}  # fmt: skip
    return {
        c.name: Look(f"is-{c.method}", "dot", OURS[c.method])
        if c.method in OURS
        else rivals[c.method, c.amplitude]
        for c in run.contenders
    }


def able(run: Run) -> list[Contender]:
    """Those that have a schedule."""
    return [c for c in run.contenders if c.schedule is not None]


def by_budget(contenders: Sequence[Contender]) -> dict[int, list[Contender]]:
    """Contenders by their number of steps, ascending."""
    budgets = sorted({c.steps for c in contenders})
    return {steps: [c for c in contenders if c.steps == steps] for steps in budgets}


@dataclass(frozen=True)
class Judgement:
    """How near a contender comes to the teacher.

    Attributes:
        statistics: of its errors.
        interval: the 95 % interval of the PSNR of the mean error, dB; None where there is none.
    """

    statistics: Statistics
    interval: Interval | None


def judged(run: Run) -> dict[str, Judgement]:
    """Judgements by contender that has a schedule and errors; empty where nothing was judged."""
    if run.mse is None or run.mse.numel() == 0:
        return {}
    rows = zip(run.contenders, run.mse.double(), strict=True)
    return {
        c.name: Judgement(
            statistics_of(mse, run.data_range), bootstrap(mse, "psnr_of_mean", run.data_range)
        )
        for c, mse in rows
        if c.schedule is not None and bool(mse.isfinite().all())
    }


def nearest(contenders: Sequence[Contender], judged: dict[str, Judgement]) -> Contender | None:
    """The one with the best PSNR of the mean error, None where none was judged."""
    known = [c for c in contenders if c.name in judged]
    return max(known, key=lambda c: judged[c.name].statistics.psnr_of_mean, default=None)


def is_image(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be shown: one or three channels of pixels."""
    return len(shape) == 3 and shape[0] in (1, 3)


def is_video(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be shown frame by frame: ``[1 or 3, F, H, W]``."""
    return len(shape) == 4 and shape[0] in (1, 3)


def pixels(image: Tensor) -> np.ndarray:
    """``[H, W, 1 or 3]`` bytes of ``[1 or 3, H, W]`` in [-1, 1]; values outside are clipped."""
    clipped = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return clipped.permute(1, 2, 0).numpy()


def data_uri(image: np.ndarray) -> str:
    """A PNG of ``[H, W, 3 or 4]`` bytes, inside the page."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, format="png")
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


def plain(name: str) -> str:
    """A name as a picture has room for it; dollars are no formulas to matplotlib then."""
    short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."
    return short.replace("$", r"\$")


def is_picture_file(path: str | os.PathLike[str]) -> bool:
    """Whether pictures can be written in the format that the name's ending stands for."""
    return Path(path).suffix[1:].lower() in FigureCanvasBase.get_supported_filetypes()


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture whose margins fit, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
