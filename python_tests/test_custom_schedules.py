"""What custom models hand on: fingerprints, noise, teacher grids and schedules on their paths."""

from __future__ import annotations

import json
import math
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oss_ext as oss
from driver_cases import SHAPE, Network, dp_search, one_thread  # noqa: F401
from oss_ext.models import Model, from_callable
from oss_ext.noise import (
    FlowPath,
    Path,
    VEPath,
    VPContinuousPath,
    VPPath,
    ddim_grid,
    flow_grid,
    karras_grid,
)

SD = VPPath()
ZERO_SNR = VPPath(zero_terminal_snr=True)
PATHS: dict[str, Path] = {
    "flow": FlowPath(),
    "flow_reverse": FlowPath(scale=1000.0, reverse=True),
    "vp": SD,
    "vp_zero_snr": ZERO_SNR,
    "vp_given": VPPath(alphas_cumprod=[0.99 * 0.9**k for k in range(40)]),
    "vp_continuous": VPContinuousPath(scale=999.0),
    "ve": VEPath(),
    "ve_log": VEPath(0.01, 40.0, clock="log"),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


class Bounded(nn.Module):
    """A smooth output whatever the clock: it knows the time as a fraction of the last one."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.network, self.last = Network(0), last

    def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return self.network(x.tanh(), t / self.last, sample)


def model_on(path: Path, predicts: str = "v", **options: Any) -> Model:
    last = path.model_times(torch.tensor(path.span, dtype=torch.float64)).abs().max()
    network = Bounded(float(last)).requires_grad_(False)
    options = {"dtype": torch.float64, "data_range": 2.0} | options
    return from_callable(network, SHAPE, path=path, predicts=predicts, **options)


# --- the fingerprint ----------------------------------------------------------------------------


def fingerprint(module: Any = None, /, **options: Any) -> str:
    options = {"path": VPPath(), "predicts": "eps", "unconditional": Network(1)} | options
    return from_callable(module or Network(0), SHAPE, **({"guidance": 2.0} | options)).fingerprint()


def test_a_fingerprint_tells_models_apart() -> None:
    variants = [
        fingerprint(),
        fingerprint(Network(2)),
        fingerprint(path=VPPath("linear")),
        fingerprint(path=VPPath(train_steps=999)),
        fingerprint(path=VPPath(zero_terminal_snr=True)),
        fingerprint(path=VPContinuousPath()),
        fingerprint(predicts="v"),
        fingerprint(guidance=2.5),
        fingerprint(guidance=1.0),
        fingerprint(unconditional=Network(2)),
        fingerprint(unconditional=None, guidance=1.0),
        fingerprint(path=VEPath(), predicts="edm"),
        fingerprint(path=VEPath(), predicts="edm", sigma_data=0.6),
        fingerprint(path=FlowPath(scale=1000.0), predicts="velocity"),
        fingerprint(path=FlowPath(scale=1000.0, reverse=True), predicts="velocity"),
        fingerprint(name="other"),
    ]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize(
    "options",
    [
        {"path": VPPath(train_steps=1000)},
        {"data_range": 3.0},
        {"dtype": torch.float64},
        {"one_time_per_call": True},
        {"fixed_batch": 8},
        {"guidance": 2},
    ],
    ids=str,
)
def test_a_fingerprint_stays_where_no_velocity_changes(options: dict[str, Any]) -> None:
    assert fingerprint(**options) == fingerprint()


@pytest.mark.parametrize(
    ("one", "other"),
    [(FlowPath(1000), FlowPath(1000.0)), (VEPath(1, 80), VEPath(1.0, 80.0))],
    ids=["flow", "ve"],
)
def test_equal_paths_have_equal_fingerprints(one: Path, other: Path) -> None:
    assert one == other
    assert fingerprint(path=one) == fingerprint(path=other)


def test_a_fingerprint_does_not_change_with_use() -> None:
    model = model_on(SD)
    before = model.fingerprint()
    oss.teacher(model, model.noise(2), steps=3)
    assert model.fingerprint() == before


# --- noise and grids ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "scale"),
    [
        (FlowPath(), 1.0),
        (FlowPath(scale=1000.0, reverse=True), 1.0),
        # Unscaled in x', of which flow coordinates are a part in alpha + beta.
        (VPPath(alphas_cumprod=[0.9, 0.36]), 1 / (0.6 + 0.8)),
        (ZERO_SNR, 1.0),
        (VEPath(), 80 / 81),
        (VEPath(0.01, 4.0, clock="log"), 0.8),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_noise_is_scaled_as_the_paths_hosts_scale_it(path: Path, scale: float) -> None:
    shape = (64, 64)
    model = from_callable(Network(0), shape, path=path, predicts="v", dtype=torch.float64)
    plain = from_callable(Network(0), shape, dtype=torch.float64).noise(4, seed=5)
    noise = model.noise(4, seed=5)
    torch.testing.assert_close(noise, scale * plain, rtol=1e-6, atol=1e-6)
    assert float(noise.std()) == pytest.approx(scale, rel=0.05)
    assert noise.dtype == torch.float64


@pytest.mark.parametrize(
    ("path", "start", "scale"),
    [
        (FlowPath(), 0.5, 1.0),
        (VPPath(alphas_cumprod=[0.64, 0.36]), 0.6 / 1.4, 1 / (0.8 + 0.6)),
        (VEPath(), 0.9, 9 / 10),
    ],
    ids=["flow", "vp", "ve"],
)
def test_noise_can_be_for_another_start(path: Path, start: float, scale: float) -> None:
    model = from_callable(Network(0), SHAPE, path=path, predicts="v", dtype=torch.float64)
    plain = from_callable(Network(0), SHAPE, dtype=torch.float64).noise(4, seed=5)
    noise = model.noise(4, seed=5, start=start)
    torch.testing.assert_close(noise, scale * plain, rtol=1e-6, atol=1e-6)


@each_path
def test_noise_of_a_sample_does_not_depend_on_the_batch(path: Path) -> None:
    model = model_on(path)
    assert torch.equal(model.noise(5, seed=3)[:2], model.noise(2, seed=3))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (FlowPath(scale=1000.0, reverse=True), flow_grid(10)),
        (SD, ddim_grid(SD, 10, "trailing")),
        (VEPath(0.01, 40.0), karras_grid(10, 0.01, 40.0)),
    ],
    ids=["flow", "vp", "ve"],
)
def test_a_model_has_the_teacher_grid_of_its_path(path: Path, expected: Tensor) -> None:
    model = model_on(path)
    assert torch.equal(model.times(10), expected)
    assert torch.equal(oss.teacher(model, model.noise(1), steps=10).times, expected)


@pytest.mark.parametrize(
    ("path", "times"),
    [
        (SD, [0.0, 0.5, 1.0]),
        (SD, [0.0, 0.01, 0.5]),
        (VEPath(), [0.0, 0.001, 0.5]),
        (VEPath(), [0.0, 0.5, 0.99]),
        (VPContinuousPath(first=1e-3), [0.0, 0.005, 0.5]),
    ],
)
def test_a_teacher_grid_that_the_network_does_not_know_is_refused(
    path: Path, times: list[float]
) -> None:
    """Before the network is asked at any of its times."""
    model = from_callable(lambda *inputs: pytest.fail("asked"), SHAPE, path=path, predicts="v")
    message = f"^times: expected flow times that the {path.name} network knows, .* got "
    with pytest.raises(ValueError, match=message):
        oss.teacher(model, model.noise(1), times=torch.tensor(times))


# --- schedules ----------------------------------------------------------------------------------


def searched(path: Path, predicts: str = "v", start: str = "pinned") -> oss.Schedule:
    model = model_on(path, predicts)
    trajectory = oss.teacher(model, model.noise(2, seed=0), steps=12)
    return dp_search(model, trajectory, 4, start=start).schedule(4)


@each_path
def test_a_schedule_comes_back_with_its_path(path: Path, tmp_path: FilePath) -> None:
    schedule = searched(path)
    assert schedule.path == path
    schedule.save(tmp_path / "schedule.json")
    loaded = oss.Schedule.load(tmp_path / "schedule.json")
    assert loaded == schedule
    assert loaded.path == path
    assert loaded.timesteps == schedule.timesteps
    model = model_on(path)
    noise = model.noise(2, seed=1)
    assert torch.equal(oss.sample(model, noise, loaded), oss.sample(model, noise, schedule))


def test_a_vp_schedule_is_in_whole_timesteps() -> None:
    """The teacher's 12 trailing timesteps, numbered from the clean end."""
    schedule = searched(SD)
    trailing = [round(k * 1000 / 12) - 1 for k in range(1, 13)]
    assert schedule.timesteps == tuple(trailing[i - 1] for i in schedule.indices[:-1])
    assert schedule.timesteps[0] == 999
    bar = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    bar = (1 - bar).cumprod(0)[[int(m) for m in schedule.timesteps]]
    assert schedule.sigmas[:-1] == pytest.approx(((1 - bar) / bar).sqrt().tolist(), rel=1e-10)
    assert schedule.sigmas[-1] == 0
    expected = float(bar[0].sqrt() + (1 - bar[0]).sqrt())
    assert schedule.initial_scale == pytest.approx(expected, rel=1e-10)


def test_a_ve_schedule_is_in_edms_sigmas() -> None:
    schedule = searched(VEPath())
    sigmas = [(80 ** (1 / 7) + i / 11 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(12)]
    expected = [sigmas[12 - i] for i in schedule.indices[:-1]]
    assert schedule.sigmas == pytest.approx([*expected, 0], rel=1e-9)
    assert schedule.timesteps == pytest.approx(expected, rel=1e-9)
    assert schedule.initial_scale == pytest.approx(81, rel=1e-9)
    log = searched(VEPath(clock="log"))
    assert log.timesteps == pytest.approx([math.log(s) / 4 for s in log.sigmas[:-1]], abs=1e-9)


def test_a_flow_schedule_is_in_its_own_times() -> None:
    schedule = searched(FlowPath(scale=1000.0, reverse=True), "reverse_velocity")
    assert schedule.sigmas == schedule.times
    assert schedule.timesteps == pytest.approx([1000 * (1 - t) for t in schedule.times[:-1]])
    assert schedule.initial_scale == 1.0


def test_a_continuous_schedule_is_in_fractions_of_the_whole() -> None:
    schedule = searched(VPContinuousPath(scale=999.0))
    expected = [999 * i / 12 for i in schedule.indices[:-1]]
    assert schedule.timesteps == pytest.approx(expected, rel=1e-9)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_a_zero_terminal_snr_model_starts_from_pure_noise() -> None:
    schedule = searched(ZERO_SNR)
    assert schedule.times[0] == 1.0
    assert schedule.timesteps[0] == 999
    assert (schedule.sigmas[0], schedule.initial_scale) == (math.inf, 1.0)
    body = json.loads(schedule.to_json(), parse_constant=no_constant)
    assert body["sigmas"][0] is None
    assert body["sigmas"][1:] == list(schedule.sigmas[1:])
    assert body["initial_scale"] == 1.0
    assert oss.Schedule.from_json(schedule.to_json()) == schedule
    model = model_on(ZERO_SNR)
    assert model.times(12)[-1] == 1.0
    assert oss.sample(model, model.noise(2, seed=1), schedule).isfinite().all()


@each_path
def test_a_schedule_is_strict_json(path: Path) -> None:
    body = json.loads(searched(path).to_json(), parse_constant=no_constant)
    assert body["path"] == json.loads(json.dumps(path.to_dict()))


def test_eps_gives_no_velocity_at_pure_noise() -> None:
    model = model_on(ZERO_SNR, "eps")
    with pytest.raises(ValueError, match=r"^predicts: 'eps' gives no velocity at pure noise"):
        oss.teacher(model, model.noise(1), steps=5)
    below = model.times(5)[:-1]
    oss.teacher(model, model.noise(1, start=float(below[-1])), times=below)


@pytest.mark.parametrize("predicts", ["velocity", "x0", "v"])
def test_other_predictions_do_at_pure_noise(predicts: str) -> None:
    assert searched(ZERO_SNR, predicts).times[0] == 1.0
