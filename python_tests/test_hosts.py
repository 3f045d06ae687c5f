"""What schedulers mean: against the schedulers of diffusers themselves."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

from driver_cases import each_seed
from oss_ext.hosts import STATES, STOCHASTIC, Host, StandIn, read_host, stand_in
from oss_ext.noise import FlowPath, VEPath, VPPath

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:(diffusers|numpy)")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ZERO_SNR = SD | {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
SVD = SD | {
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
VP = [name for name, state in STATES.items() if state == "vp"]
VE = [name for name, state in STATES.items() if state == "ve"]
MULTISTEP = ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
             "UniPCMultistepScheduler", "DEISMultistepScheduler"]  # fmt: skip
SHIFTS = [1.0, 3.0, 5.0, 7.0, 12.0]

Config = tuple[str, dict[str, Any]]


def make(name: str, **config: Any) -> Any:
    """A scheduler of diffusers, without clipping where its class has that."""
    kind = getattr(diffusers, name)
    if "clip_sample" in inspect.signature(kind.__init__).parameters:
        config = {"clip_sample": False} | config
    if "skip_prk_steps" in inspect.signature(kind.__init__).parameters:
        config = {"skip_prk_steps": True} | config  # half steps otherwise
    try:
        return kind(**config)
    except ImportError as error:  # scipy
        pytest.skip(str(error).strip().split("\n")[0])


def set_steps(name: str, config: dict[str, Any], steps: int = 10) -> Host:
    scheduler = make(name, **config)
    scheduler.set_timesteps(steps)
    return read_host(scheduler)


CONFIGS: list[Config] = [(name, {}) for name in STATES]
CONFIGS += [
    (name, SD | {"timestep_spacing": spacing, "steps_offset": offset})
    for name in [*VP, *VE]
    for spacing in ("leading", "trailing", "linspace")
    for offset in (0, 1)
    if "timestep_spacing" in inspect.signature(getattr(diffusers, name).__init__).parameters
]
CONFIGS += [(name, COSINE) for name in VP]
CONFIGS += [
    (name, ZERO_SNR)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
]
CONFIGS += [(name, SD | {"use_karras_sigmas": True}) for name in [*MULTISTEP, *VE]]
CONFIGS += [(name, FLOW | {"flow_shift": s}) for name in MULTISTEP for s in SHIFTS]
CONFIGS += [(name, {"shift": s}) for name in STATES if "FlowMatch" in name for s in SHIFTS]
CONFIGS += [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "invert_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", SD | {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", SD | {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", SVD),
    ("EDMEulerScheduler", {"sigma_min": 0.01, "sigma_max": 300.0, "sigma_data": 1.0}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}),
    ("DDIMScheduler", SD | {"set_alpha_to_one": False, "steps_offset": 1}),
    ("PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", SD | {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", SD | {"final_sigmas_type": "sigma_min"}),
]


def label(value: Any) -> str | None:
    if not isinstance(value, dict):
        return str(value).removesuffix("Scheduler")
    return ",".join(str(v) for key, v in value.items() if not key.startswith("beta")) or "default"


each_config = pytest.mark.parametrize(("name", "config"), CONFIGS, ids=label)


def own_times(host: Host) -> tuple[Tensor, Tensor]:
    """Flow times and timesteps of every step that the scheduler takes, in order of use."""
    scheduler = host.scheduler
    told = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    if "sigmas" in vars(scheduler):
        times = host.flow_times(torch.as_tensor(scheduler.sigmas, dtype=torch.float64)[:-1])
    else:
        times = host.path.flow_times(told)
    assert len(times) == len(told)
    return times, told


# --- grids --------------------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_the_grid_is_what_the_scheduler_goes_through(
    name: str, config: dict[str, Any], steps: int
) -> None:
    host = set_steps(name, config, steps)
    grid = host.grid()
    assert (grid.diff() > 0).all()
    assert grid.dtype == torch.float64
    if "sigmas" in vars(host.scheduler):
        sigmas = torch.as_tensor(host.scheduler.sigmas, dtype=torch.float64)
        expected = sorted(set(sigmas.tolist()), reverse=True)
        got = sorted(host.sigmas(grid).tolist(), reverse=True)
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)
    else:
        told = host.timesteps(grid[1:]).tolist()
        first_level = float(host.path.flow_times(torch.zeros(1, dtype=torch.float64)))
        expected = sorted(set(host.scheduler.timesteps.tolist()))
        # A step from the level of timestep 0 to that level is none.
        if float(grid[0]) == pytest.approx(first_level, rel=1e-3):
            expected = [t for t in expected if t > 0]
        assert told == expected
    ends_early = name == "DEISMultistepScheduler" and "flow_shift" in config  # that class does
    assert 0 <= float(grid[0]) < (1 if ends_early else 0.1)


@pytest.mark.parametrize("device", ["cuda"])
def test_the_grid_is_read_wherever_the_sigmas_are(device: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.set_timesteps(10, device=device)
    assert scheduler.sigmas.device.type == device
    grid = read_host(scheduler).grid()
    assert grid.device.type == "cpu"


class Elsewhere(Tensor):
    """As a tensor on a GPU: nothing but a copy can be read by numpy."""

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_the_grid_needs_no_numpy() -> None:
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.set_timesteps(10)
    expected = read_host(scheduler).grid()
    scheduler.sigmas = scheduler.sigmas.as_subclass(Elsewhere)
    assert torch.equal(read_host(scheduler).grid(), expected)


# --- timesteps ----------------------------------------------------------------------------------

CUT_OFF = [
    (name, config)
    for name in MULTISTEP
    for config in (SD | {"use_exponential_sigmas": True}, COSINE | {"use_exponential_sigmas": True})
] + [("DPMSolverMultistepScheduler", COSINE | {"use_karras_sigmas": True})]
WHOLE = [(name, config) for name, config in CONFIGS if STATES[name] == "vp"]


def assert_timesteps_are_the_schedulers(name: str, config: dict[str, Any], steps: int) -> None:
    host = set_steps(name, config, steps)
    assert host.whole_timesteps
    times, told = own_times(host)
    wrong = host.timesteps(times) != told
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {len(told)} timesteps are others"


@pytest.mark.parametrize(("name", "config"), WHOLE, ids=label)
@pytest.mark.parametrize("steps", [10, 50, 100])
def test_whole_timesteps_are_exactly_the_schedulers(
    name: str, config: dict[str, Any], steps: int
) -> None:
    assert_timesteps_are_the_schedulers(name, config, steps)


@pytest.mark.parametrize(("name", "config"), CUT_OFF, ids=label)
def test_whole_timesteps_may_be_cut_off(name: str, config: dict[str, Any]) -> None:
    assert_timesteps_are_the_schedulers(name, config, 50)


@pytest.mark.parametrize("name", MULTISTEP[:3])
def test_whole_timesteps_are_exactly_the_schedulers_at_any_number_of_steps(name: str) -> None:
    """The sigmas of 3 equal steps are 1, 0.667 and 0.334, of which 334 and a hair less is made."""
    for steps in range(1, 130):
        for shift in (1.0, 3.0, 5.0):
            assert_timesteps_are_the_schedulers(name, FLOW | {"flow_shift": shift}, steps)


CONTINUOUS = [
    (name, config)
    for name, config in CONFIGS
    if STATES[name] != "vp" and name != "KDPM2DiscreteScheduler" and "invert_sigmas" not in config
]


@pytest.mark.parametrize(("name", "config"), CONTINUOUS, ids=label)
@pytest.mark.parametrize("steps", [10, 50])
def test_other_timesteps_are_the_schedulers_to_rounding(
    name: str, config: dict[str, Any], steps: int
) -> None:
    host = set_steps(name, config, steps)
    assert not host.whole_timesteps
    times, told = own_times(host)
    # Between two timesteps of a VE host, sigmas are interpolated by some linearly, by us in log.
    bound = {"flow": 5e-5, "ve": 5e-3, "edm": 1e-6}[host.state]
    assert float((host.timesteps(times) - told).abs().max()) <= bound


def test_timesteps_of_zero_terminal_snr_are_the_schedulers() -> None:
    times, told = own_times(host := set_steps("EulerDiscreteScheduler", ZERO_SNR))
    assert float((host.timesteps(times) - told).abs().max()) <= 5e-3


@pytest.mark.parametrize("steps", [3, 10])
def test_inverted_sigmas_ascend_with_the_step(steps: int) -> None:
    host = set_steps("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, steps)
    times, told = own_times(host)
    assert times.tolist() == sorted(times.tolist(), reverse=True)
    assert host.timesteps(times).tolist() == pytest.approx(told.tolist(), abs=5e-5)
    assert host.predicts == "reverse_velocity"


# --- states and steps ---------------------------------------------------------------------------

ONE_STEP: list[Config] = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "invert_sigmas": True}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"sigma_data": 1.0}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 1}),
    ("EulerDiscreteScheduler", SVD),
    ("DDIMScheduler", ZERO_SNR),
    ("DDIMScheduler", SD | {"set_alpha_to_one": False, "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 5.0, "solver_order": 1}),
    ("UniPCMultistepScheduler", FLOW | {"flow_shift": 5.0, "solver_order": 1,
                                        "disable_corrector": list(range(99))}),
]  # fmt: skip
for predicts in ("epsilon", "sample", "v_prediction"):
    of = SD | {"prediction_type": predicts}
    ONE_STEP += [
        (name, of) for name in ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
    ]
    ONE_STEP += [
        ("EulerDiscreteScheduler", of | {"timestep_spacing": spacing, "steps_offset": 1})
        for spacing in ("leading", "trailing", "linspace")
    ]
    ONE_STEP += [(name, of | {"solver_order": 1}) for name in MULTISTEP if "UniPC" not in name]
    corrector = {"disable_corrector": list(range(99))}  # its first order is then one Euler step
    ONE_STEP += [("UniPCMultistepScheduler", of | {"solver_order": 1} | corrector)]


@pytest.mark.parametrize(("name", "config"), ONE_STEP, ids=label)
@each_seed(1)
def test_an_euler_step_is_the_schedulers_own_step(
    name: str, config: dict[str, Any], seed: int
) -> None:
    host = set_steps(name, config)
    generator = torch.Generator().manual_seed(seed)
    times = host.grid().flip(0).tolist()
    steps = list(zip(host.scheduler.timesteps, times, times[1:], strict=False))
    assert len(steps) == 10
    for told, t, t_next in steps:
        x, output = torch.randn(2, 3, 8, generator=generator)
        state = host.scale(t) * x
        if hasattr(host.scheduler, "scale_model_input"):
            shown = host.scheduler.scale_model_input(state, told)
            torch.testing.assert_close(host.input_scale(t) * x, shown, rtol=1e-5, atol=1e-6)
        else:
            assert host.input_scale(t) == host.scale(t) == 1
        expected = host.scheduler.step(output, told, state, return_dict=False)[0]
        v = host.velocity(output, x, t)
        got = host.scale(t_next) * (x + (t_next - t) * v)
        assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5


@each_config
def test_the_state_is_alpha_x0_plus_beta_eps(name: str, config: dict[str, Any]) -> None:
    host = set_steps(name, config)
    for t in host.grid()[1:].tolist():
        alpha, beta = host.alpha_beta(t)
        assert beta / (alpha + beta) == pytest.approx(t, rel=1e-12)
        assert host.scale(t) == pytest.approx(alpha + beta, rel=1e-12)
        if host.state == "vp":
            assert math.hypot(alpha, beta) == pytest.approx(1, rel=1e-12)
        else:
            assert alpha == (1 - t if host.state == "flow" else 1)


@each_config
def test_noise_has_the_size_that_the_scheduler_gives_it(name: str, config: dict[str, Any]) -> None:
    host = set_steps(name, config)
    t = float(host.grid()[-1])
    own = float(getattr(host.scheduler, "init_noise_sigma", 1.0))
    # Whatever the first sigma is, EDM's noise is of the largest one.
    assert host.noise_scale(t) * host.scale(t) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("name", STATES)
def test_paths_are_those_of_the_state(name: str) -> None:
    host = read_host(make(name))
    kinds = {"flow": FlowPath, "vp": VPPath, "ve": VPPath, "edm": VEPath}
    assert host.name == name
    assert host.state == STATES[name]
    assert type(host.path) is kinds[host.state]


@pytest.mark.parametrize("name", sorted({*STATES, *STOCHASTIC}))
def test_known_schedulers_are_classes_of_diffusers(name: str) -> None:
    gone = {"LTXEulerAncestralRFScheduler", "SCMScheduler", "FlowMatchLCMScheduler"}
    assert hasattr(diffusers, name) or name in gone


def test_betas_that_no_recipe_gives_are_read_as_levels() -> None:
    betas = torch.linspace(1e-4, 0.03, 200) ** 1.1
    scheduler = make("DDIMScheduler", trained_betas=betas.tolist(), num_train_timesteps=200)
    host = read_host(scheduler)
    assert host.path.alphas_cumprod is not None
    assert host.path.train_steps == 200
    alpha, _ = host.path.alpha_beta(host.path.knots)
    torch.testing.assert_close(alpha.float() ** 2, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


# --- stand-ins ----------------------------------------------------------------------------------


class Silent(StandIn):
    def set_timesteps(self, *args: Any, **options: Any) -> None:
        super().set_timesteps(*args, **options)
        self.asked = (args, options)

    def step(self, *args: Any, **options: Any) -> str:
        return "stepped"


def state_of(scheduler: Any) -> dict[str, str]:
    return {
        name: repr(value.tolist() if isinstance(value, Tensor) else value)
        for name, value in vars(scheduler).items()
    }


@pytest.mark.parametrize("name", STATES)
def test_a_stand_in_is_the_scheduler_to_whoever_asks(name: str) -> None:
    original = make(name)
    original.set_timesteps(7)
    before, methods = state_of(original), dict(vars(type(original)))
    double = stand_in(Silent, original)
    assert type(double).__name__ == name
    assert isinstance(double, type(original))
    assert isinstance(double, Silent)
    assert double.config is original.config
    for method in ("set_timesteps", "step"):
        for ours, own in ((double, original), (type(double), type(original))):
            expected = inspect.signature(getattr(own, method))
            assert inspect.signature(getattr(ours, method)).parameters == expected.parameters
    double.set_timesteps(5)
    assert double.asked == ((5,), {})
    assert double.step(None) == "stepped"
    assert len(set(double.timesteps.tolist())) < len(set(original.timesteps.tolist()))
    assert state_of(original) == before
    assert dict(vars(type(original))) == methods
    assert read_host(double).grid().tolist() == set_steps(name, {}, 5).grid().tolist()


def test_half_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"skip_prk_steps=False takes half steps"):
        read_host(make("PNDMScheduler", skip_prk_steps=False))
