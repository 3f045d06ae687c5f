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

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oss_ext.noise import FlowPath, Path, VEPath, VPPath, distinct, velocity_of

# Class names, to what becomes of the state in them.
STATES = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "DDIMScheduler": "vp",
    "DDIMParallelScheduler": "vp",
    "CogVideoXDDIMScheduler": "vp",
    "PNDMScheduler": "vp",
    "DPMSolverMultistepScheduler": "vp",
    "DPMSolverSinglestepScheduler": "vp",
    "UniPCMultistepScheduler": "vp",
    "DEISMultistepScheduler": "vp",
    "EulerDiscreteScheduler": "ve",
    "HeunDiscreteScheduler": "ve",
    "LMSDiscreteScheduler": "ve",
    "KDPM2DiscreteScheduler": "ve",
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
}
STOCHASTIC = {
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "CosineDPMSolverMultistepScheduler",
    "CogVideoXDPMScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "FlowMatchLCMScheduler",
    "TCDScheduler",
    "SCMScheduler",
    "CMStochasticIterativeScheduler",
    "LTXEulerAncestralRFScheduler",
    "UnCLIPScheduler",
    "DDPMWuerstchenScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
}
PREDICTS = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}

# Hosts make timesteps of float32 sigmas and may then cut off the fraction: how far below a whole
# number still counts as that number.
TRUNCATION_GUARD = 2e-4


class UnknownScheduler(ValueError):
    """A scheduler that cannot be read, with what to do about it."""


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
        if self.state == "flow":
            return 1 - times if self.path.reverse else times.clone()  # type: ignore[attr-defined]
        return times / (1 - times)

    def flow_times(self, sigmas: Tensor) -> Tensor:
        """The inverse of ``sigmas``."""
        if self.state == "flow":
            return 1 - sigmas if self.path.reverse else sigmas.clone()  # type: ignore[attr-defined]
        return sigmas / (1 + sigmas)

    def alpha_beta(self, t: float) -> tuple[float, float]:
        """``alpha`` and ``beta`` of the scheduler's state at flow time ``t``."""
        if self.state == "flow":
            return 1 - t, t
        if self.state == "vp":
            norm = math.hypot(t, 1 - t)
            return (1 - t) / norm, t / norm
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
        if self.state in ("flow", "edm"):
            alpha, beta = self.alpha_beta(t)
        else:  # predictions are in terms of the variance-preserving state
            norm = math.hypot(t, 1 - t)
            alpha, beta = (1 - t) / norm, t / norm
        ab = torch.tensor([[alpha], [beta]], dtype=torch.float64, device=x.device)
        return velocity_of(self.predicts, output, (alpha + beta) * x, ab[0], ab[1], self.sigma_data)

    def shift(self, mu: float | None = None) -> float | None:
        """The time shift of a flow host, None where it depends on a ``mu`` that is not given."""
        if self.config.get("use_dynamic_shifting", False):
            if mu is None:
                return None
            linear = self.config.get("time_shift_type", "exponential") == "linear"
            return mu if linear else math.exp(mu)
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
            sigmas = torch.as_tensor(self.scheduler.sigmas, dtype=torch.float64, device="cpu")
            return distinct(self.flow_times(sigmas))
        timesteps = torch.as_tensor(self.scheduler.timesteps, dtype=torch.float64, device="cpu")
        final = float(self.scheduler.final_alpha_cumprod)
        end = math.sqrt(max(1 - final, 0.0))
        clean = torch.tensor([end / (end + math.sqrt(final))], dtype=torch.float64)
        times = self.path.flow_times(timesteps)
        # The level of the first timestep is no step away from that timestep.
        times = times[times > clean]
        return distinct(torch.cat([clean, times]))


def read_host(scheduler: Any) -> Host:
    """What ``scheduler``, an object of a diffusers class, means.

    Raises:
        UnknownScheduler: a class that is not known, one that adds noise in every step, or a
            configuration that alters what the network says (clipping, thresholding).
    """
    name = known_name(scheduler)
    config = scheduler.config
    _refuse_noise_and_clipping(name, config)
    flow = STATES[name] == "flow" or config.get("use_flow_sigmas", False)
    flow = flow or config.get("prediction_type") == "flow_prediction"
    state = "flow" if flow else STATES[name]
    train_steps = int(config.get("num_train_timesteps", 1000))
    path: Path
    whole = False
    if state == "flow":
        # Multistep solvers cut timesteps down to whole numbers, the flow-matching ones do not.
        whole = STATES[name] == "vp"
        path = FlowPath(float(train_steps), bool(config.get("invert_sigmas", False)))
        predicts = "reverse_velocity" if path.reverse else "velocity"
        prediction = config.get("prediction_type", "flow_prediction")
        if flow and prediction not in ("flow_prediction", None) and STATES[name] != "flow":
            raise UnknownScheduler(
                f"scheduler: {name} with flow sigmas and prediction_type {prediction!r} is not "
                "supported, expected 'flow_prediction'"
            )
    elif state == "edm":
        path = VEPath(float(config.sigma_min), float(config.sigma_max), "log")
        predicts = "edm"
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise UnknownScheduler(f"scheduler: {name} is read with prediction_type 'epsilon' only")
    else:
        predicts = PREDICTS.get(config.get("prediction_type", "epsilon"), "")
        if not predicts:
            raise UnknownScheduler(
                f"scheduler: prediction_type of {name}: expected one of {tuple(PREDICTS)}, got "
                f"{config.get('prediction_type')!r}"
            )
        continuous = config.get("timestep_type", "discrete") == "continuous"
        if state == "ve" and continuous and predicts == "v":  # Stable Video Diffusion
            path = VEPath(float(config.sigma_min or 1e-3), float(config.sigma_max or 1e3), "log")
        else:
            path = _vp_path(scheduler)
        whole = state == "vp"
    sigma_data = float(config.get("sigma_data", 0.5))
    host = Host(name, state, predicts, path, whole, sigma_data, scheduler)
    return replace(host, own=_own_steps(host))


