"""The dynamic programme: what Algorithm 1 promises, on random models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    SHAPE,
    constant_velocity,
    each_family,
    each_reduction,
    each_seed,
    each_start,
    faulty,
    fill_table,
    one_thread,  # noqa: F401
    random_case,
    recorded,
)
from oss_ext import dp
from oss_ext.models import Model, from_callable
from oss_ext.models.evaluation import Evaluator, NonFiniteError


def mean_square(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(dim=1)


def paths(table: dp.Table, steps: int) -> list[tuple[int, ...]]:
    """The path of every sample, or the joint one."""
    return [table.backtrack(steps, column) for column in range(table.parent.shape[2])]


def assert_equal_tables(left: dp.Table, right: dp.Table) -> None:
    assert torch.equal(left.parent, right.parent)
    assert torch.equal(left.cost, right.cost)


def assert_close_tables(left: dp.Table, right: dp.Table, factor: float = 1.0) -> None:
    assert torch.equal(left.parent, right.parent)
    torch.testing.assert_close(left.cost * factor, right.cost, rtol=1e-9, atol=1e-24)


def plain_algorithm_1(
    model: Model, trajectory: oss.Trajectory, steps: int, reduce: str, start: str, group: list[int]
) -> tuple[Tensor, Tensor]:
    """The paper's loops for the samples in ``group`` that share a path: cost and parent."""
    x, t, n = trajectory.states[:, group], trajectory.times, trajectory.steps
    score = {
        "none": lambda cost: float(cost),
        "mean": lambda cost: float(cost.mean()),
        "log_mean": lambda cost: float(cost.clamp(min=2.0**-126).log().mean()),
    }[reduce]
    z = dict.fromkeys(range(1, n + 1) if start == "free" else [n], x[n])
    all_cost = torch.full((steps, n + 1, len(group)), math.inf, dtype=torch.float64)
    all_parent = torch.full((steps, n + 1, 1), -1)
    for k in range(steps):
        v = {i: model(z[i], t[i].expand(len(group)), torch.tensor(group)) for i in z}
        following: dict[int, Tensor] = {}
        for j in range(n):
            best = math.inf
            for i in sorted(z):
                candidate = z[i] + (t[j] - t[i]) * v[i] if i > j else torch.tensor(math.inf)
                cost = mean_square(candidate - x[j])
                if bool(cost.isfinite().all()) and score(cost) <= best:  # ties: largest source
                    best, following[j] = score(cost), candidate
                    all_cost[k, j], all_parent[k, j] = cost, i
        z = {j: state for j, state in following.items() if j > 0}
    return all_cost, all_parent


@each_family
@each_start
@each_reduction
@each_seed(2)
def test_the_table_is_that_of_the_papers_loops(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed)
    table = fill_table(model, trajectory, 4, reduce=reduce, start=start)
    groups = [[b] for b in range(SAMPLES)] if reduce == "none" else [list(range(SAMPLES))]
    expected = [plain_algorithm_1(model, trajectory, 4, reduce, start, group) for group in groups]
    assert torch.equal(table.parent, torch.cat([parent for _, parent in expected], dim=2))
    cost = torch.cat([cost for cost, _ in expected], dim=2)
    torch.testing.assert_close(table.cost, cost, rtol=1e-10, atol=1e-24)


@each_seed(4)
def test_the_first_step_is_the_best_of_all_first_steps(seed: int) -> None:
    model, trajectory = random_case("network", seed)
    errors = torch.stack(
        [
            mean_square(
                oss.sample(model, trajectory.noise, trajectory.schedule([i, 0])) - trajectory.final
            )
            for i in range(1, trajectory.steps + 1)
        ]
    )
    table = fill_table(model, trajectory, 1)
    assert torch.equal(table.parent[0, 0], errors.argmin(dim=0) + 1)
    torch.testing.assert_close(table.cost[0, 0], errors.amin(dim=0), rtol=1e-12, atol=0)


