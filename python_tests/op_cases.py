"""Inputs for the operator tests, and how the tests call an operator.

A ``Case`` says what is special about some inputs; ``Runner.make`` draws them. They are noisy
copies of a curved path, so that costs are far below ``|x|^2`` and the best sources are close, as
in a real search: that is where rounding decides.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from oss_ext import ops

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
"""Every allowed (state, velocity) pair."""

REDUCTIONS = ["none", "mean", "log_mean"]
MASKS = ["none", "rows", "samples", "dead"]
SHAPES = [  # N, B, dims
    (1, 1, ()),
    (1, 3, (1,)),
    (2, 1, (7,)),
    (2, 3, (255,)),
    (1, 2, (257,)),
    (33, 1, (3,)),
    (33, 3, ()),
    (33, 1, (257,)),
    (33, 3, (1000,)),
    (100, 1, (1000,)),
    (100, 3, (7,)),
    (33, 3, (3, 5, 17)),
    (33, 1, (1, 16, 1, 16)),
    (17, 2, (4, 40, 41)),
]

INTERPRETED_WORK = 48
"""The largest ``Case.work`` for kernels that Python interprets, some milliseconds each."""


def _every_other(x: Tensor) -> Tensor:
    """With poison between the elements."""
    poison = torch.full_like(x, torch.nan if x.is_floating_point() else 1)
    return torch.stack([x, poison], dim=-1)[..., 0]


def _axes_in_memory(order: Callable[[list[int]], list[int]]) -> Callable[[Tensor], Tensor]:
    """Axes stored in the order that ``order`` makes of them."""

    def arrange(x: Tensor) -> Tensor:
        axes = order(list(range(x.dim())))
        return x.permute(axes).contiguous().permute(torch.tensor(axes).argsort().tolist())

    return arrange


# The same values in other places. [time, sample, channel, ...] are axes 0, 1, 2, ...
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _axes_in_memory(lambda axes: axes),
    "unaligned": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "every_other": _every_other,
    "batch_major": _axes_in_memory(lambda axes: [axes[1], axes[0], *axes[2:]]),
    "time_last": _axes_in_memory(lambda axes: [*axes[1:], axes[0]]),
    "channels_last": _axes_in_memory(lambda axes: [*axes[:2], *axes[3:], *axes[2:3]]),
    "reversed_axes": _axes_in_memory(lambda axes: axes[::-1]),
}


@dataclass(frozen=True)
class Case:
    """What is special about some inputs.

    Attributes:
        steps, samples, dims: N, B and the trailing dims.
        dtype, velocity_dtype: of state and teacher, of velocity (None: the same).
        layout: how all tensors lie in memory, or ``mixed``: each in another way.
        mask: ``none``; live sources per ``rows`` or per (row, ``samples``); ``dead``: none live.
        reduce: as in ``dp_step``.
    """

    steps: int = 33
    samples: int = 3
    dims: tuple[int, ...] = (257,)
    dtype: torch.dtype = torch.float32
    velocity_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    mask: str = "none"
    reduce: str = "none"

    @property
    def work(self) -> int:
        """How many times a kernel with 32 lanes goes through its inner loop."""
        return self.steps * self.samples * -(-math.prod(self.dims) // 32)

    def __str__(self) -> str:
        """A test's id: what differs from the defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)}".replace("torch.", "")
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return " ".join(changed) or "plain"


C = TypeVar("C", bound=Case)


