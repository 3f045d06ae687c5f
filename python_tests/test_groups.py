"""Searches over many samples, a group at a time: the same schedules, in the memory of a group."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from cli_cases import TINY, Oss, assert_misused, files
from driver_cases import (
    SHAPE,
    each_family,
    each_seed,
    one_thread,  # noqa: F401
    random_case,
)
from metric_cases import case
from oss_ext.models import from_callable
from oss_ext.models.evaluation import NonFiniteError
from oss_ext.runs import Run
from oss_ext.schedule import Schedule, aggregate_indices

STEPS, BUDGETS, SAMPLES = 9, [2, 4], 7
INSTANCE = ("--scope=instance", "--aggregate=median", "--steps=2,3")


def both(
    family: str, seed: int, group: int, **options: Any
) -> tuple[oss.SearchResult, oss.SearchResult]:
    """A search of all samples at once, and in groups; row by row, so that no bit may differ."""
    model, trajectory = random_case(family, seed, steps=STEPS, samples=SAMPLES)
    options |= {"max_batch": 1}
    teach = functools.partial(oss.teacher, times=trajectory.times, max_batch=1)
    noise = trajectory.noise
    whole = oss.search(model, teach(model, noise), BUDGETS, scope="instance", **options)
    return whole, oss.search_groups(model, noise, BUDGETS, group=group, teach=teach, **options)


@each_family
@pytest.mark.parametrize("group", [1, 2, 7, 100])
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m"])
@each_seed(1)
def test_groups_change_no_bit(family: str, group: int, solver: str, seed: int) -> None:
    whole, parts = both(family, seed, group, solver=solver)
    assert whole.table is not None
    assert parts.table is not None
    assert torch.equal(parts.table.cost, whole.table.cost)
    assert torch.equal(parts.table.parent, whole.table.parent)
    assert parts.schedules(4) == whole.schedules(4)
    assert torch.equal(parts.spread(2), whole.spread(2))
    assert (parts.nfe, parts.samples) == (whole.nfe, SAMPLES)
    assert f"{SAMPLES} samples" in parts.summary()


@pytest.mark.parametrize("metric", ["x0-candidate", "perceptual:inner.1"])
@each_seed(1)
def test_metrics_evaluate_the_samples_of_the_group(metric: str, seed: int) -> None:
    model, trajectory = case(seed, steps=STEPS, samples=SAMPLES)
    teach = functools.partial(oss.teacher, times=trajectory.times, max_batch=1)
    options: dict[str, Any] = {"metric": metric, "max_batch": 1}
    noise = trajectory.noise
    whole = oss.search(model, teach(model, noise), BUDGETS, scope="instance", **options)
    parts = oss.search_groups(model, noise, BUDGETS, group=3, teach=teach, **options)
    assert [s.indices for s in parts.schedules(4)] == [s.indices for s in whole.schedules(4)]
    assert parts.nfe <= parts.plan.nfe


@pytest.mark.parametrize("aggregate", ["mean", "median"])
@each_seed(2)
def test_schedules_are_averaged_over_all_groups(aggregate: str, seed: int) -> None:
    whole, parts = both("network", seed, 3, aggregate=aggregate)
    schedule = parts.schedule(4)
    assert schedule == whole.schedule(4)
    assert schedule.samples == SAMPLES
    assert schedule.indices is not None
    assert schedule.indices == aggregate_indices(parts.spread(4).tolist(), aggregate)
    assert all(a > b for a, b in zip(schedule.indices, schedule.indices[1:], strict=False))


def test_no_more_than_a_group_is_kept() -> None:
    model, trajectory = random_case("mixture", 0, steps=STEPS, samples=SAMPLES)
    alive: list[weakref.ref[Tensor]] = []

    def teach(part: oss.models.Model, noise: Tensor) -> oss.Trajectory:
        # The first, which the result keeps.
        assert sum(known() is not None for known in alive) <= 1
        made = oss.teacher(part, noise, STEPS)
        alive.append(weakref.ref(made.states))
        return made

    oss.search_groups(model, trajectory.noise, 3, group=1, teach=teach)
    assert len(alive) == SAMPLES


def test_samples_apart_are_reported() -> None:
    model, trajectory = random_case("mixture", 0, steps=STEPS, samples=SAMPLES)
    result = oss.search(model, trajectory, 3, scope="instance")
    apart = result.spread(3)[:, :-1].double().std(dim=0)
    said = (
        f"vary by {float(apart.mean()):.1f} teacher rows (standard deviation), the worst by "
        f"{float(apart.max()):.1f}"
    )
    assert said in result.summary()
    joint = oss.search(model, trajectory, 3)
    with pytest.raises(ValueError, match=r"^scope: expected an instance search, got a joint one"):
        joint.spread(3)


def test_a_bad_sample_is_named_by_its_place() -> None:
    def network(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return torch.where((sample == 4)[:, None, None], torch.nan, x)

    model = from_callable(network, SHAPE)
    with pytest.raises(NonFiniteError, match=r"for sample 1, counted from sample 3$"):
        oss.search_groups(model, model.noise(6), 2, group=3)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
def test_what_there_was_memory_for_is_known_to_the_next_group() -> None:
    failed = 0

    def network(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        nonlocal failed
        if len(x) > 2:
            failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * t.to(x.dtype)[:, None, None]

    model = from_callable(network, SHAPE)
    oss.search_groups(
        model, model.noise(12), 2, group=4, teach=lambda part, x: oss.teacher(part, x, 6)
    )
    assert (failed, model.most_rows) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, r"^group: expected"),
        ({"group": 2.5}, r"^group: expected"),
        ({"quality": "fast"}, r"^quality: expected 'dp' with scope 'instance'"),
        ({"aggregate": "mode"}, r"^aggregate: "),
    ],
)
def test_bad_arguments_are_clear(options: dict[str, Any], message: str) -> None:
    model, trajectory = random_case("mixture", 0, steps=STEPS)
    with pytest.raises(ValueError, match=message):
        oss.search_groups(model, trajectory.noise, 2, **options)


def test_what_is_evaluated_together_is_not_parted() -> None:
    model, trajectory = random_case("mixture", 0, steps=STEPS)
    model.slots = 2
    with pytest.raises(ValueError, match=r"^group: expected a multiple of 2, .*, got 3"):
        oss.search_groups(model, trajectory.noise, 2, group=3)


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_searches_in_groups_and_plots_the_spread(oss: Oss) -> None:
    tiny = (*TINY, "--max-batch=1", *INSTANCE, "--samples=5", "--amplitude=0.1,0.9")
    outcome = oss("search", *tiny, "--out=whole")
    assert (outcome.code, outcome.err) == (0, "")
    assert "wrote 2 schedules, schedules.png and spread.png to whole" in outcome.out
    assert "steps vary by" in outcome.out
    outcome = oss("search", *tiny, "--group=2", "--out=parts")
    assert (outcome.code, outcome.err) == (0, "")
    assert files("parts") == files("whole")
    run = Run.load("parts")
    assert run.calibration == 5
    assert {k: tuple(rows.shape) for k, rows in run.spread.items()} == {2: (5, 3), 3: (5, 4)}
    for k in (2, 3):
        one, other = (Schedule.load(f"{name}/analytic-{k}.json") for name in ("whole", "parts"))
        assert (one.times, one.samples) == (other.times, other.samples)
        assert one.amplitude is not None
        assert other.amplitude is not None
        assert other.amplitude.samples == 5
        assert other.amplitude.low == pytest.approx(one.amplitude.low)
        assert other.amplitude.high == pytest.approx(one.amplitude.high)
    assert Path("parts/spread.png").stat().st_size > 5000


def test_a_joint_search_has_no_groups(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--group=2")
    assert_misused(outcome, "--group: a joint search", "expected --scope instance")


def test_the_page_shows_the_spread_of_an_instance_search(oss: Oss) -> None:
    assert oss("search", *TINY, *INSTANCE, "--out=run").code == 0
    assert oss("report", "run").code == 0
    assert "each sample's own" in Path("run/report.html").read_text(encoding="utf-8")
