"""Which sources a step has: those that were reached, that may be used, and that a model serves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from driver_cases import (
    SAMPLES,
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
from oss_ext.models.evaluation import Evaluator, NonFiniteError

STEPS, ROWS = 4, 10
each_width = pytest.mark.parametrize("samples", [None, SAMPLES], ids=["one band", "own bands"])


def random_band(seed: int, samples: int | None = None) -> Tensor:
    """Bool ``[STEPS, ROWS]``, or one each, in which 9, 7, 5, 3, 0 is always a path."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, ROWS) if samples is None else (STEPS, ROWS, samples)
    band = torch.rand(shape, generator=generator) < 0.4
    band[torch.arange(STEPS), 9 - 2 * torch.arange(STEPS)] = True
    return band


@each_start
@each_reduction
@each_seed(1)
def test_a_band_of_all_rows_changes_no_bit(start: str, reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed)
    every = torch.ones(STEPS, ROWS, dtype=torch.bool)
    whole = fill_table(model, trajectory, STEPS, reduce=reduce, start=start)
    banded = fill_table(model, trajectory, STEPS, reduce=reduce, start=start, allowed=every)
    assert torch.equal(banded.parent, whole.parent)
    assert torch.equal(banded.cost, whole.cost)


@each_start
@each_reduction
@each_seed(1)
def test_rows_outside_the_band_are_as_broken_ones(start: str, reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed)
    outside = [3, 4, 7]
    band = torch.ones(STEPS, ROWS, dtype=torch.bool)
    band[:, outside] = False
    banded = fill_table(model, trajectory, STEPS, reduce=reduce, start=start, allowed=band)
    sick = faulty(model, lambda t, sample: torch.isin(t, trajectory.times[outside]))
    broken = fill_table(sick, trajectory, STEPS, reduce=reduce, start=start)
    assert torch.equal(banded.parent, broken.parent)
    torch.testing.assert_close(banded.cost, broken.cost, rtol=1e-9, atol=1e-24)
    assert (banded.parent[0, outside] >= 0).all(), "as targets they are as good as any"


@each_family
@each_start
@each_reduction
@each_seed(1)
def test_paths_stay_in_the_band_and_replay_reproduces_them(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed)
    band = random_band(seed, SAMPLES if reduce == "none" else None)
    table = fill_table(model, trajectory, STEPS, reduce=reduce, start=start, allowed=band)
    for column in range(table.parent.shape[2]):
        samples = [column] if reduce == "none" else list(range(SAMPLES))
        for steps in range(1, STEPS + 1):
            path = table.backtrack(steps, column)
            for k, row in enumerate(path[:-1]):
                assert band[k, row].reshape(-1)[column]
            _, errors = dp.replay(model, trajectory, path)
            expected = torch.stack([table.cost[k, row] for k, row in enumerate(path[1:])])
            torch.testing.assert_close(
                errors[:, samples], expected[:, samples], rtol=1e-12, atol=1e-28
            )


@each_seed(1)
def test_a_samples_own_band_is_its_own_alone(seed: int) -> None:
    model, trajectory = random_case("network", seed)
    bands = random_band(seed, SAMPLES)
    table = fill_table(model, trajectory, STEPS, allowed=bands)
    for b in range(SAMPLES):
        own = fill_table(model, trajectory, STEPS, allowed=bands[:, :, b])
        assert torch.equal(table.parent[:, :, b], own.parent[:, :, b])
        torch.testing.assert_close(table.cost[:, :, b], own.cost[:, :, b], rtol=1e-9, atol=1e-24)


@each_start
@each_width
@each_seed(1)
def test_rows_outside_the_band_are_not_evaluated(
    start: str, samples: int | None, seed: int
) -> None:
    model, trajectory = random_case("network", seed)
    model, calls = recorded(model)
    evaluator = Evaluator(model, SAMPLES, max_batch=1)
    band = random_band(seed, samples)
    table = dp.run(evaluator, trajectory, STEPS, reduce="none", start=start, allowed=band)
    reached = torch.zeros(ROWS, SAMPLES, dtype=torch.bool)
    reached[1 if start == "free" else ROWS - 1 :] = True
    expected = []
    for k in range(STEPS):
        own = band[k].reshape(ROWS, -1)
        expected += [(int(i), int(b)) for i, b in (reached & own).nonzero()]
        reached = table.parent[k] >= 0
        reached[0] = False
    row = {float(t): i for i, t in enumerate(trajectory.times)}
    assert [(row[float(call.t)], int(call.sample)) for call in calls] == expected
    assert evaluator.nfe == len(expected)


