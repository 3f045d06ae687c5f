"""What an export format is, and what its host needs of a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.noise import FlowPath, Path, VPPath, distinct, shifted, unshifted
from oss_ext.schedule import Schedule
from oss_ext.solvers import get

NOISE_APART = 0.005
"""How much less noise a host may start from. Those that scale it by their first sigma lack 0.23 %
at Stable Diffusion's 14.6."""


class ExportError(ValueError):
    """A schedule that a host would not run as it was searched; the message says what would."""


@dataclass(frozen=True)
class Format:
    """How one host takes a schedule.

    Attributes:
        name: of the format.
        host: what takes it, and where it goes in; ``{sampler}`` is the one to choose there, and
            ``{shift}`` its shift.
        render: the text for a schedule that ``check`` has let through; ``shift`` is the host's.
        final_zero: whether the final value, usually 0, belongs to it, which the host adds
            otherwise; None for formats that hold whole tables.
        scales_noise: the host multiplies its initial noise by its first sigma, and so cannot
            start below the teacher's first time from the same noise.
        unit_noise: the host starts from noise of variance 1, which off a flow path is another
            size than a free start has.
        whole_timesteps: the host takes whole timesteps only; others are rounded or cut off, with an
            error.
        flow_only: the host runs flow models only.
        shifts: the host shifts what it is given, on flow paths.
        samplers: what it calls those of our solvers that it has.
        flow_samplers: those of them that it has on flow paths. Mostly Euler: what hosts of the
            k-diffusion kind run there under the other names is something else.
    """

    name: str
    host: str
    render: Callable[[Schedule, float], str]
    final_zero: bool | None
    scales_noise: bool = False
    unit_noise: bool = False
    whole_timesteps: bool = False
    flow_only: bool = False
    shifts: bool = False
    samplers: Mapping[str, str] = field(default_factory=lambda: {"euler": "euler"})
    flow_samplers: tuple[str, ...] = ("euler",)

    def about(self, solver: str, shift: float = 1.0) -> str:
        """``host`` with the sampler for a schedule of ``solver``, if there is one."""
        sampler = self.samplers.get(solver, f"for {solver}")
        return self.host.format(sampler=sampler, shift=shift)

    def solvers(self, path: Path) -> tuple[str, ...]:
        """Those of ours that it has a sampler for, with a model of ``path``."""
        return self.flow_samplers if isinstance(path, FlowPath) else tuple(self.samplers)

    def shifts_on(self, path: Path) -> bool:
        """Whether it shifts what it is given, for a model of ``path``."""
        return self.shifts and isinstance(path, FlowPath)

    def needs_pinned(self, path: Path) -> bool:
        """Whether a student must start at the teacher's first time, for a model of ``path``."""
        return self.scales_noise or (self.unit_noise and not isinstance(path, FlowPath))

    def check(self, schedule: Schedule, force: bool = False) -> None:
        """``ExportError`` if the host would not run what was searched, unless ``force``."""
        if force:
            return
        if schedule.starts_below and self.needs_pinned(schedule.path):
            does, noise = "starts from noise of variance 1", "noise of another size"
            if self.scales_noise:
                does, noise = "scales its noise by its first sigma", "the noise as it is"
            raise ExportError(
                f"{self.name}: this host {does}, but the schedule starts at "
                f"{schedule.sigmas[0]:.6g} from {noise} (free start); search with start='pinned' "
                f"(oss search --for {self.name})"
            )
        self.check_path(schedule.path, schedule.times[0])
        end = schedule.times[-1]
        if self.final_zero is False and isinstance(schedule.path, FlowPath) and end > 0:
            raise ExportError(
                f"{self.name}: this host ends every run at 0, but the schedule ends at {end:.6g}"
            )
        if self.final_zero is not None:
            self._check_solver(schedule)

    def check_path(self, path: Path, first: float) -> None:
        """``ExportError`` if the host has no models of ``path``, or does not start at the flow time
        ``first`` as the teacher did."""
        if self.flow_only and not isinstance(path, FlowPath):
            raise ExportError(
                f"{self.name}: expected a schedule of a flow model, got one of a {path.name} path"
            )
        sigma = float(path.sigmas(cpu.tensor([first], dtype=torch.float64)))
        if self.final_zero is not None and not math.isfinite(sigma):
            raise ExportError(
                f"{self.name}: the schedule starts at pure noise, where sigma is infinite, and "
                "this host counts in sigmas"
            )
        apart = path.noise_scale(first) / first - 1
        if self.scales_noise and apart > NOISE_APART:
            raise ExportError(
                f"{self.name}: this host scales its noise by its first sigma, {sigma:.6g}, and so "
                f"has {apart:.1%} less than the teacher started from; expected a teacher that "
                "starts at a higher one"
            )

    def _check_solver(self, schedule: Schedule) -> None:
        """``ExportError`` unless the host has a sampler that steps as the schedule's solver."""
        known = self.solvers(schedule.path)
        if schedule.solver not in known:
            raise ExportError(
                f"{self.name}: the schedule is one of {schedule.solver!r}, and of our solvers this "
                f"host has {', '.join(known)} for a {schedule.path.name} path; search with one of "
                "these"
            )
        usual = get(schedule.solver).usual_orders(schedule.times)
        if schedule.orders not in ((), usual):
            raise ExportError(
                f"{self.name}: this host takes every step of {schedule.solver!r} in its usual "
                "order, and the schedule has others; search with fixed_order=True (--fixed-order)"
            )


