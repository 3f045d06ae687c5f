"""Teacher grids: each against its formula and its hosts, and what is no grid at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from driver_cases import each_seed
from noise_cases import VP_PATHS, each_path, each_vp_path
from oss_ext.noise import (
    GRIDS,
    FlowPath,
    Path,
    VEPath,
    VPContinuousPath,
    VPPath,
    check_grid,
    ddim_grid,
    ddim_timesteps,
    distinct,
    exponential_grid,
    flow_grid,
    karras_grid,
    sigma_grid,
)

SD = VP_PATHS["scaled_linear"]


def sigmas_of(times: Tensor) -> Tensor:
    return times / (1 - times)


# --- flow ---------------------------------------------------------------------------------------


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
    torch.testing.assert_close(sigmas_of(shifted), 3 * sigmas_of(plain))


@pytest.mark.parametrize("mu", [-0.7, 0.0, 1.15])
def test_mu_is_the_logarithm_of_the_shift_and_goes_before_it(mu: float) -> None:
    torch.testing.assert_close(flow_grid(9, 5.0, mu=mu), flow_grid(9, math.exp(mu)))


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("terminal", [0.02, 0.1, 0.9])
def test_a_terminal_stretches_the_signal_evenly(steps: int, terminal: float) -> None:
    plain, times = flow_grid(steps, 2.0), flow_grid(steps, 2.0, terminal=terminal)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)
    assert float(times[1]) == pytest.approx(terminal, rel=1e-12)
    ratio = (1 - times[1:-1]) / (1 - plain[1:-1])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-10, atol=0)


def test_a_single_step_has_no_time_to_stretch() -> None:
    assert flow_grid(1, terminal=0.1).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.9, 1.1, 1.15, 7.7])
def test_a_flow_grid_can_be_used_as_a_teacher_grid(shift: float) -> None:
    check_grid(flow_grid(50, shift))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0}, "^shift: expected a positive number, got 0"),
        ({"shift": -1.0}, "^shift: expected a positive number, got -1"),
        ({"shift": math.nan}, "^shift: expected a positive number, got nan"),
        ({"mu": math.nan}, "^mu: expected a finite number, got nan"),
        ({"mu": "1"}, "^mu: expected a finite number, got '1'"),
        ({"mu": 1000.0}, "^(mu|shift): expected .*, got"),  # e^1000 is no float
        ({"terminal": 0}, "^terminal: expected a number between 0 and 1, got 0"),
        ({"terminal": 1.0}, "^terminal: expected a number between 0 and 1, got 1"),
        ({"terminal": math.nan}, "^terminal: expected a number between 0 and 1, got nan"),
        ({"terminal": 5, "steps": 1}, "^terminal: expected a number between 0 and 1, got 5"),
    ],
)
def test_a_bad_shift_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow_grid(**({"steps": 4} | options))


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"shift": 3.0}, {"shift": 3.0}),
        ({"shift": 3.0, "shift_terminal": 0.1}, {"shift": 3.0, "terminal": 0.1}),
        ({"use_dynamic_shifting": True}, {"mu": 1.15}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 0.8, "terminal": 0.1}),
    ],
)
def test_diffusers_has_the_same_flow_grid(
    config: dict[str, Any], options: dict[str, Any], steps: int
) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=options.get("mu"))
    expected = scheduler.sigmas.double().flip(0)
    torch.testing.assert_close(flow_grid(steps, **options), expected, rtol=0, atol=1e-6)


# --- DDIM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "expected"),
    [
        (4, "leading", 0, [750, 500, 250, 0]),
        (4, "leading", 1, [751, 501, 251, 1]),
        (3, "leading", 0, [666, 333, 0]),
        (4, "trailing", 0, [999, 749, 499, 249]),
        (3, "trailing", 0, [999, 666, 332]),
        (4, "linspace", 0, [999, 666, 333, 0]),
        (1, "trailing", 0, [999]),
    ],
)
def test_the_timesteps_of_a_spacing(
    steps: int, spacing: str, offset: int, expected: list[int]
) -> None:
    timesteps = ddim_timesteps(SD, steps, spacing, offset)
    assert timesteps == expected
    assert all(type(m) is int for m in timesteps)


@pytest.mark.parametrize("steps", [1, 10, 16, 50, 100, 999, 1000])
@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_diffusers_has_the_same_timesteps(spacing: str, offset: int, steps: int) -> None:
    kind = pytest.importorskip("diffusers").DDIMScheduler
    scheduler = kind(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    assert ddim_timesteps(SD, steps, spacing, offset) == scheduler.timesteps.tolist()


@each_vp_path
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_a_ddim_grid_is_the_noise_of_its_timesteps(path: VPPath, steps: int) -> None:
    times = ddim_grid(path, steps)
    assert times.dtype == torch.float64
    assert float(times[0]) == 0.0
    assert torch.equal(times[1:], path.knots[ddim_timesteps(path, steps)[::-1]])


def test_a_ddim_grid_can_end_at_the_first_timestep() -> None:
    times = ddim_grid(SD, 10, "leading", offset=1, final="first")
    assert times[:2].tolist() == SD.knots[:2].tolist()
    assert torch.equal(times[1:], ddim_grid(SD, 10, "leading", offset=1)[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1001}, "^steps: expected 1 to 1000, got 1001"),
        ({"spacing": "even"}, r"^spacing: expected one of leading, .*got 'even'"),
        ({"final": "last"}, r"^final: expected one of clean, first, got 'last'"),
        ({"steps": 1000, "spacing": "leading", "offset": 1}, "^timesteps: expected 0 to 999, got"),
        ({"spacing": "leading", "offset": -1}, "^offset: expected 0 to 1000, got -1"),
        ({"spacing": "leading", "final": "first"}, "^times: .*strictly increasing"),
        ({"spacing": "leading", "offset": 0.5}, "^offset: expected a whole number"),
        ({"spacing": "leading", "offset": "1"}, "^offset: expected a whole number"),
    ],
)
def test_what_no_ddim_has_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim_grid(SD, **({"steps": 10} | arguments))


# --- noise levels -------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize("steps", [2, 5, 18])
def test_a_karras_grid_is_edms_equation_5(steps: int, rho: float) -> None:
    i = np.arange(steps)
    low, high = 0.02 ** (1 / rho), 60.0 ** (1 / rho)
    sigmas = (high + i / (steps - 1) * (low - high)) ** rho
    expected = torch.from_numpy(np.append(sigmas, 0.0)[::-1].copy())
    times = karras_grid(steps, 0.02, 60.0, rho)
    torch.testing.assert_close(sigmas_of(times), expected, rtol=1e-12, atol=0)


def test_an_exponential_grid_is_uniform_in_log_sigma() -> None:
    times = exponential_grid(9, 0.02, 60.0)
    assert float(times[0]) == 0.0
    levels = times[1:].logit()
    torch.testing.assert_close(levels[[0, -1]].exp(), torch.tensor([0.02, 60.0]).double())
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(8))


@pytest.mark.parametrize("grid", [karras_grid, exponential_grid])
def test_a_single_step_goes_from_the_highest_level(grid: Any) -> None:
    torch.testing.assert_close(grid(1, 0.02, 4.0), torch.tensor([0, 0.8]).double())


@pytest.mark.parametrize("grid", [karras_grid, exponential_grid])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((0.0, 1.0), "^sigma_min: expected a number between 0.0 and inf, got 0"),
        ((math.nan, 1.0), "^sigma_min: expected .* got nan"),
        (("1", 2.0), "^sigma_min: expected .* got '1'"),
        ((2.0, 1.0), "^sigma_max: expected a number between 2.0 and inf, got 1"),
        ((0.1, math.inf), "^sigma_max: expected .* got inf"),
    ],
)
def test_levels_that_do_not_ascend_are_refused(grid: Any, levels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(5, *levels)


@pytest.mark.parametrize("rho", [0, -7.0, math.nan, "7"])
def test_rho_is_positive(rho: Any) -> None:
    with pytest.raises(ValueError, match=r"^rho: expected a positive number, got"):
        karras_grid(5, rho=rho)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_diffusers_has_the_same_karras_grid(steps: int) -> None:
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    scheduler.set_timesteps(steps)
    times = karras_grid(steps, *sigmas_of(torch.tensor(SD.span).double()).tolist())
    expected = scheduler.sigmas.double().flip(0)
    torch.testing.assert_close(sigmas_of(times), expected, rtol=1e-4, atol=0)
    # Between two timesteps the hosts interpolate in log sigma, too.
    timesteps = scheduler.timesteps.double().flip(0)
    torch.testing.assert_close(SD.model_times(times[1:]), timesteps, rtol=0, atol=1e-2)


def test_sigmas_in_any_order_become_times() -> None:
    expected = torch.tensor([0, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(sigma_grid([9.0, 3.0, 1.0, 0.0]), expected)
    torch.testing.assert_close(sigma_grid(torch.tensor([1.0, 0.0, 9.0, 3.0])), expected)


@pytest.mark.parametrize("sigmas", [[0.0, 1.0, 1.0], [-0.5, 1.0], [0.0, math.nan], [1.0], "abc"])
def test_sigmas_that_are_no_grid_are_refused(sigmas: Any) -> None:
    with pytest.raises(ValueError, match=r"^sigmas: expected "):
        sigma_grid(sigmas)


# --- grids by name ------------------------------------------------------------------------------

ALL_GRIDS = GRIDS | {"own": lambda path, steps: path.grid(steps)}


@each_path
@pytest.mark.parametrize("name", ALL_GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_every_grid_serves_every_path(path: Path, name: str, steps: int) -> None:
    times = ALL_GRIDS[name](path, steps)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert float(times[0]) == 0.0
    assert (times.diff() > 0).all()
    first, last = path.span
    assert first - 1e-9 <= float(times[1]) < float(times[-1]) + 1e-9 <= last + 2e-9


@each_path
@pytest.mark.parametrize("name", ALL_GRIDS)
@pytest.mark.parametrize(
    ("steps", "message"),
    [(0, "^steps: expected .*, got 0"), (True, "^steps: expected a whole number.*, got True"),
     (2.0, "^steps: expected a whole number.*, got 2.0"), (None, "^steps: expected .* got None")],
)  # fmt: skip
def test_steps_are_whole_numbers_from_1_on(path: Path, name: str, steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALL_GRIDS[name](path, steps)


def test_the_own_grid_of_a_path_is_what_its_hosts_use() -> None:
    for path, expected in (
        (FlowPath(scale=1000.0), flow_grid(10)),
        (SD, ddim_grid(SD, 10, "trailing")),
        (VEPath(0.01, 50.0), karras_grid(10, 0.01, 50.0)),
    ):
        assert torch.equal(path.grid(10), expected)
    path = VPContinuousPath(scale=999.0)
    torch.testing.assert_close(path.model_times(path.grid(10)), torch.linspace(0, 999, 11).double())


def test_a_continuous_grid_asks_for_nothing_below_the_first_time() -> None:
    path = VPContinuousPath(first=0.02)
    assert float(path.grid(200)[1]) >= path.span[0] - 1e-9


def test_grids_of_other_families_have_their_families_levels() -> None:
    """The paper's table 2 searches a flow model on the grids of DDIM and EDM."""
    assert torch.equal(GRIDS["ddim"](FlowPath(), 9), ddim_grid(VP_PATHS["linear"], 9))
    assert torch.equal(GRIDS["edm"](FlowPath(), 9), karras_grid(9))
    assert torch.equal(GRIDS["exponential"](FlowPath(), 9), exponential_grid(9))


