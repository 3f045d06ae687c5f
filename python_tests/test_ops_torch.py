"""The operators inside PyTorch: opcheck, fake tensors, ``torch.compile``, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import REDUCTIONS, Case, Runner, arguments, draw, same_bits
from oss_ext import ops
from oss_ext.ops import schema

CASES = [
    Case(6, 2, (3, 5)),
    Case(6, 2, (3, 5), mask="rows", layout="mixed"),
    Case(6, 2, (), torch.float32, torch.bfloat16, mask="samples", reduce="mean"),
    Case(1, 1, (1,), torch.float64, reduce="log_mean"),
]


def operator(name: str) -> Any:
    return getattr(torch.ops.oss, name).default


def positional(op: str, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    keywords = {a.name for a in operator(op)._schema.arguments if a.kwarg_only}
    args = tuple(value for name, value in given.items() if name not in keywords)
    return args, {name: value for name, value in given.items() if name in keywords}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_opcheck_passes(op: str, case: Case, seed: int) -> None:
    args, kwargs = positional(op, arguments(op, Runner("reference", "cpu").draw(case, seed)))
    torch.library.opcheck(operator(op), args, kwargs)


def test_the_dispatcher_takes_the_fastest_backend(seed: int) -> None:
    inputs = draw(Case(), seed)
    best = Runner(ops.serving("cpu").name, "cpu")
    chosen = ops.dp_step(**arguments("dp_step", inputs))
    for a, b in zip(chosen, best.dp_step(inputs), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_the_reference_is_the_fallback_where_no_kernel_is(op: str) -> None:
    """The fallback serves every device, and kernels for a device's own key come before it."""
    name = f"oss::{op}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(name, "CompositeExplicitAutograd")
    assert has(name, "CPU") == ops.native.available


def step(state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor) -> tuple[Tensor, ...]:
    """A step among other operators, then the next one from where it arrived."""
    first, _, parent = ops.dp_step(state * 1.0, velocity, teacher, times)
    return ops.dp_step(first, velocity, teacher, times, source_mask=parent >= 0, reduce="mean")


def accumulate(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor
) -> tuple[Tensor, ...]:
    state = state * 1.0
    cost = times.new_full(state.shape[:2], torch.inf)
    parent = torch.full_like(cost, -1, dtype=torch.int64)
    half = len(times) // 2
    for first, last in ((1, half), (half, len(times))):
        ops.dp_accumulate_(state, velocity[first:last], first, teacher, times, cost, parent)
    return state, cost, parent


@pytest.mark.parametrize("function", [step, accumulate])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_without_graph_breaks_to_equal_results(
    function: Any, compiler: str, seed: int
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
    for case in (Case(6, 2, (3, 5)), Case(9, 3, (4, 5))):
        inputs = draw(case, seed)
        given = (inputs.state, inputs.velocity, inputs.teacher, inputs.times)
        for a, b in zip(compiled(*given), function(*given), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_meta_tensors_give_the_shapes_of_the_outputs(op: str, reduce: str, seed: int) -> None:
    given = arguments(op, draw(Case(6, 2, (3, 5), torch.bfloat16, reduce=reduce), seed))
    tensors = {k: v.to("meta") for k, v in given.items() if isinstance(v, Tensor)}
    if "basis" in given:
        tensors["basis"] = [x.to("meta") for x in given["basis"]]
    on_meta = given | tensors
    expected, outputs = (getattr(ops, op)(**g) for g in (given, on_meta))
    as_tuple = (lambda x: (x,)) if isinstance(expected, Tensor) else (lambda x: x or ())
    for a, b in zip(as_tuple(outputs), as_tuple(expected), strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
