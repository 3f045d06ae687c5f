"""Models whose rows are tied to items of their conditioning: every row comes at its own place."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import SHAPE, Call, dp_search, each_seed, random_mixture, random_network
from oss_ext.models import Model
from oss_ext.models.evaluation import Evaluator, NonFiniteError

ITEMS = 5


class Slotted(Model):
    """A model that knows its rows by their place alone, as pipelines do.

    Place ``k`` of a call belongs to item ``(first + k) % ITEMS``, where ``first`` is the sample of
    the first row. Every call is kept, and refused if it is not one that a pipeline could serve.
    """

    name = "slotted"
    shape = SHAPE
    dtype = torch.float64

    def __init__(
        self, slots: int, velocity: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.slots = slots
        self.calls: list[Call] = []
        self._velocity = velocity or (lambda x, t, item: x + (100 * t + item)[:, None, None])

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        self.calls.append(Call(x.clone(), t.clone(), sample.clone()))
        assert x.shape == (self.slots, *SHAPE)
        assert len(set(t.tolist())) == 1
        first = int(sample[0])
        assert first % self.slots == 0
        assert sample.tolist() == list(range(first, first + self.slots))
        return self._velocity(x, t, (first + torch.arange(self.slots)) % ITEMS)

    def fingerprint(self) -> str:
        return "slotted"


def expected_of(states: Tensor, times: Tensor) -> Tensor:
    """The velocity of every state, by the definition above."""
    samples = torch.arange(states.shape[1]) % ITEMS
    return states + (100 * times[:, None] + samples)[:, :, None, None]


def random_rows(seed: int, times: int, samples: int) -> Tensor:
    """Some of the rows of a table, each once, in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cartesian_prod(torch.arange(times), torch.arange(samples))
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    return shuffled[: max(1, len(rows) // 2)]


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("samples", [1, 3, 7])
@each_seed(2)
def test_rows_are_placed_at_their_slots(slots: int, samples: int, seed: int) -> None:
    model = Slotted(slots)
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    states = torch.randn(4, samples, *SHAPE, dtype=torch.float64)
    rows = random_rows(seed, 4, samples)
    out = torch.full_like(states, -1.0)
    done: list[int] = []
    evaluator = Evaluator(model, samples, on_progress=done.append)
    evaluator.fill(out, states, times, rows)
    expected = torch.full_like(states, -1.0)
    row, column = rows.unbind(1)
    expected[row, column] = expected_of(states, times)[row, column]
    assert torch.equal(out, expected)
    assert evaluator.nfe == len(rows) == sum(done)  # what fills the slots up is not counted
    assert evaluator.block == slots


@pytest.mark.parametrize("slots", [2, 3, 4])
@each_seed(2)
def test_no_call_is_made_twice(slots: int, seed: int) -> None:
    """All the rows of one time and one group of samples are one call."""
    model = Slotted(slots)
    rows = random_rows(seed, 4, 7)
    states = torch.randn(4, 7, *SHAPE, dtype=torch.float64)
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    Evaluator(model, 7).fill(torch.empty_like(states), states, times, rows)
    groups = {(row, sample // slots) for row, sample in rows.tolist()}
    assert len(model.calls) == len(groups)
    asked = {(float(call.t[0]), int(call.sample[0]) // slots) for call in model.calls}
    assert asked == {(float(times[row]), group) for row, group in groups}


@each_seed(2)
def test_slots_that_nobody_asked_for_hold_a_state_of_the_same_call(seed: int) -> None:
    """Such states are finite and of the size that the network knows, unlike zeros or garbage."""
    model = Slotted(4)
    states = torch.randn(1, 7, *SHAPE, dtype=torch.float64)
    rows = torch.tensor([[0, 6], [0, 1]])
    Evaluator(model, 7).fill(
        torch.empty_like(states), states, torch.tensor([0.5], dtype=torch.float64), rows
    )
    by_group = {int(call.sample[0]): call.x for call in model.calls}
    assert torch.equal(by_group[0], states[0, 1].expand(4, *SHAPE))
    assert torch.equal(by_group[4], states[0, 6].expand(4, *SHAPE))


def test_a_bad_velocity_of_a_slot_that_was_not_asked_for_is_nobodys() -> None:
    """Item 2 is bad, and stands in no row that was asked for."""
    model = Slotted(4, lambda x, t, item: torch.where((item == 2)[:, None, None], math.nan, x))
    out = torch.zeros(1, 4, *SHAPE, dtype=torch.float64)
    times = torch.tensor([0.5], dtype=torch.float64)
    evaluator = Evaluator(model, 4)
    evaluator.fill(out, torch.ones_like(out), times, torch.tensor([[0, 0], [0, 3]]))
    assert out[0, [0, 3]].isfinite().all()
    assert evaluator.first_bad == {}


@pytest.mark.parametrize("sample", [1, 4, 6])
def test_a_bad_velocity_is_named_by_its_sample(sample: int) -> None:
    bad = sample % ITEMS
    model = Slotted(7, lambda x, t, item: torch.where((item == bad)[:, None, None], math.inf, x))
    evaluator = Evaluator(model, 7)
    out = torch.zeros(1, 7, *SHAPE, dtype=torch.float64)
    times = torch.tensor([0.5], dtype=torch.float64)
    evaluator.fill(out, torch.ones_like(out), times, torch.tensor([[0, sample]]))
    assert evaluator.first_bad == {sample: 0.5}
    with pytest.raises(NonFiniteError, match=r"at t = 0.5 for sample"):
        Evaluator(model, 7).at(out[0], 0.5)


def test_slots_go_before_the_users_block() -> None:
    assert Evaluator(Slotted(3), 7, max_batch=5).block == 3


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("start", ["free", "pinned"])
@each_seed(1)
def test_a_search_finds_what_it_finds_without_slots(slots: int, start: str, seed: int) -> None:
    """A slotted network with conditioning of its own against the same network, row by row."""
    network = random_network(seed)
    model = Slotted(slots, lambda x, t, item: network(x, t, item))
    plain = oss.models.from_callable(
        lambda x, t, sample: network(x, t, sample % ITEMS), SHAPE, dtype=torch.float64
    )
    noise = random_mixture(seed).noise(4, seed)
    results = []
    for one in (model, plain):
        trajectory = oss.teacher(one, noise, steps=8, max_batch=slots)
        result = dp_search(one, trajectory, steps=3, start=start, max_batch=slots)
        schedule = result.schedule(3)
        results.append((trajectory, result, schedule, oss.sample(one, noise, schedule)))
    (first, found, schedule, images), (other, expected, wanted, ours) = results
    torch.testing.assert_close(first.states, other.states, rtol=1e-9, atol=1e-12)
    assert (schedule.indices, found.nfe) == (wanted.indices, expected.nfe)
    torch.testing.assert_close(images, ours, rtol=1e-9, atol=1e-12)
    # Teacher, search and sampling see the same bits for the same state.
    error = ((images - first.final) ** 2).mean()
    assert float(error) == pytest.approx(found.cost(3), rel=1e-5)
