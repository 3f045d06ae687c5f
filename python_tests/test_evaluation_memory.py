"""Model calls that run out of memory: fewer rows, and the run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext.models.base import Request
from oss_ext.models.evaluation import Evaluator
from oss_ext.models.wrapped import Wrapped

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError("[alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    "aarch64": RuntimeError("[alloc_cpu.cpp] data. DefaultCPUAllocator: not enough memory"),
    "python": MemoryError(),
}


class Small(Wrapped):
    """A model that has memory for ``room`` rows, and notes the rows of its calls."""

    def __init__(self, model: oss.models.Model, room: int, error: Exception) -> None:
        super().__init__(model)
        self.room, self.error = room, error
        self.rows: list[int] = []

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for request in requests:
            self.rows.append(len(request[0]))
            if len(request[0]) > self.room:
                raise self.error
            yield from super().answers([request])


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("room", "expected"), [(16, 16), (5, 4), (1, 1)])
@each_seed(1)
def test_a_search_goes_on_with_the_rows_that_fit(
    error: str, room: int, expected: int, seed: int
) -> None:
    plain = random_mixture(seed)
    noise = plain.noise(16, seed).double()
    small = Small(plain, room, ERRORS[error])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        teacher = oss.teacher(small, noise, steps=12)
        found = oss.search(small, teacher, [3], quality="dp")
    failed = [rows for rows in small.rows if rows > room]
    assert failed == [rows for rows in (16, 8, 4, 2) if rows > room]  # once each, in the teacher
    assert len(caught) == len(failed)
    assert all("ran out of memory with" in str(warning.message) for warning in caught)
    assert (teacher.block, found.block) == (expected, expected)
    assert set(small.rows) - set(failed) == {expected}
    whole = oss.teacher(plain, noise, steps=12)
    torch.testing.assert_close(teacher.states, whole.states, rtol=1e-9, atol=1e-12)
    wanted = oss.search(plain, whole, [3], quality="dp")
    assert found.schedule(3).indices == wanted.schedule(3).indices
    assert (teacher.nfe, found.nfe) == (whole.nfe, wanted.nfe)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@pytest.mark.parametrize("declared", [{"fixed_batch": 4}, {"slots": 4}, {}])
def test_calls_that_cannot_be_smaller_fail(declared: dict[str, int]) -> None:
    model = Small(random_mixture(1), 0, ERRORS["cuda"])
    for name, value in declared.items():
        setattr(model, name, value)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        oss.teacher(model, model.noise(4, 1), steps=3)


def test_calls_that_are_looked_into_fail() -> None:
    """What a module gave before there was no memory left would be taken for the next call's."""
    model = Small(random_mixture(1), 2, ERRORS["cuda"])
    states, times = model.noise(4, 1)[None], torch.ones(1, dtype=torch.float64)
    rows = torch.tensor([[0, b] for b in range(4)])
    with pytest.raises(torch.OutOfMemoryError):
        Evaluator(model, 4).fill(torch.empty_like(states), states, times, rows, looks_inside=True)


def test_other_errors_are_no_reason_for_fewer_rows() -> None:
    model = Small(random_mixture(1), 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        oss.teacher(model, model.noise(4, 1), steps=3)
    assert model.rows == [4]


@each_seed(1)
def test_rows_that_were_done_are_not_done_again(seed: int) -> None:
    plain = random_mixture(seed)
    model = Small(plain, 4, ERRORS["cuda"])
    seen: list[int] = []
    evaluator = Evaluator(model, 8, 8, seen.append)
    states = plain.noise(8, seed).double()[None].repeat(3, 1, *[1] * len(plain.shape))
    times = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    rows = torch.tensor([[i, b] for i in range(3) for b in range(8)])
    out = torch.full_like(states, torch.nan)
    with pytest.warns(RuntimeWarning, match="there are 4 from here on"):
        evaluator.fill(out, states, times, rows)
    assert seen == [4] * 6
    assert evaluator.nfe == len(rows)
    assert model.rows == [8, *seen]
    expected = torch.empty_like(out)
    Evaluator(plain, 8, 4).fill(expected, states, times, rows)
    assert out.equal(expected)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@each_seed(1)
def test_a_run_that_is_resumed_runs_out_of_memory_where_it_did(seed: int, tmp_path: Path) -> None:
    """Whether it still would: the same calls are made, so that the bits are the same."""

    def run(model: oss.models.Model) -> str:
        teacher = oss.teacher(model, model.noise(8, 3), steps=12)
        return oss.search(model, teacher, [3]).schedule(3).to_json()

    small = Small(random_mixture(seed), 3, ERRORS["cuda"])
    expected = run(small)
    with oss.Checkpoint(tmp_path / "c", {}) as checkpoint:
        run(checkpoint.recorded(Small(random_mixture(seed), 3, ERRORS["cuda"])))
    with oss.Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        again = Small(random_mixture(seed), 100, ERRORS["cuda"])
        assert run(checkpoint.recorded(again)) == expected
        assert (again.rows, checkpoint.taken, checkpoint.notes) == ([], len(small.rows), [])


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@pytest.mark.parametrize("room", [1, 2])
@each_seed(1)
def test_refinement_goes_on_too(room: int, seed: int) -> None:
    """What it knows of a group of samples stays that of the group."""
    plain = random_mixture(seed)
    teacher = oss.teacher(plain, plain.noise(16, seed).double(), steps=12)
    start = teacher.schedule([12, 8, 4, 0])
    small = Small(plain, room, ERRORS["cuda"])
    found = oss.refine(small, teacher, start)
    assert found.schedule.indices == oss.refine(plain, teacher, start).schedule.indices
    assert any(rows > room for rows in small.rows)