def random_case(seed: int) -> Case:
    """Any combination of everything, but never many steps: they take the reference seconds."""
    choose = random.Random(seed)
    steps, samples, dims = choose.choice([shape for shape in SHAPES if shape[0] < 100])
    dtype, velocity_dtype = choose.choice(DTYPES)
    return Case(
        steps, samples, dims, dtype, velocity_dtype,
        layout=choose.choice([*LAYOUTS, "mixed"]),
        mask=choose.choice(MASKS[:3]),
        reduce=choose.choice(REDUCTIONS),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of ``dp_step``."""

    state: Tensor
    velocity: Tensor
    teacher: Tensor
    times: Tensor
    source_mask: Tensor | None
    reduce: str

    @property
    def live(self) -> Tensor:
        """[N+1, B]: the sources that count."""
        rows, samples = self.state.shape[:2]
        live = torch.ones(rows, samples, dtype=torch.bool, device=self.state.device)
        if self.source_mask is not None:
            live &= self.source_mask.reshape(rows, -1)
        live[0] = False
        return live

    def to(self, device: str) -> Inputs:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Inputs(*(v.to(device) if isinstance(v, Tensor) else v for v in values))


def draw(case: Case, seed: int) -> Inputs:
    """Inputs of a case on the CPU; velocities that no operator may read are NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows, sample = case.steps + 1, (case.samples, *case.dims)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gaps = 0.1 + torch.rand(case.steps, generator=generator, dtype=torch.float64)
    times = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0) / gaps.sum()])
    t = times.view(rows, *[1] * len(sample))
    clean, noise, bend = (randn(*sample) for _ in range(3))
    teacher = (1 - t) * clean + t * noise + 0.1 * (3 * t).sin() * bend
    slope = noise - clean + 0.3 * (3 * t).cos() * bend
    state = teacher + 0.02 * randn(rows, *sample)
    velocity = slope + 0.05 * randn(rows, *sample)

    dice = torch.rand(rows, case.samples, generator=generator)
    source_mask = {
        "none": None,
        "rows": dice[:, 0] < 0.7,
        "samples": dice < 0.8,
        "dead": torch.zeros(rows, dtype=torch.bool),
    }[case.mask]
    inputs = Inputs(
        state=state.to(case.dtype),
        velocity=velocity.to(case.velocity_dtype or case.dtype),
        teacher=teacher.to(case.dtype),
        times=times,
        source_mask=source_mask,
        reduce=case.reduce,
    )
    inputs.velocity[~inputs.live] = torch.nan
    return inputs


def arrange(inputs: Inputs, layout: str) -> Inputs:
    """The same inputs, laid out in memory as ``layout`` says."""
    if layout == "contiguous":
        return inputs
    names = ["time_last", "every_other", "channels_last"] if layout == "mixed" else [layout] * 3
    mask = inputs.source_mask
    return Inputs(
        state=LAYOUTS[names[0]](inputs.state),
        velocity=LAYOUTS[names[1]](inputs.velocity),
        teacher=LAYOUTS[names[2]](inputs.teacher),
        times=_every_other(inputs.times),
        source_mask=None if mask is None else _every_other(mask),
        reduce=inputs.reduce,
    )


def euler_terms(inputs: Inputs) -> dict[str, Tensor]:
    """``index`` and ``coefficients`` with which ``dp_argmin_`` compares what ``dp_step`` does."""
    rows, samples = inputs.state.shape[:2]
    source = torch.arange(1, rows, device=inputs.times.device)
    steps = inputs.times - inputs.times[1:, None]
    return {
        "index": source[:, None].expand(2, -1, samples),
        "coefficients": torch.stack([torch.ones_like(steps), steps])[None, ..., None],
    }


def arguments(op: str, inputs: Inputs) -> dict[str, Any]:
    """Valid arguments of an operator by name, in the order of its schema."""
    rows, samples = inputs.state.shape[:2]
    columns = samples if inputs.reduce == "none" else 1
    step = {
        "state": inputs.state,
        "velocity": inputs.velocity,
        "teacher": inputs.teacher,
        "times": inputs.times,
        "source_mask": inputs.source_mask,
    }
    if op == "dp_step":
        return {**step, "reduce": inputs.reduce}
    if op == "dp_cost":
        return step
    if op == "dp_select":
        return {"cost": ops.dp_cost(**step, backend="reference"), "reduce": inputs.reduce}
    if op == "dp_advance":
        del step["teacher"], step["source_mask"]
        best = ops.dp_step(**arguments("dp_step", inputs), backend="reference")
        return {**step, "parent": best[2]}
    best_cost = inputs.times.new_full((rows, samples), torch.inf)
    best_parent = torch.full_like(best_cost[:, :columns], -1, dtype=torch.int64)
    if op == "dp_combine":
        parent = ops.dp_step(**arguments("dp_step", inputs), backend="reference")[2]
        parent = parent.expand(rows, samples)
        steps = inputs.times[:, None] - inputs.times[parent]
        return {
            "basis": [inputs.state, inputs.velocity],
            "index": torch.stack([parent, parent]),
            "coefficients": torch.stack([torch.ones_like(steps), steps]),
        }
    if op == "dp_argmin_":
        return {
            "basis": [inputs.state, inputs.velocity],
            **euler_terms(inputs),
            "terms": [2],
            "first_source": 1,
            "target": inputs.teacher,
            "best_cost": best_cost,
            "best_parent": best_parent,
            "best_order": best_parent.clone(),
            "source_mask": inputs.source_mask,
            "reduce": inputs.reduce,
        }
    return {
        "state": inputs.state.clone(memory_format=torch.contiguous_format),
        "velocity_chunk": inputs.velocity[1:],
        "first_source": 1,
        "teacher": inputs.teacher,
        "times": inputs.times,
        "best_cost": best_cost,
        "best_parent": best_parent,
        "source_mask": inputs.source_mask,
        "reduce": inputs.reduce,
    }


