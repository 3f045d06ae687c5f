"""Time grids, and the coordinates that noise paths share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from driver_cases import each_seed
from oss_ext.noise import PATHS, check_grid, flow_grid


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 17.0])
def test_a_flow_grid_ascends_strictly_from_0_to_1(steps: int, shift: float) -> None:
    times = flow_grid(steps, shift)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)
    assert (times.diff() > 0).all()


def test_without_a_shift_a_flow_grid_is_uniform() -> None:
    expected = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    assert torch.equal(flow_grid(4), expected)


def test_a_shift_moves_the_signal_to_noise_ratio() -> None:
    """``t / (1 - t)`` of every inner time grows by the shift."""
    plain, shifted = flow_grid(10)[1:-1], flow_grid(10, 3.0)[1:-1]
    torch.testing.assert_close(shifted / (1 - shifted), 3 * plain / (1 - plain))


@pytest.mark.parametrize(
    "shift",
    [0.1, 0.2, 0.9, 1.1, 1.15, 7.7],
)
def test_a_flow_grid_can_be_used_as_a_teacher_grid(shift: float) -> None:
    check_grid(flow_grid(50, shift))


@pytest.mark.parametrize("shift", [0, -1.0, math.nan])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match=f"^shift: expected a positive number, got {shift}"):
        flow_grid(4, shift)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_has_at_least_one_step(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^steps: expected at least 1, got {steps}"):
        flow_grid(steps)


@pytest.mark.parametrize("steps", [True, 2.0, "2", None])
def test_steps_are_whole_numbers(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^steps: expected .*, got"):
        flow_grid(steps)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("abc", r"expected \[N\+1\] numbers, got 'abc'"),
        ([], r"expected \[N\+1\] with N >= 1, got shape \(0,\)"),
        ([0.5], r"expected \[N\+1\] with N >= 1, got shape \(1,\)"),
        ([[0.0, 1.0]], r"got shape \(1, 2\)"),
        ([0.0, math.nan, 1.0], r"expected finite values in \[0, 1\], got .*nan"),
        ([0.0, math.inf], r"expected finite values in \[0, 1\], got .*inf"),
        ([-0.1, 1.0], r"expected finite values in \[0, 1\], got .*-0.1"),
        ([0.0, 1.1], r"expected finite values in \[0, 1\], got .*1.1"),
        ([0.0, 0.5, 0.5, 1.0], "strictly increasing .* got 0.5 after 0.5 at index 2"),
        ([1.0, 0.5, 0.0], "strictly increasing .* got 0.5 after 1.0 at index 1"),
    ],
)
def test_a_bad_grid_is_refused_with_what_is_wrong(times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^times: .*{message}"):
        check_grid(times)


def test_a_long_bad_grid_gives_a_short_message() -> None:
    times = flow_grid(1000)
    times[500] = math.nan
    with pytest.raises(ValueError, match=r"^times: ") as caught:
        check_grid(times)
    assert len(str(caught.value)) < 200


def test_a_grid_becomes_float64_on_the_cpu() -> None:
    times = check_grid(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32))
    assert times.dtype == torch.float64
    assert times.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name", PATHS)
@each_seed(2)
def test_a_path_agrees_with_its_flow_time(name: str, seed: int) -> None:
    """``t = beta / (alpha + beta)``: equal signal-to-noise ratio, for every path there is."""
    t = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alpha, beta = PATHS[name].alpha_beta(t)
    torch.testing.assert_close(beta / (alpha + beta), t)
    assert PATHS[name].name == name


def test_the_sigma_of_a_flow_is_its_time() -> None:
    t = flow_grid(5)
    sigmas = PATHS["flow"].sigmas(t)
    assert torch.equal(sigmas, t)
    assert sigmas.data_ptr() != t.data_ptr()  # the grid itself is not handed out
