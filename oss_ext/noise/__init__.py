"""Noise paths by name, and the teacher grids of each. A new path is a file and a line in PATHS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from oss_ext.noise.base import Path, check_grid, distinct, is_clean
from oss_ext.noise.flow import FLOW, FlowPath, flow_grid, shift_of, shifted, unshifted
from oss_ext.noise.prediction import PREDICTIONS, output_of, velocity_of
from oss_ext.noise.ve import VEPath, exponential_grid, karras_grid, sigma_grid
from oss_ext.noise.vp import VPContinuousPath, VPPath, ddim_grid, ddim_timesteps

__all__ = [
    "FLOW",
    "GRIDS",
    "PATHS",
    "PREDICTIONS",
    "FlowPath",
    "Path",
    "VEPath",
    "VPContinuousPath",
    "VPPath",
    "check_grid",
    "ddim_grid",
    "ddim_timesteps",
    "distinct",
    "exponential_grid",
    "flow_grid",
    "is_clean",
    "karras_grid",
    "output_of",
    "path_from_dict",
    "same_clock",
    "same_noise",
    "shift_of",
    "shifted",
    "sigma_grid",
    "unshifted",
    "velocity_of",
]

PATHS: dict[str, type[Path]] = {
    path.name: path for path in (FlowPath, VPPath, VPContinuousPath, VEPath)
}
"""Every path by the name that schedules store."""


def same_clock(one: Path, other: Path) -> bool:
    """Whether two paths tell the network the same at the same time."""
    if isinstance(one, VPPath) and isinstance(other, VPPath):
        return one.train_steps == other.train_steps and torch.allclose(
            one.knots, other.knots, atol=1e-4
        )
    return one == other


def same_noise(one: Path, other: Path) -> bool:
    """Whether a network of one path is asked at a time of the other where it would be on its own.

    In what they count by, flow models may differ: it is not where they are asked.
    """
    if isinstance(one, FlowPath) and isinstance(other, FlowPath):
        return one.reverse == other.reverse
    return same_clock(one, other)


def _levels(path: Path) -> tuple[float, float]:
    """The sigmas that an EDM grid goes through on ``path``, EDM's own where the path has more."""
    if isinstance(path, VEPath):
        return path.sigma_min, path.sigma_max
    default = VEPath()
    first, last = path.span
    low = first / (1 - first)
    high = last / (1 - last) if last < 1 else default.sigma_max
    return max(low, default.sigma_min), min(high, default.sigma_max)


def _ddim(path: Path, steps: int) -> Tensor:
    if isinstance(path, VPPath):
        return ddim_grid(path, steps)
    return _squeezed(ddim_grid(VPPath("linear", 1e-4, 0.02), steps), path)


def _squeezed(times: Tensor, path: Path) -> Tensor:
    """``times`` with those above the clean end moved, linearly, into what the network knows."""
    inner = times[1:]
    low, high = float(inner[0]), float(inner[-1])
    first, last = max(low, path.span[0]), min(high, path.span[1])
    if len(inner) == 1:
        inner = inner.clamp(max=last)
    elif (first, last) != (low, high):
        inner = first + (inner - low) * ((last - first) / (high - low))
        inner[-1] = last  # not a rounding beside it
    return torch.cat([times[:1], inner])


GRIDS: dict[str, Callable[[Path, int], Tensor]] = {
    "flow": lambda path, steps: _squeezed(flow_grid(steps), path),
    "ddim": _ddim,
    "edm": lambda path, steps: karras_grid(steps, *_levels(path)),
    "exponential": lambda path, steps: exponential_grid(steps, *_levels(path)),
}
"""Teacher grids by name, for a path and a number of steps (the paper's table 2 has flow, ddim and
edm), beside its own, ``Path.grid``. ``ddim`` on another path takes DDPM's betas; times are kept
within what the path's network knows.
"""


def path_from_dict(values: Any) -> Path:
    """The path that ``Path.to_dict`` wrote; ``ValueError`` says what is wrong with ``values``."""
    if not isinstance(values, dict) or values.get("name") not in tuple(PATHS):
        raise ValueError(f"path: expected a name among {tuple(PATHS)}, got {values!r:.200}")
    kind = PATHS[values["name"]]
    known = {field.name for field in fields(kind)}
    given = {name: value for name, value in values.items() if name != "name"}
    for name, value in given.items():
        if name not in known:
            listed = ", ".join(sorted(known))
            raise ValueError(f"path: {kind.name!r} has no attribute {name!r}; it has {listed}")
        if isinstance(value, list):
            given[name] = tuple(value)
    try:
        return kind(**given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"path: {error}") from None
