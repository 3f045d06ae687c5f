"""Baselines that are formulas or tables, against their published values."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import oss_ext as oss
from baseline_cases import model_on, teacher_on
from noise_cases import EXAMPLES
from oss_ext import presets
from oss_ext.baselines import (
    UnableError,
    ays,
    ddim_leading,
    ddim_trailing,
    exponential,
    flow_shift,
    karras,
    logsnr,
    quadratic,
    time_uniform,
    uniform,
)
from oss_ext.noise import FlowPath, Path, VEPath, VPPath, flow_grid
from oss_ext.noise.vp import ddim_timesteps

STEPS = 4
LN_SIGMA_MIN, LN_SIGMA_MAX = math.log(0.002), math.log(80)


def approx(*values: float) -> Any:
    return pytest.approx(values, rel=1e-9, abs=1e-12)


def log_sigmas(schedule: oss.Schedule) -> np.ndarray:
    times = np.array(schedule.times[:-1])
    return np.log(times / (1 - times))


# --- in what the network is told ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "flow_scaled", "flow_reverse"])
def test_on_a_flow_model_time_is_flow_time(kind: str) -> None:
    trajectory = teacher_on(EXAMPLES[kind])
    assert time_uniform(trajectory, STEPS).times == approx(1, 0.75, 0.5, 0.25, 0)
    assert quadratic(trajectory, STEPS).times == approx(1, 9 / 16, 4 / 16, 1 / 16, 0)


def test_uniform_in_time_knows_no_shift_of_the_teacher() -> None:
    model = model_on(FlowPath())
    trajectory = oss.teacher(model, model.noise(1), times=flow_grid(12, 3.0))
    assert time_uniform(trajectory, STEPS).times == approx(1, 0.75, 0.5, 0.25, 0)
    assert uniform(trajectory, STEPS).times == approx(*flow_shift(trajectory, STEPS).times)


def test_on_discrete_timesteps_the_last_step_is_from_above_timestep_0() -> None:
    trajectory = teacher_on(VPPath())
    uniform_ = time_uniform(trajectory, 10).timesteps
    assert uniform_ == approx(*(99.9 * k for k in range(10, 0, -1)))
    assert quadratic(trajectory, 10).timesteps == approx(*(9.99 * k**2 for k in range(10, 0, -1)))


def test_on_a_ve_path_that_is_told_the_logarithm_uniform_in_time_is_uniform_in_log_snr() -> None:
    trajectory = teacher_on(EXAMPLES["ve_log"])
    found = time_uniform(trajectory, STEPS).times
    assert found == approx(*logsnr(trajectory, STEPS).times)


# --- Stable Diffusion's timesteps -----------------------------------------------------------------


def test_ddim_timesteps_are_stable_diffusions() -> None:
    trajectory = teacher_on(VPPath(), 20)
    leading, trailing = ddim_leading(trajectory, 10), ddim_trailing(trajectory, 10)
    assert leading.timesteps == approx(901, 801, 701, 601, 501, 401, 301, 201, 101, 1)
    assert trailing.timesteps == approx(999, 899, 799, 699, 599, 499, 399, 299, 199, 99)
    assert trailing.indices == tuple(range(20, -1, -2))  # the teacher's grid is trailing too
    assert (leading.starts_below, trailing.starts_below) == (True, False)
    assert ddim_leading(trajectory, 7).timesteps == approx(*(142 * k + 1 for k in range(6, -1, -1)))


def test_without_timesteps_rows_take_their_place() -> None:
    trajectory = teacher_on(VEPath(), 10)
    assert ddim_leading(trajectory, 4).indices == (7, 5, 3, 1, 0)
    assert ddim_leading(trajectory, 10).indices == tuple(range(10, -1, -1))
    for steps in range(1, 11):
        assert ddim_trailing(trajectory, steps).indices == uniform(trajectory, steps).indices


def test_timesteps_that_do_not_exist_are_no_schedule() -> None:
    trajectory = teacher_on(EXAMPLES["few_timesteps"], 40)
    with pytest.raises(UnableError, match=r"^ddim-leading: timesteps: expected 0 to 39, got 40"):
        ddim_leading(trajectory, 40)
    assert ddim_trailing(trajectory, 40).indices == tuple(range(40, -1, -1))


# --- in sigma -------------------------------------------------------------------------------------


def test_karras_is_edms_formula() -> None:
    found = karras(teacher_on(VEPath()), 5)
    sigmas = (80, 17.527831964644, 2.515218976147, 0.169752756269, 0.002, 0)
    assert found.sigmas == pytest.approx(sigmas, rel=1e-11)
    assert karras(teacher_on(VEPath(), 12), 12).indices == tuple(range(12, -1, -1))


def test_karras_with_rho_1_is_uniform_in_sigma() -> None:
    found = karras(teacher_on(VEPath()), 5, rho=1.0).sigmas
    assert found[:-1] == pytest.approx(np.linspace(80, 0.002, 5), rel=1e-9)


def test_exponential_asks_at_the_least_sigma_and_logsnr_does_not() -> None:
    trajectory = teacher_on(VEPath())
    asked = np.linspace(LN_SIGMA_MAX, LN_SIGMA_MIN, STEPS)
    assert log_sigmas(exponential(trajectory, STEPS)) == pytest.approx(asked, abs=1e-9)
    asked = np.linspace(LN_SIGMA_MAX, LN_SIGMA_MIN, STEPS + 1)[:-1]
    assert log_sigmas(logsnr(trajectory, STEPS)) == pytest.approx(asked, abs=1e-9)


@pytest.mark.parametrize("make", [karras, exponential])
def test_the_least_sigma_is_the_least_that_the_teacher_asks_at(make: Any) -> None:
    trajectory = teacher_on(VPPath(), 10)
    assert make(trajectory, STEPS).times[-2] == float(trajectory.times[1])


@pytest.mark.parametrize("kind", ["flow", "zero_terminal_snr"])
def test_pure_noise_counts_as_edms_highest_sigma(kind: str) -> None:
    trajectory = teacher_on(EXAMPLES[kind])
    found = exponential(trajectory, STEPS)
    assert found.times[0] == 1.0
    low = math.log(float(trajectory.times[1] / (1 - trajectory.times[1])))
    expected = np.linspace(LN_SIGMA_MAX, low, STEPS)[1:]
    inner = np.array(found.times[1:-1])
    assert np.log(inner / (1 - inner)) == pytest.approx(expected, abs=1e-9)


# --- shifted, and from tables ---------------------------------------------------------------------


def test_flow_shift_is_the_formula_of_sd3() -> None:
    trajectory = teacher_on(FlowPath())
    assert flow_shift(trajectory, 4).times == approx(1, 0.9, 0.75, 0.5, 0)
    assert flow_shift(trajectory, 4, shift=1.0).times == approx(1, 0.75, 0.5, 0.25, 0)
    start = float(teacher_on(VEPath()).times[-1])
    found = flow_shift(teacher_on(VEPath()), 4).times
    assert found == approx(start, 0.9 * start, 0.75 * start, 0.5 * start, 0)


@pytest.mark.parametrize(
    ("path", "name"),
    [(VPPath(), "sd1-ays-10"), (VEPath(0.002, 700.0, clock="log"), "svd-ays-10")],
    ids=["vp", "ve"],
)
def test_ays_is_its_table_at_the_tables_own_budget(path: Path, name: str) -> None:
    table = presets.load(name).schedule
    found = ays(teacher_on(path), 10)
    assert found.times == approx(*table.times)
    assert ays(teacher_on(path), 5).times == approx(*table.times[:10:2], 0)


def test_ays_for_stable_diffusion_has_the_published_timesteps() -> None:
    found = ays(teacher_on(VPPath()), 10).timesteps
    assert [round(t) for t in found] == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    other = ays(teacher_on(VPPath()), 10, preset="sdxl-ays-10").timesteps
    assert [round(t) for t in other] == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]


def test_ays_goes_between_its_entries_log_linearly_down_to_the_models_least_sigma() -> None:
    sigma = [*presets.load("sd1-ays-10").schedule.sigmas[:-1], 0.0291675]  # timestep 0
    found = ays(teacher_on(VPPath(), 20), 20)
    between = [math.sqrt(high * low) for high, low in pairwise(sigma)]
    expected = [value for pair in zip(sigma, between, strict=False) for value in pair]
    assert log_sigmas(found) == pytest.approx(np.log(expected), abs=1e-5)


def test_ays_on_a_flow_has_stable_diffusions_signal_to_noise_ratios() -> None:
    vp, flow = (ays(teacher_on(path), 6).times for path in (VPPath(), FlowPath()))
    assert flow[0] == 1.0
    assert flow[1:] == approx(*vp[1:])


def test_ays_is_cut_to_what_the_teacher_spans() -> None:
    found = ays(teacher_on(VEPath()), 10)
    assert found.sigmas[:3] == approx(80, 54.5, 15.886)
    model = model_on(FlowPath())
    short = oss.teacher(model, model.noise(1), times=torch.linspace(0, 0.5, 13))
    with pytest.raises(UnableError, match=r"^ays: 10 steps need times that descend"):
        ays(short, 10)


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^unknown preset 'sd9'"):
        ays(teacher_on(VPPath()), 10, preset="sd9")


@pytest.mark.parametrize("value", [0, -1.0, math.inf, "7", None])
def test_parameters_are_positive_numbers(value: Any) -> None:
    trajectory = teacher_on(FlowPath())
    with pytest.raises(ValueError, match=r"^rho: expected a positive number"):
        karras(trajectory, 2, rho=value)
    with pytest.raises(ValueError, match=r"^shift: expected a positive number"):
        flow_shift(trajectory, 2, shift=value)


@pytest.mark.parametrize("train_steps", [1000, 500])
def test_trailing_timesteps_are_rounded_as_diffusers_does(train_steps: int) -> None:
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        num_train_timesteps=train_steps, timestep_spacing="trailing"
    )
    path = VPPath(train_steps=train_steps)
    for steps in range(1, train_steps + 1):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[:steps]  # it may have one too many
        assert ddim_timesteps(path, steps) == expected
