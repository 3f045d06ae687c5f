"""Weights and masks: what counts how much in a comparison with the teacher."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    SHAPE,
    assert_replays,
    dp_search,
    each_family,
    each_reduction,
    each_seed,
    fill_table,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext.metrics import DataMetric, Metric, Selection, StateMetric
from oss_ext.models.evaluation import Evaluator

STEPS = 3
METRICS: dict[str, Any] = {"xt": StateMetric, "x0": DataMetric}
each_metric = pytest.mark.parametrize("metric", METRICS)


def random_weights(seed: int, *shape: int) -> Tensor:
    """Some of them 0, the first never."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    weights[torch.rand(shape, generator=generator) < 0.4] = 0.0
    weights.view(-1)[0] = 0.7
    return weights


def case(family: str, seed: int, steps: int = 7) -> tuple[Any, oss.Trajectory]:
    model, without = random_case(family, seed, steps=steps)
    return model, oss.teacher(model, without.noise, times=without.times, keep_x0=True)


def weighted(difference: Tensor, weights: Tensor) -> float:
    """``sum w d^2 / sum w`` of one sample, one element after the other."""
    above, below = 0.0, 0.0
    for at in itertools.product(*map(range, difference.shape)):
        own = tuple(i if n > 1 else 0 for i, n in zip(at, weights.shape, strict=True))
        above += float(weights[own]) * float(difference[at]) ** 2
        below += float(weights[own])
    return above / below


