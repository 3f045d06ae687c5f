"""Equal bits of ``dp_argmin_`` and ``dp_combine``, however they are cut, laid out or run; and
with the terms of Euler's step those of ``dp_step``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from affine_cases import (
    AffineCase,
    AffineInputs,
    AffineRunner,
    arrange_affine,
    assert_same,
    chosen,
)
from op_cases import (
    DTYPES,
    LAYOUTS,
    MASKS,
    REDUCTIONS,
    Case,
    arguments,
    same_bits,
)
from op_truth import flat64
from oss_ext import ops

CASES = [
    *(
        AffineCase(13, 3, (3, 9, 31), *dtypes, reduce=REDUCTIONS[k % 3])
        for k, dtypes in enumerate(DTYPES)
    ),
    *(
        AffineCase(13, 3, (300,), mask=mask, reduce=reduce, shared=mask == "rows")
        for mask in ("rows", "samples")
        for reduce in REDUCTIONS
    ),
    AffineCase(9, 2, (5000,), layout="batch_major", terms=(6, 1)),
]


@pytest.mark.parametrize(
    "case",
    [
        *(
            Case(33, 2, (257,), *dtypes, reduce=REDUCTIONS[k % 3])
            for k, dtypes in enumerate(DTYPES)
        ),
        *(Case(17, 3, (300,), mask=mask, reduce=reduce) for mask in MASKS for reduce in REDUCTIONS),
        *(Case(*shape) for shape in ((1, 1, (1,)), (2, 1, (7,)), (300, 1, (300,)))),
        Case(9, 2, (3, 40, 41), layout="mixed"),
    ],
    ids=str,
)
def test_eulers_terms_give_what_dp_step_gives(affine: AffineRunner, case: Case, seed: int) -> None:
    runner = affine.runner
    if runner.name == "reference" and case.steps == 300:
        pytest.skip("one pair at a time takes too long")
    runner.spare(unless=case.samples == 2 and case.dtype == case.velocity_dtype)
    inputs = runner.draw(case, seed)
    next_state, cost, parent = runner.dp_step(inputs)
    given = arguments("dp_argmin_", inputs)
    ops.dp_argmin_(**given, backend=runner.name)
    assert same_bits(given["best_cost"].to(cost.dtype), cost)
    assert same_bits(given["best_parent"], parent)
    assert same_bits(given["best_order"], torch.where(parent < 0, -1, 0))
    # And the candidates: the state's own row where there is no parent is dp_step's business.
    found = parent.expand(cost.shape)
    steps = inputs.times[:, None] - inputs.times[found]
    combined = ops.dp_combine(
        [inputs.state, inputs.velocity],
        torch.stack([found, found]),
        torch.stack([torch.ones_like(steps), steps]),
        backend=runner.name,
    )
    assert same_bits(combined[found >= 0], next_state[found >= 0])
    assert bool((combined[found < 0] == 0).all())


@pytest.mark.parametrize("chunk", [1, 3, 11])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_add_up_to_one_call(
    affine: AffineRunner, case: AffineCase, chunk: int, seed: int
) -> None:
    affine.runner.spare(unless=chunk == 3 and case == CASES[7])
    inputs = affine.draw(case, seed)
    assert_same(affine.argmin(inputs, chunk), affine.argmin(inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_combination_is_the_candidate_that_was_compared(
    affine: AffineRunner, case: AffineCase, seed: int
) -> None:
    affine.runner.spare(unless=case == CASES[2])
    inputs = affine.draw(case, seed)
    best = affine.argmin(inputs)
    index, coefficients = chosen(inputs, best)
    combined = affine.combine(inputs, index, coefficients)
    assert combined.dtype == inputs.target.dtype
    alive = (best[1] >= 0).expand(best[0].shape)
    assert bool((combined[~alive] == 0).all())
    exact, size = combination(inputs, index, coefficients)
    number = torch.finfo(combined.dtype)
    unit = 2.0**-53 if combined.dtype == torch.float64 else 2.0**-24
    slack = 8 * unit * size + number.eps / 2 * exact.abs() + number.smallest_normal * number.eps
    assert bool(((flat64(combined) - exact).abs() <= slack).all())
    if combined.dtype not in (
        torch.bfloat16,
        torch.float16,
    ):  # else rounded once more than the cost
        cost = (flat64(combined) - flat64(inputs.target)).square().mean(dim=-1)
        torch.testing.assert_close(cost[alive], best[0][alive], rtol=1e-4, atol=1e-12)


def combination(inputs: AffineInputs, index: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The sum in float64, [N+1, B, D], and that of the terms' sizes."""
    sample = torch.arange(index.shape[2], device=index.device)
    total = torch.zeros_like(flat64(inputs.target))
    size = total.clone()
    for basis, rows, factors in zip(inputs.basis, index, coefficients, strict=True):
        term = factors[..., None] * flat64(basis)[rows.clamp(min=0), sample]
        term = torch.where((rows >= 0)[..., None], term, 0)
        total, size = total + term, size + term.abs()
    return total, size