# --- what is a grid -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("abc", r"expected \[N\+1\] numbers, got 'abc'"),
        ([], r"expected \[N\+1\] with N >= 1, got shape \(0,\)"),
        ([0.5], r"expected \[N\+1\] with N >= 1, got shape \(1,\)"),
        ([[0.0, 1.0]], r"got shape \(1, 2\)"),
        ([0.0, math.nan, 1.0], r"expected finite values in \[0, 1\], got nan at index 1"),
        ([0.0, math.inf], r"expected finite values in \[0, 1\], got inf at index 1"),
        ([-0.1, 1.0], r"expected finite values in \[0, 1\], got -0.1 at index 0"),
        ([0.0, 1.1], r"expected finite values in \[0, 1\], got 1.1 at index 1"),
        ([1.0, 0.5, 0.0], "strictly increasing .* got 0.5 after 1.0 at index 1$"),
        (
            [0.0, 0.5, 0.5, 1.0],
            "strictly increasing .* got 0.5 after 0.5 at index 2; 1 times repeat: use fewer steps "
            "or `distinct`$",
        ),
        ([0.0, 0.5, 0.25, 0.25, 1.0, 1.0], "0.25 after 0.5 at index 2; 2 times repeat"),
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


def test_a_grid_becomes_a_float64_copy() -> None:
    times = check_grid(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32))
    assert times.dtype == torch.float64
    assert times.tolist() == [0.0, 0.5, 1.0]
    assert check_grid(times).data_ptr() != times.data_ptr()


@each_seed(2)
def test_distinct_times_are_each_there_once(seed: int) -> None:
    """Such as a host's that rounds to whole timesteps where it is denser than they are."""
    path = VP_PATHS["few_timesteps"]
    timesteps = torch.randint(40, (60,), generator=torch.Generator().manual_seed(seed))
    times = distinct(path.flow_times(timesteps))
    assert times.tolist() == [float(path.knots[m]) for m in sorted(set(timesteps.tolist()))]


@pytest.mark.parametrize("times", [[0.5, 0.5], [0.0, 2.0], [0.0, math.nan], "abc"])
def test_distinct_times_still_have_to_be_a_grid(times: Any) -> None:
    with pytest.raises(ValueError, match=r"^times: expected "):
        distinct(times)
