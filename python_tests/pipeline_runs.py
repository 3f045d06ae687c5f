"""What pipelines do by themselves, to compare with: their own runs, first states and files."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import Tensor, nn

import oss_ext as oss
from oss_ext import Schedule
from oss_ext.models import from_pipeline
from pipelines import CASES, PROMPTS, Case

STEPS = 10


class FirstState(Exception):
    """Raised in a pipeline's first step, with the state and the timestep it was called at."""


class Undecoded:
    """Keeps what it should decode, for pipelines that cannot be asked for latents."""

    def __init__(self, vae: Any) -> None:
        self.config, self.dtype = vae.config, vae.dtype

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents * self.config.scaling_factor
        return SimpleNamespace(sample=latents)


def quiet(pipe: Any, **members: Any) -> Any:
    """A copy of ``pipe`` without a progress bar and with other ``members``."""
    pipe = copy.copy(pipe)
    vars(pipe).update(members, _progress_bar_config={"disable": True})
    return pipe


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def own_latents(pipe: Any, call: dict[str, Any], seeds: Iterable[int] = range(PROMPTS)) -> Tensor:
    """Where ``pipe(**call)`` ends before it decodes, with its own loop and scheduler."""
    if isinstance(pipe, diffusers.DiTPipeline):  # knows no output_type "latent"
        vae = Undecoded(pipe.vae)
        quiet(pipe, vae=vae)(**call, generator=generators(seeds), output_type="np")
        return vae.latents
    return quiet(pipe)(**call, generator=generators(seeds), output_type="latent")[0]


def first_state(pipe: Any, call: dict[str, Any], seeds: Iterable[int]) -> tuple[Tensor, float]:
    """The state and the timestep of the first step of ``pipe(**call)``."""

    def step(output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        raise FirstState(sample, float(timestep))

    scheduler = copy.copy(pipe.scheduler)
    scheduler.step = step
    try:
        quiet(pipe, scheduler=scheduler)(**call, generator=generators(seeds))
    except FirstState as caught:
        state, timestep = caught.args
        return state, timestep
    raise AssertionError("the pipeline took no step")


@dataclass(frozen=True)
class Searched:
    pipe: Any
    call: dict[str, Any]
    model: Any
    noise: Tensor
    schedule: Schedule

    def promised(self, schedule: Schedule | None = None, x: Tensor | None = None) -> Tensor:
        """Where the search said that the pipeline ends, as its scheduler has states."""
        schedule = schedule or self.schedule
        x = oss.sample(self.model, self.noise if x is None else x, schedule)
        return self.model.host.scale(schedule.times[-1]) * x

    def got(self, **call: Any) -> Tensor:
        return own_latents(self.pipe, self.call | call)


def search(
    name: str, scheduler: Any = None, *, kind: Any = None, start: str = "free", **call: Any
) -> Searched:
    """A pipeline with three steps found for it, whatever cost they have, of a teacher of STEPS."""
    case = CASES[name]()
    pipe = case.pipe if kind is None else kind(case.pipe)
    if scheduler is not None:
        vars(pipe)["scheduler"] = scheduler
    takes = inspect.signature(type(pipe).__call__).parameters
    call = {key: value for key, value in (case.call | call).items() if key in takes}
    model = from_pipeline(pipe, **call, num_inference_steps=STEPS)
    noise = model.noise(PROMPTS, 0)
    trajectory = oss.teacher(model, noise, steps=STEPS)
    n = trajectory.steps  # fewer where an image-to-image pipeline starts part-way
    rows = [n - 2 if start == "free" else n, n // 2, n // 5, 0]
    return Searched(pipe, call, model, noise, trajectory.schedule(rows))


def assert_close(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    got = got.view_as(expected)
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"relative error {error:.2e}"


def reloaded(case: Case, folder: Path) -> Case:
    """The same pipeline, written to ``folder`` as safetensors files and read from them."""
    case.pipe.save_pretrained(folder)
    given: dict[str, Any] = {}
    for name, component in case.pipe.components.items():
        parts = getattr(component, "_keep_in_fp32_modules", None)
        if component is None:
            given[name] = None
        elif parts and not importlib.util.find_spec("accelerate"):  # their own loader needs it
            given[name] = type(component).from_config(component.config).eval()
            files = (folder / name).glob("*.safetensors")
            given[name].load_state_dict(safetensors.torch.load_file(next(files)))
    return replace(case, pipe=type(case.pipe).from_pretrained(folder, **given))


def of_items(call: dict[str, Any], *items: int) -> dict[str, Any]:
    """The call for some of the prompts of a case."""
    chosen = {
        name: value[list(items)] if isinstance(value, Tensor) else value
        for name, value in call.items()
    }
    if "class_labels" in call:
        chosen["class_labels"] = [call["class_labels"][k] for k in items]
    return chosen


class Wrapped:
    """Something that can be called like a network but is no ``nn.Module``."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._network(*args, **options)
