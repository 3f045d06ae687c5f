"""Whether a scheduler takes the steps that were searched: both are run, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.hosts import Host
from oss_ext.schedule import Schedule
from oss_ext.solvers import get, integrate

SAME = 1e-3
"""Relative distance of the ends: hosts compute in float32."""

STATE = 16
"""Elements of the state that is moved."""


class _Network:
    """What stands in for a network: outputs so far apart from step to step that solvers are too.

    It answers by the scheduler's timestep that is nearest to the one it is told: hosts that step
    back a little from pure noise tell it another than they would otherwise.
    """

    def __init__(self, host: Host, timesteps: Tensor) -> None:
        self._host, self._told = host, timesteps.double().cpu()
        generator = torch.Generator().manual_seed(0)
        self._away = cpu.randn(len(timesteps), STATE, generator=generator, dtype=torch.float64)

    def __call__(self, state: Tensor, told: float) -> Tensor:
        nearest = int((self._told - told).abs().argmin())  # the first of those that are repeated
        return self._away[nearest, None] + torch.tanh(state.double().roll(1, dims=1))

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Of it in flow coordinates."""
        told = float(self._host.timesteps(cpu.tensor([t], dtype=torch.float64)))
        return self._host.velocity(self(self._host.input_scale(t) * x, told), x, t)


def takes_steps_of(
    scheduler: Any, host: Host, schedule: Schedule, solver: str, orders: Sequence[int] = ()
) -> bool:
    """Whether ``scheduler``, whose steps are set, ends where ``solver`` does over the schedule.

    Args:
        scheduler: is run, and left as a run leaves it.
        host: what it means, read after its steps were set.
        schedule: whose times it has.
        solver: a name in ``oss_ext.solvers.SOLVERS``.
        orders: of its steps; none: the usual ones.
    """
    network, times = _Network(host, scheduler.timesteps), schedule.times
    x = cpu.linspace(-1, 1, STATE, dtype=torch.float64)[None] * host.noise_scale(times[0])
    *_, end = integrate(get(solver), network.velocity, x, times, orders)
    state = (x * host.scale(times[0])).float()
    shows = hasattr(type(scheduler), "scale_model_input")  # those of flow models show the state
    for timestep in scheduler.timesteps:
        shown = scheduler.scale_model_input(state, timestep) if shows else state
        output = network(shown, float(timestep)).float()
        state = scheduler.step(output, timestep, state)[0]
    got = state.double() / host.scale(times[-1])
    return bool((got - end).abs().max() <= SAME * end.abs().max())
