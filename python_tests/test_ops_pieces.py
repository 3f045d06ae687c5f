"""Equal results, bit for bit: however a step is cut, laid out in memory or run in parallel."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from op_cases import (
    DTYPES,
    LAYOUTS,
    MASKS,
    REDUCTIONS,
    Case,
    Inputs,
    Runner,
    arguments,
    arrange,
    random_case,
    refusal,
    same_bits,
)
from oss_ext import ops

CASES = [
    *(
        Case(17, 3, (3, 9, 31), *dtypes, reduce=REDUCTIONS[k % 3])
        for k, dtypes in enumerate(DTYPES)
    ),
    *(Case(17, 3, (300,), mask=mask, reduce=reduce) for mask in MASKS for reduce in REDUCTIONS),
    Case(9, 2, (5000,), layout="batch_major"),
]
Outputs = tuple[torch.Tensor, ...]


def assert_same(outputs: Outputs, expected: Outputs) -> None:
    for name, a, b in zip(["next_state", "cost", "parent"], outputs, expected, strict=True):
        assert same_bits(a, b), name


def everything(backend: Runner, inputs: Inputs) -> Outputs:
    return (*backend.dp_step(inputs), backend.dp_cost(inputs), *backend.dp_accumulate(inputs, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_is_cost_select_advance(backend: Runner, case: Case, seed: int) -> None:
    inputs = backend.draw(case, seed)
    next_state, cost, parent = backend.dp_step(inputs)
    best_cost, selected = backend.dp_select(backend.dp_cost(inputs), case.reduce)
    moved = backend.dp_advance(inputs, selected)
    assert_same((moved, best_cost.to(cost.dtype), selected), (next_state, cost, parent))


@pytest.mark.parametrize("chunk", [1, 3, 17])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_is_the_accumulation_of_chunks(
    backend: Runner, case: Case, chunk: int, seed: int
) -> None:
    rare = chunk != 3 or case.mask != "none"
    if backend.interpreted and rare and case.dims != (5000,):
        pytest.skip("takes too long to be done for every case")
    inputs = backend.draw(case, seed)
    next_state, cost, parent = backend.dp_step(inputs)
    state, best_cost, best_parent = backend.dp_accumulate(inputs, chunk)
    assert_same((state, best_cost.to(cost.dtype), best_parent), (next_state, cost, parent))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_chunks_without_live_sources_may_be_left_out(
    backend: Runner, reduce: str, seed: int
) -> None:
    inputs = backend.draw(Case(steps=12, reduce=reduce), seed)
    live = torch.arange(13, device=backend.device) // 4 == 1  # the middle chunk of three
    inputs = dataclasses.replace(inputs, source_mask=live)
    next_state, cost, parent = backend.dp_step(inputs)
    state, best_cost, best_parent = backend.dp_accumulate(inputs, 4)
    assert_same((state, best_cost.to(cost.dtype), best_parent), (next_state, cost, parent))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_a_strided_state_is_updated_in_place_or_refused(
    backend: Runner, layout: str, seed: int
) -> None:
    inputs = backend.draw(Case(steps=12, dims=(3, 8, 9)), seed)
    expected = backend.dp_step(inputs)[0]
    given = arguments("dp_accumulate_", inputs)
    given["state"] = LAYOUTS[layout](given["state"])
    reason = refusal(lambda: ops.dp_accumulate_(**given, backend=backend.name))
    if reason is not None:
        assert layout not in ("unaligned", "batch_major"), "each sample is one run of memory here"
        assert reason.startswith("dp_accumulate_: state")
        expected = inputs.state
    assert same_bits(given["state"], expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_costs_of_shards_join_to_those_of_the_batch(
    backend: Runner, reduce: str, seed: int
) -> None:
    inputs = backend.draw(Case(samples=5, mask="samples", reduce=reduce), seed)
    assert inputs.source_mask is not None
    shards = [
        Inputs(
            state=inputs.state[:, part],
            velocity=inputs.velocity[:, part],
            teacher=inputs.teacher[:, part],
            times=inputs.times,
            source_mask=inputs.source_mask[:, part],
            reduce=reduce,
        )
        for part in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    joined = torch.cat([backend.dp_cost(shard) for shard in shards], dim=2)
    best_cost, parent = backend.dp_select(joined, reduce)
    _, cost, expected = backend.dp_step(inputs)
    assert same_bits(best_cost.to(cost.dtype), cost)
    assert same_bits(parent, expected)


def test_a_shared_parent_moves_every_sample(backend: Runner, seed: int) -> None:
    inputs = backend.draw(Case(), seed)
    parent = backend.dp_step(inputs)[2][:, :1]
    shared = backend.dp_advance(inputs, parent)
    assert same_bits(shared, backend.dp_advance(inputs, parent.expand(-1, 3).contiguous()))
    assert same_bits(shared, backend.dp_advance(inputs, parent.expand(-1, 3)))


@pytest.mark.parametrize("layout", [name for name in [*LAYOUTS, "mixed"] if name != "contiguous"])
def test_the_layout_changes_no_bit(backend: Runner, layout: str, seed: int) -> None:
    inputs = backend.draw(Case(12, 2, (3, 9, 31)), seed)
    assert_same(
        backend.dp_step(arrange(inputs, layout)),
        backend.dp_step(inputs),
    )


def test_the_inputs_are_not_changed(backend: Runner, seed: int) -> None:
    inputs = backend.draw(Case(12, 2, (3, 9, 31), layout="mixed"), seed)
    before = [inputs.state.clone(), inputs.velocity.clone(), inputs.teacher.clone()]
    everything(backend, inputs)
    assert_same((inputs.state, inputs.velocity, inputs.teacher), tuple(before))


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_number_of_threads_changes_no_bit(backend: Runner, reduce: str, seed: int) -> None:
    if backend.interpreted:
        pytest.skip("interpreted in one thread")
    inputs = backend.draw(Case(12, 3, (6000,), reduce=reduce), seed)
    torch.set_num_threads(1)
    expected = everything(backend, inputs)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        for a, b in zip(everything(backend, inputs), expected, strict=True):
            assert same_bits(a, b), f"{threads} threads"


@pytest.mark.parametrize("draw", range(4))
def test_a_second_run_changes_no_bit(backend: Runner, draw: int, seed: int) -> None:
    if backend.interpreted and draw >= 1:
        pytest.skip("takes too long to be done as often")
    inputs = backend.draw(random_case(seed), seed)
    for a, b in zip(everything(backend, inputs), everything(backend, inputs), strict=True):
        assert same_bits(a, b)
