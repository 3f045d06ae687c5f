"""Amplitude calibration: its definition, where it is measured, and where a student applies it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_family,
    each_seed,
    example_schedule,
    one_thread,  # noqa: F401
    random_case,
    random_mixture,
    recorded,
)
from oss_ext import Schedule, ScheduleError, solvers
from oss_ext.amplitude import LEVELS, Amplitude, quantiles
from oss_ext.sampling import student_states
from oss_ext.solvers import Singlestep

ROWS = [8, 5, 2, 0]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(x: Tensor, low: float, high: float, levels: tuple[float, float] = LEVELS) -> Tensor:
    """The definition, one sample after the other, with numpy's quantiles."""
    moved = []
    for sample in x:
        q_low, q_high = np.quantile(sample.double().numpy(), levels)
        moved.append((high - low) / (q_high - q_low) * (sample.double() - q_low) + low)
    return torch.stack(moved)


def calibrated(family: str, seed: int, **options: Any) -> tuple[Any, oss.Trajectory, Schedule]:
    """A random model, its teacher and a schedule with the teacher's quantiles."""
    model, trajectory = random_case(family, seed)
    schedule = trajectory.schedule(ROWS, **options)
    return model, trajectory, oss.calibrate(trajectory, schedule)


# --- quantiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (4, 3, 7), (1, 2, 5, 5, 3), (5, 1001)])
@pytest.mark.parametrize("levels", [LEVELS, (0.001, 0.5), (0.0, 1.0), (0.25,)])
def test_quantiles_are_numpys(shape: tuple[int, ...], levels: tuple[float, ...], seed: int) -> None:
    x = draw(seed, *shape)
    expected = np.quantile(x.flatten(1).numpy(), levels, axis=1).T
    assert quantiles(x, levels).shape == (shape[0], len(levels))
    np.testing.assert_allclose(quantiles(x, levels).numpy(), expected, rtol=1e-13, atol=1e-14)


def test_quantiles_are_torchs_also_of_ties_and_strided_states(seed: int) -> None:
    x = draw(seed, 6, 5, 4, dtype=torch.float32).round(decimals=1).transpose(0, 2)
    expected = torch.quantile(x.flatten(1), torch.tensor(LEVELS), dim=1).T
    torch.testing.assert_close(quantiles(x, LEVELS).float(), expected)


@pytest.mark.slow
def test_samples_may_have_more_elements_than_torch_quantile_takes() -> None:
    """Whole numbers up to 2^24 are float32: here the quantiles are known exactly."""
    x = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)[None]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    assert quantiles(x, LEVELS)[0].tolist() == pytest.approx([0.05 * 2**24, 0.95 * 2**24], abs=1e-6)


