"""Metrics: what a search compares with the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    assert_replays,
    dp_search,
    each_family,
    each_reduction,
    each_seed,
    one_thread,  # noqa: F401
    random_case,
    random_times,
)
from oss_ext import dp, metrics
from oss_ext.metrics import (
    CandidateDataMetric,
    DataMetric,
    FeatureMetric,
    Selection,
    StateMetric,
)
from oss_ext.models.analytic import GaussianMixture
from oss_ext.models.evaluation import Evaluator

STEPS = 3
METRICS: dict[str, Any] = {
    "part": StateMetric(Selection(channels=1)),
    "random": StateMetric(Selection(channels=1, how="random", seed=5)),
    "x0": DataMetric(),
    "x0 part": DataMetric(Selection(channels=1)),
    "feature": FeatureMetric(lambda x: x.flatten(1)[:, :4].sin().cumsum(dim=1), block=4),
}
each_metric = pytest.mark.parametrize("metric", METRICS)


def case(family: str, seed: int, steps: int = 7) -> tuple[Any, oss.Trajectory]:
    model, trajectory = random_case(family, seed, steps=steps)
    return model, oss.teacher(model, trajectory.noise, times=trajectory.times, keep_x0=True)


def table_of(model: Any, trajectory: oss.Trajectory, **options: Any) -> dp.Table:
    return dp.run(Evaluator(model, SAMPLES), trajectory, STEPS, **options)


# --- the teacher's clean samples ----------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m"])
@each_seed(1)
def test_the_teacher_keeps_what_the_model_saw(solver: str, seed: int) -> None:
    model, without = random_case("network", seed, steps=6)
    given = oss.teacher(model, without.noise, times=without.times, solver=solver, keep_x0=True)
    assert without.x0 is None
    assert given.x0 is not None
    assert torch.equal(given.x0[0], given.final)
    evaluator = Evaluator(model, SAMPLES)
    for row in range(1, 7):
        t = float(given.times[row])
        expected = given.states[row] - t * evaluator.at(given.states[row], t)
        torch.testing.assert_close(given.x0[row], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("stride", [2, 4])
def test_parts_of_a_trajectory_keep_their_clean_samples(stride: int) -> None:
    _, trajectory = case("mixture", 2)
    assert trajectory.x0 is not None
    thinned, rows = trajectory.thinned(stride)
    assert torch.equal(thinned.x0, trajectory.x0[list(rows)])
    assert torch.equal(trajectory.first(2).x0, trajectory.x0[:, :2])


# --- the search ---------------------------------------------------------------------------------


def value(metric: str, x: Tensor, t: float, v: Tensor, t_next: float, step: int) -> Tensor:
    """A candidate's features, written out; ``[B, F]``."""
    moved, clean = x + (t_next - t) * v, x - t * v
    if metric == "part":
        return moved[:, :1].flatten(1)
    if metric == "random":
        return METRICS[metric].selection.of(moved[None], step)[0].flatten(1)
    if metric == "feature":
        return METRICS[metric].phi(clean)
    return (clean if metric == "x0" else clean[:, :1]).flatten(1)


@each_metric
@each_family
@each_reduction
@each_seed(1)
def test_parents_are_the_nearest_by_the_metric(
    metric: str, family: str, reduce: str, seed: int
) -> None:
    """First order, one pair after the other, from the states of the paths so far."""
    model, trajectory = case(family, seed)
    table = table_of(model, trajectory, reduce=reduce, metric=METRICS[metric])
    times, evaluator = trajectory.times.tolist(), Evaluator(model, SAMPLES)
    assert trajectory.x0 is not None
    states = dict.fromkeys(range(1, 8), trajectory.noise)
    for k in range(STEPS):
        velocity = {i: evaluator.at(x, times[i]) for i, x in states.items()}
        after = {}
        for j in range(8):
            parent = table.parent[k, j].expand(SAMPLES)
            errors = {}
            for i, x in states.items():
                if i > j:
                    got = value(metric, x, times[i], velocity[i], times[j], k + 1)
                    # The teacher's own, by way of a state that does not move.
                    clean = trajectory.x0[j]
                    still = trajectory.states[j]
                    slope = (still - clean) / times[j] if j else torch.zeros_like(still)
                    if j == 0 and metric in ("x0", "x0 part", "feature"):
                        still = clean
                    expected = value(metric, still, times[j], slope, times[j], k + 1)
                    errors[i] = (got - expected).square().mean(dim=1)
            if not errors:
                assert bool((parent == -1).all())
                continue
            ordered = sorted(errors, reverse=True)
            stacked = torch.stack([errors[i] for i in ordered])
            if reduce != "none":
                stacked = stacked.log() if reduce == "log_mean" else stacked
                stacked = stacked.mean(dim=1, keepdim=True).expand_as(stacked)
            least = stacked.min(dim=0).values
            chosen = torch.tensor([ordered.index(int(p)) for p in parent])
            picked = stacked.gather(0, chosen[None])[0]
            torch.testing.assert_close(picked, least, rtol=1e-9, atol=1e-12)
            after[j] = torch.stack([
                states[int(p)][b] + (times[j] - times[int(p)]) * velocity[int(p)][b]
                for b, p in enumerate(parent)
            ])  # fmt: skip
        states = {j: x for j, x in after.items() if j > 0}


