"""Every backend agrees with the float64 truth, whatever the inputs look like."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from op_cases import (
    DTYPES,
    LAYOUTS,
    MASKS,
    REDUCTIONS,
    SHAPES,
    Case,
    Runner,
    random_case,
    refusal,
    same_bits,
)
from op_truth import Truth

CASES = [
    *(Case(*shape, reduce=REDUCTIONS[k % 3]) for k, shape in enumerate(SHAPES)),
    *(
        Case(20, 2, (5, 61), dtype, velocity_dtype, reduce=reduce)
        for dtype, velocity_dtype in DTYPES[1:]
        for reduce in REDUCTIONS
    ),
    *(
        Case(12, 3, (3, 9, 31), dtype, layout=layout)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in [*LAYOUTS, "mixed"]
        if layout != "contiguous"
    ),
    *(Case(mask=mask, reduce=reduce) for mask in MASKS if mask != "none" for reduce in REDUCTIONS),
]


def check(backend: Runner, case: Case, seed: int) -> None:
    inputs = backend.draw(case, seed)
    truth = Truth(inputs)
    truth.check_step(backend.dp_step(inputs))
    if backend.interpreted:
        return  # slow, and test_ops_pieces.py compares the pieces with the step
    cost = backend.dp_cost(inputs)
    truth.check_costs(cost)
    parent = backend.dp_select(cost, case.reduce)[1]
    truth.check_parent(parent)
    truth.check_advance(backend.dp_advance(inputs, parent), parent)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_truth(backend: Runner, case: Case, seed: int) -> None:
    if backend.interpreted and case.layout != "contiguous" and case.dtype == torch.bfloat16:
        pytest.skip("takes too long to be done for every combination")
    check(backend, case, seed)


@pytest.mark.parametrize("draw", range(12))
def test_agrees_with_the_truth_in_any_combination(backend: Runner, draw: int, seed: int) -> None:
    if backend.interpreted and draw >= 4:
        pytest.skip("takes too long to be done as often")
    case = random_case(seed)
    print(case)
    check(backend, case, seed)


def test_gives_the_numbers_worked_out_by_hand(backend: Runner) -> None:
    def rows(*values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=backend.device)[:, None]

    inputs = dataclasses.replace(
        backend.draw(Case(steps=2, samples=1, dims=(2,)), seed=0),
        times=torch.tensor([0, 0.5, 1], dtype=torch.float64, device=backend.device),
        state=rows([9, 9], [1, 0], [2, 2]),
        velocity=rows([math.nan, math.nan], [2, 2], [2, 4]),
        teacher=rows([0, 0], [1, 1], [2, 2]),
    )
    # 1 -> 0 arrives at (0, -1), 2 -> 0 at (0, -2), 2 -> 1 at (1, 0).
    costs = backend.dp_cost(inputs)
    assert costs[:, :, 0].tolist() == [
        [math.inf] * 3,
        [0.5, math.inf, math.inf],
        [2, 0.5, math.inf],
    ]
    next_state, cost, parent = backend.dp_step(inputs)
    assert parent[:, 0].tolist() == [1, 2, -1]
    assert cost[:, 0].tolist() == [0.5, 0.5, math.inf]
    assert next_state[:, 0].tolist() == [[0, -1], [1, 0], [2, 2]]


@pytest.mark.usefixtures("restore_threads")
def test_agrees_with_the_truth_for_many_rows(backend: Runner, seed: int) -> None:
    """More rows than a kernel keeps at hand, the fewer the more threads share its scratch."""
    if backend.name == "reference" or backend.interpreted:
        pytest.skip("one pair at a time takes too long")
    inputs = backend.draw(Case(steps=300, samples=1, dims=(300,)), seed)
    torch.set_num_threads(32)
    by_many_threads = backend.dp_step(inputs)
    torch.set_num_threads(2)
    truth = Truth(inputs)
    truth.check_step(by_many_threads)
    truth.check_step(backend.dp_step(inputs))


@pytest.mark.parametrize(
    ("dtype", "elements"),
    [
        (torch.float32, 2**20 + 64),
        (torch.float32, 2**20 + 1),  # rows of any alignment
        (torch.float64, 2**19 + 8),
        (torch.bfloat16, 2**20 + 64),
    ],
)
def test_agrees_with_the_truth_beyond_the_caches(
    backend: Runner, dtype: torch.dtype, elements: int, seed: int
) -> None:
    """From 16 MiB on, what is written goes past the caches of a CPU."""
    backend.spare(unless=False)
    case = Case(steps=3, samples=1, dims=(elements,), dtype=dtype)
    check(backend, case, seed)
    inputs = backend.draw(case, seed)
    in_place = backend.dp_accumulate(inputs, 2)[0]
    assert same_bits(in_place, backend.dp_step(inputs)[0])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_agrees_with_the_truth_far_from_one(backend: Runner, scale: float, seed: int) -> None:
    inputs = backend.draw(Case(), seed)
    for tensor in (inputs.state, inputs.velocity, inputs.teacher):
        tensor.mul_(scale)
    truth = Truth(inputs)
    truth.check_step(backend.dp_step(inputs))
    truth.check_costs(backend.dp_cost(inputs))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_first_step_takes_one_row_as_every_state(backend: Runner, reduce: str, seed: int) -> None:
    inputs = backend.draw(Case(dims=(3, 8, 8), reduce=reduce), seed)
    noise = inputs.teacher[-1:].expand_as(inputs.teacher)  # stride 0 along the rows
    inputs = dataclasses.replace(inputs, state=noise)
    Truth(inputs).check_step(backend.dp_step(inputs))


def test_takes_one_mask_for_all_samples_as_a_view(backend: Runner, seed: int) -> None:
    inputs = backend.draw(Case(mask="rows"), seed)
    assert inputs.source_mask is not None
    mask = inputs.source_mask[:, None].expand(-1, 3)
    inputs = dataclasses.replace(inputs, source_mask=mask)
    Truth(inputs).check_step(backend.dp_step(inputs))


def test_many_strided_dims_work_or_are_refused(backend: Runner, seed: int) -> None:
    dims = (2,) * 10
    inputs = backend.draw(Case(steps=5, samples=1, dims=dims, layout="reversed_axes"), seed)
    reason = refusal(lambda: Truth(inputs).check_step(backend.dp_step(inputs)))
    assert reason is None or re.match(r"dp_step: state\b.*contiguous", reason)
