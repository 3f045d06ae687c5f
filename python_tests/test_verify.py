"""What a schedule says of itself is found true, or what is not true of it is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import oss_ext as oss
from cli_cases import TINY, Oss, assert_misused
from driver_cases import (
    SAMPLES,
    SHAPE,
    each_family,
    example_schedule,
    one_thread,  # noqa: F401
    random_case,
    random_mixture,
    random_network,
)
from oss_ext.noise import FlowPath
from oss_ext.verify import Claim, verify

MODEL = TINY[:2]
RESTING = ("cost", "amplitude")


def judged(*arguments: Any, **options: Any) -> dict[str, Claim]:
    return {claim.name: claim for claim in verify(*arguments, **options)}


def broken(claims: dict[str, Claim]) -> list[str]:
    return [name for name, claim in claims.items() if claim.holds is False]


# --- what was searched verifies -----------------------------------------------------------------


@each_family
@pytest.mark.parametrize("quality", ["dp", "fast", "best"])
def test_a_searched_schedule_verifies(family: str, quality: str, seed: int) -> None:
    model, trajectory = random_case(family, seed, samples=9)
    result = oss.search(model, trajectory, steps=[2, 3], quality=quality)
    for steps in (2, 3):
        claims = judged(model, result.schedule(steps), seed=seed)
        assert broken(claims) == []
        assert claims["cost"].holds, claims["cost"]
        assert claims["teacher_times"].found == "9 steps that the network knows, of no usual grid"


def test_a_refined_cost_is_over_the_samples_that_were_seen(seed: int) -> None:
    model, trajectory = random_case("network", seed, samples=12)
    schedule = oss.search(model, trajectory, steps=2, quality="fast").schedule(2)
    assert schedule.samples == 9
    assert judged(model, schedule, seed=seed)["cost"].holds
    over_all = dataclasses.replace(schedule, samples=12)
    assert judged(model, over_all, seed=seed)["cost"].holds is False


@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun"])
@pytest.mark.parametrize("teacher_solver", ["euler", "dpmpp-2m"])
def test_solvers_and_orders_are_those_of_the_file(
    solver: str, teacher_solver: str, seed: int
) -> None:
    model = random_network(seed)
    noise = model.noise(SAMPLES, seed)
    trajectory = oss.teacher(model, noise, steps=8, solver=teacher_solver)
    options = {"solver": solver, "fixed_order": True, "quality": "dp"}
    schedule = oss.search(model, trajectory, steps=5, **options).schedule(5)
    claims = judged(model, schedule, seed=seed)
    assert claims["cost"].holds, claims["cost"]
    assert claims["teacher_times"].found == "8 steps, the model's own"
    other = dataclasses.replace(schedule, solver="euler", orders=())
    assert judged(model, other, seed=seed)["cost"].holds is False


def test_a_schedule_of_one_sample_has_the_cost_of_one_sample(seed: int) -> None:
    model, trajectory = random_case("network", seed)
    found = oss.search(model, trajectory, steps=2, scope="instance").schedules(2)
    for b, schedule in enumerate(found):
        cost = judged(model, schedule, seed=seed)["cost"]
        assert cost.holds, cost
        assert f"on sample {b}, the nearest of 3 samples" in cost.found
        assert schedule.cost is not None
        altered = dataclasses.replace(schedule, cost=1e3 * (1 + schedule.cost))
        assert judged(model, altered, seed=seed)["cost"].holds is False


def test_a_measured_amplitude_verifies_whatever_samples_it_is_over(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, samples=5)
    schedule = oss.search(model, trajectory.first(3), steps=2, quality="dp").schedule(2)
    schedule = oss.calibrate(trajectory, schedule)
    claims = judged(model, schedule, seed=seed)
    assert [claims[name].holds for name in RESTING] == [True, True]
    assert schedule.amplitude is not None
    high = tuple(value + 1e-3 for value in schedule.amplitude.high)
    altered = dataclasses.replace(schedule.amplitude, high=high)
    claims = judged(model, dataclasses.replace(schedule, amplitude=altered), seed=seed)
    assert broken(claims) == ["amplitude"]
    assert claims["amplitude"].found.startswith(f"expected {high[0]:.6g} as high of step 0, got")


# --- what is not so -----------------------------------------------------------------------------


@pytest.fixture
def searched(seed: int) -> tuple[oss.models.Model, oss.Schedule]:
    model, trajectory = random_case("network", seed)
    return model, oss.search(model, trajectory, steps=2, quality="dp").schedule(2)


Searched = tuple[oss.models.Model, oss.Schedule]


def test_an_altered_cost_does_not_hold(searched: Searched, seed: int) -> None:
    model, schedule = searched
    assert schedule.cost is not None
    for factor in (0.99, 1.01, 0):
        altered = dataclasses.replace(schedule, cost=factor * schedule.cost)
        claims = judged(model, altered, seed=seed)
        assert broken(claims) == ["cost"]
        expected = f"expected {altered.cost:.6g}, got {schedule.cost:.6g} on 3 samples of seed"
        assert claims["cost"].found.startswith(expected)


def test_other_steps_than_the_costs_do_not_hold(searched: Searched, seed: int) -> None:
    model, schedule = searched
    assert schedule.indices is not None
    first, second, last = schedule.indices
    times = (schedule.times[0], schedule.teacher_times[1 if second != 1 else 2], 0.0)
    indices = (first, 1 if second != 1 else 2, last)
    other = dataclasses.replace(schedule, times=times, indices=indices)
    assert broken(judged(model, other, seed=seed)) == ["cost"]


def test_of_other_noise_nothing_is_replayed(searched: Searched, seed: int) -> None:
    claims = judged(*searched, seed=seed + 1)
    assert broken(claims) == ["noise_hash"]
    assert claims["noise_hash"].found.startswith(f"expected {searched[1].noise_hash}, got ")
    assert str(claims["cost"]) == "cost: not checked: it rests on noise_hash"


def test_another_seed_does_not_give_the_cost_of_a_file_without_its_noise(
    searched: Searched, seed: int
) -> None:
    model, schedule = searched
    unsaid = dataclasses.replace(schedule, noise_hash="")
    assert broken(judged(model, unsaid, seed=seed)) == []
    assert broken(judged(model, unsaid, seed=seed + 1)) == ["cost"]


def test_of_another_model_nothing_is_replayed(searched: Searched, seed: int) -> None:
    _, schedule = searched
    claims = judged(random_mixture(seed), schedule, seed=seed)
    assert broken(claims) == ["model_hash"]
    assert f"expected {schedule.model_hash} of 'custom', got" in claims["model_hash"].found
    assert str(claims["cost"]) == "cost: not checked: it rests on model_hash"


def test_another_path_or_other_timesteps_do_not_hold(searched: Searched, seed: int) -> None:
    model, schedule = searched
    path = dataclasses.replace(schedule, path=FlowPath(scale=1000.0))
    claims = judged(model, path, seed=seed)
    assert broken(claims) == ["path"]
    assert claims["path"].found.startswith("expected FlowPath(scale=1000.0, reverse=False), got")
    told = (*schedule.teacher_timesteps[:-1], 0.5)
    claims = judged(model, dataclasses.replace(schedule, teacher_timesteps=told), seed=seed)
    assert broken(claims) == ["teacher_timesteps"]
    assert claims["teacher_timesteps"].found == "expected 0.5 at t = 1, got 1"


def test_times_that_the_network_does_not_know_do_not_hold(searched: Searched) -> None:
    _, schedule = searched
    path = oss.noise.VEPath()
    model = oss.models.from_callable(lambda x, t: x, SHAPE, path=path)
    claims = judged(model, schedule)
    assert {"model_hash", "path", "teacher_times", "teacher_timesteps"} == set(broken(claims))
    assert claims["teacher_times"].found.startswith("expected flow times that the ve network knows")


def test_orders_that_the_solver_lacks_do_not_hold(searched: Searched, seed: int) -> None:
    model, schedule = searched
    claims = judged(model, dataclasses.replace(schedule, orders=(2, 1)), seed=seed)
    assert broken(claims) == ["orders"]


# --- what cannot be checked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"cost": None}, "cost", "not recorded"),
        ({"model_hash": ""}, "model_hash", "not recorded"),
        ({"noise_hash": ""}, "noise_hash", "not recorded"),
        ({"model_hash": ""}, "cost", "not checked: it rests on model_hash"),
        ({"samples": 0}, "cost", "not checked: over how many samples is not recorded"),
        ({"samples": 10**15}, "cost", "not checked: it is over 1000000000000000 samples, more"),
        ({"solver": "x"}, "solver", "not checked: this release knows no solver 'x'"),
        ({"solver": "x"}, "cost", "not checked: it rests on solver"),
        ({"teacher_solver": "x"}, "cost", "not checked: it rests on teacher_solver"),
        ({"teacher_timesteps": ()}, "teacher_timesteps", "not recorded"),
        ({}, "amplitude", "not recorded"),
    ],
)
def test_what_cannot_be_checked_is_said(
    changes: dict[str, Any], name: str, expected: str, searched: Searched, seed: int
) -> None:
    model, schedule = searched
    claims = judged(model, dataclasses.replace(schedule, **changes), seed=seed)
    assert broken(claims) == []
    assert claims[name].holds is None
    assert str(claims[name]).startswith(f"{name}: {expected}")


def test_a_schedule_without_timesteps_is_replayed_all_the_same(
    searched: Searched, seed: int
) -> None:
    model, schedule = searched
    untold = dataclasses.replace(schedule, teacher_timesteps=())
    assert judged(model, untold, seed=seed)["cost"].holds


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_what_holds(oss: Oss, found: list[str]) -> None:
    for file in found:
        outcome = oss("verify", file, *MODEL, "--quiet")
        assert (outcome.code, outcome.err) == (0, "")
        assert "\ncost: holds: " in outcome.out
        assert "teacher_times: holds: 8 steps, the model's own\n" in outcome.out


@pytest.mark.parametrize("options", [("--grid=exponential",), ("--for=text",), ("--off-grid",)])
def test_the_command_follows_the_files_teacher(oss: Oss, options: tuple[str, ...]) -> None:
    search = ("--steps=2", "--seed=7", "--amplitude", *options)
    assert oss("search", *TINY, *search).code == 0
    file = "schedules/analytic-2.json"
    outcome = oss("verify", file, *MODEL, "--seed=7", "--quiet", "--max-batch=2")
    assert outcome.code == 0, outcome.out
    assert outcome.out.count(" holds: ") == 9
    outcome = oss("verify", file, *MODEL, "--quiet")
    assert outcome.code == 1
    assert "noise_hash: does not hold: expected " in outcome.out


def test_the_command_fails_for_another_model_and_a_changed_file(oss: Oss, found: list[str]) -> None:
    outcome = oss("verify", found[0], "--model=analytic", "--quiet")
    assert outcome.code == 1
    assert "model_hash: does not hold: expected " in outcome.out
    outcome = oss("verify", found[0], "--model=digits", "--quiet")
    assert outcome.code == 1
    text = Path(found[0]).read_text()
    Path(found[0]).write_text(text.replace(str(json.loads(text)["cost"]), "0.25"))
    outcome = oss("verify", found[0], *MODEL, "--quiet")
    assert outcome.code == 1
    assert "checksum: the content was changed" in outcome.err


def test_the_command_says_of_a_preset_that_nothing_was_recorded(oss: Oss) -> None:
    outcome = oss("verify", "preset:flux-oss-10", "--model=digits", "--quiet")
    assert outcome.out.count("not recorded") == 5
    assert "teacher_times: holds: " in outcome.out
    assert_misused(oss("verify", "preset:flux-oss-10"), "the model", "is not a bundled one")


def test_a_file_that_claims_too_much_is_not_run(searched: Searched, seed: int) -> None:
    model, schedule = searched
    many = dataclasses.replace(schedule, samples=20)
    claims = judged(model, many, samples=19, seed=seed)
    assert claims["cost"].found.endswith("over 20 samples, more than the 19 to be drawn")


def test_an_example_that_was_never_searched_has_claims_too() -> None:
    assert broken(judged(random_mixture(0), example_schedule())) == ["model_hash"]