@each_family
@each_start
@each_reduction
@each_seed(3)
def test_replay_reproduces_the_table_at_every_step(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed)
    table = fill_table(model, trajectory, 5, reduce=reduce, start=start)
    for steps in range(1, 6):
        for column, path in enumerate(paths(table, steps)):
            samples = [column] if reduce == "none" else list(range(SAMPLES))
            _, errors = dp.replay(model, trajectory, path)
            expected = torch.stack([table.cost[k, row] for k, row in enumerate(path[1:])])
            torch.testing.assert_close(
                errors[:, samples], expected[:, samples], rtol=1e-12, atol=1e-28
            )


@each_family
@each_reduction
@each_seed(3)
def test_replay_reproduces_a_float32_table_within_the_error_model(
    family: str, reduce: str, seed: int
) -> None:
    """The kernel's error model, once per step and ten times over: steps pass errors on."""
    model, trajectory = random_case(family, seed, dtype=torch.float32)
    table = fill_table(model, trajectory, 4, reduce=reduce)
    assert table.cost.dtype == torch.float32
    for column, path in enumerate(paths(table, 4)):
        samples = [column] if reduce == "none" else list(range(SAMPLES))
        states, errors = dp.replay(model, trajectory, path)
        for k, row in enumerate(path[1:]):
            speed = (trajectory.states[-1] - trajectory.final).abs()  # v of a straight path
            size = states[k].abs() + trajectory.states[row].abs() + speed
            rounding = 10 * (k + 1) * 4 * 2.0**-24 * mean_square(size).sqrt()
            error, cost = errors[k], table.cost[k, row].double()
            allowed = 1e-5 * error + 2 * error.sqrt() * rounding + rounding**2
            assert bool(((cost - error).abs() <= allowed)[samples].all()), (k, cost, error)