@each_seed(4)
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 1), (3, 1, 1)])
def test_the_mean_square_of_what_is_selected_is_the_weighted_one(
    seed: int, shape: tuple[int, ...]
) -> None:
    weights = random_weights(seed, *shape)
    a, b = torch.randn(2, 4, 2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
    selection = Selection(weights=weights)
    got = (selection.of(a, 1) - selection.of(b, 1)).square().mean(dim=2)
    expected = [[weighted(a[i, s] - b[i, s], weights) for s in range(2)] for i in range(4)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@each_seed(2)
def test_weights_of_a_part_are_those_of_its_elements(seed: int) -> None:
    weights, x = random_weights(seed, 4, 3, 5), torch.randn(2, 1, 4, 3, 5).double()
    for how in ("first", "even", "random"):
        part = Selection(channels=2, how=how, seed=seed)
        of_part = Selection(channels=2, how=how, seed=seed, weights=weights + 0.1)
        ones = part.of((weights + 0.1)[None, None], 3)[0, 0]
        expected = [weighted(row, ones) for row in part.of(x, 3)[:, 0]]
        got = of_part.of(x, 3).square().mean(dim=2)[:, 0]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_takes_the_elements_as_they_are(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype)
    x = torch.randn(2, 1, 2, 3)
    assert torch.equal(Selection(weights=mask).of(x, 1), x.flatten(2)[:, :, [0, 2, 4]])


def test_what_weighs_nothing_is_never_read() -> None:
    x = torch.tensor([1.0, float("nan"), 2.0, float("inf")]).view(1, 1, 4)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert Selection(weights=weights).of(x, 1).flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("scale", [1e-300, 1e300, 5e307])
def test_only_the_ratios_of_weights_count(scale: float) -> None:
    weights, x = torch.tensor([1.0, 3.0, 0.5]).double(), torch.randn(2, 1, 3).double()
    scaled = Selection(weights=weights * scale).of(x, 1)
    torch.testing.assert_close(scaled, Selection(weights=weights).of(x, 1))


@each_metric
@each_family
@each_reduction
@each_seed(1)
def test_parents_are_the_nearest_by_the_weighted_mean_square(
    metric: str, family: str, reduce: str, seed: int
) -> None:
    model, trajectory = case(family, seed)
    weights = random_weights(seed, *SHAPE)
    used: Metric = METRICS[metric](Selection(weights=weights))
    table = fill_table(model, trajectory, STEPS, reduce=reduce, metric=used)
    times, evaluator = trajectory.times.tolist(), Evaluator(model, SAMPLES)
    assert trajectory.x0 is not None
    target = trajectory.states if metric == "xt" else trajectory.x0
    states = dict.fromkeys(range(1, 8), trajectory.noise)
    for k in range(STEPS):
        velocity = {i: evaluator.at(x, times[i]) for i, x in states.items()}
        after = {}
        for j in range(7 - k):
            parent = table.parent[k, j].expand(SAMPLES).tolist()
            costs = {}
            for i in states:
                t = 0.0 if metric == "x0" else times[j]
                moved = states[i] + (t - times[i]) * velocity[i]
                if i > j:
                    costs[i] = [weighted(moved[b] - target[j, b], weights) for b in range(SAMPLES)]
            found = torch.tensor(list(costs.values()))
            if reduce != "none":
                found = found.log() if reduce == "log_mean" else found
                found = found.mean(dim=1, keepdim=True).expand(-1, SAMPLES)
            picked = [found[list(costs).index(p), b] for b, p in enumerate(parent)]
            least = found.min(dim=0).values
            torch.testing.assert_close(torch.stack(picked), least, rtol=1e-7, atol=1e-9)
            after[j] = torch.stack([
                states[p][b] + (times[j] - times[p]) * velocity[p][b] for b, p in enumerate(parent)
            ])  # fmt: skip
        states = {j: x for j, x in after.items() if j > 0}


@pytest.mark.parametrize(
    ("metric", "solver"),
    [("xt", "euler"), ("xt", "dpmpp-2m"), ("xt", "heun"), ("x0", "euler"), ("x0", "dpmpp-2m")],
)
@each_reduction
@each_seed(1)
def test_the_state_that_moves_is_not_weighted(
    metric: str, solver: str, reduce: str, seed: int
) -> None:
    model, trajectory = case("network", seed, steps=10)
    used = METRICS[metric](Selection(weights=random_weights(seed, *SHAPE)))
    table = fill_table(model, trajectory, STEPS, reduce=reduce, metric=used, solver=solver)
    assert_replays(model, trajectory, table, solver, STEPS)


@each_seed(1)
def test_equal_weights_find_what_none_find(seed: int) -> None:
    model, trajectory = case("network", seed)
    equal = StateMetric(Selection(weights=torch.full((1, 1), 0.3)))
    with_weights = fill_table(model, trajectory, STEPS, metric=equal)
    without = fill_table(model, trajectory, STEPS)
    assert torch.equal(with_weights.parent, without.parent)
    torch.testing.assert_close(with_weights.cost, without.cost, rtol=1e-9, atol=1e-20)


@each_metric
def test_a_schedule_says_that_its_metric_was_weighted(metric: str) -> None:
    model, trajectory = case("mixture", 1)
    selection = Selection(channels=1, weights=torch.ones(1))
    result = dp_search(model, trajectory, 2, metric=METRICS[metric](selection))
    objective = result.schedule(2).objective
    assert objective is not None
    assert objective.metric == f"{metric}[first 1 channels, weighted]"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "got"),
    [
        (torch.zeros(2, 3), r"none in a tensor of shape \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.bool), "none in"),
        (torch.zeros(0), "none in"),
        (torch.tensor([1.0, -0.5]), "-0.5"),
        (torch.tensor([1.0, float("nan")]), "NaN or inf"),
        (torch.tensor([1.0, float("inf")]), "NaN or inf"),
        (torch.ones(2, dtype=torch.complex64), "Tensor of torch.complex64"),
        ([1.0, 2.0], "list"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^weights: expected a tensor of finite .* got {got}"):
        Selection(weights=weights)


@each_metric
@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2, 3), (2, 3, 1)])
def test_weights_of_another_shape_are_refused_before_the_model_is_asked(
    metric: str, shape: tuple[int, ...]
) -> None:
    model, trajectory = case("mixture", 1)
    used = METRICS[metric](Selection(weights=torch.ones(shape)))
    evaluator = Evaluator(model, SAMPLES)
    with pytest.raises(ValueError, match=r"^weights: expected a shape that broadcasts to \(2, 3\)"):
        oss.dp.run(evaluator, trajectory, 2, reduce="none", metric=used)
    assert evaluator.nfe == 0


def test_a_part_without_any_weight_is_refused() -> None:
    selection = Selection(channels=1, weights=torch.tensor([[0.0], [1.0]]))
    with pytest.raises(ValueError, match=r"^weights: expected one above zero in what step 4"):
        selection.of(torch.zeros(1, 1, 2, 3), 4)
