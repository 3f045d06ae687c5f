"""Model calls in fixed blocks: counted, checked, and what comes back put where it belongs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driver_cases import SHAPE, each_seed, random_mixture, recorded
from oss_ext.models import Model, from_callable
from oss_ext.models.evaluation import Evaluator, NonFiniteError

TIMES = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
ROWS = torch.tensor([[1, 0], [1, 2], [3, 1], [2, 2], [3, 0]])


def number_of_row(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    """A velocity that says which time and sample it was made for."""
    return torch.ones_like(x) * (100 * t + sample)[:, None, None]


def fill(model: Model, **options: Any) -> tuple[Evaluator, Tensor]:
    """``out`` [4, 3, *SHAPE] of -1 with ``ROWS`` filled in."""
    evaluator = Evaluator(model, samples=3, **options)
    out = torch.full((4, 3, *SHAPE), -1.0)
    evaluator.fill(out, torch.zeros_like(out), TIMES, ROWS)
    return evaluator, out


@pytest.mark.parametrize("max_batch", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("one_time", [False, True])
def test_exactly_the_rows_asked_for_are_filled(max_batch: int | None, one_time: bool) -> None:
    model = from_callable(number_of_row, SHAPE, one_time_per_call=one_time)
    evaluator, out = fill(model, max_batch=max_batch)
    expected = torch.full((4, 3), -1.0)
    for row, sample in ROWS.tolist():
        expected[row, sample] = 25 * row + sample
    assert torch.equal(out, expected[:, :, None, None].expand_as(out))
    assert evaluator.nfe == len(ROWS)


@pytest.mark.parametrize("declared", [{}, {"one_time_per_call": True}, {"fixed_batch": 4}])
def test_nothing_asked_for_is_no_call(declared: dict[str, Any]) -> None:
    model, calls = recorded(from_callable(number_of_row, SHAPE), **declared)
    evaluator, out = Evaluator(model, 3), torch.full((4, 3, *SHAPE), -1.0)
    evaluator.fill(out, torch.zeros_like(out), TIMES, ROWS[:0])
    assert (out == -1).all()
    assert evaluator.nfe == len(calls) == 0


@each_seed(2)
def test_the_model_sees_each_rows_own_state_time_and_sample(seed: int) -> None:
    model, calls = recorded(random_mixture(seed))
    states = torch.randn(4, 3, *SHAPE, dtype=torch.float64)
    Evaluator(model, 3, max_batch=5).fill(torch.empty_like(states), states, TIMES, ROWS)
    (call,) = calls
    assert torch.equal(call.x, states[ROWS[:, 0], ROWS[:, 1]])
    assert torch.equal(call.t, TIMES[ROWS[:, 0]])
    assert torch.equal(call.sample, ROWS[:, 1])
    assert (call.t.dtype, call.sample.dtype) == (torch.float64, torch.int64)


def test_the_last_block_is_filled_up_with_its_last_row() -> None:
    model, calls = recorded(from_callable(number_of_row, SHAPE))
    done: list[int] = []
    evaluator, _ = fill(model, max_batch=3, on_progress=done.append)
    assert [call.sample.tolist() for call in calls] == [[0, 2, 1], [2, 0, 0]]
    assert [call.t.tolist() for call in calls] == [[0.25, 0.25, 0.75], [0.5, 0.75, 0.75]]
    assert done == [3, 2]  # filling is no progress
    assert evaluator.nfe == 5


def test_blocks_of_one_time_are_filled_up_each() -> None:
    model, calls = recorded(from_callable(number_of_row, SHAPE), one_time_per_call=True)
    fill(model, max_batch=2)
    assert [call.t.tolist() for call in calls] == [[0.25] * 2, [0.5] * 2, [0.75] * 2]
    assert [call.sample.tolist() for call in calls] == [[0, 2], [2, 2], [1, 0]]


@pytest.mark.parametrize(
    ("fixed", "max_batch", "block"), [(None, None, 3), (None, 7, 7), (4, None, 4), (4, 7, 4)]
)
def test_the_block_is_what_the_model_or_else_the_user_says(
    fixed: int | None, max_batch: int | None, block: int
) -> None:
    model, calls = recorded(from_callable(number_of_row, SHAPE), fixed_batch=fixed)
    evaluator, _ = fill(model, max_batch=max_batch)
    assert evaluator.block == block
    assert {len(call.t) for call in calls} == {block}


def test_states_and_velocities_are_cast_to_and_from_the_models_dtype() -> None:
    model, calls = recorded(random_mixture(1, torch.float32))
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    v = Evaluator(model, 3).at(x, 0.5)
    assert calls[0].x.dtype == torch.float32
    assert v.dtype == torch.float64
    call = calls[0]
    assert torch.equal(v, random_mixture(1, torch.float32)(call.x, call.t, call.sample).double())


def test_at_is_one_state_per_sample() -> None:
    v = Evaluator(from_callable(number_of_row, SHAPE), 2).at(torch.zeros(2, *SHAPE), 0.5)
    assert v[:, 0, 0].tolist() == [50.0, 51.0]


def test_no_gradients_are_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    model = from_callable(lambda x, t, sample: weight * x, SHAPE)
    assert not Evaluator(model, 2).at(torch.zeros(2, *SHAPE), 0.5).requires_grad


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: x[:, :1], r"torch.float32 \(3, 1, 3\)"),
        (lambda x: x[:2], r"torch.float32 \(2, 2, 3\)"),
        (lambda x: x.sum(), r"torch.float32 \(\)"),
        (lambda x: x.long(), r"torch.int64 \(3, 2, 3\)"),
        (lambda x: x.to(torch.complex64), r"torch.complex64 \(3, 2, 3\)"),
        (lambda x: None, "NoneType"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: (x, x), "tuple"),
    ],
)
def test_an_answer_of_the_wrong_form_is_an_error(answer: Any, got: str) -> None:
    model = from_callable(lambda x, t, sample: answer(x), SHAPE, name="mine")
    expected = rf"^model 'mine' returned {got}, expected .* shape \(3, 2, 3\)$"
    with pytest.raises(ValueError, match=expected):
        fill(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_velocity_is_remembered_with_time_and_sample(value: float) -> None:
    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        v = x.clone()
        v[(t == 0.5) & (sample == 2), 1, 1] = value
        return v

    evaluator, out = fill(from_callable(velocity, SHAPE, name="mine"), max_batch=2)
    assert evaluator.first_bad == {2: 0.5}
    assert evaluator.describe_bad() == ("model 'mine' returned NaN or inf at t = 0.5 for sample 2")
    assert out.isfinite().all(dim=-1).all(dim=-1).logical_not().nonzero().tolist() == [[2, 2]]


def test_finite_velocities_leave_nothing_to_describe() -> None:
    evaluator, _ = fill(from_callable(number_of_row, SHAPE))
    assert (evaluator.first_bad, evaluator.describe_bad()) == ({}, "")


def test_at_refuses_a_bad_velocity() -> None:
    model = from_callable(lambda x, t, sample: x / 0, SHAPE, name="mine")
    message = r"^model 'mine' returned NaN or inf at t = 0.75 for sample 0$"
    with pytest.raises(NonFiniteError, match=message):
        Evaluator(model, 3).at(torch.ones(3, *SHAPE), 0.75)


def test_a_bad_velocity_is_an_error_of_its_own_call_alone() -> None:
    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        v = x.clone()
        v[(sample == 1) & (t > 0.5)] = math.nan
        return v

    evaluator = Evaluator(from_callable(velocity, SHAPE, name="mine"), 3)
    x = torch.ones(3, *SHAPE)
    for t in (0.75, 1.0):
        with pytest.raises(NonFiniteError, match=rf"at t = {t:g} for sample 1$"):
            evaluator.at(x, t)
    assert torch.equal(evaluator.at(x, 0.25), x)
    assert evaluator.first_bad == {1: 0.75}


@pytest.mark.parametrize("max_batch", [0, -2])
def test_a_block_has_at_least_one_row(max_batch: int) -> None:
    with pytest.raises(ValueError, match=f"^max_batch: expected at least 1, got {max_batch}"):
        Evaluator(random_mixture(0), 3, max_batch)


@pytest.mark.parametrize("max_batch", [True, 2.5, "2"])
def test_a_block_is_a_whole_number(max_batch: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_batch: expected .*, got"):
        Evaluator(random_mixture(0), 3, max_batch)


@pytest.mark.parametrize("declared", [{}, {"slots": 2, "one_time_per_call": True}])
@each_seed(1)
def test_after_a_call_its_rows_and_their_places_are_said(
    declared: dict[str, Any], seed: int
) -> None:
    model, calls = recorded(random_mixture(seed))
    for name, value in declared.items():
        setattr(model, name, value)
    states, said = torch.randn(4, 3, *SHAPE, dtype=torch.float64), []

    def then(rows: Tensor, places: Tensor) -> None:
        call = calls[-1]
        assert torch.equal(call.x[places], states[rows[:, 0], rows[:, 1]])
        assert torch.equal(call.sample[places], rows[:, 1])
        said.extend(rows.tolist())

    evaluator = Evaluator(model, 3, max_batch=2)
    evaluator.fill(torch.empty_like(states), states, TIMES, ROWS, then=then)
    assert sorted(said) == sorted(ROWS.tolist())
