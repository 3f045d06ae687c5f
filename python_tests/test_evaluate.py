"""Held-out comparison: distances to the teacher on the way and at the end, by hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    constant_velocity,
    each_family,
    each_seed,
    random_case,
    random_mixture,
    recorded,
)
from oss_ext.statistics import frechet_distance, statistics_of


@each_family
@each_seed(2)
def test_compare_measures_the_distance_to_the_teacher(family: str, seed: int) -> None:
    model, held_out = random_case(family, seed)
    schedules = {"three": held_out.schedule([9, 6, 2, 0]), "one": held_out.schedule([9, 0])}
    scores = oss.compare(model, held_out, schedules)
    assert [(s.name, s.steps) for s in scores] == [("three", 3), ("one", 1)]
    for s, schedule in zip(scores, schedules.values(), strict=True):
        images = oss.sample(model, held_out.noise, schedule)
        assert s.schedule is schedule
        assert torch.equal(s.images, images)
        expected = [float(((images[b] - held_out.final[b]) ** 2).mean()) for b in range(3)]
        assert s.mse.tolist() == pytest.approx(expected, rel=1e-12)
        assert s.data_range == held_out.data_range
        assert s.statistics == statistics_of(s.mse, held_out.data_range)
        assert s.frechet is None


@each_seed(1)
def test_a_score_has_every_statistic(seed: int) -> None:
    model, held_out = random_case("mixture", seed)
    (s,) = oss.compare(model, held_out, {"s": held_out.schedule([9, 4, 0])})
    shortcuts = (s.psnr_of_mean, s.mean_psnr, s.median_psnr, s.worst_decile)
    found = statistics_of(s.mse, s.data_range)
    assert shortcuts == (
        found.psnr_of_mean,
        found.mean_psnr,
        found.median_psnr,
        found.worst_decile,
    )


def test_the_teachers_own_steps_have_no_error() -> None:
    model, held_out = random_case("mixture", 1, dtype=torch.float32)
    everything = held_out.schedule(range(held_out.steps, -1, -1))
    (s,) = oss.compare(model, held_out, {"teacher": everything})
    assert s.mse.tolist() == [0.0, 0.0, 0.0]
    assert s.along.tolist() == [0.0] * held_out.steps
    assert (s.psnr_of_mean, s.mean_psnr) == (math.inf, math.inf)


def test_another_model_than_the_teachers_is_refused() -> None:
    _, held_out = random_case("mixture", 1)
    other, _ = random_case("mixture", 2)
    with pytest.raises(ValueError, match=r"^model: expected the teacher's"):
        oss.compare(other, held_out, {"one": held_out.schedule([9, 0])})


def geometric_mean_distance(x: Tensor, target: Tensor) -> float:
    distances = [float(((x[b] - target[b]) ** 2).mean()) for b in range(len(x))]
    return math.exp(sum(math.log(d) for d in distances) / len(distances))


@each_family
@each_seed(2)
def test_the_distance_is_recorded_after_every_step(family: str, seed: int) -> None:
    """Times between rows and on one, the row's own state where there is one."""
    model, held_out = random_case(family, seed)
    times, states = held_out.times.tolist(), held_out.states
    inner = [0.3 * times[7] + 0.7 * times[8], times[5], 0.9 * times[1] + 0.1 * times[2]]
    schedule = held_out.schedule_at([times[9], *inner, times[0]])
    (s,) = oss.compare(model, held_out, {"s": schedule})
    targets = [
        0.3 * states[7] + 0.7 * states[8],
        states[5],
        0.9 * states[1] + 0.1 * states[2],
        states[0],
    ]
    x, expected = held_out.noise, []
    for k, target in enumerate(targets):
        t, t_next = schedule.times[k : k + 2]
        x = x + (t_next - t) * model(x, torch.full((3,), t, dtype=torch.float64), torch.arange(3))
        expected.append(geometric_mean_distance(x, target))
    assert (s.along.dtype, s.along.shape) == (torch.float64, (4,))
    assert s.along.tolist() == pytest.approx(expected, rel=1e-9)
    assert s.along[-1].item() == pytest.approx(math.exp(s.mse.log().mean()), rel=1e-12)


def test_a_straight_path_is_never_left() -> None:
    """What is linear in time is met between the teacher's rows as well."""
    model = constant_velocity(2.0, dtype=torch.float64)
    held_out = oss.teacher(model, model.noise(3), 7)
    schedule = held_out.schedule_at([1.0, 0.77, 0.5, 0.013, 0.0])
    (s,) = oss.compare(model, held_out, {"s": schedule})
    assert max(s.along.tolist()) < 1e-28


