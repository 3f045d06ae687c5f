"""Any diffusers pipeline as a model, evaluated by the pipeline's own loop.

The pipeline says what it always says: after guidance, packing, switching of experts and all that
its ``__call__`` does. The scheduler in it says what that means: path, prediction and time grid.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oss_ext import arguments, cpu
from oss_ext.hosts import original_of, read_host, scheduler_of
from oss_ext.models.base import MOST_SEED, Model, hash_of
from oss_ext.models.pipeline_call import check_call, count_items, select
from oss_ext.models.pipeline_load import diffusers_class, import_diffusers, load_pipeline
from oss_ext.models.pipeline_run import Ended, Request, Run

SEED_STRIDE = 1_000_000
"""Sample ``b`` of ``noise(batch, seed)`` has a generator with seed ``SEED_STRIDE * seed + b``."""

TURNS = 100
"""At the least, of the loops of runs that begin for the sake of evaluations."""

STEADY = 0.1
"""How far two answers to the same may be apart, relative to the first: less than rounding in 16
bits makes of guidance."""

HASHED_VALUES = 64
"""Values of every weight tensor that the fingerprint reads."""


class PipelineModel(Model):
    """A pipeline with its call arguments; see ``from_pipeline``.

    Attributes:
        pipe: the pipeline.
        host: what the pipeline's scheduler means.
        mu: the resolution shift that the pipeline gives to its scheduler, if any.
        nfe_probe: evaluations that pipelines made at their own first state, to set up.
    """

    slots: int
    setting_up = False

    def __init__(
        self, pipe: Any, scheduler: Any, items: int, batch: int, call: Mapping[str, Any]
    ) -> None:
        self.pipe, self._scheduler, self._call = pipe, scheduler, dict(call)
        self._steps = self._call.pop("num_inference_steps", 50)
        self._items, self.slots, self.one_time_per_call = items, batch, True
        self._groups = math.lcm(items, batch) // batch  # of calls with different conditioning
        self._runs: dict[int, Run] = {}
        self._encoded: dict[str, Any] = {}
        weakref.finalize(self, _close_all, self._runs)
        self.nfe_probe = 0
        self.mu: float | None = None
        self.name = type(pipe).__name__
        run = self._start(0, None)
        self.host, self.path, self.mu = run.host, run.host.path, run.mu
        self.shape = tuple(run.first.sample.shape[1:])
        self.device = run.first.sample.device
        self._check_answers(run)
        self._hash = self._fingerprint()

    # --- the protocol ---

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        group = int(sample[0]) // self.slots % self._groups
        time = float(t[0])
        at = t[:1].double().cpu()
        state = (self.host.input_scale(time) * x).to(x.dtype)
        request = Request(state, float(self.timesteps(at)), float(self.host.sigmas(at)))
        output = self._evaluate(group, request)[: len(x)]
        return self.host.velocity(output.to(x.device), x, time)

    def times(self, steps: int) -> Tensor:
        """The pipeline's own grid for ``steps``; fewer where it starts part-way (img2img)."""
        self._steps = arguments.whole_number("steps", steps)
        run = self._start(0, None)
        self.host, self.mu = run.host, run.mu
        return self._grid(run)

    def timesteps(self, times: Tensor) -> Tensor:
        """What the scheduler tells the network; at the steps of its grid, what it says itself."""
        return self.host.timesteps(times)

    def close(self) -> None:
        """Leave the pipeline's loop. The next evaluation enters it again."""
        _close_all(self._runs)

    def noise(self, batch: int, seed: int = 0, *, start: float | None = None) -> Tensor:
        """The pipeline's own initial states in flow coordinates, ``[batch, *shape]`` float32.

        Sample ``b`` is what ``torch.Generator().manual_seed(1_000_000 * seed + b)`` gives.

        Args:
            batch: how many.
            seed: whole number from 0 on, so that ``SEED_STRIDE`` times it is one for torch.
            start: the flow time that the teacher starts at; None: the pipeline's own, with the
                number of steps that ``times`` was last asked for, or ``num_inference_steps``.
        """
        batch = arguments.whole_number("batch", batch)
        seed = arguments.whole_number("seed", seed, least=0, most=MOST_SEED // SEED_STRIDE - 1)
        if batch > SEED_STRIDE:
            raise ValueError(f"batch: expected at most {SEED_STRIDE}, got {batch}")
        states = []
        for first in range(0, batch, self.slots):
            group = first // self.slots % self._groups
            run = self._start(group, self.seeds(first, seed))
            t = float(self._grid(run)[-1])
            state = run.first.sample[: self.slots].float() / self.host.scale(t)
            if start is not None:
                state = state * (self.host.noise_scale(start) / self.host.noise_scale(t))
            states.append(state)
        return torch.cat(states)[:batch]

    def networks(self) -> dict[str, nn.Module]:
        components = getattr(self.pipe, "components", {})
        return {name: c for name, c in components.items() if isinstance(c, nn.Module)}

    def fingerprint(self) -> str:
        return self._hash

    def seeds(self, first: int, seed: int) -> list[int]:
        """The seeds of the generators for the samples from ``first`` on that one call holds."""
        return [SEED_STRIDE * seed + first + k for k in range(self.slots)]

    def call(self, group: int, seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of ``pipe(...)`` for the items of a group, with generators of ``seeds``."""
        call = dict(self._call, num_inference_steps=self._steps)
        call |= select(call, self._items, group, self.slots)
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        call["generator"] = generators if len(generators) > 1 else generators[0]
        return call

    # --- runs of the pipeline ---

    def _start(self, group: int, seeds: Sequence[int] | None, steps: int = 0) -> Run:
        """A run of the pipeline for the items of ``group``, in place of the one there was."""
        if group in self._runs:
            self._runs.pop(group).close()
        call = self.call(group, seeds or range(self.slots))
        call["num_inference_steps"] = steps or self._steps
        self.setting_up = True
        try:
            run = Run(self.pipe, self._scheduler, call, self._encoded)
        finally:
            self.setting_up = False
        self.nfe_probe += self.slots
        self._check_rows(run)
        self._runs[group] = run
        return run

    def _check_rows(self, run: Run) -> None:
        sample, slots = run.first.sample, self.slots
        if len(sample) % slots or any(
            not torch.equal(part, sample[:slots]) for part in sample.split(slots)
        ):
            run.close()
            raise ValueError(
                f"{self.name}: expected {slots} rows in a call, one for each item, got "
                f"{len(sample)}; give several images per prompt as several prompts, or batch=..."
            )

    def _check_answers(self, run: Run) -> None:
        """``ValueError`` if the second turn says something else at the state and time of the first.

        Momentum in the guidance, a first turn that is unlike the others, and networks that draw
        numbers have no velocity that a search could follow.
        """
        t, rows = float(self._grid(run)[-1]), torch.arange(self.slots, device=self.device)
        x = run.first.sample[: self.slots].float() / self.host.scale(t)
        first = self.host.velocity(run.first.output[: self.slots].to(x.device), x, t)
        again = self(x, cpu.tensor([t], dtype=torch.float64), rows)
        self.nfe_probe += self.slots
        apart = float((again - first).norm() / first.norm())
        if apart > STEADY:
            self.close()
            raise ValueError(
                f"pipe: {self.name} says something else when it is asked the same in its next step "
                f"({apart:.0%} apart): what depends on earlier steps (momentum, caches), or is "
                "drawn anew (dropout), has to be switched off for the search"
            )

    def _evaluate(self, group: int, request: Request) -> Tensor:
        run = self._runs.get(group)
        if run is not None and not run.closed:
            with contextlib.suppress(Ended):
                return run.evaluate(request)
        return self._start(group, None, max(self._steps, TURNS)).evaluate(request)

    def _grid(self, run: Run) -> Tensor:
        """The part of the scheduler's grid that the pipeline goes through."""
        inner = run.host_grid[1:]
        # Whole timesteps may repeat; the loop begins with the first of its steps, the highest.
        distance = (run.host.timesteps(inner) - run.first.timestep).abs()
        row = int((distance == distance.min()).nonzero().max())
        return run.host_grid[: row + 2]

    # --- identity ---

    def _fingerprint(self) -> str:
        parts: list[object] = [self.name, self.path, self.host.state, self.host.predicts]
        parts += [self.host.sigma_data, self.shape]
        for key in sorted(self._call):
            parts += [key, *_identity(self._call[key])]
        # Components are named in it too, and private entries say where it was loaded from.
        parts += [
            f"{name}={value}"
            for name, value in sorted(getattr(self.pipe, "config", {}).items())
            if isinstance(value, bool | int | float | str) and not name.startswith("_")
        ]
        components = getattr(self.pipe, "components", {})
        for key in sorted(components):
            weights = getattr(components[key], "state_dict", None)
            if callable(weights):
                for name, value in weights().items():
                    parts += [key, name, *_sampled(value)]
        return hash_of(parts)


def _close_all(runs: dict[int, Run]) -> None:
    while runs:
        runs.popitem()[1].close()


def _sampled(value: Any) -> list[object]:
    """What stands for a weight tensor in a fingerprint: shape, type and some of its values.

    All values of a model of many gigabytes would take minutes, and fine-tunes change most.
    """
    if not isinstance(value, Tensor):
        return [type(value).__name__]
    parts: list[object] = [tuple(value.shape), str(value.dtype)]
    try:
        flat = value.detach().flatten()
        stride = max(1, len(flat) // HASHED_VALUES)
        return [*parts, flat[::stride][:HASHED_VALUES].float().cpu()]
    except (RuntimeError, NotImplementedError):  # quantised types that cannot be sliced
        return parts


def _identity(value: Any) -> list[object]:
    """Call arguments as ``hash_of`` takes them: nothing that has an address in it."""
    if isinstance(value, Tensor | str | int | float | bool | type(None)):
        return [value]
    if isinstance(value, Mapping):
        return [part for key in sorted(value) for part in (key, *_identity(value[key]))]
    if isinstance(value, Sequence):
        return [len(value), *(part for item in value for part in _identity(item))]
    try:
        return [torch.from_numpy(np.array(value))]  # images
    except (TypeError, ValueError):
        return [type(value).__name__]


def from_pipeline(
    pipe: Any, *, scheduler: Any = None, batch: int | None = None, **call: Any
) -> PipelineModel:
    """A diffusers pipeline as a model, evaluated by the pipeline's own loop.

    The pipeline object is never changed. Its states are what its scheduler moves (latents, packed
    or not); sample ``b`` has the prompt (image, class, ...) ``b`` modulo their number.

    Args:
        pipe: any pipeline that steps one state with ``scheduler.step``: text to image, image to
            image, video, with two experts, quantised, with adapters, offloaded.
        scheduler: read and stood in for instead of ``pipe.scheduler``, e.g. a deterministic one in
            place of one that adds noise.
        batch: prompts per call of the network; None: as many as there are.
        call: the arguments of ``pipe(...)``: ``prompt`` (a list for several), ``guidance_scale``,
            ``height``, ``strength``, ... ``num_inference_steps`` is the number of teacher steps.

    Raises:
        ValueError: a scheduler that is unknown or adds noise, a call argument that belongs to the
            search or depends on the step number, caching of steps in the network.
        Whatever the pipeline raises in its first step, which is taken here to see its shapes.
    """
    scheduler = original_of(scheduler_of(pipe, scheduler))  # a schedule may be attached
    read_host(scheduler)
    check_call(pipe, call)
    items = count_items(call)
    batch = items if batch is None else arguments.whole_number("batch", batch)
    return PipelineModel(pipe, scheduler, items, batch, call)


def from_folder(
    folder: str,
    prompts: Sequence[str] | None,
    *,
    scheduler: str | None = None,
    batch: int | None = None,
    call: Mapping[str, Any] | None = None,
    **options: Any,
) -> PipelineModel:
    """A diffusers pipeline from a folder, or from the hub, as a model.

    Args:
        folder: that ``save_pretrained`` wrote, or a name on the hub.
        options: ``dtype``, ``device``, ``offload``, ``lora``, ``kind``; see ``load_pipeline``.
        prompts: what to condition on; None for pipelines that ``call`` conditions.
        scheduler: name of a scheduler class to use in place of the pipeline's own.
        batch: prompts per call of the network.
        call: further arguments of ``pipe(...)``.

    Raises:
        ValueError: as ``load_pipeline`` and ``from_pipeline``.
    """
    if prompts is not None and call is not None and "prompt" in call:
        raise ValueError("prompt: expected none beside prompts, which are all that there are")
    pipe = load_pipeline(folder, **options)
    if scheduler is not None:
        kind = diffusers_class(import_diffusers(), scheduler, "scheduler")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    arguments_ = dict(call or {})
    if prompts is not None:
        arguments_["prompt"] = list(prompts)
    return from_pipeline(pipe, batch=batch, **arguments_)
