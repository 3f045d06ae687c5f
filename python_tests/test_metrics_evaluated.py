"""Metrics that evaluate the model at the best few candidates of every target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    SHAPE,
    assert_replays,
    constant_velocity,
    dp_search,
    each_reduction,
    each_seed,
    each_start,
    faulty,
    fill_table,
    one_thread,  # noqa: F401
    random_case,
)
from metric_cases import METRICS, WEIGHTS, blind, case, each_metric, each_solver
from oss_ext import coarse, dp, metrics
from oss_ext.metrics import CandidateDataMetric, PerceptualMetric
from oss_ext.models.evaluation import Evaluator
from oss_ext.solvers import SOLVERS, Multistep, Singlestep

STEPS = 3


# --- against one pair after the other -------------------------------------------------------------


def features(metric: str, model: Any, x: Tensor, t: float, b: int) -> Tensor:
    """Of the model at ``x`` ``[*dims]``, by its definition."""
    one, time, sample = x[None], torch.tensor([t], dtype=torch.float64), torch.tensor([b])
    if metric == "perceptual":
        return model.networks()[""].hidden(one, time, sample)[0]
    return x - t * model(one, time, sample)[0]


def distance(metric: str, a: Tensor, b: Tensor, step: int) -> float:
    """The mean square, with the metric's weights or in its channels; a and b of one sample."""
    square = (a - b) ** 2
    if metric == "weighted":
        return float((square * WEIGHTS).sum() / (3 * WEIGHTS.sum()))
    if metric == "random":
        selection = METRICS[metric].selection
        return float(selection.of(square[None, None], step).mean())
    return float(square.mean())


def apart(metric: str, a: Tensor, b: Tensor, step: int) -> float:
    """The same of states, all of whose elements count unless the metric's selection says else."""
    return distance("" if metric == "perceptual" else metric, a, b, step)


def reduced(costs: list[float], reduce: str) -> list[float]:
    if reduce == "none":
        return costs
    values = torch.tensor(costs, dtype=torch.float64)
    mean = values.clamp(min=1e-300).log().mean() if reduce == "log_mean" else values.mean()
    return [float(mean)] * len(costs)


@each_metric
@each_solver
@each_reduction
@each_seed(1)
def test_the_parent_is_the_best_of_the_few_whose_states_are_nearest(
    metric: str, solver: str, reduce: str, seed: int
) -> None:
    """Every step of every order from every source, from the states of the table's own paths."""
    model, trajectory = case(seed, steps=6)
    table = fill_table(
        model, trajectory, STEPS, reduce=reduce, solver=solver, metric=METRICS[metric]
    )
    times, used, teacher = trajectory.times.tolist(), SOLVERS[solver], trajectory.states
    assert table.order is not None

    def velocity(x: Tensor, t: float, b: int) -> Tensor:
        time = torch.tensor([t], dtype=torch.float64)
        return model(x, time, torch.tensor([b]))

    # State and history of every row and sample.
    paths = {(i, b): (teacher[-1, b], None) for i in range(1, 7) for b in range(SAMPLES)}
    for k in range(STEPS):
        after: dict[tuple[int, int], Any] = {}
        for j in range(6 - k):
            ends: dict[tuple[int, int], list[Any]] = {}  # by source and order
            for i in range(j + 1, 7 - k):
                known = min(k, used.remembers) if isinstance(used, Multistep) else 0
                highest = used.highest_order(known, times[j])
                if isinstance(used, Singlestep):
                    highest = used.highest_orders([times[i], times[j]])[0]
                for order in range(1, highest + 1) if isinstance(used, Multistep) else [highest]:
                    ends[i, order] = []
                    for b in range(SAMPLES):
                        x, history = paths[i, b]
                        v = velocity(x[None], times[i], b)
                        moved, its_history = used.step(
                            history, x[None], v, times[i], times[j], order,
                            lambda x, t, b=b: velocity(x, t, b),
                        )  # fmt: skip
                        near = (
                            moved if isinstance(used, Multistep) else x + (times[j] - times[i]) * v
                        )
                        rank = apart(metric, near.view(SHAPE), teacher[j, b], k + 1)
                        if j == 0 or k == STEPS - 1:  # nothing goes on from there
                            cost = apart(metric, moved[0], teacher[j, b], k + 1)
                        else:
                            got, own = (
                                features(metric, model, x, times[j], b)
                                for x in (moved[0], teacher[j, b])
                            )
                            cost = distance(metric, got, own, k + 1)
                        ends[i, order].append((rank, cost, moved[0], its_history))
            ranks = {key: reduced([s[0] for s in found], reduce) for key, found in ends.items()}
            costs = {key: reduced([s[1] for s in found], reduce) for key, found in ends.items()}
            for b in range(SAMPLES):
                column = min(b, table.parent.shape[2] - 1)
                chosen = int(table.parent[k, j, column]), int(table.order[k, j, column])
                # The best order of every source, then the nearest few sources.
                best = {
                    i: min((key for key in ranks if key[0] == i), key=lambda key: ranks[key][b])
                    for i, _ in ranks
                }
                few = sorted(best.values(), key=lambda key: ranks[key][b])[: dp.FEW]
                # Compared by value: orders of a short history can be the same step.
                slack = 1e-9 * abs(ranks[few[-1]][b]) + 1e-20
                assert ranks[chosen][b] <= ranks[few[-1]][b] + slack
                least = min(costs[key][b] for key in few)
                assert costs[chosen][b] == pytest.approx(least, rel=1e-7, abs=1e-18)
                after[j, b] = ends[chosen][b][2:]
        paths = after