def poison_memory(inputs: Inputs) -> None:
    """Leave NaN where an operator's outputs are likely to be allocated next."""
    rows, samples = inputs.state.shape[:2]
    shapes = [inputs.state.shape, (rows, samples), (rows, 1), (rows, rows, samples)]
    dtypes = {inputs.state.dtype, torch.float32, torch.float64}
    like = inputs.state
    kept = [like.new_full(s, torch.nan, dtype=d) for s in shapes for d in dtypes for _ in "ab"]
    del kept


@dataclass(frozen=True)
class Runner:
    """One backend on one device, over the memory of NaN that an earlier call might have left."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        return (self.name, self.device) == ("triton", "cpu")

    def needs(self, op: str) -> None:
        """Skips a test of an operator that the backend does not have."""
        reason = ops.BACKENDS[self.name].why_not_call(op, torch.device(self.device))
        if reason is not None:
            pytest.skip(f"{self.name}: {reason}")

    def needs_values(self) -> None:
        """Skips a test of values that kernels on a GPU do not look at: they would have to wait."""
        if self.device == "cuda" and self.name != "reference":
            pytest.skip("looking at values would wait for the device")

    def spare(self, *, unless: bool) -> None:
        """Skips a test of kernels that Python interprets, unless it is one of the few to do."""
        if self.interpreted and not unless:
            pytest.skip("takes too long to be interpreted as often")

    def examples(self, most: int) -> int:
        """How many a property test draws: few where nearly every one is compiled for."""
        return min(most, 6) if (self.name, self.device) == ("triton", "cuda") else most

    def draw(self, case: Case, seed: int) -> Inputs:
        """Inputs of a case on this device."""
        case = self.fitting(case)
        return arrange(draw(case, seed).to(self.device), case.layout)

    def fitting(self, case: C) -> C:
        """The case, or a smaller one where Python interprets the kernels."""
        if not self.interpreted or case.work <= INTERPRETED_WORK:
            return case
        steps = case.steps if case.steps == 12 else min(case.steps, 8)
        largest = [2] * len(case.dims[:-1]) + [7] * len(case.dims[-1:])
        return dataclasses.replace(case, steps=steps, dims=tuple(map(min, case.dims, largest)))

    def dp_step(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        poison_memory(inputs)
        return ops.dp_step(**arguments("dp_step", inputs), backend=self.name)

    def dp_cost(self, inputs: Inputs) -> Tensor:
        poison_memory(inputs)
        return ops.dp_cost(**arguments("dp_cost", inputs), backend=self.name)

    def dp_select(self, cost: Tensor, reduce: str = "none") -> tuple[Tensor, Tensor]:
        return ops.dp_select(cost, reduce, backend=self.name)

    def dp_advance(self, inputs: Inputs, parent: Tensor) -> Tensor:
        poison_memory(inputs)
        return ops.dp_advance(
            inputs.state, inputs.velocity, inputs.times, parent, backend=self.name
        )

    def dp_accumulate(self, inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """``dp_accumulate_`` over all sources, ``chunk`` at a time: state, cost and parent."""
        given = arguments("dp_accumulate_", inputs)
        for first in range(1, len(inputs.state), chunk):
            part = inputs.velocity[first : first + chunk]
            given |= {"first_source": first, "velocity_chunk": part}
            ops.dp_accumulate_(**given, backend=self.name)
        return given["state"], given["best_cost"], given["best_parent"]


def refusal(call: Callable[[], object]) -> str | None:
    """What ``call`` answers to arguments that it need not support; None if it supports them."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included, and of equal dtype and shape."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(bits[a.itemsize]), b.contiguous().view(bits[b.itemsize])
    )
