"""Refinement over many processes: students that may run next are run at the same time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext.baselines import uniform
from oss_ext.checkpoint import ANSWERS, Checkpoint
from oss_ext.models.base import Model, Request
from oss_ext.models.wrapped import Wrapped
from oss_ext.sharing import Shared
from test_evaluation_memory import ERRORS
from test_sharing import AtOnce, Peer


class Rounds(Shared):
    """Notes how many calls were made at the same time, every time."""

    def __init__(self, model: Model, count: int, room: int = 100) -> None:
        peers: list[Any] = [Peer(random_mixture(1), room=room) for _ in range(count - 1)]
        super().__init__(model, peers)
        self.rounds: list[int] = []

    def _round(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        self.rounds.append(len(requests))
        return super()._round(requests)


def refined(model: Model, solver: str, **options: Any) -> tuple[str, float, int]:
    teacher = oss.teacher(random_mixture(1), model.noise(8, 3), steps=30)
    starts = [uniform(teacher, 5), teacher.schedule([30, 20, 15, 10, 2, 0])]
    starts = [replace(start, solver=solver) for start in starts]
    found = oss.refine(model, teacher, starts, max_batch=2, **options)
    return found.schedule.to_json(), found.nfe, found.trials


@pytest.mark.parametrize(("count", "share"), [(2, 0.75), (3, 0.65), (8, 0.5)])
@pytest.mark.parametrize("solver", ["euler", "dpmpp-3m"])
@pytest.mark.parametrize("options", [{"budget": 300}, {"start": "pinned", "off_grid": True}, {}])
def test_students_are_run_at_the_same_time(
    options: dict[str, Any], solver: str, count: int, share: float
) -> None:
    """With the same result from the same number of evaluations, in fewer rounds."""
    alone, several = Rounds(random_mixture(1), 1), Rounds(random_mixture(1), count)
    assert refined(several, solver, **options) == refined(alone, solver, **options)
    assert max(several.rounds) == count
    assert len(several.rounds) < share * len(alone.rounds)


def test_students_of_several_evaluations_a_step_are_run_one_by_one() -> None:
    alone, several = Rounds(random_mixture(1), 1), Rounds(random_mixture(1), 3)
    assert refined(several, "heun", budget=300) == refined(alone, "heun", budget=300)
    assert several.rounds == alone.rounds


@pytest.mark.parametrize("processes", [(1, 4), (4, 1)])
def test_a_refinement_goes_on_with_another_number_of_processes(
    processes: tuple[int, int], tmp_path: Path
) -> None:
    class Cut(Checkpoint):
        def keep(self, request: int, answer: Tensor | None) -> None:
            if self.kept == 150:
                raise KeyboardInterrupt
            super().keep(request, answer)

    files = []
    for count in processes:
        model = Rounds(random_mixture(1), count)
        with Cut(tmp_path / str(count), {}) as checkpoint, pytest.raises(KeyboardInterrupt):
            refined(checkpoint.recorded(model), "euler", budget=200)
        files.append((tmp_path / str(count) / ANSWERS).read_bytes())
    assert files[0] == files[1]
    model = Rounds(random_mixture(1), processes[1])
    with Checkpoint(tmp_path / str(processes[0]), {}, resume=True) as checkpoint:
        found = refined(checkpoint.recorded(model), "euler", budget=200)
        assert (checkpoint.taken, checkpoint.notes) == (150, [])
    assert found == refined(random_mixture(1), "euler", budget=200)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_ahead_runs_out_when_it_is_asked_for(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AtOnce, "error", ERRORS[error])
    alone = AtOnce(random_mixture(1), 1, room=1)
    several = Rounds(AtOnce(random_mixture(1), 1, room=1), 3, room=1)
    assert refined(several, "euler", budget=200) == refined(alone, "euler", budget=200)


def test_what_nobody_asks_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["oss_ext.sharing"]  # `oss_ext.sharing` is the function in it
    monkeypatch.setattr(module, "AHEAD_BYTES", 0)
    monkeypatch.setattr(module, "AHEAD_ROUNDS", 2)
    model = Rounds(random_mixture(1), 2)
    x, t, sample = model.noise(1), torch.ones(1, dtype=torch.float64), torch.zeros(1).long()
    requests = [(x * n, t, sample) for n in range(9)]
    expected = [random_mixture(1)(*request) for request in requests]
    for n in (3, 6):
        ahead = model.ahead(requests[:n])
        assert ahead is not None
        assert all(a.equal(b) for a, b in zip(ahead, expected, strict=False))
    assert model.rounds == [2, 1, 2, 1]  # the first three were there already
    assert model.ahead(requests[6:]) is not None
    assert all(a.equal(b) for a, b in zip(model.answers(requests), expected, strict=True))
    assert model.rounds == [2, 1, 2, 1, 2, 1, 2, 2, 1]  # the first five were forgotten
    assert model.ahead([]) == []


class OneBuffer(Wrapped):
    """Gives every answer in the same memory."""

    buffer: Tensor | None = None

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for velocity in super().answers(requests):
            if self.buffer is None or self.buffer.shape != velocity.shape:
                self.buffer = torch.empty_like(velocity)
            yield self.buffer.copy_(velocity)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_answers_in_the_same_memory_are_kept_apart(count: int) -> None:
    model = Rounds(OneBuffer(random_mixture(1)), count)
    assert refined(model, "euler", budget=200) == refined(random_mixture(1), "euler", budget=200)