@each_metric
@each_solver
@each_reduction
@each_start
@each_seed(1)
def test_replaying_a_path_gives_the_tables_cost(
    metric: str, solver: str, reduce: str, start: str, seed: int
) -> None:
    model, trajectory = case(seed, steps=10)
    options = {"reduce": reduce, "start": start, "solver": solver}
    table = fill_table(model, trajectory, STEPS, metric=METRICS[metric], **options)
    for steps in range(1, STEPS + 1):
        assert_replays(model, trajectory, table, solver, steps)


@each_metric
@pytest.mark.parametrize("max_batch", [1, 2, 8])
@pytest.mark.parametrize("one_time", [False, True])
def test_how_calls_are_made_changes_no_parent(metric: str, max_batch: int, one_time: bool) -> None:
    model, trajectory = case(5)
    table = fill_table(model, trajectory, STEPS, metric=METRICS[metric])
    model.one_time_per_call = one_time
    again = fill_table(model, trajectory, STEPS, metric=METRICS[metric], max_batch=max_batch)
    assert torch.equal(again.parent, table.parent)
    torch.testing.assert_close(again.cost, table.cost, rtol=1e-9, atol=1e-20)


@each_seed(1)
def test_rows_that_are_tied_to_places_in_a_call_keep_their_features(seed: int) -> None:
    """Bands of their own: of two samples in a call, often the second alone is asked for."""
    model, trajectory = blind(seed, steps=40, sees=True)
    options: dict[str, Any] = {"reduce": "none", "stride": 4, "band": 2}
    tables = []
    for slots in (None, 2):
        model.slots = slots
        evaluator = Evaluator(model, SAMPLES)
        tables.append(
            coarse.coarse_to_fine(
                evaluator, trajectory, [8], metric=METRICS["perceptual"], **options
            )
        )
    assert torch.equal(tables[0].parent, tables[1].parent)
    torch.testing.assert_close(tables[0].cost, tables[1].cost, rtol=1e-9, atol=1e-20)


@each_reduction
@each_seed(1)
def test_of_equal_costs_the_largest_source_wins(reduce: str, seed: int) -> None:
    """Hidden features that do not see the state: both of the nearest are as good."""

    model, trajectory = blind(seed, steps=9, sees=False)
    noise, times = trajectory.noise, trajectory.times
    table = fill_table(model, trajectory, 2, reduce=reduce, metric=METRICS["perceptual"])
    evaluator = Evaluator(model, SAMPLES)
    velocity = {i: evaluator.at(noise, float(times[i])) for i in range(1, 10)}
    for j in range(1, 9):
        costs = {}
        for i in range(j + 1, 10):
            apart = noise + (times[j] - times[i]) * velocity[i] - trajectory.states[j]
            costs[i] = reduced(apart.square().flatten(1).mean(dim=1).tolist(), reduce)
        for b, parent in enumerate(table.parent[0, j].tolist()):
            nearest = sorted(costs, key=lambda i: costs[i][b])[: dp.FEW]
            assert parent == max(nearest)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x0-candidate", "perceptual:unet.mid_block", "perceptual:a:b"])
def test_a_metric_is_found_by_the_name_it_has(name: str) -> None:
    assert metrics.get(name).name == name
    assert metrics.get(metrics.get(name)).name == name


@pytest.mark.parametrize("name", ["perceptual", "perceptual:", "x0:inner", "lpips:a", 3, ["xt"]])
def test_an_error_lists_the_names_that_there_are(name: Any) -> None:
    expected = r"^metric: expected one of .*xt, x0, x0-candidate, perceptual:MODULE.* got"
    with pytest.raises(ValueError, match=expected):
        metrics.get(name)


@pytest.mark.parametrize("module", ["", None, 3])
def test_a_perceptual_metric_needs_a_module(module: Any) -> None:
    with pytest.raises(ValueError, match=r"^module: expected the name of a module, got"):
        PerceptualMetric(module)


def test_a_weighted_one_says_so() -> None:
    assert METRICS["weighted"].name == "x0-candidate[weighted]"
    assert METRICS["random"].name == "x0-candidate[random 1 channels]"


# --- bad input ------------------------------------------------------------------------------------


def test_a_module_that_is_not_there_costs_no_evaluation() -> None:
    model, trajectory = case(1)
    evaluator = Evaluator(model, SAMPLES)
    with pytest.raises(ValueError, match=r"^metric: expected a module of 'custom' such as inner.1"):
        dp.run(evaluator, trajectory, 2, reduce="none", metric=PerceptualMetric("iner.1"))
    assert evaluator.nfe == 0


def test_a_model_without_modules_is_refused() -> None:
    model = constant_velocity()
    trajectory = oss.teacher(model, model.noise(2), 5)
    with pytest.raises(ValueError, match=r"^metric: expected a model of torch modules"):
        dp_search(model, trajectory, 2, metric="perceptual:mid")


def test_a_beam_is_refused() -> None:
    model, trajectory = case(1)
    with pytest.raises(ValueError, match=r"^beam: expected 1 with .* metric 'x0-candidate'"):
        dp_search(model, trajectory, 2, metric="x0-candidate", beam=2)


@each_reduction
@each_seed(1)
def test_a_model_that_fails_at_a_candidate_makes_it_no_source(reduce: str, seed: int) -> None:
    good, trajectory = random_case("mixture", seed, steps=8)
    bad = float(trajectory.times[4])
    model = faulty(good, lambda t, sample: t == bad)
    table = fill_table(model, trajectory, STEPS, reduce=reduce, metric=CandidateDataMetric())
    # Its teacher's state at row 4 has no features, and at the last step none are needed.
    assert (table.parent[: STEPS - 1, 4] == -1).all()
    assert (table.parent[:, 0] >= 1).all()
    assert all(4 not in table.backtrack(STEPS, b)[1:-1] for b in range(table.parent.shape[2]))