def test_nothing_larger_than_a_sample_is_sorted(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """And torch.quantile, which refuses large samples, has no part in it."""
    seen, sort = [], Tensor.sort

    def counted(self: Tensor, *arguments: Any) -> Any:
        seen.append(self.numel())
        return sort(self, *arguments)

    monkeypatch.setattr(Tensor, "sort", counted)
    monkeypatch.delattr(torch, "quantile")
    quantiles(draw(seed, 7, 4, 5), LEVELS)
    assert seen == [20] * 7


# --- what is done to a state --------------------------------------------------------------------


@each_seed(3)
def test_a_state_is_moved_to_the_teachers_quantiles(seed: int) -> None:
    amplitude = Amplitude((0.1, 0.7), (-1.5, 0.2), (0.4, 3.0), 5)
    x = 3 * draw(seed, 4, 3, 6) + 1
    for step, (low, high) in enumerate([(-1.5, 0.4), (0.2, 3.0)]):
        moved = amplitude.matched(step, x)
        torch.testing.assert_close(moved, by_hand(x, low, high, (0.1, 0.7)))
        reached = quantiles(moved, (0.1, 0.7))
        torch.testing.assert_close(reached, torch.tensor([[low, high]] * 4, dtype=torch.float64))


def test_a_state_that_has_the_quantiles_stays(seed: int) -> None:
    x = draw(seed, 1, 3, 6)
    (low, high) = quantiles(x, LEVELS)[0].tolist()
    moved = Amplitude(LEVELS, (low,), (high,), 1).matched(0, x)
    torch.testing.assert_close(moved, x, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_without_amplitude_stays_and_the_others_do_not(
    dtype: torch.dtype, seed: int
) -> None:
    x = draw(seed, 3, 4, 5, dtype=dtype)
    x[1] = 0.7
    moved = Amplitude(LEVELS, (-2.0,), (2.0,), 1).matched(0, x)
    assert moved.dtype == dtype
    assert torch.equal(moved[1], x[1])
    expected = by_hand(x[[0, 2]], -2.0, 2.0).to(dtype)
    torch.testing.assert_close(moved[[0, 2]], expected)


# --- measured along the teacher -----------------------------------------------------------------


@each_family
@each_seed(2)
def test_the_teachers_quantiles_are_averaged_over_samples(family: str, seed: int) -> None:
    """On rows of its grid and between them."""
    _, trajectory = random_case(family, seed)
    times, states = trajectory.times.tolist(), trajectory.states
    between = 0.3 * times[5] + 0.7 * times[6]
    schedule = trajectory.schedule_at([times[8], between, times[2], times[0]])
    amplitude = oss.calibrate(trajectory, schedule, levels=(0.2, 0.6)).amplitude
    assert amplitude is not None
    wanted = [states[8], 0.3 * states[5] + 0.7 * states[6], states[2]]
    for step, x in enumerate(wanted):
        expected = np.quantile(x.flatten(1).numpy(), (0.2, 0.6), axis=1).mean(axis=1)
        assert (amplitude.low[step], amplitude.high[step]) == pytest.approx(expected, rel=1e-12)
    assert (amplitude.levels, amplitude.samples) == ((0.2, 0.6), trajectory.samples)


def test_several_trajectories_are_one_calibration_set(seed: int) -> None:
    model = random_mixture(seed)
    whole = oss.teacher(model, model.noise(5, seed), 6)
    schedule = whole.schedule([6, 3, 0])

    def parts() -> Iterator[oss.Trajectory]:
        for first, last in ((0, 1), (1, 5)):
            yield replace(whole, states=whole.states[:, first:last])

    one, two = (oss.calibrate(t, schedule).amplitude for t in (whole, parts()))
    assert one is not None
    assert two is not None
    assert two.samples == 5
    assert (*two.low, *two.high) == pytest.approx((*one.low, *one.high), rel=1e-13)


def test_one_sample_is_a_calibration_set(seed: int) -> None:
    """A student of that sample alone that has the teacher's states keeps them."""
    model, trajectory = random_case("network", seed, samples=1)
    everything = trajectory.schedule(range(trajectory.steps, -1, -1))
    schedule = oss.calibrate(trajectory, everything)
    assert schedule.amplitude is not None
    assert schedule.amplitude.samples == 1
    images = oss.sample(model, trajectory.noise, schedule, amplitude=True)
    torch.testing.assert_close(images, trajectory.final, rtol=1e-11, atol=1e-12)


def test_calibrating_changes_nothing_else(seed: int) -> None:
    _, trajectory, schedule = calibrated("mixture", seed)
    assert replace(schedule, amplitude=None) == trajectory.schedule(ROWS)


def test_what_does_not_belong_to_the_schedule_is_refused(seed: int) -> None:
    model, trajectory = random_case("mixture", seed)
    schedule = trajectory.schedule(ROWS)
    with pytest.raises(ValueError, match=r"^schedule: expected one for the teacher's model, "):
        oss.calibrate(trajectory, replace(schedule, model_hash="0" * 16))
    with pytest.raises(ValueError, match=r"with hash \(none\)$"):
        oss.calibrate(trajectory, replace(schedule, model_hash=""))
    short = oss.teacher(model, trajectory.noise, 4)
    with pytest.raises(ValueError, match=r"4 steps of euler, got one of 9 steps of euler$"):
        oss.calibrate(short, schedule)
    even = oss.teacher(model, trajectory.noise, 9)
    with pytest.raises(ValueError, match=r"9 steps of euler, got .* at other times$"):
        oss.calibrate([trajectory, even], schedule)
    with pytest.raises(ValueError, match=r"^schedule: .*got one of 9 steps of heun"):
        oss.calibrate(trajectory, replace(schedule, teacher_solver="heun"))
    with pytest.raises(ValueError, match=r"^teacher: expected a trajectory or several, got none"):
        oss.calibrate([], schedule)
    broken = replace(trajectory, states=trajectory.states * math.nan)
    with pytest.raises(ValueError, match=r"^teacher: expected finite states"):
        oss.calibrate(broken, schedule)


def test_a_teacher_without_amplitude_is_refused(seed: int) -> None:
    """Brought to equal quantiles, every sample would be one constant."""
    _, trajectory = random_case("mixture", seed)
    schedule = trajectory.schedule(ROWS)
    flat = trajectory.states.clone()
    flat[ROWS[1]] = 0.25
    message = rf"^teacher: expected .* 0.05 and 0.95 differ, got 0.25 .* t = {schedule.times[1]:g}$"
    with pytest.raises(ValueError, match=message):
        oss.calibrate(replace(trajectory, states=flat), schedule)


BAD_LEVELS: list[Any] = [
    (0.0, 0.95), (0.05, 1.0), (-0.1, 0.5), (0.95, 0.05), (0.5, 0.5), (math.nan, 0.5),
    (0.1, math.nan), (0.1,), (0.1, 0.5, 0.9), "12", None, 0.5, ("a", "b"), (True, 0.5), (5, 95),
]  # fmt: skip


@pytest.mark.parametrize("levels", BAD_LEVELS)
def test_bad_levels_are_refused(levels: Any, seed: int) -> None:
    _, trajectory = random_case("mixture", seed)
    with pytest.raises(ValueError, match=r"^levels: expected .*, got"):
        oss.calibrate(trajectory, trajectory.schedule(ROWS), levels=levels)
    with pytest.raises(ValueError, match=r"^levels: expected .*, got"):
        Amplitude(levels, (0.0,), (1.0,), 1)


@pytest.mark.parametrize(
    ("low", "high", "samples", "message"),
    [
        ((0.0, math.nan), (1.0, 1.0), 1, "^low: expected a finite number, got nan"),
        ((0.0,), (math.inf,), 1, "^high: expected a finite number, got inf"),
        ((0.0,), ("1",), 1, "^high: expected a finite number, got '1'"),
        (0.0, (1.0,), 1, "^low: expected numbers, got 0.0"),
        ((0.0, 0.1), (1.0,), 1, "^high: expected 2 numbers as in low"),
        ((0.0,), (-0.1,), 1, "^high: expected numbers above low's, got -0.1 and 0.0"),
        ((0.0, 0.5), (1.0, 0.5), 1, "^high: expected numbers above low's, got 0.5 and 0.5"),
        ((0.0,), (1.0,), 0, "^samples: expected at least 1, got 0"),
        ((0.0,), (1.0,), True, "^samples: expected a whole number"),
    ],
)
def test_what_no_teacher_has_is_refused(low: Any, high: Any, samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Amplitude(LEVELS, low, high, samples)


# --- in a schedule ------------------------------------------------------------------------------

AMPLITUDE = Amplitude((0.1, 0.9), (-1.0, -1 / 3, 5e-324), (1.0, 0.1 + 0.2, 1e300), 7)
EXAMPLE = example_schedule(amplitude=AMPLITUDE)


def test_a_file_holds_the_amplitude() -> None:
    assert Schedule.from_json(EXAMPLE.to_json()) == EXAMPLE
    assert json.loads(EXAMPLE.to_json())["amplitude"]["samples"] == 7
    assert len({EXAMPLE, example_schedule()}) == 2  # frozen throughout


@pytest.mark.parametrize(
    "value", [(0.05, 0.95), "yes", {"levels": LEVELS}, replace(AMPLITUDE, low=(0.0,), high=(1.0,))]
)
def test_a_schedule_has_an_amplitude_of_its_steps(value: Any) -> None:
    with pytest.raises(
        ScheduleError, match=r"^amplitude: expected null or an Amplitude of 3 steps"
    ):
        example_schedule(amplitude=value)


def test_parts_keep_the_amplitudes_of_their_steps() -> None:
    above, below = EXAMPLE.split(at=0.2)
    assert above.amplitude == replace(AMPLITUDE, low=AMPLITUDE.low[:2], high=AMPLITUDE.high[:2])
    assert below.amplitude == replace(AMPLITUDE, low=AMPLITUDE.low[2:], high=AMPLITUDE.high[2:])
    assert EXAMPLE.cut(sigma=1.0).amplitude == AMPLITUDE
    from_knot = EXAMPLE.cut(sigma=0.4).amplitude
    assert from_knot == replace(AMPLITUDE, low=AMPLITUDE.low[1:], high=AMPLITUDE.high[1:])


def test_a_cut_between_knots_has_no_amplitude() -> None:
    """What the teacher has at the new first time is not in the schedule."""
    assert EXAMPLE.cut(sigma=0.7).amplitude is None


def test_parts_one_after_the_other_are_the_whole(seed: int) -> None:
    model, trajectory, schedule = calibrated("network", seed)
    x = trajectory.noise
    for part in schedule.split(at=schedule.times[1]):
        x = oss.sample(model, x, part, amplitude=True)
    assert torch.equal(x, oss.sample(model, trajectory.noise, schedule, amplitude=True))


# --- applied ------------------------------------------------------------------------------------


@each_family
@each_seed(2)
def test_a_student_starts_every_step_from_the_teachers_quantiles(family: str, seed: int) -> None:
    model, trajectory, schedule = calibrated(family, seed)
    assert schedule.amplitude is not None
    x, expected = trajectory.noise, []
    for k, (low, high) in enumerate(
        zip(schedule.amplitude.low, schedule.amplitude.high, strict=True)
    ):
        x = by_hand(x, low, high)
        t = torch.full((len(x),), schedule.times[k], dtype=torch.float64)
        v = model(x, t, torch.arange(len(x)))
        x = x + (schedule.times[k + 1] - schedule.times[k]) * v
        expected.append(x)
    states = student_states(model, trajectory.noise, schedule, amplitude=True)
    torch.testing.assert_close(torch.stack(list(states)), torch.stack(expected))


@each_family
@each_seed(1)
def test_it_is_off_unless_asked_for(family: str, seed: int) -> None:
    model, trajectory, schedule = calibrated(family, seed)
    plain = oss.sample(model, trajectory.noise, trajectory.schedule(ROWS))
    assert torch.equal(oss.sample(model, trajectory.noise, schedule), plain)
    assert not torch.equal(oss.sample(model, trajectory.noise, schedule, amplitude=True), plain)


def test_a_schedule_without_it_cannot_be_asked_for_it(seed: int) -> None:
    model, trajectory = random_case("mixture", seed)
    with pytest.raises(ValueError, match=r"^amplitude: expected a schedule with the teacher's"):
        oss.sample(model, trajectory.noise, trajectory.schedule(ROWS), amplitude=True)


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_blocks_change_nothing_but_rounding(max_batch: int, seed: int) -> None:
    model, trajectory, schedule = calibrated("network", seed)
    whole, blocks = (
        oss.sample(model, trajectory.noise, schedule, amplitude=True, max_batch=rows)
        for rows in (None, max_batch)
    )
    torch.testing.assert_close(blocks, whole)


def test_samples_know_nothing_of_each_other(seed: int) -> None:
    model, trajectory, schedule = calibrated("mixture", seed)
    noise = trajectory.noise
    together = oss.sample(model, noise, schedule, amplitude=True)
    torch.testing.assert_close(oss.sample(model, noise[:1], schedule, amplitude=True), together[:1])


class Midpoint(Singlestep):
    """Two evaluations a step."""

    name, title, order, to_clean, evaluations = "midpoint", "", 2, 2, 2

    def stages(
        self, order: int, t: Tensor, t_next: Tensor
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        return [(t + t_next) / 2], [[], [t_next - t]]


def test_stages_within_a_step_are_not_calibrated(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setitem(solvers.SOLVERS, "midpoint", Midpoint())
    model, calls = recorded(random_mixture(seed), data_range=2.0)
    trajectory = oss.teacher(model, model.noise(3, seed), 9)
    schedule = oss.calibrate(trajectory, trajectory.schedule(ROWS, solver="midpoint"))
    calls.clear()
    oss.sample(model, trajectory.noise, schedule, amplitude=True)
    amplitude = schedule.amplitude
    assert amplitude is not None
    assert len(calls) == 2 * schedule.steps
    for k, (begin, stage) in enumerate(zip(calls[::2], calls[1::2], strict=True)):
        reached = torch.tensor([[amplitude.low[k], amplitude.high[k]]] * 3, dtype=torch.float64)
        torch.testing.assert_close(quantiles(begin.x, LEVELS), reached)
        v = model(begin.x, begin.t, begin.sample)
        half = (schedule.times[k + 1] - schedule.times[k]) / 2
        torch.testing.assert_close(stage.x, begin.x + half * v)


def test_a_multistep_solver_remembers_the_calibrated_states(seed: int) -> None:
    """A second step by hand: DPM-Solver++(2M) from data predictions at the states it was given."""
    model, calls = recorded(random_mixture(seed), data_range=2.0)
    times = [0.95, 0.7, 0.4]
    grid = torch.tensor(times[::-1], dtype=torch.float64)
    trajectory = oss.teacher(model, model.noise(3, seed), times=grid)
    schedule = oss.calibrate(trajectory, trajectory.schedule([2, 1, 0], solver="dpmpp-2m"))
    calls.clear()
    last = oss.sample(model, 2 * trajectory.noise, schedule, amplitude=True)
    data = [c.x - c.t.view(-1, 1, 1) * model(c.x, c.t, c.sample) for c in calls[:2]]
    lambdas = [math.log((1 - t) / t) for t in times]
    h_0, h = lambdas[1] - lambdas[0], lambdas[2] - lambdas[1]
    extrapolated = data[1] + h / (2 * h_0) * (data[1] - data[0])
    expected = times[2] / times[1] * calls[1].x - (1 - times[2]) * math.expm1(-h) * extrapolated
    torch.testing.assert_close(last, expected)