def _own_steps(host: Host) -> tuple[Tensor, Tensor] | None:
    """The flow times of the scheduler's steps and its timesteps; None if it has none yet."""
    scheduler = host.scheduler
    if "sigmas" not in vars(scheduler) or getattr(scheduler, "num_inference_steps", None) is None:
        return None
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64, device="cpu")
    told = torch.as_tensor(scheduler.timesteps, dtype=torch.float64, device="cpu").clone()
    return (host.flow_times(sigmas[:-1]), told) if len(sigmas) == len(told) + 1 else None


def known_name(scheduler: Any) -> str:
    """The name of the known class that ``scheduler`` is of, or derives from."""
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    for name in names:
        if name in STATES:
            return name
        if name in STOCHASTIC:
            raise UnknownScheduler(
                f"scheduler: {name} adds fresh noise in every step, so there is no trajectory to "
                "follow; pass scheduler=... a deterministic one, e.g. DDIMScheduler, "
                "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler, made with from_config "
                "of this one's config"
            )
    raise UnknownScheduler(
        f"scheduler: {names[0]} is not known; pass scheduler=... one that is, made with "
        f"from_config of this one's config where that fits: {', '.join(STATES)}"
    )


def _refuse_noise_and_clipping(name: str, config: Any) -> None:
    if name == "PNDMScheduler" and not config.get("skip_prk_steps", False):
        raise UnknownScheduler(
            f"scheduler: {name} with skip_prk_steps=False takes half steps; pass "
            f"scheduler={name}.from_config(pipe.scheduler.config, skip_prk_steps=True)"
        )
    for key in ("stochastic_sampling", "clip_sample", "thresholding"):
        if config.get(key, False):
            what = {"stochastic_sampling": "adds fresh noise in every step"}.get(
                key, "changes what the network says before it takes the step"
            )
            raise UnknownScheduler(
                f"scheduler: {name} with {key}=True {what}; pass "
                f"scheduler={name}.from_config(pipe.scheduler.config, {key}=False)"
            )
    if str(config.get("algorithm_type", "")).startswith("sde"):
        raise UnknownScheduler(
            f"scheduler: {name} with algorithm_type {config['algorithm_type']!r} adds fresh noise "
            "in every step; pass one with algorithm_type='dpmsolver++'"
        )


def _vp_path(scheduler: Any) -> VPPath:
    """By the recipe of its betas if that gives the scheduler's own levels, else by the levels."""
    config, bars = scheduler.config, torch.as_tensor(scheduler.alphas_cumprod, device="cpu")
    recipe = BETAS.get(config.get("beta_schedule", ""), "")
    if recipe:
        path = VPPath(
            betas=recipe,
            beta_start=float(config.beta_start),
            beta_end=float(config.beta_end),
            train_steps=len(bars),
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )
        own = VPPath(alphas_cumprod=tuple(bars.double().tolist()))
        # Some hosts stop just short of pure noise.
        return path if torch.allclose(path.knots, own.knots, atol=1e-5) else own
    return VPPath(alphas_cumprod=tuple(bars.double().tolist()))


class StandIn:
    """Mixed into a scheduler's own class by ``stand_in``: overrides some of its answers."""


class StepOutput(tuple[Tensor]):
    """What ``step`` returns: a tuple, and its parts by the names that pipelines use."""

    pred_original_sample: Tensor | None

    def __new__(cls, values: tuple[Tensor], x0: Tensor | None = None) -> StepOutput:
        made = super().__new__(cls, values)
        made.pred_original_sample = x0
        return made

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


def stand_in(mixin: type[StandIn], scheduler: Any) -> Any:
    """A copy of ``scheduler`` whose class also derives from ``mixin``, which goes first.

    Pipelines ask schedulers for their class, configuration, levels and the parameters of their
    methods, and so find what they would find in the original, which is left alone.
    """
    scheduler = original_of(scheduler)
    original = type(scheduler)
    methods = {}
    for name in ("set_timesteps", "step"):
        override = _signed_as(getattr(mixin, name), getattr(original, name))
        methods[name] = override
    kind = type(original.__name__, (mixin, original), methods)
    copy: Any = object.__new__(kind)
    vars(copy).update(vars(scheduler), _original=scheduler)
    return copy


def original_of(scheduler: Any) -> Any:
    """What ``scheduler`` stands in for, or itself."""
    return vars(scheduler).get("_original", scheduler)


def _signed_as(function: Any, like: Any) -> Any:
    """``function``, which takes whatever comes, with the parameters that ``like`` shows."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        return function(self, *args, **options)

    method.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return method
