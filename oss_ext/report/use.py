"""How to use the schedules: what every host takes, to be copied."""

from __future__ import annotations

import json
import shlex

from oss_ext import export
from oss_ext.report.base import Judgement, Part, able, judged, looks, nearest
from oss_ext.report.markup import NOTHING, Html, code, decibels, element, join, plural, tabs
from oss_ext.runs import Contender, Run
from oss_ext.schedule import Schedule

PYTHON = """\
import oss_ext as oss

schedule = oss.Schedule.load({file})
samples = oss.sample(model, model.noise(8, seed=1), schedule{options})
"""

PIPELINE = """\
import oss_ext as oss

schedule = oss.Schedule.load({file})
with oss.export.attach(schedule, pipe):
    result = pipe(prompt, num_inference_steps={steps})
"""

UNCALIBRATED = "Judged with amplitude calibration, which no host does: it is for Python alone."


def _render(run: Run) -> Html | None:
    contenders = able(run)
    if not contenders:
        return None
    scores = judged(run)
    # What was not judged is no better than the last of ours, which has the most steps.
    ours = [c for c in contenders if looks(run)[c.name].ours] or contenders
    first = nearest(contenders, scores) or max(ours, key=lambda c: c.steps)
    ordered = [first, *(c for c in contenders if c is not first)]
    intro = "Files and commands are those of the run's folder."
    if first.name in scores:
        intro += f" {first.name} came nearest to the teacher."
    return join(
        element("p", intro, class_="note"),
        *(_schedule(run, n, c, scores.get(c.name), c is first) for n, c in enumerate(ordered)),
    )


def _schedule(run: Run, number: int, c: Contender, score: Judgement | None, opened: bool) -> Html:
    assert c.schedule is not None
    file, quoted = shlex.quote(c.file), json.dumps(c.file, ensure_ascii=False)
    known = "" if score is None else f" · {decibels(score.statistics.psnr_of_mean)} dB"
    summary = element(
        "summary", element("strong", c.name, class_=looks(run)[c.name].css),
        element("span", plural(c.steps, "step") + known),
    )  # fmt: skip
    panels = {
        "Python": code(
            PYTHON.format(file=quoted, options=", amplitude=True" if c.amplitude else ""), "Python"
        ),
        "diffusers": join(
            code(PIPELINE.format(file=quoted, steps=c.steps), "Python for diffusers"),
            element("p", "or the arguments for its own scheduler:"),
            code(f"oss export {file} --to {export.DIFFUSERS} --scheduler DIR", "command"),
        ),
        **{name: _host(c.schedule, file, name) for name in export.FORMATS},
        "JSON": join(
            element("p", "The schedule itself: ", element("code", c.file)),
            element("div", code(c.schedule.to_json(), "schedule as JSON"), class_="screen"),
        ),
    }
    body = tabs(f"use-{number}", f"Hosts for {c.name}", panels)
    note = element("p", UNCALIBRATED, class_="note") if c.amplitude else NOTHING
    return element("details", summary, note, body, open=opened)


def _host(schedule: Schedule, file: str, name: str) -> Html:
    about = export.FORMATS[name].about(schedule.solver)
    try:
        text = export.to(schedule, name)
    except export.ExportError as error:
        return join(element("p", about), element("p", f"Refused: {error}", class_="refused"))
    return join(
        element("p", about),
        code(text, f"schedule for {name}"),
        code(f"oss export {file} --to {name}", "command"),
    )


PART = Part("use", "Use", _render)