@dataclass(frozen=True)
class Needs:
    """What a search must keep to for a host to run its result.

    Attributes:
        pinned: the first step starts at the teacher's first time.
        whole_timesteps: the network is told whole ones only.
        shifts: the host shifts them.
        solvers: that the host may have; each in its usual orders.
    """

    pinned: bool
    whole_timesteps: bool
    shifts: bool
    solvers: tuple[str, ...]


def whole_grid(times: Tensor, path: Path, shift: float = 1.0) -> Tensor:
    """A teacher grid moved to whole timesteps, ``[N'+1]``; times that fall together count once.

    Args:
        times: flow times, ascending.
        path: of the model; on a flow path there are 1000 timesteps.
        shift: that the host applies to its timesteps; flow paths only.
    """
    if isinstance(path, FlowPath):
        shift = arguments.number("shift", shift, positive=True)
        whole = (1000 * unshifted(times, shift)).round() / 1000
        moved = shifted(whole, shift)
    else:
        inside = times >= path.span[0] - 1e-9  # the end below the first timestep is never asked
        moved = times.clone()
        moved[inside] = path.flow_times(path.model_times(times[inside]).round())
    return distinct(moved)


def number(value: float) -> str:
    """Enough digits to come back as the same float32."""
    text, single = f"{value:.9g}", np.float32(value)
    return text if np.float32(text) == single else f"{float(single):.9g}"


def numbers(values: tuple[float, ...]) -> str:
    """``values`` with commas between them."""
    return ", ".join(map(number, values))


def whole_timesteps(schedule: Schedule, shift: float = 1.0) -> list[int]:
    """The nearest whole timesteps of 1000 (or of the path's own count) for every step.

    Args:
        shift: that the host applies to them again; flow paths only.

    Raises:
        ExportError: two steps fall on the same one.
    """
    flow = isinstance(schedule.path, FlowPath)
    if flow:
        times = cpu.tensor(schedule.times[:-1], dtype=torch.float64)
        values = (1000 * unshifted(times, shift)).tolist()
    elif isinstance(schedule.path, VPPath):
        values = list(schedule.timesteps)
    else:
        raise ExportError(
            "timesteps: expected a network that is told whole ones, got a "
            f"{schedule.path.name} path"
        )
    rounded = [round(value) for value in values]
    if len(set(rounded)) < len(rounded) or (flow and 0 in rounded):
        raise ExportError(
            f"timesteps: expected {len(rounded)} different whole numbers above 0, got {rounded}; "
            "search on a coarser teacher grid, or with fewer steps"
        )
    return rounded