@each_start
@each_reduction
@each_seed(2)
def test_a_search_contains_the_search_of_every_smaller_budget(
    start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case("network", seed)
    whole = fill_table(model, trajectory, 5, reduce=reduce, start=start)
    for steps in range(1, 5):
        small = fill_table(model, trajectory, steps, reduce=reduce, start=start)
        assert_equal_tables(small, dp.Table(whole.cost[:steps], whole.parent[:steps]))


@each_reduction
@each_seed(2)
def test_permuting_the_samples_permutes_the_results(reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed)
    order = torch.tensor([2, 0, 1])
    permuted_model = from_callable(
        lambda x, t, sample: model(x, t, order[sample]), SHAPE, dtype=torch.float64
    )
    permuted = oss.teacher(permuted_model, trajectory.noise[order], times=trajectory.times)
    table = fill_table(model, trajectory, 4, reduce=reduce)
    expected = dp.Table(
        table.cost[:, :, order], table.parent[:, :, order if reduce == "none" else [0]]
    )
    assert_close_tables(fill_table(permuted_model, permuted, 4, reduce=reduce), expected)


@each_family
@each_reduction
@each_seed(2)
def test_scaling_data_and_noise_scales_the_cost_by_the_square(
    family: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed)
    scaled_model = from_callable(
        lambda x, t, sample: 3 * model(x / 3, t, sample), SHAPE, dtype=torch.float64
    )
    scaled = oss.teacher(scaled_model, 3 * trajectory.noise, times=trajectory.times)
    expected = fill_table(scaled_model, scaled, 4, reduce=reduce)
    assert_close_tables(fill_table(model, trajectory, 4, reduce=reduce), expected, factor=9.0)


@each_family
@each_start
@each_reduction
@each_seed(2)
def test_as_many_steps_as_the_teacher_are_the_teacher(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=6)
    table = fill_table(model, trajectory, 6, reduce=reduce, start=start)
    assert paths(table, 6) == [(6, 5, 4, 3, 2, 1, 0)] * table.parent.shape[2]
    # The only path to row N - k in k steps is the teacher's own.
    for k in range(1, 7):
        assert (table.parent[k - 1, 6 - k] == 6 - k + 1).all()
        assert (table.cost[k - 1, 6 - k] < 1e-28).all()
        assert (table.parent[k - 1, 6 - k + 1 :] == -1).all()
        assert table.cost[k - 1, 6 - k + 1 :].isinf().all()


@each_seed(2)
def test_a_pinned_start_begins_at_the_teachers_first_time(seed: int) -> None:
    model, trajectory = random_case("network", seed)
    table = fill_table(model, trajectory, 4, start="pinned")
    firsts = {path[0] for steps in range(1, 5) for path in paths(table, steps)}
    assert firsts == {trajectory.steps}


def test_a_free_start_may_begin_below_the_teachers_first_time() -> None:
    # Standing still until t = 1/2 and then moving: to start at row 2 is exact, at row 4 it is not.
    model = from_callable(
        lambda x, t, sample: torch.ones_like(x) * (t <= 0.5)[:, None, None],
        SHAPE,
        dtype=torch.float64,
    )
    trajectory = oss.teacher(model, model.noise(1), 4)
    table = fill_table(model, trajectory, 1)
    assert table.backtrack(1) == (2, 0)
    assert float(table.cost[0, 0, 0]) < 1e-30


@each_family
@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
@each_seed(2)
def test_a_joint_search_of_one_sample_is_its_own(family: str, reduce: str, seed: int) -> None:
    model, trajectory = random_case(family, seed, samples=1)
    own = fill_table(model, trajectory, 4)
    assert_close_tables(fill_table(model, trajectory, 4, reduce=reduce), own)


@each_start
@each_reduction
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@each_seed(1)
def test_streamed_velocities_give_identical_bits(
    start: str, reduce: str, rows: int, seed: int
) -> None:
    model, trajectory = random_case("network", seed, dtype=torch.float32)
    whole = fill_table(model, trajectory, 4, reduce=reduce, start=start)
    room = {"velocity_bytes": rows * trajectory.final.nbytes}
    streamed = fill_table(model, trajectory, 4, reduce=reduce, start=start, **room)
    assert_equal_tables(streamed, whole)


@each_reduction
@each_seed(1)
def test_streaming_rows_in_other_blocks_changes_results_only_to_rounding(
    reduce: str, seed: int
) -> None:
    """A row's bits depend on its place in a block, and chunks move rows to other places."""
    model, trajectory = random_case("network", seed)
    whole = fill_table(model, trajectory, 4, reduce=reduce, max_batch=5)
    room = 4 * trajectory.final.nbytes
    streamed = fill_table(model, trajectory, 4, reduce=reduce, max_batch=5, velocity_bytes=room)
    assert_close_tables(streamed, whole)


@each_start
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_only_live_sources_are_evaluated(start: str, steps: int) -> None:
    model, trajectory = random_case("network", 3)
    model, calls = recorded(model)
    evaluator = Evaluator(model, SAMPLES)
    dp.run(evaluator, trajectory, steps, reduce="none", start=start)
    n = trajectory.steps
    expected = {
        "free": steps * n - steps * (steps - 1) // 2,
        "pinned": 1 + sum(n - k + 1 for k in range(2, steps + 1)),
    }[start]
    assert dp.evaluations(n, steps, start) == expected
    assert evaluator.nfe == expected * SAMPLES
    assert sum(len(call.t) for call in calls) == expected * SAMPLES  # SAMPLES fills every block
    assert min(float(call.t.min()) for call in calls) > 0


@each_seed(2)
@pytest.mark.parametrize("max_batch", [1, 2, 5, 64])
def test_max_batch_changes_results_only_to_rounding(seed: int, max_batch: int) -> None:
    model, trajectory = random_case("network", seed)
    model, calls = recorded(model)
    table = fill_table(model, trajectory, 4, max_batch=max_batch)
    assert {len(call.t) for call in calls} == {max_batch}
    assert_close_tables(table, fill_table(model, trajectory, 4))


def test_what_a_model_declares_is_honoured() -> None:
    model, trajectory = random_case("network", 7)
    careful, calls = recorded(model, one_time_per_call=True, fixed_batch=4)
    table = fill_table(careful, trajectory, 4, max_batch=2)
    assert {len(call.t) for call in calls} == {4}
    assert all(len(call.t.unique()) == 1 for call in calls)
    assert_close_tables(table, fill_table(model, trajectory, 4))


def test_broken_sources_never_win() -> None:
    model, trajectory = random_case("mixture", 1)
    broken = trajectory.times[[3, 5, 9]]
    sick = faulty(model, lambda t, sample: torch.isin(t, broken) & (sample == 1))
    table, healthy = fill_table(sick, trajectory, 4), fill_table(model, trajectory, 4)
    # k = 3 steps to row N - 3 have only the teacher's way, which begins at the broken row N.
    assert not torch.isin(table.parent[:, :, 1], torch.tensor([3, 5, 9])).any()
    assert table.parent[2, trajectory.steps - 3, 1] == -1
    assert torch.equal(table.cost[:, :, [0, 2]], healthy.cost[:, :, [0, 2]])
    assert torch.equal(table.parent[:, :, [0, 2]], healthy.parent[:, :, [0, 2]])
    joint = fill_table(sick, trajectory, 4, reduce="mean")
    assert not torch.isin(joint.parent, torch.tensor([3, 5, 9])).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_finite_path_is_an_error_that_names_step_time_and_sample(value: float) -> None:
    model, trajectory = random_case("mixture", 1)
    sick = faulty(model, lambda t, sample: sample == 2, value)
    t = f"{float(trajectory.times[1]):.6g}"
    with pytest.raises(NonFiniteError, match=rf"^step 1 .* sample 2: .*'faulty'.* t = {t} .* 2$"):
        fill_table(sick, trajectory, 3)


def test_the_error_of_a_later_step_says_so() -> None:
    model, trajectory = random_case("mixture", 1)
    first_step = trajectory.steps * SAMPLES
    rows = 0

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return model(x, t, sample) * (1.0 if rows <= first_step else math.nan)

    sick = from_callable(velocity, SHAPE, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"^step 2 .* for the batch: .* t = .* for sample 0"):
        fill_table(sick, trajectory, 3, reduce="log_mean")


def test_the_error_blames_the_sample_that_has_no_path() -> None:
    model, trajectory = random_case("mixture", 1)
    first = trajectory.times[1]
    sick = faulty(model, lambda t, sample: (sample == 2) | ((sample == 0) & (t == first)))
    with pytest.raises(NonFiniteError, match=r"for sample 2: .* for sample 2$"):
        fill_table(sick, trajectory, 3)


def test_costs_that_overflow_are_called_so() -> None:
    model, trajectory = random_case("mixture", 1)
    huge = faulty(model, lambda t, sample: sample >= 0, 1e200)
    with pytest.raises(NonFiniteError, match="every cost overflowed"):
        fill_table(huge, trajectory, 1)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"steps": 0}, "^steps: expected 1 to 2, got 0"),
        ({"steps": 3}, "^steps: expected 1 to 2, got 3"),
        ({"steps": 1, "sample": 3}, "^sample: expected 0 to 2, got 3"),
        ({"steps": 1, "sample": -1}, "^sample: expected 0 to 2, got -1"),
    ],
)
def test_a_table_knows_what_it_holds(wanted: dict[str, int], message: str) -> None:
    model, trajectory = random_case("mixture", 1, steps=4)
    with pytest.raises(ValueError, match=message):
        fill_table(model, trajectory, 2).backtrack(**wanted)


@pytest.mark.parametrize("steps", [0, -1, 5])
def test_a_table_has_1_to_n_steps(steps: int) -> None:
    model, trajectory = random_case("mixture", 1, steps=4)
    with pytest.raises(ValueError, match=f"^steps: expected 1 to 4.*, got {steps}"):
        fill_table(model, trajectory, steps)


@pytest.mark.parametrize("path", [(4, 0), (4, 2, 0), (3, 2, 1, 0)])
def test_replay_measures_the_distance_to_the_teacher_at_every_step(path: Sequence[int]) -> None:
    model = constant_velocity(dtype=torch.float64)
    trajectory = oss.teacher(model, model.noise(2), 4)
    # All but the noise is moved, so that every state of a student is off by one quarter.
    moved = torch.cat([trajectory.states[:-1] - 0.25, trajectory.noise[None]])
    shifted = replace(trajectory, states=moved)
    states, errors = dp.replay(model, shifted, path)
    missing = 1 - float(trajectory.times[path[0]])  # a free start has less way to go
    assert len(states) == len(path) - 1
    expected = torch.full((len(states), 2), (0.25 + missing) ** 2, dtype=torch.float64)
    torch.testing.assert_close(errors, expected)