@each_metric
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m"])
@each_reduction
@each_seed(1)
def test_the_tables_costs_are_of_the_whole_state(
    metric: str, solver: str, reduce: str, seed: int
) -> None:
    model, trajectory = case("network", seed, steps=12)
    table = table_of(model, trajectory, reduce=reduce, metric=METRICS[metric], solver=solver)
    assert_replays(model, trajectory, table, solver, STEPS)


@each_seed(1)
def test_features_that_are_the_state_find_what_the_state_finds(seed: int) -> None:
    """All channels selected: the general operator where Algorithm 1 has its own."""
    model, trajectory = case("network", seed)
    everything = StateMetric(Selection(channels=2, how="even"))
    general = table_of(model, trajectory, reduce="none", metric=everything)
    fused = table_of(model, trajectory, reduce="none")
    assert torch.equal(general.parent, fused.parent)
    torch.testing.assert_close(general.cost, fused.cost, rtol=1e-9, atol=1e-20)


def test_a_search_names_its_metric_and_reports_the_error_of_the_whole() -> None:
    model, trajectory = case("mixture", 1, steps=12)
    result = dp_search(model, trajectory, STEPS, metric="x0", reduce="mean")
    schedule = result.schedule(STEPS)
    assert schedule.objective is not None
    assert schedule.objective.metric == "x0"
    images = oss.sample(model, trajectory.noise, schedule)
    assert float((images - trajectory.final).square().mean()) == pytest.approx(schedule.cost)


def test_a_balanced_search_goes_on_from_a_metrics_paths() -> None:
    model = GaussianMixture(torch.randn(3, 8).double(), sd=0.3, shape=(2, 2, 2))
    trajectory = oss.teacher(model, model.noise(8, 1), times=random_times(1, 200), keep_x0=True)
    found = oss.search(model, trajectory, 10, metric=DataMetric(Selection(channels=1)))
    assert found.plan.coarse > 0
    assert found.schedule(10).method == "refined"


# --- selections ---------------------------------------------------------------------------------


def test_a_selection_is_a_view_of_what_it_says() -> None:
    video = torch.arange(2 * 3 * 8 * 5 * 2 * 2.0).view(2, 3, 8, 5, 2, 2)
    first = Selection(channels=4, frames=2).of(video, 1)
    assert torch.equal(first, video[:, :, :4, :2])
    even = Selection(channels=3, frames=3, how="even").of(video, 1)
    assert torch.equal(even, video[:, :, [0, 3, 6]][:, :, :, [0, 2, 4]])
    for part in (first, even):
        assert part.untyped_storage().data_ptr() == video.untyped_storage().data_ptr()
    one = Selection(channels=1, how="even").of(video, 1)
    assert torch.equal(one, video[:, :, :1])
    assert torch.equal(Selection().of(video, 1), video)


def test_a_random_selection_is_another_one_at_every_step_and_the_same_by_its_seed() -> None:
    video = torch.arange(64.0).view(1, 1, 64, 1)
    picks = [Selection(channels=8, how="random", seed=3).of(video, k).flatten() for k in (1, 1, 2)]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])
    assert len(set(picks[0].tolist())) == 8
    other = Selection(channels=8, how="random", seed=4).of(video, 1).flatten()
    assert not torch.equal(picks[0], other)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "last"}, "how: expected one of"),
        ({"channels": 0}, "channels: expected at least 1, got 0"),
        ({"frames": 1.5}, "frames: expected"),
        ({"channels": 1, "how": "random", "seed": 1.5}, "seed: expected a whole number"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": 2**70}, "seed: expected 0 to"),
        ({"how": "even"}, "how: expected channels or frames beside 'even', got neither"),
        ({"how": "random"}, "how: expected channels or frames beside 'random', got neither"),
    ],
)
def test_bad_selections_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Selection(**options)


