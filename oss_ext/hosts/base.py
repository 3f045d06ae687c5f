"""What a diffusers scheduler means: its noise path, prediction, time grid and coordinates.

Schedulers are known by class name and configuration alone, so that nothing here needs diffusers.
A scheduler moves a state of its own (``state``), shows the network a scaled one, and is handed an
output (``predicts``) in terms of what the network was shown:

| state | schedulers | state of ``x0`` and ``eps`` | the network is shown |
|---|---|---|---|
| flow | FlowMatch*, and others with ``use_flow_sigmas`` | ``(1 - t) x0 + t eps`` | the state |
| vp | DDIM, PNDM, DPM-Solver, UniPC, DEIS | ``alpha x0 + beta eps`` | the state |
| ve | Euler, Heun, LMS, KDPM2 | ``x0 + sigma eps`` | the state / sqrt(sigma^2 + 1) |
| edm | EDMEuler, EDMDPMSolverMultistep | ``x0 + sigma eps`` | the state * c_in |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.noise import FlowPath, Path, distinct, velocity_of
from oss_ext.noise.flow import MAX_MU

# Hosts make timesteps of float32 sigmas and may then cut off the fraction: how far below a whole
# number still counts as that number.
TRUNCATION_GUARD = 2e-4


def _variance_preserving(t: float) -> tuple[float, float]:
    norm = math.hypot(t, 1 - t)
    return (1 - t) / norm, t / norm


@dataclass(frozen=True)
class Host:
    """What a scheduler object means; made by ``read_host``.

    Attributes:
        name: class name.
        state: ``flow``, ``vp``, ``ve`` or ``edm``; see above.
        predicts: of the network's output, a name in ``noise.PREDICTIONS``.
        path: noise path and clock of the network.
        whole_timesteps: the host tells the network whole numbers.
        sigma_data: of EDM preconditioning.
        scheduler: the object itself.
        own: flow times of the steps that were set in the scheduler, and what it tells the network
            at them; None before ``set_timesteps``.
    """

    name: str
    state: str
    predicts: str
    path: Path
    whole_timesteps: bool
    sigma_data: float
    scheduler: Any
    own: tuple[Tensor, Tensor] | None = None

    @property
    def config(self) -> Any:
        return self.scheduler.config

    def timesteps(self, times: Tensor) -> Tensor:
        """What the host tells the network at flow times ``times``, float64.

        At its own steps what it says itself: hosts interpolate, round and cut off in ways of
        their own. Elsewhere what it would say, as near as can be known.
        """
        steps = self.path.model_times(times)
        if self.whole_timesteps:
            # On a flow path hosts cut off the fraction; elsewhere most of them round.
            flow = self.state == "flow"
            steps = (steps + TRUNCATION_GUARD).floor() if flow else steps.round()
        if self.own is not None:
            known, told = self.own
            match = times[:, None] == known
            steps = torch.where(match.any(dim=1), told[match.int().argmax(dim=1)], steps)
        return steps

    def sigmas(self, times: Tensor) -> Tensor:
        """The host's ``sigmas`` at flow times ``times``, float64."""
        sigmas = self.path.sigmas(times)
        return 1 - sigmas if self._reverse else sigmas

    def flow_times(self, sigmas: Tensor) -> Tensor:
        """The inverse of ``sigmas``."""
        return self.path.times_of(1 - sigmas if self._reverse else sigmas)

    @property
    def _reverse(self) -> bool:
        """Whether sigmas, and what the network is told, rise to 1 at the clean end."""
        return isinstance(self.path, FlowPath) and self.path.reverse

    def alpha_beta(self, t: float) -> tuple[float, float]:
        """``alpha`` and ``beta`` of the scheduler's state at flow time ``t``."""
        if self.state == "flow":
            return 1 - t, t
        if self.state == "vp":
            return _variance_preserving(t)
        return 1.0, t / (1 - t)

    def scale(self, t: float) -> float:
        """The scheduler's state is this times the state in flow coordinates."""
        return sum(self.alpha_beta(t))

    def input_scale(self, t: float) -> float:
        """The network is shown this times the state in flow coordinates."""
        if self.state == "ve":
            return 1 / math.hypot(t, 1 - t)
        if self.state == "edm":
            sigma = t / (1 - t)
            return self.scale(t) / math.hypot(sigma, self.sigma_data)
        return self.scale(t)

    def velocity(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The flow velocity that the network's output stands for.

        Args:
            output: ``[R, *dims]``, what pipelines hand to ``step``, in any floating dtype.
            x: the state in flow coordinates, float32 or float64, which decides the arithmetic.
            t: flow time.
        """
        # Where the state is scaled for the network, predictions are in terms of what that sees.
        alpha, beta = _variance_preserving(t) if self.state == "ve" else self.alpha_beta(t)
        ab = torch.tensor([[alpha], [beta]], dtype=torch.float64, device=x.device)
        return velocity_of(self.predicts, output, (alpha + beta) * x, ab[0], ab[1], self.sigma_data)

    def shift(self, mu: float | None = None) -> float | None:
        """The time shift of a flow host, None where it depends on a ``mu`` that is not given."""
        if self.config.get("use_dynamic_shifting", False):
            if mu is None:
                return None
            if self.config.get("time_shift_type", "exponential") == "linear":
                return arguments.number("mu", mu, positive=True)
            return math.exp(arguments.between("mu", mu, -MAX_MU, MAX_MU))
        # Not by getattr alone: it may end in the configuration, with a warning.
        has = isinstance(getattr(type(self.scheduler), "shift", None), property)
        set_later = self.scheduler.shift if has else None
        fixed = set_later or self.config.get("shift") or self.config.get("flow_shift")
        return float(fixed or 1.0)

    def noise_scale(self, t: float) -> float:
        """Pipelines start at flow time ``t`` from this times standard normal noise, in flow
        coordinates."""
        if self.state == "flow":
            return 1.0
        sigma = t / (1 - t) if t < 1 else math.inf
        initial = 1.0
        if self.state == "ve":
            spread = self.config.get("timestep_spacing", "linspace") in ("linspace", "trailing")
            initial = sigma if spread else math.hypot(sigma, 1)
        elif self.state == "edm":
            initial = math.hypot(sigma, 1)
        return initial / self.scale(t)

    def grid(self) -> Tensor:
        """The flow times that ``set_timesteps`` left in the scheduler, ascending ``[N+1]``.

        Repeated ones (two-stage solvers, PNDM) count once.
        """
        if "sigmas" in vars(self.scheduler):
            sigmas = cpu.as_tensor(self.scheduler.sigmas, dtype=torch.float64)
            if self.state == "flow" and float(sigmas.max()) > 1 + 1e-6:
                raise ValueError(
                    f"scheduler: {self.name} has sigmas up to {float(sigmas.max()):.4g} here, but "
                    "those of a flow path end at 1"
                )
            return distinct(self.flow_times(sigmas))
        timesteps = cpu.as_tensor(self.scheduler.timesteps, dtype=torch.float64)
        final = float(self.scheduler.final_alpha_cumprod)
        end = math.sqrt(max(1 - final, 0.0))
        clean = cpu.tensor([end / (end + math.sqrt(final))], dtype=torch.float64)
        times = self.path.flow_times(timesteps)
        # The level of the first timestep is no step away from that timestep.
        times = times[times > clean]
        return distinct(torch.cat([clean, times]))