def test_beyond_the_teachers_ends_its_end_is_the_measure() -> None:
    """A schedule of another teacher may begin above this one and end below it."""
    model = constant_velocity(2.0, dtype=torch.float64)
    whole = oss.teacher(model, model.noise(3), times=torch.tensor([0, 0.2, 0.5, 0.8, 1.0]))
    inside = oss.teacher(model, model.noise(3), times=torch.tensor([0.2, 0.5, 0.8]))
    (s,) = oss.compare(model, inside, {"s": whole.schedule_at([1.0, 0.9, 0.5, 0.1])})
    # The student comes to x - 2 (1 - t); the teacher starts from the same x at 0.8.
    at_end = [0.2, 1.0 - 0.6, 1.8 - 1.2]
    assert s.along.tolist() == pytest.approx([d**2 for d in at_end], rel=1e-6)


def test_the_student_runs_once_and_its_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the model's calls advance by 3 seconds and the features by 100."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    network, calls = recorded(random_mixture(1), data_range=2.0)

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        now[0] += 3.0
        return network(x, t, sample)

    def features(images: Tensor) -> Tensor:
        now[0] += 100.0
        return images.flatten(1)

    model = oss.models.from_callable(velocity, network.shape, dtype=network.dtype, data_range=2.0)
    held_out = oss.teacher(model, model.noise(6), 6)
    calls.clear()
    schedule = held_out.schedule([6, 4, 3, 1, 0])
    (s,) = oss.compare(model, held_out, {"s": schedule}, features=features)
    assert len(calls) == 4
    assert s.seconds == 4 * 3.0 / 6


@each_seed(1)
def test_features_are_of_the_final_samples(seed: int) -> None:
    model, held_out = random_case("network", seed, samples=8)
    schedules = {"a": held_out.schedule([9, 4, 0]), "b": held_out.schedule([9, 0])}
    scores = oss.compare(
        model, held_out, schedules, features=lambda images: images.flatten(1)[:, :4].sin()
    )
    target = held_out.final.flatten(1)[:, :4].sin()
    for s in scores:
        assert s.frechet == frechet_distance(target, s.images.flatten(1)[:, :4].sin())
    assert scores[0].frechet != scores[1].frechet


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: x.flatten(1)[:-1], r"features: expected \[3, F\] for the teacher, got \(2, 6\)"),
        (lambda x: x, r"features: expected \[3, F\] for the teacher, got \(3, 2, 3\)"),
        (lambda x: x.sum((1, 2)), r"features: expected \[3, F\] for the teacher, got \(3,\)"),
        (lambda x: x.flatten(1).numpy(), r"features: expected \[3, F\] .*, got ndarray"),
        (lambda x: x.flatten(1)[:, :0], r"features of the teacher: expected \[B, F\], got"),
        (
            lambda x: x.flatten(1) / torch.tensor([1.0, 0.0, 1.0])[:, None],
            "features of the teacher: NaN or inf in sample 1",
        ),
    ],
)
def test_bad_features_are_refused_before_any_run(
    features: Callable[[Tensor], Any], message: str
) -> None:
    model, calls = recorded(random_mixture(1), data_range=2.0)
    held_out = oss.teacher(model, model.noise(3), 4)
    calls.clear()
    with pytest.raises(ValueError, match=f"^{message}"):
        oss.compare(model, held_out, {"s": held_out.schedule([4, 0])}, features=features)
    assert not calls


def test_bad_features_of_a_student_name_it() -> None:
    model, held_out = random_case("mixture", 1)
    factors = iter([1.0, 1.0, math.nan])  # the teacher's, those of "good" and of "bad"
    contest = dict.fromkeys(("good", "bad"), held_out.schedule([9, 0]))
    with pytest.raises(ValueError, match=r"^features of 'bad': NaN or inf in sample 0"):
        oss.compare(model, held_out, contest, features=lambda x: x.flatten(1) * next(factors))


def test_one_sample_has_no_distribution() -> None:
    model, held_out = random_case("mixture", 1, samples=1)
    with pytest.raises(ValueError, match=r"^features of the teacher: expected at least 2 samples"):
        oss.compare(
            model, held_out, {"s": held_out.schedule([9, 0])}, features=lambda x: x.flatten(1)
        )
