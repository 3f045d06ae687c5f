"""Schedules as hosts take them. A new text format is a line in ``text.FORMATS``."""

from __future__ import annotations

from oss_ext import arguments as arguments_
from oss_ext.export.base import ExportError, Format, Needs, whole_grid
from oss_ext.export.diffusers import arguments, call_arguments, class_arguments
from oss_ext.export.diffusers_attach import Attachment, attach, scheduled
from oss_ext.export.text import FORMATS as TEXTS
from oss_ext.noise import FlowPath, Path, VPPath
from oss_ext.schedule import Schedule
from oss_ext.solvers import SOLVERS

__all__ = [
    "DIFFUSERS",
    "FORMATS",
    "Attachment",
    "ExportError",
    "Format",
    "arguments",
    "attach",
    "call_arguments",
    "class_arguments",
    "get",
    "needs",
    "scheduled",
    "to",
    "whole_grid",
]

DIFFUSERS = "diffusers"
"""The host that is given arguments instead of a text; see ``arguments``."""

FORMATS: dict[str, Format] = {form.name: form for form in TEXTS}
"""Every format that is a text, by name."""


def get(name: str) -> Format:
    """The format called ``name``; ``ExportError`` lists the known ones."""
    if name not in tuple(FORMATS):
        raise ExportError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


@arguments_.takes(schedule=Schedule)
def to(schedule: Schedule, name: str, *, shift: float = 1.0, force: bool = False) -> str:
    """The text that the host called ``name`` takes; none of them calibrates amplitudes.

    Args:
        schedule: what was searched.
        name: a format; see ``FORMATS``.
        shift: that the host applies to what it is given: lightx2v, and sdnext on flow paths; 1
            for others.
        force: also where the host would not run what was searched.

    Raises:
        ExportError: an unknown format, or a schedule that the host would run otherwise.
        ValueError: a shift that is no positive number, or not 1 for a host that applies none.
    """
    form = get(name)
    shift = arguments_.number("shift", shift, positive=True)
    if shift != 1 and not form.shifts_on(schedule.path):
        kind = schedule.path.name
        raise ValueError(
            f"shift: expected 1 for {name} and a {kind} path, where it applies none, got {shift:g}"
        )
    form.check(schedule, force)
    return form.render(schedule, shift)


def needs(name: str, path: Path) -> Needs:
    """What a search for the host called ``name`` must keep to, for a model of ``path``."""
    if name == DIFFUSERS:  # as call arguments; ``attach`` needs nothing
        flow, whole = isinstance(path, FlowPath), isinstance(path, VPPath)
        return Needs(not flow, whole, shifts=False, solvers=tuple(SOLVERS))
    form, pinned = get(name), get(name).needs_pinned(path)
    return Needs(pinned, form.whole_timesteps, form.shifts_on(path), form.solvers(path))
