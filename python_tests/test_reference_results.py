"""Searches on exact flows whose results are known, and what the published code made of them.

Each pair in ``reference_data`` is one search in float64: Algorithm 1 with free start, per sample
(``alg1_cost``, ``alg1_parent``, ``algorithm1``), the path that the paper's published code returned
(``search_OSS``) and the published aggregation of those (``median``). The published code keeps a
row that a step did not improve, and then follows pointers that were overwritten; its path can then
differ from ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import oss_ext as oss
from driver_cases import one_thread  # noqa: F401
from oss_ext import dp
from oss_ext.models.analytic import GaussianMixture
from oss_ext.models.evaluation import Evaluator
from oss_ext.ops import native
from oss_ext.schedule import aggregate_indices

FILES = sorted(Path(__file__).with_name("reference_data").glob("*.json"))
LONG = 50  # teacher steps from which the fallback takes many seconds


@dataclass(frozen=True, eq=False)
class Case:
    expected: dict[str, Any]
    tensors: dict[str, Tensor]
    model: GaussianMixture
    trajectory: oss.Trajectory
    table: dp.Table

    @property
    def samples(self) -> range:
        return range(self.expected["B"])

    def path(self, steps: int, sample: int) -> list[int]:
        """Our path as the files write it: ascending, without the clean end."""
        return list(self.table.backtrack(steps, sample)[-2::-1])

    def replayed_error(self, path: list[int], sample: int) -> float:
        _, errors = dp.replay(self.model, self.trajectory, [*reversed(path), 0])
        return float(errors[-1, sample])

    def rows_carried_over(self, sample: int) -> list[tuple[int, int]]:
        """Steps and targets that a further step makes worse: the published code keeps those."""
        cost = self.tensors["alg1_cost"][sample]
        steps, n = len(cost), self.expected["N"]
        return [
            (k + 1, j)
            for k in range(1, steps)
            for j in range(n - k)  # higher ones have no candidate any more
            if cost[k, j] >= cost[k - 1, j]
        ]


def load_case(file: Path) -> Case:
    expected, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
    model = GaussianMixture(tensors["mu"], float(tensors["sd"]), expected["shape"])
    trajectory = oss.teacher(model, tensors["z"], times=tensors["t"])
    table = dp.run(Evaluator(model, expected["B"]), trajectory, expected["M"], reduce="none")
    return Case(expected, tensors, model, trajectory, table)


def parameter(file: Path) -> Any:
    steps = len(load_file(file.with_suffix(".safetensors"))["t"]) - 1
    slow = [pytest.mark.slow] if steps >= LONG and not native.available else []
    return pytest.param(file, id=file.stem, marks=slow)


@pytest.fixture(scope="module", params=[parameter(file) for file in FILES])
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


def test_all_five_searches_are_here() -> None:
    assert len(FILES) == 5


def test_the_teacher_is_reproduced(case: Case) -> None:
    torch.testing.assert_close(case.trajectory.states, case.tensors["teacher"], rtol=0, atol=1e-13)


def test_every_parent_is_reproduced(case: Case) -> None:
    assert torch.equal(case.table.parent.permute(2, 0, 1), case.tensors["alg1_parent"].long())


def test_every_cost_is_reproduced(case: Case) -> None:
    # 1e-13: the teacher's own path costs a rounding error, not exactly zero.
    torch.testing.assert_close(
        case.table.cost.permute(2, 0, 1), case.tensors["alg1_cost"], rtol=1e-9, atol=1e-13
    )


def test_every_schedule_of_every_budget_is_reproduced(case: Case) -> None:
    budgets = range(1, case.expected["M"] + 1)
    ours = [[case.path(steps, sample) for steps in budgets] for sample in case.samples]
    assert ours == case.expected["algorithm1"]


def test_replay_ends_where_the_table_says(case: Case) -> None:
    steps = case.expected["M"]
    for sample in case.samples:
        cost = float(case.table.cost[-1, 0, sample])
        assert case.replayed_error(case.path(steps, sample), sample) == pytest.approx(
            cost, rel=1e-11
        )


def test_where_nothing_was_carried_over_the_published_path_is_ours(case: Case) -> None:
    clean = [sample for sample in case.samples if not case.rows_carried_over(sample)]
    assert clean
    ours = [case.path(case.expected["M"], sample) for sample in clean]
    assert ours == [case.expected["search_OSS"][sample] for sample in clean]


def test_a_published_path_ends_no_better_than_ours(case: Case) -> None:
    steps = case.expected["M"]
    for sample in case.samples:
        ours, theirs = case.path(steps, sample), case.expected["search_OSS"][sample]
        if ours != theirs:
            our_error = case.replayed_error(ours, sample)
            assert our_error <= case.replayed_error(theirs, sample) * (1 + 1e-12)


def test_some_published_paths_are_not_ours() -> None:
    """The tests above would be empty words otherwise."""
    published = [json.loads(file.read_text()) for file in FILES]
    differing = [
        (found["seed"], sample)
        for found in published
        for sample in range(found["B"])
        if found["search_OSS"][sample] != found["algorithm1"][sample][-1]
    ]
    assert differing == [(1, 0), (1, 1), (2, 1)]


def published_median(paths: list[list[int]]) -> list[int]:
    """Floor of the average of two neighbours of the middle, also for an odd number of paths."""
    half = len(paths) // 2
    columns = [sorted(column) for column in zip(*paths, strict=True)]
    return [(column[half] + column[half - 1]) // 2 for column in columns]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_published_median_is_not_the_median(file: Path) -> None:
    expected = json.loads(file.read_text())
    paths = expected["search_OSS"]
    assert published_median(paths) == expected["median"]
    true_median = [
        int(torch.tensor(column, dtype=torch.float64).quantile(0.5).add(0.5).floor())
        for column in zip(*paths, strict=True)
    ]
    assert list(aggregate_indices(paths, "median")) == true_median != expected["median"]