@pytest.mark.parametrize("lost", range(3))
def test_a_combination_leaves_out_any_term(affine: AffineRunner, lost: int, seed: int) -> None:
    affine.runner.spare(unless=lost == 0)
    inputs = affine.draw(AffineCase(9, 2, (257,), holes=False, reduce="mean"), seed)
    index, coefficients = chosen(inputs, affine.argmin(inputs))
    index[lost], coefficients[lost] = -1, torch.nan
    exact, size = combination(inputs, index, coefficients)
    combined = flat64(affine.combine(inputs, index, coefficients))
    assert bool(((combined - exact).abs() <= 2.0**-20 * size).all())


def test_a_combination_has_any_number_of_targets(affine: AffineRunner, seed: int) -> None:
    affine.runner.spare(unless=False)
    inputs = affine.draw(AffineCase(9, 2, (257,), holes=False), seed)
    index, coefficients = chosen(inputs, affine.argmin(inputs))
    whole = affine.combine(inputs, index, coefficients)
    part = affine.combine(inputs, index[:, 3:4], coefficients[:, 3:4])
    assert same_bits(part, whole[3:4])
    twice = affine.combine(inputs, index.repeat(1, 3, 1), coefficients.repeat(1, 3, 1))
    assert same_bits(twice, whole.repeat(3, 1, 1))


def test_the_orders_beside_it_change_no_bit_of_an_order(affine: AffineRunner, seed: int) -> None:
    inputs = affine.draw(AffineCase(33, 2, (300,), terms=(2, 4, 3)), seed)
    alone = []
    for o, terms in enumerate(inputs.terms):
        one = dataclasses.replace(
            inputs, terms=[terms], coefficients=inputs.coefficients[o : o + 1]
        )
        alone.append(affine.argmin(one)[0])
    assert same_bits(affine.argmin(inputs)[0], torch.stack(alone).amin(dim=0))


def test_shared_coefficients_are_those_of_every_sample(affine: AffineRunner, seed: int) -> None:
    inputs = affine.draw(AffineCase(13, 2, (40,), shared=True, mask="samples"), seed)
    expected = affine.argmin(inputs)
    each = inputs.coefficients.expand(*[-1] * 4, 2)
    for same in (each, each.contiguous()):
        other = dataclasses.replace(inputs, coefficients=same)
        assert_same(affine.argmin(other), expected)


@pytest.mark.parametrize("layout", [name for name in [*LAYOUTS, "mixed"] if name != "contiguous"])
def test_the_layout_changes_no_bit(affine: AffineRunner, layout: str, seed: int) -> None:
    affine.runner.spare(unless=layout == "mixed")
    inputs = affine.draw(AffineCase(9, 2, (3, 9, 31)), seed)
    other = arrange_affine(inputs, layout)
    best = affine.argmin(inputs)
    assert_same(affine.argmin(other), best)
    picked = chosen(inputs, best)
    assert same_bits(affine.combine(other, *picked), affine.combine(inputs, *picked))


def test_the_inputs_are_not_changed(affine: AffineRunner, seed: int) -> None:
    case = AffineCase(9, 2, (3, 9, 31), layout="mixed", mask="samples")
    inputs = affine.draw(case, seed)
    affine.combine(inputs, *chosen(inputs, affine.argmin(inputs)))
    before = affine.draw(case, seed)
    tensors = [(*x.basis, x.target, x.coefficients) for x in (inputs, before)]
    assert all(same_bits(a, b) for a, b in zip(*tensors, strict=True))
    assert torch.equal(inputs.index, before.index)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_number_of_threads_changes_no_bit(affine: AffineRunner, reduce: str, seed: int) -> None:
    affine.runner.spare(unless=False)
    inputs = affine.draw(AffineCase(13, 3, (6000,), reduce=reduce), seed)

    def everything() -> tuple[Tensor, ...]:
        best = affine.argmin(inputs, 5)
        return (*best, affine.combine(inputs, *chosen(inputs, best)))

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        for a, b in zip(everything(), expected, strict=True):
            assert same_bits(a, b), f"{threads} threads"
