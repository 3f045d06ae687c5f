"""What a diffusers scheduler is, from its class name and configuration.

A new class is a line in ``STATES``, if it moves one of the states of ``base``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.hosts.base import Host
from oss_ext.noise import FlowPath, Path, VEPath, VPPath

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


class UnknownScheduler(ValueError):
    """A scheduler that cannot be read, with what to do about it."""


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
        if prediction not in ("flow_prediction", None) and STATES[name] != "flow":
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
    sigmas = cpu.as_tensor(scheduler.sigmas, dtype=torch.float64)
    told = cpu.as_tensor(scheduler.timesteps, dtype=torch.float64).clone()
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
    config, bars = scheduler.config, cpu.as_tensor(scheduler.alphas_cumprod)
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
