"""Noise paths: their coordinates and clocks against the published formulas, and bad attributes."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from driver_cases import each_seed
from noise_cases import VP_PATHS, each_path, each_vp_path, times_on
from oss_ext.noise import (
    PATHS,
    FlowPath,
    Path,
    VEPath,
    VPContinuousPath,
    VPPath,
    path_from_dict,
)

CONTINUOUS = [VPContinuousPath(), VPContinuousPath(0.2, 15.0, scale=999.0, first=1e-3)]
WIDE = np.longdouble


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def alphas_cumprod(path: VPPath) -> Tensor:
    return path.alpha_beta(path.knots)[0] ** 2


def published(path: VPPath) -> np.ndarray:
    """``alphas_cumprod`` as DDPM, Stable Diffusion, improved DDPM and Lin et al. write them."""
    if path.alphas_cumprod is not None:
        return np.array(path.alphas_cumprod, WIDE)
    steps = path.train_steps
    start, end = WIDE(path.beta_start), WIDE(path.beta_end)
    ramp = np.arange(steps).astype(WIDE) / (steps - 1)
    if path.betas == "linear":
        betas = start + ramp * (end - start)
    elif path.betas == "scaled_linear":
        betas = (np.sqrt(start) + ramp * (np.sqrt(end) - np.sqrt(start))) ** 2
    else:
        u = np.arange(steps + 1).astype(WIDE) / steps
        bar = np.cos((u + WIDE("0.008")) / WIDE("1.008") * np.arccos(WIDE(-1)) / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], WIDE("0.999"))
    bar = np.cumprod(1 - betas)
    if path.zero_terminal_snr:  # Lin et al. 2023, algorithm 1
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bar


# --- every path ---------------------------------------------------------------------------------


def test_paths_are_known_by_their_names() -> None:
    assert {
        "flow": FlowPath,
        "vp": VPPath,
        "vp_continuous": VPContinuousPath,
        "ve": VEPath,
    } == PATHS
    assert all(kind.name == name for name, kind in PATHS.items())


@each_path
@each_seed(2)
def test_a_path_agrees_with_its_flow_time(path: Path, seed: int) -> None:
    """``t = beta / (alpha + beta)``: equal signal-to-noise ratio."""
    t = times_on(path, seed)
    alpha, beta = path.alpha_beta(t)
    assert alpha.dtype == beta.dtype == torch.float64
    torch.testing.assert_close(beta / (alpha + beta), t, rtol=1e-12, atol=0)


@each_path
@each_seed(2)
def test_model_times_and_flow_times_are_inverse(path: Path, seed: int) -> None:
    t = times_on(path, seed)
    m = path.model_times(t)
    assert m.dtype == torch.float64
    torch.testing.assert_close(path.flow_times(m), t, rtol=0, atol=1e-12)
    inner = m[:-1] if t[-1] == 1 and isinstance(path, VPPath) else m
    mixed = (inner[1:] + inner[:-1]) / 2
    scale = float(m.abs().max())
    again = path.model_times(path.flow_times(mixed))
    torch.testing.assert_close(again, mixed, rtol=0, atol=1e-12 * scale)


@each_path
def test_flow_times_are_float64_whatever_the_model_times_are(path: Path) -> None:
    m = path.model_times(times_on(path, 0, count=3))
    times = path.flow_times(m.float())
    assert times.dtype == torch.float64
    assert torch.equal(times, path.flow_times(m.float().double()))


@each_path
@each_seed(2)
def test_the_networks_clock_is_strictly_monotone(path: Path, seed: int) -> None:
    gaps = path.model_times(times_on(path, seed)).diff()
    reverse = isinstance(path, FlowPath) and path.reverse
    assert bool((gaps < 0).all() if reverse else (gaps > 0).all())


@each_path
@each_seed(1)
def test_gradients_pass_through_the_networks_clock(path: Path, seed: int) -> None:
    t = times_on(path, seed)[1:-2].requires_grad_()
    (slope,) = torch.autograd.grad(path.model_times(t).sum(), t)
    up, down = (t.detach() * factor for factor in (1 + 1e-8, 1 - 1e-8))
    measured = (path.model_times(up) - path.model_times(down)) / (up - down)
    assert float((slope / measured - 1).abs().median()) < 1e-5  # knots are kinks


@each_path
@each_seed(1)
def test_a_path_survives_json(path: Path, seed: int) -> None:
    assert None not in path.to_dict().values()
    text = json.dumps(path.to_dict(), allow_nan=False)
    loaded = path_from_dict(json.loads(text))
    assert loaded == path
    assert hash(loaded) == hash(path)
    t = times_on(path, seed)
    assert torch.equal(loaded.model_times(t), path.model_times(t))


@each_path
def test_a_time_the_network_does_not_know_is_refused_by_name(path: Path) -> None:
    first, last = path.span
    for t in (first - 1e-3, last + 1e-3, math.nan):
        with pytest.raises(ValueError, match=f"^times: .* the {path.name} network knows, .* got "):
            path.model_times(tensor((first + last) / 2, t))


@each_path
def test_the_ends_may_be_rounded_to_float32(path: Path) -> None:
    ends = tensor(*path.span)
    exact, rounded = path.model_times(ends), path.model_times(ends.float().double())
    torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@each_path
@each_seed(1)
def test_sigma_is_beta_over_alpha_except_on_a_flow(path: Path, seed: int) -> None:
    t = times_on(path, seed)
    alpha, beta = path.alpha_beta(t)
    sigmas = path.sigmas(t)
    expected = t if isinstance(path, FlowPath) else beta / alpha
    torch.testing.assert_close(sigmas, expected, rtol=1e-12, atol=0)
    assert sigmas.data_ptr() != t.data_ptr()  # the grid itself is not handed out


@each_path
@each_seed(1)
def test_noise_starts_as_hosts_start_it(path: Path, seed: int) -> None:
    """Unscaled in the coordinates of VP and flow models, of the size sigma in those of VE."""
    for t in times_on(path, seed, count=5):
        alpha, beta = path.alpha_beta(t)
        host = float(beta) if isinstance(path, VEPath) else 1.0
        expected = host / float(alpha + beta)
        assert path.noise_scale(float(t)) == pytest.approx(expected, rel=1e-12)


@each_path
def test_a_path_is_frozen(path: Path) -> None:
    field = dataclasses.fields(path)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(path, field, 0.5)


# --- each kind ----------------------------------------------------------------------------------


def test_the_clocks_of_a_flow() -> None:
    t = tensor(0, 0.25, 1)
    assert FlowPath().model_times(t).tolist() == [0, 0.25, 1]
    assert FlowPath(1000.0).model_times(t).tolist() == [0, 250, 1000]
    assert FlowPath(1000.0, reverse=True).model_times(t).tolist() == [1000, 750, 0]
    alpha, beta = FlowPath(1000.0, reverse=True).alpha_beta(t)
    assert (alpha.tolist(), beta.tolist()) == ([1, 0.75, 0], [0, 0.25, 1])


def test_the_clocks_of_ve() -> None:
    sigmas = tensor(0.002, 0.5, 1, 80)
    t = sigmas / (1 + sigmas)
    alpha, beta = VEPath().alpha_beta(t)
    assert torch.equal(alpha, torch.ones_like(t))
    torch.testing.assert_close(beta, sigmas, rtol=1e-12, atol=0)
    torch.testing.assert_close(VEPath().model_times(t), sigmas, rtol=1e-12, atol=0)
    log = VEPath(clock="log").model_times(t)
    torch.testing.assert_close(log, sigmas.log() / 4, rtol=1e-12, atol=1e-15)


@each_seed(1)
@pytest.mark.parametrize("path", [*VP_PATHS.values(), *CONTINUOUS], ids=repr)
def test_vp_preserves_the_variance(path: Path, seed: int) -> None:
    alpha, beta = path.alpha_beta(times_on(path, seed))
    one = torch.ones_like(alpha)
    torch.testing.assert_close(alpha**2 + beta**2, one, rtol=0, atol=1e-14)


@each_vp_path
def test_the_timesteps_have_the_published_noise(path: VPPath) -> None:
    bar = published(path)
    alpha, beta = np.sqrt(bar), np.sqrt(1 - bar)
    knots = torch.from_numpy((beta / (alpha + beta)).astype(np.float64))
    torch.testing.assert_close(path.knots, knots, rtol=1e-11, atol=0)
    expected = torch.from_numpy(bar.astype(np.float64))
    torch.testing.assert_close(alphas_cumprod(path), expected, rtol=1e-10, atol=0)


@each_vp_path
def test_whole_timesteps_are_the_knots_exactly(path: VPPath) -> None:
    """A network that looks timesteps up in a table would cut 998.9999 off to 998."""
    timesteps = torch.arange(path.train_steps, dtype=torch.float64)
    assert torch.equal(path.flow_times(timesteps), path.knots)
    assert torch.equal(path.model_times(path.knots), timesteps)
    for m in (0, 1, path.train_steps // 2, path.train_steps - 1):  # by itself, too
        assert path.model_times(path.knots[m]).item() == m
        assert path.flow_times(timesteps[m]).item() == path.knots[m].item()


@each_vp_path
def test_between_timesteps_log_sigma_is_linear(path: VPPath) -> None:
    m = torch.arange(path.train_steps - 2, dtype=torch.float64)
    levels = path.knots.logit()[:-1]
    for weight in (0.25, 0.5):
        expected = torch.lerp(levels[:-1], levels[1:], weight)
        torch.testing.assert_close(path.flow_times(m + weight).logit(), expected)


@pytest.mark.parametrize("timesteps", [-1.0, 999.5, 1000.0, math.nan])
def test_a_timestep_that_was_not_trained_is_refused(timesteps: float) -> None:
    with pytest.raises(ValueError, match=r"^timesteps: expected 0 to 999, got "):
        VPPath().flow_times(tensor(5, timesteps))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_ends_at_pure_noise_exactly(betas: str) -> None:
    path = VPPath(betas, zero_terminal_snr=True)
    assert path.span[1] == 1.0
    assert [float(value) for value in path.alpha_beta(path.knots[-1])] == [0.0, 1.0]
    assert path.model_times(tensor(1.0)).tolist() == [999.0]
    assert path.flow_times(tensor(999.0)).tolist() == [1.0]
    # The first timestep keeps its noise.
    torch.testing.assert_close(path.knots[0], VPPath(betas).knots[0], rtol=1e-10, atol=0)
    between = path.model_times(torch.linspace(float(path.knots[-2]), 1, 50, dtype=torch.float64))
    assert between[0] == 998
    assert bool((between.diff() >= 0).all())


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_alphas_cumprod_can_be_given_as_they_are(kind: Any) -> None:
    values = [0.9, 0.5, 0.1, 0.0]
    path = VPPath(alphas_cumprod=kind(values))
    assert (path.train_steps, path.alphas_cumprod) == (4, pytest.approx(values, abs=1e-7))
    torch.testing.assert_close(alphas_cumprod(path), tensor(*values), rtol=1e-6, atol=0)
    assert path.span[1] == 1.0


def test_alphas_cumprod_go_before_the_recipe() -> None:
    recipe = VP_PATHS["linear"]
    path = VPPath(zero_terminal_snr=True, alphas_cumprod=alphas_cumprod(recipe))
    torch.testing.assert_close(path.knots, recipe.knots, rtol=1e-11, atol=0)


@pytest.mark.parametrize("path", CONTINUOUS, ids=repr)
def test_the_vp_sde_has_the_published_noise(path: VPContinuousPath) -> None:
    """``alpha_bar(s) = exp(-int beta)``, with beta linear from ``beta_min`` to ``beta_max``."""
    s = np.linspace(path.first, 1, 50).astype(WIDE)
    slope = WIDE(path.beta_max) - WIDE(path.beta_min)
    bar = np.exp(-(WIDE(path.beta_min) * s + slope * s**2 / 2))
    alpha, beta = np.sqrt(bar), np.sqrt(-np.expm1(np.log(bar)))
    expected = torch.from_numpy((beta / (alpha + beta)).astype(np.float64))
    times = path.flow_times(torch.from_numpy((path.scale * s).astype(np.float64)))
    torch.testing.assert_close(times, expected, rtol=1e-12, atol=1e-15)
    assert path.span == (pytest.approx(float(expected[0])), pytest.approx(float(expected[-1])))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    ("betas", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_diffusers_has_the_same_noise(
    betas: str, theirs: str, kind: str, zero_terminal_snr: bool
) -> None:
    ends = {} if betas == "linear" else {"beta_start": 0.00085, "beta_end": 0.012}
    scheduler = getattr(pytest.importorskip("diffusers"), kind)(
        beta_schedule=theirs, rescale_betas_zero_snr=zero_terminal_snr, **ends
    )
    path = VPPath(betas, zero_terminal_snr=zero_terminal_snr)
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(alphas_cumprod(path), expected, rtol=1e-4, atol=0)


# --- what is no path ----------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("flow", {"scale": 0}, "scale: expected a number between 0.0 and inf, got 0"),
    ("flow", {"scale": -1.0}, "scale: expected a number between 0.0 and inf, got -1.0"),
    ("flow", {"scale": math.inf}, "scale: expected .* got inf"),
    ("flow", {"scale": True}, "scale: expected .* got True"),
    ("flow", {"scale": 10**400}, "scale: "),
    ("flow", {"reverse": "no"}, "reverse: "),
    ("flow", {"reverse": {}}, "reverse: "),
    ("vp", {"betas": "sigmoid"}, r"betas: expected one of linear, .*got 'sigmoid'"),
    ("vp", {"betas": ["linear"]}, "betas: expected one of"),
    ("vp", {"beta_start": 0.0}, "beta_start: expected a number between 0 and 1, got 0.0"),
    ("vp", {"beta_end": 1}, "beta_end: expected a number between 0 and 1, got 1"),
    ("vp", {"beta_end": math.nan}, "beta_end: expected a number between 0 and 1, got nan"),
    ("vp", {"beta_end": "0.1"}, "beta_end: expected a number between 0 and 1, got '0.1'"),
    ("vp", {"train_steps": 1}, "train_steps: expected 2 to 1000000, got 1"),
    ("vp", {"train_steps": 10**15}, "train_steps: expected 2 to 1000000, got 10"),
    ("vp", {"train_steps": 1e3}, "train_steps: expected a whole number, .* got 1000.0"),
    ("vp", {"train_steps": True}, "train_steps: expected a whole number, .* got True"),
    ("vp", {"zero_terminal_snr": "no"}, "zero_terminal_snr: "),
    ("vp", {"alphas_cumprod": 0.5}, "alphas_cumprod: expected 2 or more numbers, got 0.5"),
    ("vp", {"alphas_cumprod": [0.5]}, "alphas_cumprod: expected 2 or more numbers, got"),
    ("vp", {"alphas_cumprod": {"0": 0.5}}, "alphas_cumprod: expected 2 or more numbers, got"),
    ("vp", {"alphas_cumprod": [[0.9], [0.5]]}, "alphas_cumprod: expected 2 or more numbers"),
    ("vp", {"alphas_cumprod": ["0.9", "0.5"]}, "alphas_cumprod: "),
    ("vp", {"alphas_cumprod": [10**400, 0.5]}, "alphas_cumprod: "),
    ("vp", {"alphas_cumprod": [0.9, math.nan]}, "alphas_cumprod: expected alphas_cumprod falling"),
    ("vp", {"alphas_cumprod": [1.0, 0.5]}, "alphas_cumprod: .*strictly from below 1"),
    (
        "vp",
        {"alphas_cumprod": [0.5, 0.5]},
        "alphas_cumprod: expected alphas_cumprod falling strictly",
    ),
    (
        "vp",
        {"alphas_cumprod": [0.5, -0.1]},
        "alphas_cumprod: expected alphas_cumprod falling strictly",
    ),
    ("vp_continuous", {"beta_min": 0}, "beta_min: expected a number between 0.0 and inf, got 0"),
    ("vp_continuous", {"beta_max": 0.1}, "beta_max: expected a number between 0.1 and inf, got"),
    ("vp_continuous", {"beta_max": 10**400}, "beta_max: "),
    ("vp_continuous", {"scale": None}, "scale: expected a number between 0.0 and inf, got None"),
    ("vp_continuous", {"first": 1}, "first: expected a number between 0 and 1, got 1"),
    ("vp_continuous", {"first": -0.1}, "first: expected a number between 0 and 1, got -0.1"),
    ("vp_continuous", {"first": False}, "first: "),
    ("ve", {"sigma_min": 0}, "sigma_min: expected a number between 0.0 and inf, got 0"),
    ("ve", {"sigma_max": 0.002}, "sigma_max: expected a number between 0.002 and inf, got 0.002"),
    ("ve", {"sigma_max": 10**400}, "sigma_max: "),
    ("ve", {"clock": "ln"}, r"clock: expected one of sigma, log, got 'ln'"),
]


@pytest.mark.parametrize(("kind", "attributes", "message"), BAD)
def test_a_bad_attribute_is_refused_by_name(
    kind: str, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        PATHS[kind](**attributes)
    with pytest.raises(ValueError, match=f"^path: {message}"):
        path_from_dict({"name": kind} | attributes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "expected a name among .*'flow', 'vp', .* got None"),
        ("flow", "expected a name among .* got 'flow'"),
        (["flow"], r"expected a name among .* got \['flow'\]"),
        ({}, "expected a name among .* got {}"),
        ({"name": "warp"}, "expected a name among .* got {'name': 'warp'}"),
        ({"name": None}, "expected a name among"),
        ({"name": []}, "expected a name among"),
        ({"name": {"name": "flow"}}, "expected a name among"),
        ({"name": "ve", "rho": 7}, "'ve' has no attribute 'rho'; it has .*sigma_max"),
        ({"name": "vp", "knots": [0.1, 0.9]}, "'vp' has no attribute 'knots'"),
        ({"name": "flow", 1: 2}, "'flow' has no attribute 1"),
        ({"name": "ve", "sigma_max": {"name": "ve"}}, "sigma_max: expected a number"),
    ],
)
def test_what_stands_for_no_path_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^path: {message}"):
        path_from_dict(values)


@pytest.mark.parametrize(
    ("name", "field"), [(k.name, f.name) for k in PATHS.values() for f in dataclasses.fields(k)]
)
def test_nothing_in_a_file_is_worse_than_a_value_error(name: str, field: str) -> None:
    values = ["x", [], [[1]], {}, {"name": "flow"}, -1, 1e999, math.nan, 10**400]
    values += [None] if field not in ("alphas_cumprod", "beta_start", "beta_end") else []
    for value in values:
        with pytest.raises(ValueError, match=f"^path: {field}: "):
            path_from_dict({"name": name, field: value})
