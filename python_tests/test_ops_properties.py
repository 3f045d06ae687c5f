"""What holds of the operators for any shape, dtype, layout, mask and value.

Examples are drawn to fail small: the values themselves come from a seed, what is special about them
from strategies. ``op_truth`` and ``affine_cases`` say what is right.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from affine_cases import AffineCase, AffineRunner, AffineTruth, assert_same
from op_cases import DTYPES, LAYOUTS, REDUCTIONS, Case, Inputs, Runner, arguments, same_bits
from op_truth import Truth
from oss_ext import ops
from property_cases import few_or_many

DIMS = [(), (1,), (7,), (255,), (256,), (257,), (3, 5, 17), (2, 1, 8, 3)]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-45]
"""Denormal in float32 the last two; what a dtype cannot hold becomes zero there."""

usual = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 6),
        "samples": st.integers(1, 3),
        "dims": st.sampled_from(DIMS),
        "layout": st.sampled_from([*LAYOUTS, "mixed"]),
        "mask": st.sampled_from(["none", "rows", "samples", "dead"]),
        "reduce": st.sampled_from(REDUCTIONS),
    }
)
cases = st.builds(
    lambda dtypes, given: Case(**given, dtype=dtypes[0], velocity_dtype=dtypes[1]),
    st.sampled_from(DTYPES),
    usual,
)
affine_cases = st.builds(
    lambda dtypes, given, terms, shared, holes: AffineCase(
        **given, dtype=dtypes[0], velocity_dtype=dtypes[1], terms=terms, shared=shared, holes=holes
    ),
    st.sampled_from(DTYPES),
    usual,
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)
one_pair = {"steps": 1, "samples": 1, "dims": (), "mask": "none"}  # where nothing hides a square
places = st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 10**6)] * 3), max_size=4)
"""Which tensor, row, sample and element; modulo how many there are."""


def at(tensor: Tensor, row: int, sample: int, element: int) -> tuple[int, ...]:
    rows, samples, *dims = tensor.shape
    inner = (
        torch.unravel_index(torch.tensor(element % math.prod(dims)), tuple(dims)) if dims else ()
    )
    return (row % rows, sample % samples, *(int(i) for i in inner))


def spoil(inputs: Inputs, where: list[tuple[int, int, int, int]], values: list[float]) -> None:
    for (which, *place), value in zip(where, values, strict=False):
        tensor = [inputs.state, inputs.velocity, inputs.teacher][which]
        tensor[at(tensor, *place)] = value


def check_pieces(backend: Runner, inputs: Inputs, chunk: int) -> None:
    """The step is its pieces, and the accumulation of chunks, to the bit."""
    next_state, cost, parent = backend.dp_step(inputs)
    best, selected = backend.dp_select(backend.dp_cost(inputs), inputs.reduce)
    moved = backend.dp_advance(inputs, selected)
    streamed = backend.dp_accumulate(inputs, chunk)
    for state, own, source in ((moved, best, selected), streamed):
        assert same_bits(state, next_state)
        assert same_bits(own.to(cost.dtype), cost)
        assert same_bits(source, parent)


@few_or_many(40, 300)
def test_any_step_agrees_with_the_truth_and_is_its_pieces(backend: Runner, examples: int) -> None:
    backend.spare(unless=False)

    @settings(max_examples=backend.examples(examples))
    @given(cases, seeds, places, st.lists(st.sampled_from(SPECIAL), max_size=4), st.integers(1, 6))
    @example(
        Case(**one_pair), 0, [(0, 1, 0, 0), (1, 1, 0, 0), (2, 0, 0, 0)], [1e-40, 0.0, 0.0], 1
    )  # the square underflows
    def check(
        case: Case,
        seed: int,
        where: list[tuple[int, int, int, int]],
        values: list[float],
        chunk: int,
    ) -> None:
        inputs = backend.draw(case, seed)
        spoil(inputs, where, values)
        truth = Truth(inputs)
        truth.check_step(backend.dp_step(inputs))
        truth.check_costs(backend.dp_cost(inputs))
        check_pieces(backend, inputs, chunk)

    check()


@few_or_many(40, 300)
def test_a_source_that_cannot_count_is_as_good_as_masked(backend: Runner, examples: int) -> None:
    """NaN, inf, and what is so large that its cost overflows: nothing else changes by a bit."""
    backend.spare(unless=False)

    @settings(max_examples=backend.examples(examples))
    @given(cases, seeds, places, st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
    def check(case: Case, seed: int, where: list[tuple[int, int, int, int]], value: float) -> None:
        inputs = backend.draw(case, seed)
        if math.isfinite(value):  # of float16 all squares are within float32
            half = case.dtype == torch.float16
            value = math.inf if half else min(value, torch.finfo(case.dtype).max)
        live = inputs.live.clone()
        for _, *place in where:
            row, sample, *_ = index = at(inputs.state, *place)
            inputs.state[index] = value
            live[row, sample] = False
        masked = dataclasses.replace(inputs, source_mask=live)
        for one, other in zip(backend.dp_step(inputs), backend.dp_step(masked), strict=True):
            assert same_bits(one, other)

    check()


@few_or_many(40, 300)
def test_exact_costs_have_exact_winners(backend: Runner, examples: int) -> None:
    """Whole numbers and powers of two: no rounding, hence many ties, which the largest wins."""
    backend.spare(unless=False)
    exact = st.sampled_from(["none", "mean"])  # logarithms are rounded

    @settings(max_examples=backend.examples(examples))
    @given(cases, seeds, exact, st.sampled_from([(), (1,), (4,), (256,)]), st.integers(0, 2))
    def check(case: Case, seed: int, reduce: str, dims: tuple[int, ...], most: int) -> None:
        samples = 1 << case.samples // 2  # 1 or 2: their mean is exact
        case = dataclasses.replace(case, samples=samples, dims=dims, reduce=reduce)
        inputs = backend.draw(case, seed)
        generator = torch.Generator().manual_seed(seed)
        for tensor in (inputs.state, inputs.velocity, inputs.teacher):
            tensor[:] = torch.randint(-most, most + 1, tensor.shape, generator=generator).to(tensor)
        times = torch.arange(case.steps + 1, dtype=torch.float64, device=inputs.times.device) / 8
        inputs = dataclasses.replace(inputs, times=times)
        cost = Truth(inputs).cost
        if reduce == "mean":
            cost = cost.mean(dim=2, keepdim=True)
        rows = len(times)
        flipped = cost.flip(0)  # of equal ones, argmin takes the first
        expected = torch.where(flipped.amin(dim=0).isfinite(), rows - 1 - flipped.argmin(dim=0), -1)
        assert torch.equal(backend.dp_step(inputs)[2], expected)
        assert torch.equal(backend.dp_accumulate(inputs, 2)[2], expected)
        if ops.BACKENDS[backend.name].why_not_call("dp_argmin_", inputs.state.device) is None:
            given = arguments("dp_argmin_", inputs)
            ops.dp_argmin_(**given, backend=backend.name)
            assert torch.equal(given["best_parent"], expected)

    check()


@few_or_many(40, 300)
def test_tiny_and_large_values_keep_the_error_model(backend: Runner, examples: int) -> None:
    """From where squares underflow to just below where their sums overflow."""
    backend.spare(unless=False)

    @settings(max_examples=backend.examples(examples))
    @given(cases, seeds, st.integers(-140, 55))
    def check(case: Case, seed: int, power: int) -> None:
        inputs = backend.draw(case, seed)
        if torch.float16 in (case.dtype, case.velocity_dtype):
            power = max(-20, min(power, 8))
        for tensor in (inputs.state, inputs.velocity, inputs.teacher):
            tensor.mul_(2.0**power)
        truth = Truth(inputs)
        truth.check_costs(backend.dp_cost(inputs))
        truth.check_parent(backend.dp_step(inputs)[2])

    check()


@few_or_many(40, 300)
def test_any_argmin_agrees_with_the_truth_in_any_chunks(
    affine: AffineRunner, examples: int
) -> None:
    affine.runner.spare(unless=False)

    @settings(max_examples=affine.runner.examples(examples))
    @given(
        affine_cases, seeds, places, st.sampled_from([math.nan, math.inf, 0.0, 1e-40]),
        st.integers(1, 6),
    )  # fmt: skip
    @example(
        AffineCase(**one_pair, terms=(1,), holes=False), 0, [(0, 1, 0, 0), (1, 0, 0, 0)], 1e-40, 1
    )  # the square underflows
    def check(
        case: AffineCase,
        seed: int,
        where: list[tuple[int, int, int, int]],
        value: float,
        chunk: int,
    ) -> None:
        inputs = affine.draw(case, seed)
        for which, *place in where:
            tensor = [*inputs.basis, inputs.target][which % (len(inputs.basis) + 1)]
            tensor[at(tensor, *place)] = value
        best = affine.argmin(inputs)
        AffineTruth(inputs).check(best)
        assert_same(affine.argmin(inputs, chunk), best)

    check()
