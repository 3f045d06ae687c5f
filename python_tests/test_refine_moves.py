"""The moves of a descent, each for itself, on races whose answer is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from driver_cases import each_seed, random_case
from oss_ext.models.evaluation import Evaluator
from oss_ext.refine.base import Race, Rows, Runner, fine_times
from oss_ext.refine.descent import descend
from oss_ext.refine.descent_newton import gauss_newton
from oss_ext.refine.descent_sweep import sweep
from oss_ext.schedule import Objective
from oss_ext.trajectory import in_order

LAST_ROW, KNOTS, SAMPLES, SIZE = 1000, 5, 6, 40


class Linear(Race):
    """A race in which the residual is affine in the rows, so that the optimum is known.

    ``e_b(r) = J_b (r - r*) + c_b`` with ``c_b`` orthogonal to the columns of ``J_b``.
    """

    def __init__(self, seed: int, reduce: str, first: int = 0, limit: int = 10**6) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(SAMPLES, SIZE, KNOTS + 1, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(basis).Q
        mixing = torch.randn(KNOTS, KNOTS, generator=generator, dtype=torch.float64)
        mixing += 3 * torch.eye(KNOTS, dtype=torch.float64)
        self.matrix = q[..., :KNOTS] @ mixing
        self.floor = 30 * q[..., KNOTS]
        # Far enough apart that the way there does not lead through knots out of order.
        inner = torch.linspace(900, 100, KNOTS) + 80 * torch.rand(KNOTS, generator=generator)
        best = inner.round().long().tolist()
        self.best: Rows = (LAST_ROW, *best[1:], 0) if first else (*best, 0)
        self.reduce, self.first, self.last_row, self.trials = reduce, first, LAST_ROW, 0
        self.seen: list[Rows] = []
        self._limit = limit

    def ahead(self, paths: Sequence[Rows]) -> None:
        """Nothing is made at the same time here."""

    def guess(self, paths: Iterable[Rows]) -> list[Rows]:
        return []

    @property
    def nfe(self) -> int:
        return len(self.seen)

    def residuals(self, rows: Rows) -> Tensor:
        assert rows[-1] == 0
        assert len(rows) == KNOTS + 1
        assert all(above > below for above, below in pairwise(rows))
        assert rows[0] <= LAST_ROW
        assert not self.first or rows[0] == LAST_ROW
        self.seen.append(rows)
        off = torch.tensor(rows[:-1], dtype=torch.float64) - torch.tensor(self.best[:-1])
        return self.matrix @ off + self.floor

    def values(self, rows: Rows) -> Tensor:
        errors = self.residuals(rows).square().mean(dim=1)
        return errors.log() if self.reduce == "log_mean" else errors

    def better(self, rows: Rows, score: Tensor) -> Tensor | None:
        self.trials += 1
        found = self.values(rows)
        return found if float((found - score).mean()) < 0 else None


def even_rows(first: int) -> Rows:
    rows = [LAST_ROW * (KNOTS - k) // KNOTS for k in range(KNOTS + 1)]
    return (rows[0] - (0 if first else 7), *rows[1:])


@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
@pytest.mark.parametrize("first", [0, 1])
@each_seed(4)
def test_gauss_newton_steps_reach_the_optimum_of_a_linear_problem(
    reduce: str, first: int, seed: int
) -> None:
    race, rows = Linear(seed, reduce, first), even_rows(first)
    score = race.values(rows)
    start, optimum = (float(race.values(at).mean()) for at in (rows, race.best))
    before, rounds = None, 0
    while rows != before and rounds < 10:
        before, rounds = rows, rounds + 1
        rows, score = gauss_newton(race, rows, score)
    assert torch.equal(score, race.values(rows))
    # Damping, whole rows and their order leave a little.
    assert float(score.mean()) - optimum <= 0.05 * (start - optimum)
    assert len(race.seen) < 150


@each_seed(3)
def test_a_sweep_moves_one_knot_at_a_time_and_only_downhill(seed: int) -> None:
    race, rows = Linear(seed, "mean"), even_rows(0)
    score = race.values(rows)
    moved, after = sweep(race, rows, score, 16)
    assert float(after.mean()) < float(score.mean())
    assert all((a - b) % 16 == 0 for a, b in zip(moved, rows, strict=True))


@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
@each_seed(3)
def test_a_descent_ends_where_no_move_helps(reduce: str, seed: int) -> None:
    race, rows = Linear(seed, reduce), even_rows(0)
    rows, score = descend(race, rows, race.values(rows), 64)
    least = float(score.mean())
    for k in range(KNOTS):
        for step in (1, -1):
            moved = (*rows[:k], rows[k] + step, *rows[k + 1 :])
            if moved[0] <= LAST_ROW and all(a > b for a, b in pairwise(moved)):
                assert float(race.values(moved).mean()) >= least


@pytest.mark.parametrize("limit", [1, 3, 8, 20])
def test_a_descent_stops_when_evaluations_are_spent(limit: int) -> None:
    race, rows = Linear(0, "log_mean", limit=limit), even_rows(0)
    score = race.values(rows)
    found, after = descend(race, rows, score, 64)
    assert len(race.seen) <= limit + 2
    assert float(after.mean()) <= float(score.mean())
    assert torch.equal(after, race.values(found))


def test_gauss_newton_steps_leave_what_is_exact() -> None:
    race = Linear(0, "log_mean")
    race.floor = torch.zeros_like(race.floor)
    score = race.values(race.best)
    assert gauss_newton(race, race.best, score)[0] == race.best


def test_knots_without_room_stay() -> None:
    rows = (LAST_ROW, LAST_ROW - 1, 3, 2, 1, 0)
    race = Linear(0, "mean", first=1)
    found, _ = gauss_newton(race, rows, race.values(rows))
    assert found[0] == LAST_ROW


# --- rows ---------------------------------------------------------------------------------------


@each_seed(50)
def test_rows_are_moved_apart_and_no_further_than_needed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = int(torch.randint(6, 12, (), generator=generator))
    values = (14 * torch.rand(6, generator=generator) - 1).tolist()
    rows = in_order(values, top)
    assert all(a > b for a, b in pairwise(rows))
    assert rows[0] <= top
    assert rows[-1] >= 1
    assert in_order(rows, top) == rows


def test_rows_in_order_are_only_rounded() -> None:
    assert in_order([9.4, 5.6, 2.2], 12) == (9, 6, 2)


@pytest.mark.parametrize("fineness", [1, 2, 8])
def test_finer_rows_keep_the_teachers_own(fineness: int) -> None:
    _, trajectory = random_case("mixture", 0)
    times = fine_times(trajectory, fineness)
    assert times[::fineness] == trajectory.times.tolist()
    assert all(low < high for low, high in pairwise(times))


@pytest.mark.parametrize(("samples", "block", "front"), [(12, 3, 6), (3, 1, 3), (12, 12, 12)])
def test_the_front_is_what_a_path_is_judged_by_at_first(
    samples: int, block: int, front: int
) -> None:
    model, trajectory = random_case("mixture", 0, samples=samples)
    evaluator = Evaluator(model, samples, block)
    runner = Runner(evaluator, trajectory, "euler", 2)
    race = Race(runner, range(samples), Objective(reduce="mean"))
    rows = (trajectory.steps, 3, 0)
    assert len(race.residuals(rows)) == len(race.values(rows)) == front
    everyone = runner.values(rows, range(samples), "mean")
    assert torch.equal(race.values(rows), everyone[:front])
    # Ten times as good as any: it is worse on all of the front, and not run on the rest.
    race.better((trajectory.steps, 2, 0), everyone / 1e9)
    assert evaluator.nfe <= 2 * samples + front
