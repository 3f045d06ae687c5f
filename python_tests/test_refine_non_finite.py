"""Refinement where the model gives NaN or inf: such paths are no students, others are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    faulty,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext.models import from_callable
from oss_ext.models.evaluation import NonFiniteError
from oss_ext.refine import exhaustive, refine

STEPS, ROWS, COUNT = 3, 12, 8
"""A teacher of 12 steps with 8 samples, of which a validation leaves out two."""

each_reduce = pytest.mark.parametrize("reduce", ["mean", "log_mean"])
each_value = pytest.mark.parametrize("value", [float("nan"), float("inf")])


def touchy_case(
    seed: int, broken: Callable[[Tensor, Tensor], Tensor], value: float = float("nan")
) -> tuple[Any, oss.Trajectory]:
    """A model that gives ``value`` where ``broken(row, sample)``, but for the teacher's states."""
    base, known = random_case("mixture", seed, steps=ROWS, samples=COUNT)

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        row = (known.times[None] - t[:, None]).abs().argmin(dim=1)
        far = (x - known.states[row, sample]).abs().flatten(1).amax(dim=1) > 1e-9
        v = base(x, t, sample)
        v[far & broken(row, sample)] = value
        return v

    model = from_callable(velocity, base.shape, dtype=base.dtype, name="touchy")
    return model, oss.teacher(model, known.noise, times=known.times)


def errors_of(model: Any, trajectory: oss.Trajectory, path: tuple[int, ...]) -> Tensor | None:
    """Final errors of a path, from a run of its own; None if it breaks the model."""
    try:
        images = oss.sample(model, trajectory.noise, trajectory.schedule(path))
    except NonFiniteError:
        return None
    return (images - trajectory.final).square().flatten(1).mean(dim=1)


def value_of(errors: Tensor, reduce: str) -> float:
    return float(errors.log().mean().exp() if reduce == "log_mean" else errors.mean())


@each_reduce
@each_value
@each_seed(1)
def test_exhaustive_search_is_the_best_of_those_that_are_finite(
    reduce: str, value: float, seed: int
) -> None:
    model, trajectory = touchy_case(seed, lambda row, _: (row == 3) | (row == 7), value)
    found = []
    for path in itertools.combinations(range(ROWS, 0, -1), 2):
        errors = errors_of(model, trajectory, (*path, 0))
        found.append(float("inf") if errors is None else value_of(errors, reduce))
    assert float("inf") in found
    schedule, error = exhaustive(model, trajectory, 2, reduce=reduce)
    assert error == pytest.approx(min(found), rel=1e-9)
    assert errors_of(model, trajectory, schedule.indices or ()) is not None


@each_reduce
@each_value
@pytest.mark.parametrize("max_batch", [None, 1, 3])
@each_seed(3)
def test_paths_that_break_the_model_are_left(
    reduce: str, value: float, max_batch: int | None, seed: int
) -> None:
    """For one sample alone: the descents meet it only where they try such rows."""
    model, trajectory = touchy_case(seed, lambda row, sample: (row % 3 != 0) & (sample == 2), value)
    starts = [trajectory.schedule(path) for path in ((11, 9, 6, 0), (12, 9, 3, 0), (12, 8, 4, 0))]
    assert errors_of(model, trajectory, starts[2].indices or ()) is None
    for off_grid in (False, True):
        found = refine(
            model, trajectory, starts[1:], reduce=reduce, max_batch=max_batch, validation=0,
            off_grid=off_grid,
        )  # fmt: skip
        assert found.start == starts[1]
        images = oss.sample(model, trajectory.noise, found.schedule)
        errors = (images - trajectory.final).square().flatten(1).mean(dim=1)
        assert value_of(errors, reduce) == pytest.approx(found.error, rel=1e-9)
        assert found.error <= found.start_error


@each_seed(2)
def test_what_breaks_the_model_on_samples_left_out_is_not_taken(seed: int) -> None:
    rows = (11, 7, 2, 0)
    clear, taught = touchy_case(seed, lambda row, _: row < 0)
    better = refine(clear, taught, taught.schedule(rows), validation=0.25)
    assert better.schedule.indices != rows  # as long as nothing breaks, there is a better one

    known = torch.tensor(rows)
    model, trajectory = touchy_case(
        seed, lambda row, sample: ~torch.isin(row, known) & (sample >= COUNT - 2)
    )
    found = refine(model, trajectory, trajectory.schedule(rows), validation=0.25)
    assert found.schedule.indices == rows
    assert found.validation == found.start_validation


def test_a_model_that_breaks_on_every_path_names_time_and_sample() -> None:
    model, trajectory = touchy_case(0, lambda row, sample: (row < ROWS) & (sample == 2))
    message = r"^no path has a finite error on every sample: model 'touchy' .* t = .* for sample 2$"
    with pytest.raises(NonFiniteError, match=message):
        refine(model, trajectory, trajectory.schedule((11, 6, 2, 0)), validation=0)
    # Also where only those are that no descent sees.
    model, trajectory = touchy_case(0, lambda row, sample: (row < ROWS) & (sample == COUNT - 1))
    with pytest.raises(NonFiniteError, match=r"^no path has .* for sample 7$"):
        refine(model, trajectory, trajectory.schedule((11, 6, 2, 0)), validation=0.25)


def test_a_model_that_breaks_everywhere_is_named_by_exhaustive_search_too() -> None:
    base, known = random_case("mixture", 0, steps=ROWS)
    taught = oss.teacher(faulty(base, lambda t, sample: t < 0), known.noise, times=known.times)
    model = faulty(base, lambda t, sample: sample == 1)
    with pytest.raises(NonFiniteError, match=r"^no path has .* 'faulty' .* for sample 1$"):
        exhaustive(model, taught, STEPS)


@each_seed(2)
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_a_search_finds_what_the_model_can_do(quality: str, seed: int) -> None:
    model, trajectory = touchy_case(seed, lambda row, sample: (row % 4 != 0) & (sample == 2))
    found = oss.search(model, trajectory, STEPS, quality=quality).schedule(STEPS)
    assert oss.sample(model, trajectory.noise, found).isfinite().all()