@each_reduction
@each_width
@pytest.mark.parametrize("chunk", [4])
@each_seed(1)
def test_streaming_within_a_band_gives_identical_bits(
    reduce: str, samples: int | None, chunk: int, seed: int
) -> None:
    model, trajectory = random_case("network", seed, dtype=torch.float32)
    band = random_band(seed, samples if reduce == "none" else None)
    options = {"reduce": reduce, "allowed": band, "max_batch": 1}
    whole = fill_table(model, trajectory, STEPS, **options)
    room = chunk * trajectory.final.nbytes
    streamed = fill_table(model, trajectory, STEPS, velocity_bytes=room, **options)
    assert torch.equal(streamed.parent, whole.parent)
    assert torch.equal(streamed.cost, whole.cost)


def without_sources(k: int) -> Tensor:
    """All rows, but for one sample's step k + 1."""
    band = torch.ones(STEPS, ROWS, SAMPLES, dtype=torch.bool)
    band[k, 1:, 1] = False
    return band


def too_high(k: int) -> Tensor:
    """Step k + 1 may only start above all that the step before it starts from."""
    band = torch.ones(STEPS, ROWS, dtype=torch.bool)
    band[k - 1, 4:] = False
    band[k, :4] = False
    return band


@pytest.mark.parametrize(
    ("allowed", "reduce", "message"),
    [
        (torch.ones(STEPS, ROWS), "none", r"^allowed: expected bool .*\(4, 10\) or \(4, 10, 3\)"),
        (random_band(0)[1:], "none", r"^allowed: expected bool .* got torch.bool .*\(3, 10\)$"),
        (random_band(0, 2), "none", r"^allowed: .* got torch.bool of shape \(4, 10, 2\)$"),
        (random_band(0, SAMPLES), "mean", r"^allowed: .*\(4, 10\), got .*\(4, 10, 3\)$"),
        (without_sources(0), "none", "^allowed: .* got none for step 1 for sample 1$"),
        (without_sources(3), "none", "^allowed: .* got none for step 4 for sample 1$"),
        (too_high(2), "log_mean", "^allowed: .* got none for step 3$"),
        (torch.zeros(STEPS, ROWS, dtype=torch.bool), "mean", "^allowed: .* got none for step 1$"),
    ],
)
def test_a_band_that_cannot_be_is_refused_before_the_model_is_called(
    allowed: Tensor, reduce: str, message: str
) -> None:
    model, trajectory = random_case("mixture", 1)
    model, calls = recorded(model)
    with pytest.raises(ValueError, match=message):
        fill_table(model, trajectory, STEPS, reduce=reduce, allowed=allowed)
    assert not calls


def test_a_pinned_start_outside_the_band_is_refused() -> None:
    model, trajectory = random_case("mixture", 1)
    band = torch.ones(STEPS, ROWS, dtype=torch.bool)
    band[0, -1] = False
    fill_table(model, trajectory, STEPS, allowed=band)
    with pytest.raises(ValueError, match=r"^allowed: .* got none for step 1$"):
        fill_table(model, trajectory, STEPS, start="pinned", allowed=band)


@each_reduction
def test_a_step_with_no_source_left_is_an_error_that_says_why(reduce: str) -> None:
    model, trajectory = random_case("mixture", 1)
    # Only row 1 works, and what starts there can only end: no row above 0 has a second step.
    sick = faulty(model, lambda t, sample: t > trajectory.times[1])
    with pytest.raises(NonFiniteError, match=r"^step 2 has no finite path .* NaN or inf at t = "):
        fill_table(sick, trajectory, 2, reduce=reduce)


def test_a_band_whose_rows_all_fail_is_an_error_that_says_why() -> None:
    model, trajectory = random_case("mixture", 1)
    band = random_band(0)
    band[1] = torch.arange(ROWS) == 7
    sick = faulty(model, lambda t, sample: (t == trajectory.times[7]) & (sample == 1))
    with pytest.raises(NonFiniteError, match=r"^step 2 has no finite path .* for sample 1: .*t = "):
        fill_table(sick, trajectory, STEPS, allowed=band)


def test_a_table_without_a_path_says_so() -> None:
    model, trajectory = random_case("mixture", 1)
    table = fill_table(model, trajectory, 2)
    parent = table.parent.clone()
    parent[1, 0, 2] = -1
    broken = dp.Table(table.cost, parent)
    assert broken.backtrack(2, sample=1) == table.backtrack(2, sample=1)
    with pytest.raises(ValueError, match=r"^steps: expected a budget with a finite path, got 2$"):
        broken.backtrack(2, sample=2)


def test_unknown_reductions_are_refused() -> None:
    model, trajectory = random_case("mixture", 1)
    with pytest.raises(ValueError, match=r"^reduce: expected one of .*, got 'median'$"):
        fill_table(model, trajectory, 2, reduce="median")
