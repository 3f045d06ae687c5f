"""The teacher's trajectory: what it holds, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import (
    SHAPE,
    constant_velocity,
    each_family,
    each_seed,
    faulty,
    random_case,
    random_mixture,
    recorded,
)
from oss_ext import models
from oss_ext.models import from_callable
from oss_ext.models.evaluation import NonFiniteError


@each_family
@each_seed(2)
def test_every_state_is_an_euler_step_from_the_one_above(family: str, seed: int) -> None:
    model, trajectory = random_case(family, seed)
    t, x = trajectory.times, trajectory.states
    for i in range(trajectory.steps, 0, -1):
        v = model(x[i], t[i].expand(trajectory.samples), torch.arange(trajectory.samples))
        torch.testing.assert_close(x[i - 1], x[i] + (t[i - 1] - t[i]) * v, rtol=1e-13, atol=1e-13)


def test_a_trajectory_says_what_made_it() -> None:
    model, calls = recorded(random_mixture(1), data_range=5.0)
    noise = model.noise(3)
    trajectory = oss.teacher(model, noise, 7, max_batch=2)
    assert trajectory.states.shape == (8, 3, *SHAPE)
    assert (trajectory.steps, trajectory.samples) == (7, 3)
    assert torch.equal(trajectory.noise, noise)
    assert torch.equal(trajectory.states[-1], noise)
    assert torch.equal(trajectory.final, trajectory.states[0])
    assert (trajectory.model, trajectory.model_hash) == (model.name, model.fingerprint())
    assert (trajectory.path.name, trajectory.solver) == ("flow", "euler")
    assert (trajectory.data_range, trajectory.block, trajectory.nfe) == (5.0, 2, 7)
    assert trajectory.seconds > 0
    assert {len(call.t) for call in calls} == {2}


def test_the_grid_is_the_models_own_unless_given() -> None:
    model = models.load("analytic", shape=SHAPE, shift=3.0)
    own = oss.teacher(model, model.noise(1), 2)
    assert own.times.tolist() == model.times(2).tolist() == [0.0, 0.75, 1.0]
    given = oss.teacher(model, model.noise(1), times=torch.tensor([0.1, 0.4, 0.9, 0.95]))
    assert given.times.dtype == torch.float64
    torch.testing.assert_close(
        given.times, torch.tensor([0.1, 0.4, 0.9, 0.95], dtype=torch.float64)
    )


def test_a_trajectory_is_frozen() -> None:
    _, trajectory = random_case("mixture", 0, steps=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory.solver = "other"


def test_changing_the_given_times_later_changes_no_trajectory() -> None:
    model = random_mixture(0)
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    trajectory = oss.teacher(model, model.noise(1), times=times)
    times[1] = 0.25
    assert trajectory.times.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_are_float32_or_better(dtype: torch.dtype) -> None:
    model = constant_velocity(dtype=dtype)
    trajectory = oss.teacher(model, model.noise(2), 4)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert trajectory.states.dtype == expected
    torch.testing.assert_close(trajectory.final, trajectory.noise - 1)


def test_without_a_data_range_it_is_that_of_the_final_states() -> None:
    model, trajectory = random_case("network", 4)
    assert trajectory.data_range == 2.0  # declared
    silent = from_callable(model, SHAPE, dtype=torch.float64)
    measured = oss.teacher(silent, trajectory.noise, times=trajectory.times)
    final = trajectory.final
    assert measured.data_range == pytest.approx(float(final.max() - final.min()))


def test_a_schedule_of_a_trajectory_carries_its_origin() -> None:
    _, trajectory = random_case("mixture", 2, steps=4)
    schedule = trajectory.schedule([4, 1, 0], method="mine", samples=3)
    times = trajectory.times.tolist()
    assert schedule.times == (times[4], times[1], times[0])
    assert schedule.teacher_times == tuple(times)
    assert (schedule.model, schedule.model_hash) == (trajectory.model, trajectory.model_hash)
    assert (schedule.method, schedule.samples) == ("mine", 3)


@pytest.mark.parametrize(
    ("stride", "rows"),
    [(1, tuple(range(8))), (2, (0, 2, 4, 6, 7)), (3, (0, 3, 6, 7)), (5, (0, 5, 7)), (7, (0, 7))],
)
def test_a_thinned_trajectory_is_the_same_run_at_fewer_rows(
    stride: int, rows: tuple[int, ...]
) -> None:
    _, trajectory = random_case("network", 3, steps=7)
    seen, kept = trajectory.thinned(stride)
    assert kept == rows
    assert seen.steps == len(rows) - 1
    assert torch.equal(seen.times, trajectory.times[list(rows)])
    assert torch.equal(seen.states, trajectory.states[list(rows)])
    assert torch.equal(seen.noise, trajectory.noise)
    own = dict(zip(trajectory.times[1:].tolist(), trajectory.timesteps.tolist(), strict=True))
    assert seen.timesteps.tolist() == [own[t] for t in seen.times[1:].tolist()]
    assert (seen.model_hash, seen.nfe) == (trajectory.model_hash, trajectory.nfe)


@pytest.mark.parametrize("stride", [1, 2, 3, 6])
def test_a_stride_that_divides_the_steps_copies_nothing(stride: int) -> None:
    _, trajectory = random_case("network", 3, steps=6)
    seen, _ = trajectory.thinned(stride)
    storage = trajectory.states.untyped_storage()
    assert seen.states.untyped_storage().data_ptr() == storage.data_ptr()


@pytest.mark.parametrize("stride", [0, -1, 8, 2.0, True])
def test_a_stride_is_1_to_n(stride: Any) -> None:
    _, trajectory = random_case("network", 3, steps=7)
    with pytest.raises(ValueError, match=r"^stride: expected .*1 to 7, got"):
        trajectory.thinned(stride)


def test_noise_of_the_models_shape_is_asked_for() -> None:
    model = random_mixture(0)
    with pytest.raises(ValueError, match=r"^noise: expected \[B, 2, 3\] .*, got \(4, 3, 2\)"):
        oss.teacher(model, torch.zeros(4, 3, 2), 4)
    with pytest.raises(ValueError, match=r"^noise: .* NaN or inf in sample 1"):
        oss.teacher(model, torch.tensor([0, math.nan])[:, None, None].expand(2, 2, 3), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "^steps: expected at least 1, got 0"),
        ({"steps": -4}, "^steps: expected at least 1, got -4"),
        ({"times": torch.tensor([0.0, 0.5, 0.5])}, "^times: .* 0.5 after 0.5 at index 2"),
        ({"times": torch.tensor([0.0, math.nan])}, "^times: expected finite values"),
        ({"times": torch.tensor([1.0])}, r"^times: expected \[N\+1\] with N >= 1"),
        ({"solver": "magic"}, "^unknown solver 'magic'; known solvers: euler"),
        ({"max_batch": 0}, "^max_batch: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_called(
    options: dict[str, Any], message: str
) -> None:
    model, calls = recorded(random_mixture(0))
    with pytest.raises(ValueError, match=message):
        oss.teacher(model, model.noise(1), **options)
    assert calls == []


def test_samples_without_elements_are_refused() -> None:
    model = constant_velocity(shape=(3, 1))
    model.shape = (3, 0)
    with pytest.raises(ValueError, match=r"^(noise|shape): expected .*, got"):
        oss.teacher(model, torch.zeros(2, 3, 0), 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_names_time_and_sample(value: float) -> None:
    model = faulty(random_mixture(1), lambda t, sample: (t < 0.6) & (sample == 2), value)
    with pytest.raises(NonFiniteError, match=r"'faulty' returned NaN or inf at t = 0.5 .* 2$"):
        oss.teacher(model, model.noise(3), 4)


def test_a_velocity_of_the_wrong_shape_is_refused() -> None:
    model = from_callable(lambda x, t, sample: x[:, 0], SHAPE, name="mine")
    with pytest.raises(ValueError, match=r"'mine' returned torch.float32 \(2, 3\), expected"):
        oss.teacher(model, model.noise(2), 4)


class Network(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, t: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Wrapper:
    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(*inputs)


WRAPPED = [lambda network: network, Wrapper, lambda network: lambda *inputs: network(*inputs)]


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(4)])
def test_a_network_in_training_mode_is_pointed_out(
    layer: torch.nn.Module, wrapped: Callable[[Network], Any]
) -> None:
    network = Network(layer).train()
    model = oss.models.from_callable(wrapped(network), (4,))
    message = r"training mode and has a \w+, .*\.eval"
    with torch.no_grad(), pytest.warns(UserWarning, match=message) as warned:
        oss.teacher(model, model.noise(3), 2)
    assert [each.filename for each in warned] == [__file__]
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oss.teacher(model, model.noise(3), 2)