def test_a_selection_of_more_than_there_is_is_refused() -> None:
    images = torch.zeros(2, 1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^channels: expected at most 3, got 4"):
        Selection(channels=4).of(images, 1)
    with pytest.raises(ValueError, match=r"^frames: expected at most 0, got 1"):
        Selection(frames=1).of(images, 1)


def test_the_largest_seed_serves_every_step() -> None:
    video = torch.zeros(2, 1, 9, 7, 4, 4)
    chosen = Selection(channels=2, how="random", seed=2**48).of(video, 10_000)
    assert chosen.shape == (2, 1, 2, 7, 4, 4)


@pytest.mark.parametrize("metric", [StateMetric, DataMetric, CandidateDataMetric])
@pytest.mark.parametrize("selection", [None, 3, torch.ones(2, 3)])
def test_a_metric_takes_a_selection(metric: Any, selection: Any) -> None:
    with pytest.raises(ValueError, match=r"^selection: expected a Selection, got"):
        metric(selection)


def test_a_metric_says_what_it_needs() -> None:
    model, trajectory = random_case("mixture", 1)
    with pytest.raises(ValueError, match=r"^trajectory: expected one with x0 for the metric 'x0'"):
        dp_search(model, trajectory, 2, metric="x0")
    with pytest.raises(ValueError, match=r"^metric: expected one of xt, x0, .*, got 'psnr'"):
        dp_search(model, trajectory, 2, metric="psnr")


@pytest.mark.parametrize(
    ("phi", "got"),
    [
        (lambda x: x[:1], r"\(1, 2, 3\)"),
        (lambda x: x.sum(), r"\(\)"),
        (lambda x: x[:, :0], r"\(24, 0, 3\)"),
        (lambda x: (x, x), "tuple"),
        (lambda x: None, "NoneType"),
        (lambda x: x.long(), "torch.int64"),
        (lambda x: x > 0, "torch.bool"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
    ],
)
def test_what_are_no_features_of_the_samples_is_refused(phi: Any, got: str) -> None:
    model, trajectory = case("mixture", 1)
    message = rf"^phi: expected floating-point features of 24 samples, got {got}"
    with pytest.raises(ValueError, match=message):
        dp_search(model, trajectory, 2, metric=FeatureMetric(phi))


@pytest.mark.parametrize(("calls", "name"), [(1, "phi"), (6, "metric")])
def test_features_of_another_shape_than_before_are_refused(calls: int, name: str) -> None:
    """Within the teacher's samples, of which there are 24, and where those of candidates begin."""
    model, trajectory = case("mixture", 1)
    seen: list[int] = []

    def grown(x: Any) -> Any:
        seen.append(len(x))
        return x.flatten(1)[:, : 2 if len(seen) <= calls else 3]

    with pytest.raises(ValueError, match=rf"^{name}: expected features of shape \(2,\) .* \(3,\)"):
        dp_search(model, trajectory, 2, metric=FeatureMetric(grown, block=4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_where_the_teacher_has_been(value: float) -> None:
    model, trajectory = case("mixture", 1)
    with pytest.raises(ValueError, match=r"^phi: expected finite features of the teacher's clean"):
        dp_search(model, trajectory, 2, metric=FeatureMetric(lambda x: x + value))


@each_reduction
@each_seed(1)
def test_a_candidate_whose_features_are_not_finite_is_never_chosen(reduce: str, seed: int) -> None:
    model, trajectory = case("mixture", seed)
    assert trajectory.x0 is not None
    teachers = len(trajectory.x0) * SAMPLES
    seen = 0

    def blind(x: Any) -> Any:
        """Of the first step's sources, which come after the teacher's samples, all but row 7."""
        nonlocal seen
        rows = seen + torch.arange(len(x)) - teachers
        seen += len(x)
        hidden = (rows >= 0) & (rows < 6 * SAMPLES)
        return torch.where(hidden[:, None], torch.nan, x.flatten(1))

    table = table_of(model, trajectory, reduce=reduce, metric=FeatureMetric(blind))
    assert set(table.parent[0, :7].flatten().tolist()) == {7}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None,), "phi: expected a function of states, got None"),
        ((torch.sin, 0), "block: expected at least 1, got 0"),
        ((torch.sin, 2.5), "block: expected a whole number"),
    ],
)
def test_a_feature_metric_takes_a_function_and_a_block(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        FeatureMetric(*given)


def test_metrics_are_registered_under_their_own_names() -> None:
    assert all(metrics.get(name).name == name for name in metrics.METRICS)
