"""``dp_argmin_`` agrees with the float64 truth: who wins, in which order, at what cost."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from affine_cases import (
    AffineCase,
    AffineRunner,
    AffineTruth,
    random_affine_case,
)
from op_cases import DTYPES, LAYOUTS, REDUCTIONS

SHAPES = [
    (1, 1, (1,)),
    (1, 5, (257,)),
    (2, 1, (7,)),
    (2, 3, (255,)),
    (33, 1, (257,)),
    (33, 2, (7,)),
    (13, 5, ()),
    (13, 2, (3, 5, 17)),
]
CASES = [
    *(AffineCase(*shape, reduce=REDUCTIONS[k % 3]) for k, shape in enumerate(SHAPES)),
    *(AffineCase(*shape, shared=True, holes=False) for shape in SHAPES[3:5]),
    *(
        AffineCase(13, 2, (5, 61), dtype, other, reduce=REDUCTIONS[k % 3])
        for k, (dtype, other) in enumerate(DTYPES)
    ),
    *(AffineCase(9, 3, (3, 5, 7), layout=layout) for layout in [*LAYOUTS, "mixed"]),
    *(
        AffineCase(13, 3, (40,), mask=mask, reduce=reduce, shared=reduce == "mean")
        for mask in ("rows", "samples", "dead")
        for reduce in REDUCTIONS
    ),
    *(
        AffineCase(13, 2, (257,), terms=terms)
        for terms in ((1,), (6,), (5, 1), (3, 3, 3), (6, 4, 2, 1), (1, 2, 3, 4))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_truth(affine: AffineRunner, case: AffineCase, seed: int) -> None:
    affine.runner.spare(unless=case in CASES[::6])
    inputs = affine.draw(case, seed)
    AffineTruth(inputs).check(affine.argmin(inputs))


@pytest.mark.parametrize("draw", range(12))
def test_agrees_with_the_truth_in_any_combination(
    affine: AffineRunner, draw: int, seed: int
) -> None:
    affine.runner.spare(unless=draw == 0)
    case = random_affine_case(seed)
    print(case)
    inputs = affine.draw(case, seed)
    AffineTruth(inputs).check(affine.argmin(inputs, chunk=1 + seed % 7))


def test_agrees_with_the_truth_for_many_rows(affine: AffineRunner, seed: int) -> None:
    """More rows than a kernel keeps at hand, and more cells than its workspace holds."""
    if affine.runner.name == "reference" or affine.runner.interpreted:
        pytest.skip("one pair at a time takes too long")
    for case in (
        AffineCase(230, 1, (300,), terms=(2, 4, 3, 1)),
        AffineCase(230, 2, (20,), terms=(2, 3), reduce="mean"),
    ):
        inputs = affine.draw(case, seed)
        AffineTruth(inputs).check(affine.argmin(inputs))


def test_gives_the_numbers_worked_out_by_hand(affine: AffineRunner) -> None:
    inputs = affine.draw(AffineCase(3, 1, (2,), terms=(1, 2), holes=False), seed=0)
    state = torch.tensor([[9.0, 9], [1, 0], [2, 2], [0, 4]])[:, None].to(inputs.target)
    earlier = torch.tensor([[1.0, 1], [0, -2]])[:, None].to(inputs.target)
    index = torch.tensor([[1, 2, 3], [-1, 1, 0]], device=state.device)[..., None]
    coefficients = torch.full_like(inputs.coefficients, math.nan)
    coefficients[0, 0] = 1  # order 0 stays where it is
    coefficients[1, 0, 1:], coefficients[1, 1, 1:] = 0.5, 1  # order 1 goes to z/2 + e
    inputs = dataclasses.replace(
        inputs,
        basis=[state, earlier],
        index=index,
        coefficients=coefficients,
        target=torch.tensor([[1.0, -1], [0, 0], [0, 4], [7, 7]])[:, None].to(state),
    )
    # Order 0 is at (1, 0), (2, 2) and (0, 4), order 1 at (1, -1) from 2 and at (1, 3) from 3.
    cost, parent, order = affine.argmin(inputs)
    assert parent[:, 0].tolist() == [2, 2, 3, -1]
    assert order[:, 0].tolist() == [1, 1, 0, -1]
    assert cost[:, 0].tolist() == [0, 1, 0, math.inf]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ties_go_to_the_largest_source_then_to_the_lowest_order(
    affine: AffineRunner, reduce: str
) -> None:
    affine.runner.spare(unless=reduce == "none")
    inputs = affine.draw(
        AffineCase(20, 2, (300,), terms=(2, 1, 3), reduce=reduce, holes=False), seed=0
    )
    inputs.coefficients[:, 0], inputs.coefficients[:, 1:] = 1, 0
    for tensor in inputs.basis:
        tensor[:] = tensor[1]
    last = len(inputs.target) - 1
    for chunk in (None, 7) if affine.runner.interpreted else (None, 1, 7):
        _, parent, order = affine.argmin(inputs, chunk)
        assert bool((parent[:-1] == last).all())
        assert bool((order[:-1] == 0).all())
    # Without order 0 at the last source, and without the one before it at all.
    inputs.coefficients[0, 0, -1] = torch.nan
    _, parent, order = affine.argmin(inputs)
    assert parent[:-1].unique().tolist() == [last]
    assert order[:-1].unique().tolist() == [1]
    inputs.coefficients[:, 0, -2:] = torch.nan
    _, parent, order = affine.argmin(inputs)
    assert parent[: last - 2].unique().tolist() == [last - 2]
    assert order[: last - 2].unique().tolist() == [0]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["first", "second", "third", "target"])
def test_nan_and_inf_never_win(
    affine: AffineRunner, where: str, value: float, reduce: str, seed: int
) -> None:
    affine.runner.spare(
        unless=(value, reduce) == (math.inf, "log_mean") and where in ("third", "target")
    )
    inputs = affine.draw(AffineCase(9, 3, (257,), reduce=reduce, holes=False), seed)
    spoilt = [*inputs.basis[:3], inputs.target][["first", "second", "third", "target"].index(where)]
    spoilt[5, 1, -1] = value
    spoilt[7, 2, 5] = value
    AffineTruth(inputs).check(affine.argmin(inputs))


def test_a_term_that_is_missing_is_never_read(affine: AffineRunner, seed: int) -> None:
    """-1 is the last row to whoever takes it for an index, and here that row would win."""
    inputs = affine.draw(AffineCase(9, 2, (7,), terms=(1, 3), holes=False), seed)
    inputs.index[1:, ::2] = -1
    inputs.coefficients[1, 0, ::2] = torch.nan
    best = affine.argmin(inputs)
    AffineTruth(inputs).check(best)
    short = best[1] % 2 == 1
    assert bool((best[2][short] <= 0).all())


@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
def test_with_a_reduction_an_order_must_serve_every_sample(
    affine: AffineRunner, reduce: str, seed: int
) -> None:
    case = AffineCase(4, 3, (7,), reduce=reduce, terms=(2, 2), holes=False)
    inputs = affine.draw(case, seed)
    inputs.coefficients[0, 0, 3, :, 1] = torch.nan  # order 0 of source 4, in one sample
    inputs.coefficients[1, 0, 3, 2, 0] = torch.nan  # order 1, for target 2 in another
    inputs.basis[0][3, 2] = torch.nan  # source 3
    _, parent, order = best = affine.argmin(inputs)
    AffineTruth(inputs).check(best)
    assert (parent[2:, 0].tolist(), order[2:, 0].tolist()) == ([-1, 4, -1], [-1, 1, -1])
