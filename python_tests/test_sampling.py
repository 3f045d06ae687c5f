"""Running a student: the states it goes through, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import oss_ext as oss
from driver_cases import (
    SHAPE,
    constant_velocity,
    each_family,
    each_seed,
    example_schedule,
    faulty,
    random_case,
    random_mixture,
    recorded,
)
from oss_ext import sampling
from oss_ext.models.evaluation import NonFiniteError
from oss_ext.sampling import student_states


def by_hand(model: oss.models.Model, noise: Tensor, times: tuple[float, ...]) -> list[Tensor]:
    x, states = noise, []
    for k in range(len(times) - 1):
        t = torch.full((len(noise),), times[k], dtype=torch.float64)
        x = x + (times[k + 1] - times[k]) * model(x, t, torch.arange(len(noise)))
        states.append(x)
    return states


@each_family
@each_seed(2)
def test_a_student_takes_euler_steps_through_its_times(family: str, seed: int) -> None:
    model, trajectory = random_case(family, seed)
    schedule = trajectory.schedule([8, 5, 2, 0])
    expected = by_hand(model, trajectory.noise, schedule.times)
    states = list(student_states(model, trajectory.noise, schedule))
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-12, atol=1e-13)
    assert torch.equal(oss.sample(model, trajectory.noise, schedule), states[-1])


def test_the_first_step_starts_from_the_noise_as_it_is() -> None:
    """Also below the teacher's first time: a free start is not rescaled."""
    model, calls = recorded(random_mixture(2))
    noise = model.noise(2)
    schedule = example_schedule(model="mixture")
    assert schedule.times[0] == 1.0
    late = replace(schedule, times=schedule.times[1:], indices=None)
    oss.sample(model, noise, late)
    assert torch.equal(calls[0].x, noise)
    assert calls[0].t.tolist() == [0.4, 0.4]


def test_a_straight_path_is_exact_in_any_number_of_steps() -> None:
    model = constant_velocity(2.0, dtype=torch.float64)
    noise = model.noise(3)
    images = oss.sample(model, noise, example_schedule())
    torch.testing.assert_close(images, noise - 2.0)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_states_are_float32_or_better(given: torch.dtype, computed: torch.dtype) -> None:
    model = constant_velocity(dtype=given)
    assert oss.sample(model, model.noise(2), example_schedule()).dtype == computed


def test_states_on_the_way_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StorageWeakRef] = []
    kept = []

    def watched(*args: Any, **options: Any) -> Iterator[Tensor]:
        for state in student_states(*args, **options):
            seen.append(StorageWeakRef(state.untyped_storage()))
            kept.append(sum(not state.expired() for state in seen))
            yield state

    monkeypatch.setattr(sampling, "student_states", watched)
    model, times = random_mixture(1), tuple(i / 20 for i in range(20, -1, -1))
    oss.sample(model, model.noise(2), replace(example_schedule(), times=times, indices=None))
    assert len(kept) >= 20
    assert max(kept) <= 2


def test_the_noise_is_left_alone() -> None:
    model = random_mixture(1)
    noise = model.noise(2)
    before = noise.clone()
    oss.sample(model, noise, example_schedule())
    assert torch.equal(noise, before)


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_blocks_change_nothing_but_rounding(max_batch: int) -> None:
    model, calls = recorded(random_mixture(1))
    noise = model.noise(3)
    images = oss.sample(model, noise, example_schedule(), max_batch=max_batch)
    assert {len(call.t) for call in calls} == {max_batch}
    torch.testing.assert_close(images, oss.sample(model, noise, example_schedule()))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.zeros(SHAPE), r"expected \[B, 2, 3\] with B >= 1, got \(2, 3\)"),
        (torch.zeros(4, 3, 2), r"expected \[B, 2, 3\] with B >= 1, got \(4, 3, 2\)"),
        (torch.zeros(0, 2, 3), r"expected \[B, 2, 3\] with B >= 1, got \(0, 2, 3\)"),
        (torch.zeros(()), r"expected \[B, 2, 3\] with B >= 1, got \(\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int32), "expected a floating-point .* got torch.int32"),
        (torch.tensor([0.0, math.nan])[:, None, None].expand(2, 2, 3), "NaN or inf in sample 1"),
        (torch.full((1, 2, 3), -math.inf), "NaN or inf in sample 0"),
    ],
)
def test_bad_noise_is_refused(noise: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^noise: .*{message}"):
        oss.sample(random_mixture(0), noise, example_schedule())


def test_noise_that_is_no_tensor_is_refused() -> None:
    noise: Any = torch.zeros(1, 2, 3).numpy()
    with pytest.raises(ValueError, match=r"^noise: expected .*, got"):
        oss.sample(random_mixture(0), noise, example_schedule())


def test_noise_on_another_device_than_the_models_is_refused() -> None:
    noise = torch.zeros(1, 2, 3, device="meta")
    with pytest.raises(ValueError, match=r"^noise: expected .* cpu, got .*meta"):
        oss.sample(random_mixture(0), noise, example_schedule())


def test_an_unknown_solver_is_refused() -> None:
    schedule = replace(example_schedule(), solver="magic")
    with pytest.raises(ValueError, match="unknown solver 'magic'; known solvers: euler"):
        oss.sample(random_mixture(0), torch.zeros(1, 2, 3), schedule)


def test_nan_on_the_way_names_time_and_sample() -> None:
    model = faulty(random_mixture(1), lambda t, sample: (t == 0.4) & (sample == 1))
    with pytest.raises(NonFiniteError, match=r"'faulty' returned NaN or inf at t = 0.4 .* 1$"):
        oss.sample(model, model.noise(3), example_schedule())
