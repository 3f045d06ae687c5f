"""Published schedules as data, to be shown, compared and exported like one's own.

They are for the weights and settings that they were found on; searching is for yours. The tables
give the last noise level that a network is asked at; what follows it is the clean end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from oss_ext import cpu
from oss_ext.noise import FlowPath, flow_grid, path_from_dict
from oss_ext.schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """A published schedule.

    Attributes:
        name: of the preset: model, method, steps.
        about: what it is for.
        source: where it was published.
        schedule: the schedule.
    """

    name: str
    about: str
    source: str
    schedule: Schedule


@cache
def _table() -> dict[str, Any]:
    text = resources.files("oss_ext").joinpath("presets.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def names() -> list[str]:
    """The names of all presets."""
    return list(_table())


def load(name: str) -> Preset:
    """The preset called ``name``; ``ValueError`` lists the known ones."""
    if name not in _table():
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(_table())}")
    entry = _table()[name]
    path = path_from_dict(entry["path"])
    sigmas = cpu.tensor(entry["sigmas"], dtype=torch.float64)
    grid = entry["teacher"]
    times = path.times_of(sigmas)
    teacher = flow_grid(**grid) if isinstance(path, FlowPath) else path.grid(**grid)
    if torch.isclose(times[0], teacher[-1], rtol=1e-6):  # tables are rounded
        times[0] = teacher[-1]
    schedule = Schedule(
        times=tuple(times.tolist()),
        teacher_times=tuple(teacher.tolist()),
        indices=None,
        model=entry["model"],
        model_hash="",
        path=path,
        method=entry["method"],
    )
    return Preset(name, entry["about"], entry["source"], schedule)
