"""What was searched, at what cost, and what came of it in one line per budget."""

from __future__ import annotations

from oss_ext.report.base import (
    Judgement,
    Part,
    able,
    by_budget,
    judged,
    looks,
    nearest,
)
from oss_ext.report.markup import (
    NOTHING,
    Html,
    code,
    decibels,
    element,
    join,
    plural,
)
from oss_ext.runs import Contender, Run
from oss_ext.words import size, span


def _render(run: Run) -> Html:
    scores = judged(run)
    tiles = [
        _tile(run, steps, group, scores) for steps, group in by_budget(able(run)).items() if scores
    ]
    facts = {
        "Model": run.model,
        "Teacher": f"{plural(run.teacher_steps, 'step')}, {plural(run.teacher_nfe, 'evaluation')} "
        f"per sample, {span(run.teacher_seconds)}",
        "Samples": f"{run.calibration:,} to search, "
        + (f"{run.held_out:,} others to judge" if run.held_out else "none judged"),
        "Search": _costs(run),
        "Peak memory": size(run.peak_bytes) if run.peak_bytes else "",
        "Ended": run.created.replace("T", " "),
        "Machine": ", ".join(f"{name} {value}" for name, value in run.machine.items()),
    }
    listed = [
        element(
            "div",
            element("dt", name),
            element("dd", value),
            class_="wide" if name == "Machine" else None,
        )
        for name, value in facts.items()
        if value
    ]
    return join(
        element("div", *tiles, class_="tiles") if tiles else "",
        element("dl", *listed, class_="facts"),
        code(run.command, "command of this run", wrap=True) if run.command else "",
    )


def _costs(run: Run) -> str:
    ours = [c for c in able(run) if looks(run)[c.name].ours]
    if not ours:
        return ""
    most = max(c.schedule.search_nfe for c in ours if c.schedule is not None)
    return (
        f"up to {plural(most, 'evaluation')} per sample with the teacher's, "
        f"{span(max(c.seconds for c in ours))}"
    )


def _tile(run: Run, steps: int, group: list[Contender], scores: dict[str, Judgement]) -> Html:
    best = nearest(group, scores)
    if best is None:
        return NOTHING
    best_psnr = scores[best.name].statistics.psnr_of_mean
    uniform = next((c for c in group if c.method == "uniform" and c.name in scores), None)
    remark = ""
    if uniform is best:
        remark = "no other is nearer to the teacher"
    elif uniform is not None:
        gain = best_psnr - scores[uniform.name].statistics.psnr_of_mean
        remark = f"{decibels(gain)} dB nearer to the teacher than uniform"
    return element(
        "div",
        element("p", plural(steps, "step"), class_="over"),
        element("p", decibels(best_psnr), element("small", " dB"),
                class_=f"figure {looks(run)[best.name].css}"),
        element("p", element("strong", best.name), element("br") if remark else "", remark),
        class_="tile",
    )  # fmt: skip


PART = Part("overview", "Overview", _render)
