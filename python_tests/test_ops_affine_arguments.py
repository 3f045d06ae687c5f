"""Bad values given to ``dp_argmin_`` and ``dp_combine``; their shapes and dtypes are in
``test_ops_arguments.py``, with those of all operators."""

from __future__ import annotations

import re

import pytest
import torch

from affine_cases import AffineCase, AffineRunner, chosen, new_best
from op_cases import Case, arguments, draw, same_bits
from oss_ext import ops
from oss_ext.ops.backend import Backend


@pytest.fixture
def looking(affine: AffineRunner) -> AffineRunner:
    """Every backend that looks at values."""
    affine.runner.needs_values()
    return affine


CASE = AffineCase(6, 2, (3, 5), terms=(2, 3), holes=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_coefficient_is_named(looking: AffineRunner, value: float, seed: int) -> None:
    inputs = looking.draw(CASE, seed)
    inputs.coefficients[1, 2, 3, 1, 1] = value
    with pytest.raises(RuntimeError, match=r"^dp_argmin_: coefficients\b") as caught:
        looking.argmin(inputs)
    for part in ("order 1", "term 2", "source 4", "target 1", "sample 1", str(value)):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_only_nan_says_that_there_is_no_candidate(
    looking: AffineRunner, value: float, seed: int
) -> None:
    inputs = looking.draw(CASE, seed)
    inputs.coefficients[0, 0, 2, 0] = value
    with pytest.raises(RuntimeError, match=r"^dp_argmin_: coefficients\b.*term 0.*source 3"):
        looking.argmin(inputs)


def test_a_bad_coefficient_shared_by_samples_is_found_wherever_one_is_live(
    looking: AffineRunner, seed: int
) -> None:
    case = AffineCase(6, 3, (7,), terms=(2,), holes=False, shared=True, mask="samples")
    inputs = looking.draw(case, seed)
    assert inputs.source_mask is not None
    inputs.source_mask[4] = torch.tensor([False, False, True])
    inputs.live[4] = inputs.source_mask[4]
    inputs.coefficients[0, 1, 3, 2] = torch.inf
    with pytest.raises(RuntimeError, match=r"^dp_argmin_: coefficients\b.*source 4, target 2"):
        looking.argmin(inputs)
    inputs.source_mask[4] = False
    looking.argmin(inputs)


@pytest.mark.parametrize("row", [-1, -7, 99])
def test_a_bad_row_is_named_where_a_candidate_needs_it(
    looking: AffineRunner, row: int, seed: int
) -> None:
    inputs = looking.draw(CASE, seed)
    inputs.index[2, 3, 1] = row
    with pytest.raises(RuntimeError, match=rf"^dp_argmin_: index\b.*basis\[2\].*order 1.*{row}"):
        looking.argmin(inputs)
    inputs.coefficients[1, 0, 3, :, 1] = torch.nan  # only order 1 has that term
    looking.argmin(inputs)


def test_chunks_out_of_order_are_refused(looking: AffineRunner, seed: int) -> None:
    inputs = looking.draw(CASE, seed)
    best = new_best(inputs)

    def accumulate(first: int) -> None:
        part = slice(first - 1, first + 1)
        ops.dp_argmin_(
            inputs.basis, inputs.index[:, part], inputs.coefficients[:, :, part], inputs.terms,
            first, inputs.target, *best, backend=looking.runner.name,
        )  # fmt: skip

    accumulate(4)
    for second in (1, 3, 4):
        with pytest.raises(RuntimeError, match=r"^dp_argmin_: .*first_source"):
            accumulate(second)


def test_a_refused_chunk_changes_nothing(looking: AffineRunner, seed: int) -> None:
    inputs = looking.draw(CASE, seed)
    inputs.coefficients[0, 1, -1, 0] = torch.inf
    best = new_best(inputs)
    for tensor in best:
        tensor.fill_(-1)
    before = [tensor.clone() for tensor in best]
    with pytest.raises(RuntimeError, match="coefficients"):
        ops.dp_argmin_(
            inputs.basis, inputs.index, inputs.coefficients, inputs.terms, 1, inputs.target,
            *best, backend=looking.runner.name,
        )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(best, before, strict=True))


def test_a_combination_uses_rows_and_numbers(looking: AffineRunner, seed: int) -> None:
    inputs = looking.draw(CASE, seed)
    index, coefficients = chosen(inputs, looking.argmin(inputs))
    for row in (-2, len(inputs.basis[1])):
        wrong = index.clone()
        wrong[1, 2, 1] = row
        with pytest.raises(RuntimeError, match=rf"^dp_combine: index\b.*basis\[1\].*{row}"):
            looking.combine(inputs, wrong, coefficients)
    coefficients[1, 2, 1] = torch.nan
    with pytest.raises(RuntimeError, match=r"^dp_combine: coefficients\b.*nan"):
        looking.combine(inputs, index, coefficients)


@pytest.mark.parametrize("empty", ["B", "D"])
@pytest.mark.parametrize("op", ["dp_argmin_", "dp_combine"])
def test_empty_inputs_are_refused(affine: AffineRunner, op: str, empty: str, seed: int) -> None:
    given = arguments(op, affine.runner.draw(Case(6, 2, (3, 5)), seed))
    cut = {"B": (slice(None), slice(0, 0)), "D": (..., slice(0, 0))}[empty]
    given["basis"] = [x[cut] for x in given["basis"]]
    if "target" in given:
        given["target"] = given["target"][cut]
    with pytest.raises(RuntimeError, match=rf"^{op}: (target|basis\[0\]).*, got "):
        getattr(ops, op)(**given, backend=affine.runner.name)


def test_a_backend_that_lacks_an_operator_says_so_and_another_serves(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    device = torch.device("cpu")
    partial = Backend("partial", "", {"dp_step": ops.dp_step}, lambda device: None)
    monkeypatch.setattr(ops, "BACKENDS", {"partial": partial, **ops.BACKENDS})
    assert ops.serving(device).name == "partial"
    assert ops.serving(device, "dp_argmin_").name != "partial"
    reason = partial.why_not_call("dp_argmin_", device)
    assert reason == "it has no dp_argmin_ for cpu"
    given = arguments("dp_argmin_", draw(Case(6, 2, (3, 5)), seed))
    with pytest.raises(RuntimeError, match=rf"^dp_argmin_: backend\b.*{re.escape(reason)}"):
        ops.dp_argmin_(**given, backend="partial")
