"""The beam: the dynamic programme at width 1, every path there is at the largest width."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    constant_velocity,
    each_family,
    each_reduction,
    each_seed,
    each_start,
    faulty,
    fill_table,
    one_thread,  # noqa: F401
    random_case,
    random_mixture,
    recorded,
)
from oss_ext import dp
from oss_ext.beam import Beam, beam, evaluations
from oss_ext.models import Model
from oss_ext.models.evaluation import Evaluator, NonFiniteError

EVERY = 10_000
"""A width that holds every path of the small cases here."""

each_joint = pytest.mark.parametrize("reduce", ["mean", "log_mean"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def search(
    model: Model,
    trajectory: oss.Trajectory,
    steps: int,
    width: int,
    *,
    reduce: str = "none",
    max_batch: int | None = 32,
    **options: Any,
) -> Beam:
    evaluator = Evaluator(model, trajectory.samples, max_batch)
    return beam(evaluator, trajectory, steps, width=width, reduce=reduce, **options)


def columns(reduce: str) -> list[list[int]]:
    """The samples of every path that a search looks for."""
    return [[b] for b in range(SAMPLES)] if reduce == "none" else [list(range(SAMPLES))]


def error_of(cost: Tensor, reduce: str) -> float:
    """One error for the samples that share a path."""
    cost = cost.double()
    return float(cost.log().mean().exp() if reduce == "log_mean" else cost.mean())


def final_error(
    model: Model, trajectory: oss.Trajectory, path: tuple[int, ...], group: list[int], reduce: str
) -> float:
    return error_of(dp.replay(model, trajectory, path)[1][-1, group], reduce)


def plain_beam(
    model: Model, trajectory: oss.Trajectory, steps: int, width: int, reduce: str, group: list[int]
) -> list[tuple[tuple[int, ...], float]]:
    """The beam in loops over whole paths, for the samples in ``group`` that share one."""
    x, t, n = trajectory.states[:, group], trajectory.times, trajectory.steps
    slots = {i: [((i,), x[n], 0.0)] for i in range(1, n + 1)}
    for _ in range(steps):
        found: dict[int, list[Any]] = {j: [] for j in range(n)}
        for i, kept in slots.items():
            for path, z, _ in kept:
                v = model(z, t[i].expand(len(group)), torch.tensor(group))
                for j in range(i):
                    moved = z + (t[j] - t[i]) * v
                    cost = (moved - x[j]).square().flatten(1).mean(dim=1)
                    found[j].append(((*path, j), moved, error_of(cost, reduce)))
        best = {j: sorted(new, key=lambda item: item[2])[:width] for j, new in found.items()}
        slots = {j: new for j, new in best.items() if j > 0}
    return [(path, error) for path, _, error in best[0]]


def assert_same_paths(
    found: list[tuple[tuple[int, ...], float]], expected: list[tuple[tuple[int, ...], float]]
) -> None:
    assert [path for path, _ in found] == [path for path, _ in expected]
    assert [cost for _, cost in found] == pytest.approx([cost for _, cost in expected], rel=1e-9)


# --- width 1 ------------------------------------------------------------------------------------


def assert_is_the_table(found: Beam, table: dp.Table) -> None:
    for k in range(table.steps):
        assert found.source[k].shape[0] == 1
        assert torch.equal(found.source[k][0], table.parent[k])
        assert torch.equal(found.cost[k][0], table.cost[k])
        assert found.cost[k].dtype == table.cost.dtype
    for sample in range(table.parent.shape[2]):
        for steps in range(1, table.steps + 1):
            ((path, _),) = found.paths(steps, sample)
            assert path == table.backtrack(steps, sample)


@each_family
@each_start
@each_reduction
@each_dtype
@each_seed(1)
def test_width_1_is_the_dynamic_programme(
    family: str, start: str, reduce: str, dtype: torch.dtype, seed: int
) -> None:
    model, trajectory = random_case(family, seed, dtype=dtype)
    options = {"reduce": reduce, "start": start, "max_batch": 4}
    table = fill_table(model, trajectory, 5, **options)
    assert_is_the_table(search(model, trajectory, 5, 1, **options), table)


@each_start
@each_reduction
@each_dtype
@pytest.mark.parametrize("steps", [7, 8])
def test_width_1_breaks_ties_as_the_dynamic_programme_does(
    start: str, reduce: str, dtype: torch.dtype, steps: int
) -> None:
    """With 8 teacher steps all sums are exact and every later source is as good as another; with
    7 the costs are rounding noise, and equal ones many."""
    model = constant_velocity(dtype=dtype)
    trajectory = oss.teacher(model, torch.ones(SAMPLES, *model.shape, dtype=dtype), steps)
    table = fill_table(model, trajectory, 4, reduce=reduce, start=start, max_batch=32)
    assert_is_the_table(search(model, trajectory, 4, 1, reduce=reduce, start=start), table)


@pytest.mark.parametrize("reduce", ["none", "log_mean"])
def test_ties_go_to_the_largest_source_and_then_to_its_lowest_slot(reduce: str) -> None:
    model = constant_velocity(dtype=torch.float64)
    trajectory = oss.teacher(model, torch.ones(SAMPLES, *model.shape).double(), 8)
    found = search(model, trajectory, 3, 4, reduce=reduce, start="pinned")
    assert [path for path, _ in found.paths(2)] == [(8, i, 0) for i in (7, 6, 5, 4)]
    # To row 5 there are two paths of two steps, to row 4 three.
    expected = [(8, 7, 6, 0), (8, 7, 5, 0), (8, 6, 5, 0), (8, 7, 4, 0)]
    assert [path for path, _ in found.paths(3)] == expected


# --- any width ----------------------------------------------------------------------------------


@each_family
@each_reduction
@pytest.mark.parametrize("width", [2, 5])
@each_seed(1)
def test_the_paths_are_those_of_plain_loops(
    family: str, reduce: str, width: int, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=7)
    found = search(model, trajectory, 3, width, reduce=reduce)
    for sample, group in enumerate(columns(reduce)):
        for steps in (2, 3):
            expected = plain_beam(model, trajectory, steps, width, reduce, group)
            assert len(expected) == width
            assert_same_paths(found.paths(steps, sample), expected)


@each_family
@each_start
@each_reduction
@each_seed(1)
def test_every_path_replays_to_its_cost_and_comes_once(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed)
    found = search(model, trajectory, 4, 5, reduce=reduce, start=start)
    assert found.steps == 4
    for sample, group in enumerate(columns(reduce)):
        for steps in range(1, 5):
            paths = found.paths(steps, sample)
            assert 1 <= len(paths) <= 5
            assert len({path for path, _ in paths}) == len(paths)
            costs = [cost for _, cost in paths]
            assert costs == sorted(costs)
            for path, cost in paths:
                error = final_error(model, trajectory, path, group, reduce)
                assert cost == pytest.approx(error, rel=1e-9)
                assert path[0] == trajectory.steps or start == "free"


@each_reduction
@each_seed(1)
def test_a_beam_contains_that_of_every_smaller_budget(reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed)
    whole = search(model, trajectory, 4, 3, reduce=reduce)
    for steps in range(1, 4):
        small = search(model, trajectory, steps, 3, reduce=reduce)
        for sample in range(len(columns(reduce))):
            assert_same_paths(small.paths(steps, sample), whole.paths(steps, sample))


@each_seed(1)
def test_a_samples_paths_are_its_own(seed: int) -> None:
    model = random_mixture(seed)
    noise = model.noise(SAMPLES, seed)
    together = search(model, oss.teacher(model, noise, 9), 4, 3)
    for b in range(SAMPLES):
        alone = search(model, oss.teacher(model, noise[[b]], 9), 4, 3)
        assert_same_paths(together.paths(4, b), alone.paths(4))


# --- how good it is -----------------------------------------------------------------------------


@each_family
@each_start
@each_reduction
@each_seed(1)
def test_a_beam_that_is_wide_enough_holds_every_path(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=7)
    found = search(model, trajectory, 3, EVERY, reduce=reduce, start=start)
    firsts = [7] if start == "pinned" else list(range(7, 0, -1))
    every = {(*p, 0) for p in itertools.combinations(range(7, 0, -1), 3) if p[0] in firsts}
    for sample in range(len(columns(reduce))):
        paths = [path for path, _ in found.paths(3, sample)]
        assert len(paths) == len(every)
        assert set(paths) == every
    if reduce != "none":
        best, error = oss.exhaustive(model, trajectory, 3, reduce=reduce, start=start)
        path, cost = found.paths(3)[0]
        assert path == best.indices
        assert cost == pytest.approx(error, rel=1e-9)


@each_joint
def test_wider_beams_end_nearer_and_never_below_the_optimum(reduce: str) -> None:
    """On the average over six mixtures; a single one may end farther."""
    over: dict[int, list[float]] = {1: [], 3: [], 8: []}
    for seed in range(6):
        model, trajectory = random_case("mixture", seed, steps=10)
        _, optimum = oss.exhaustive(model, trajectory, 3, reduce=reduce)
        for width, ratios in over.items():
            path, cost = search(model, trajectory, 3, width, reduce=reduce).paths(3)[0]
            error = final_error(model, trajectory, path, list(range(SAMPLES)), reduce)
            assert cost == pytest.approx(error, rel=1e-9)
            assert error >= optimum * (1 - 1e-9)
            ratios.append(math.log(error / optimum))
    means = {width: sum(ratios) / len(ratios) for width, ratios in over.items()}
    assert means[1] > means[3] > means[8]
    assert means[8] < 0.5 * means[1]


# --- what it costs ------------------------------------------------------------------------------


@each_start
@each_reduction
@each_seed(3)
def test_evaluations_are_foretold_exactly(start: str, reduce: str, seed: int) -> None:
    draw = random.Random(seed)
    n, width = draw.randint(3, 12), draw.choice([1, 2, 3, 5, 40])
    steps = draw.randint(1, min(n, 4))
    model, trajectory = random_case("mixture", seed, steps=n)
    model, calls = recorded(model)
    evaluator = Evaluator(model, SAMPLES)
    beam(evaluator, trajectory, steps, width=width, reduce=reduce, start=start)
    assert evaluator.nfe == SAMPLES * evaluations(n, steps, width, start)
    assert min(float(call.t.min()) for call in calls) > 0


@each_start
def test_width_1_costs_what_the_dynamic_programme_does(start: str) -> None:
    for n, steps in [(1, 1), (5, 5), (40, 3), (200, 10)]:
        assert evaluations(n, steps, 1, start) == dp.evaluations(n, steps, start)


def test_evaluations_count_the_paths_to_every_row() -> None:
    assert evaluations(7, 3, EVERY) == 7 + math.comb(7, 2) + math.comb(7, 3)
    assert evaluations(7, 3, EVERY, "pinned") == 1 + 6 + math.comb(6, 2)
    assert evaluations(7, 3, 2) == 7 + (1 + 2 * 5) + (1 + 2 * 4)


@each_reduction
@each_seed(1)
def test_all_slots_of_a_step_are_one_request(reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed)
    model, calls = recorded(model)
    evaluator = Evaluator(model, SAMPLES, max_batch=EVERY)
    beam(evaluator, trajectory, 4, width=3, reduce=reduce)
    assert len(calls) == 4


def test_what_a_model_declares_is_honoured() -> None:
    model, trajectory = random_case("network", 7)
    careful, calls = recorded(model, one_time_per_call=True, fixed_batch=4)
    found = search(careful, trajectory, 4, 3, max_batch=2)
    assert {len(call.t) for call in calls} == {4}
    assert all(len(call.t.unique()) == 1 for call in calls)
    expected = search(model, trajectory, 4, 3)
    for sample in range(SAMPLES):
        assert_same_paths(found.paths(4, sample), expected.paths(4, sample))


# --- what it refuses ----------------------------------------------------------------------------


@each_seed(1)
def test_broken_sources_never_win(seed: int) -> None:
    model, trajectory = random_case("mixture", seed)
    broken = [3, 5, 9]
    sick = faulty(model, lambda t, sample: torch.isin(t, trajectory.times[broken]) & (sample == 1))
    found, healthy = search(sick, trajectory, 3, EVERY), search(model, trajectory, 3, EVERY)
    for sample in (0, 2):
        assert_same_paths(found.paths(3, sample), healthy.paths(3, sample))
    whole = {path for path, _ in healthy.paths(3, 1) if not set(path) & set(broken)}
    assert {path for path, _ in found.paths(3, 1)} == whole
    joint = search(sick, trajectory, 3, EVERY, reduce="mean")
    assert {path for path, _ in joint.paths(3)} == whole
    for result in (found, joint):
        for cost, source in zip(result.cost, result.source, strict=True):
            assert torch.equal(cost.isinf(), (source < 0).expand_as(cost))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_finite_path_is_an_error_that_names_step_time_and_sample(value: float) -> None:
    model, trajectory = random_case("mixture", 1)
    sick = faulty(model, lambda t, sample: sample == 2, value)
    with pytest.raises(NonFiniteError, match=r"^step 1 .* sample 2: .*'faulty'.* t = .* 2$"):
        search(sick, trajectory, 3, 2)
    with pytest.raises(NonFiniteError, match=r"^step 1 .* for the batch: .* for sample 2$"):
        search(sick, trajectory, 3, 2, reduce="log_mean")


def test_the_error_of_a_later_step_says_so() -> None:
    model, trajectory = random_case("mixture", 1)
    # Only row 1 works, and what starts there can only end: no row above 0 has a second step.
    sick = faulty(model, lambda t, sample: t > trajectory.times[1])
    with pytest.raises(NonFiniteError, match=r"^step 2 .* for sample 0: .* t = "):
        search(sick, trajectory, 3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "^steps: expected 1 to 9, got 0"),
        ({"steps": 10}, "^steps: expected 1 to 9, got 10"),
        ({"width": 0}, "^width: expected at least 1, got 0"),
        ({"width": 2.0}, "^width: expected a whole number, at least 1, got 2.0"),
        ({"start": "late"}, r"^start: expected one of .*, got 'late'"),
        ({"reduce": "median"}, r"^reduce: expected one of .*, got 'median'"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_called(
    options: dict[str, Any], message: str
) -> None:
    model, trajectory = random_case("mixture", 1)
    model, calls = recorded(model)
    given = {"steps": 3, "width": 2, "start": "free"} | options
    with pytest.raises(ValueError, match=message):
        search(model, trajectory, **given)
    assert not calls
    if "reduce" not in given:
        with pytest.raises(ValueError, match=message):
            evaluations(9, **given)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"steps": 0}, "^steps: expected 1 to 2, got 0"),
        ({"steps": 3}, "^steps: expected 1 to 2, got 3"),
        ({"steps": 1, "sample": 3}, "^sample: expected 0 to 2, got 3"),
    ],
)
def test_a_beam_knows_what_it_holds(wanted: dict[str, int], message: str) -> None:
    model, trajectory = random_case("mixture", 1, steps=4)
    with pytest.raises(ValueError, match=message):
        search(model, trajectory, 2, 2).paths(**wanted)
