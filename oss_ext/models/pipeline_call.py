"""The arguments of a pipeline's call: which ones a search can have, and those of each item."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from oss_ext import arguments

MAIN = ("prompt", "prompt_embeds", "prompt_embeds_t5", "class_labels", "image", "video")
"""Call arguments that say how many items there are to condition on; the first one given counts."""

TEXTS = ("prompt", "prompt_2", "prompt_3", "prompt_4", "negative_prompt", "negative_prompt_2",
         "negative_prompt_3", "negative_prompt_4")  # fmt: skip

OURS = {
    "timesteps": "the search chooses them",
    "sigmas": "the search chooses them",
    "latents": "the initial states come from noise(batch, seed)",
    "generator": "the initial states come from noise(batch, seed)",
    "callback_on_step_end": "the loop's steps are the search's",
    "callback": "the loop's steps are the search's",
    "output_type": "the pipeline is left before it decodes",
    "return_dict": "the pipeline is left before it decodes",
}

# What depends on the number of the step, or on how many there are, and so has no meaning where
# steps are asked for in any order; the value that switches each off.
BY_STEP: dict[str, Any] = {
    "eta": 0.0,
    "skip_guidance_layers": None,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "cfg_interval_start": 0.0,
    "cfg_interval_end": 1.0,
    "cfg_trunc_ratio": 1.0,
    "cfg_truncation": 1.0,
    "use_dynamic_cfg": False,
    "adapter_conditioning_factor": 1.0,
    "denoising_start": None,
    "denoising_end": None,
    "num_temporal_reasoning_steps": 0,
}

UNFIT_CALLS = ("guidance_schedule", "pyramid_num_inference_steps_list")
"""Parameters of pipelines that always do something else at every number of the step."""


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """``ValueError`` if a search cannot follow ``pipe(**call)``, or chooses an argument itself."""
    known = dict(inspect.signature(type(pipe).__call__).parameters)
    known.pop("self", None)
    bare = all(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in known.values())
    for name in call:
        # Some pipelines take anything, and drop it; wrapped ones do not say what they take.
        if name not in known and not bare:
            raise ValueError(f"{type(pipe).__name__} has no argument {name!r}")
    for name, why in OURS.items():
        if call.get(name) is not None:
            raise ValueError(f"{name}: expected none of it, because {why}")
    for name, off in BY_STEP.items():
        value = call.get(name, off)
        values = value if isinstance(value, list | tuple) else [value]  # of several ControlNets
        if any(each not in (off, None) for each in values):
            raise ValueError(
                f"{name}: expected {off!r}, got {call[name]!r}: it changes what the network does "
                "with the number of the step, but a schedule is to change the steps"
            )
    if call.get("num_images_per_prompt", 1) != 1 or call.get("num_videos_per_prompt", 1) != 1:
        raise ValueError("num_images_per_prompt: expected 1; repeat the prompts, or set batch")
    arguments.whole_number("num_inference_steps", call.get("num_inference_steps", 50))
    for name in UNFIT_CALLS:
        if name in known:
            raise ValueError(
                f"pipe: {type(pipe).__name__} has a {name}, which changes what the network does "
                "with the number of the step"
            )
    prepare = getattr(type(pipe), "prepare_latents", None)
    if prepare is not None and "is_strength_max" in inspect.signature(prepare).parameters:
        strength = call.get("strength", known["strength"].default if "strength" in known else 1)
        if strength != 1:
            raise ValueError(
                f"strength: expected 1.0 for {type(pipe).__name__}, got {strength!r}: only there "
                "it runs all steps of a schedule, and then from noise alone"
            )
    if getattr(pipe, "free_init_enabled", False):
        raise ValueError(
            "pipe: FreeInit runs the loop several times; call pipe.disable_free_init() for the "
            "search"
        )
    _refuse_guiders(pipe)
    for name, component in getattr(pipe, "components", {}).items():
        if getattr(component, "is_cache_enabled", False):
            raise ValueError(
                f"pipe: {name} caches from step to step; call {name}.disable_cache() for the search"
            )
        if getattr(getattr(component, "config", None), "use_meanflow", False):
            raise ValueError(
                f"pipe: {name} is told where each step ends (mean flow), which a search does not "
                "know before it has evaluated it"
            )


def full_strength(pipe: Any) -> dict[str, float]:
    """What makes an image-to-image pipeline run a schedule from its first step."""
    known = inspect.signature(type(pipe).__call__).parameters
    return {"strength": 1.0} if "strength" in known else {}


def _refuse_guiders(pipe: Any) -> None:
    """``ValueError`` if a guider does something else at every number of the step."""
    for name in ("guider", "ocr_guider"):
        guider = getattr(pipe, name, None)
        config = getattr(guider, "config", {})
        for key, value in config.items() if config.get("enabled", True) else ():
            by_step = {
                "start": value not in (None, 0.0),
                "stop": value not in (None, 1.0),
                "start_step": value not in (None, 0),
                "momentum": value is not None,
            }
            if any(key.endswith(end) and unfit for end, unfit in by_step.items()):
                raise ValueError(
                    f"pipe: {name} is a {type(guider).__name__} with {key}={value!r}, which "
                    "changes what the network does with the number of the step; search with one "
                    f"that does not, e.g. pipe.{name} = ClassifierFreeGuidance(...)"
                )


def count_items(call: Mapping[str, Any]) -> int:
    """How many items the call arguments condition on; the first of ``MAIN`` that is given says."""
    for name in MAIN:
        value = call.get(name)
        if value is None:
            continue
        if isinstance(value, Tensor | np.ndarray):
            one = _is_one(value) if name in ("image", "video") else value.ndim < 2
            return 1 if one and name != "class_labels" else len(value)
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError(f"{name}: expected at least one item, got none")
            return len(value)
        return 1
    rows: int = call.get("batch_size", 1)  # of pipelines without any condition
    return rows


def _is_one(image: Any) -> bool:
    """Whether it is one image (or video), not some."""
    if isinstance(image, Tensor | np.ndarray):
        return image.ndim < 4
    return not isinstance(image, list | tuple)


def select(call: Mapping[str, Any], items: int, group: int, batch: int) -> dict[str, Any]:
    """The call arguments that differ from item to item, for the items of a group, cyclically."""
    wanted = [(group * batch + k) % items for k in range(batch)]
    chosen: dict[str, Any] = {}
    for name, value in call.items():
        if name in TEXTS and isinstance(value, str):
            chosen[name] = [value] * batch if batch > 1 else value
        elif name in TEXTS and batch == 1 and isinstance(value, list) and len(value) == items:
            chosen[name] = value[wanted[0]]  # not every pipeline takes lists
        elif name in ("image", "video") and _is_one(value):
            if items == 1 and batch > 1:
                chosen[name] = [value] * batch  # else one for all
        elif isinstance(value, list | tuple) and len(value) == items:
            listed = name in MAIN + TEXTS or name.endswith(("embeds", "images", "image"))
            if listed:
                chosen[name] = [value[k] for k in wanted]
        elif isinstance(value, Tensor | np.ndarray) and value.ndim > 0 and len(value) == items:
            chosen[name] = value[wanted]
    return chosen
