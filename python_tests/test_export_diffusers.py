"""Call arguments for diffusers: the scheduler itself ends up with exactly the schedule."""

from __future__ import annotations

import copy
import inspect
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from driver_cases import each_seed, random_times
from oss_ext import Schedule, export
from oss_ext.export import ExportError
from oss_ext.hosts import read_host
from oss_ext.noise import FlowPath, Path, VPPath, flow_grid

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:(diffusers|numpy)")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ATTACH = re.escape("use export.attach(schedule, pipe)")
TIMES = FlowPath(1000.0)


def make(teacher: Tensor, rows: list[int], path: Path = TIMES) -> Schedule:
    return Schedule.from_indices(rows, teacher.tolist(), model="m", model_hash="h", path=path)


def flow_schedule(seed: int, *, free: bool = False) -> Schedule:
    """Of an uneven teacher, which says nothing of a shift."""
    return make(random_times(seed, 12), [11 if free else 12, 9, 4, 3, 0])


def of_host(scheduler: Any, *, free: bool = False, steps: int = 20) -> Schedule:
    """A schedule on the scheduler's own grid."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    host = read_host(scheduler)
    grid = host.grid()
    return make(grid, [len(grid) - (2 if free else 1), 11, 6, 2, 0], host.path)


def state_of(scheduler: Any) -> dict[str, str]:
    return {
        name: repr(value.tolist() if isinstance(value, Tensor) else value)
        for name, value in vars(scheduler).items()
    }


def run(schedule: Schedule, scheduler: Any, **options: Any) -> tuple[Any, Any]:
    """The arguments, and the scheduler after it was given them; the original is left alone."""
    before = state_of(scheduler)
    given = export.arguments(schedule, scheduler, **options)
    assert state_of(scheduler) == before
    used = copy.deepcopy(scheduler)
    used.set_timesteps(**given, **({"mu": options["mu"]} if "mu" in options else {}))
    return given, used


def assert_has(scheduler: Any, sigmas: tuple[float, ...]) -> None:
    got = torch.as_tensor(scheduler.sigmas).double().tolist()
    assert got == pytest.approx(list(sigmas), rel=2e-6, abs=1e-9)


# --- flow ---------------------------------------------------------------------------------------

SHIFTS: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"shift": shift}, {}) for shift in (1.0, 1.15, 3.0, 5.0, 12.0)
]
SHIFTS += [
    ({"use_dynamic_shifting": True, "time_shift_type": kind, "shift": 3.0}, {"mu": mu})
    for kind in ("exponential", "linear")
    for mu in (0.5, 1.15, 2.0)
]


@pytest.mark.parametrize(("config", "options"), SHIFTS)
@pytest.mark.parametrize("free", [False, True])
@each_seed(2)
def test_flow_matching_ends_up_with_the_schedule(
    config: dict[str, Any], options: dict[str, float], free: bool, seed: int
) -> None:
    schedule = flow_schedule(seed, free=free)
    given, used = run(schedule, FlowMatchEulerDiscreteScheduler(**config), **options)
    assert list(given) == ["sigmas"]
    assert len(given["sigmas"]) == schedule.steps
    assert_has(used, schedule.sigmas)
    told = [1000 * sigma for sigma in schedule.sigmas[:-1]]
    assert used.timesteps.tolist() == pytest.approx(told, rel=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@each_seed(1)
def test_inverted_sigmas_end_up_with_the_schedule(shift: float, seed: int) -> None:
    schedule = replace(flow_schedule(seed), path=FlowPath(1000.0, reverse=True))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=True)
    _, used = run(schedule, scheduler)
    inverted = [1 - t for t in schedule.times]
    assert used.sigmas.tolist() == pytest.approx(inverted, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
@each_seed(1)
def test_stretched_sigmas_end_up_with_a_schedule_that_fits(
    config: dict[str, Any], seed: int
) -> None:
    options = {"mu": 1.2} if "use_dynamic_shifting" in config else {}
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1, **config)
    schedule = flow_schedule(seed)
    with pytest.raises(ExportError, match=rf"last step starts at 0.1, but .*; {ATTACH}"):
        run(schedule, scheduler, **options)
    fitting = replace(schedule, indices=None, times=(*(t for t in schedule.times if t > 0.1), 0.1))
    fitting = replace(fitting, times=(*fitting.times, 0.0))
    _, used = run(fitting, scheduler, **options)
    assert_has(used, fitting.sigmas)


unipc_takes_sigmas = pytest.mark.skipif(
    "sigmas" not in inspect.signature(UniPCMultistepScheduler.set_timesteps).parameters,
    reason="UniPC of this diffusers takes no schedule",
)


@unipc_takes_sigmas
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("free", [False, True])
@each_seed(2)
def test_unipc_ends_up_with_the_schedule(shift: float, free: bool, seed: int) -> None:
    """Also from a first sigma of exactly 1, of which UniPC takes 1e-6 off: for it a step as long
    as any other, and ours is from infinitely far."""
    schedule = replace(flow_schedule(seed, free=free), solver="unipc-2")
    assert (schedule.sigmas[0] == 1) != free
    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=shift)
    if not free:
        with pytest.raises(
            ExportError, match=rf"takes other steps than the 'unipc-2'.*or {ATTACH}"
        ):
            run(schedule, scheduler)
    given, used = run(schedule, scheduler, force=not free)
    assert isinstance(given["sigmas"], np.ndarray)  # which it multiplies
    assert_has(used, schedule.sigmas)
    assert used.timesteps.tolist() == [
        int(1000 * (sigma - 1e-6 * (sigma == 1))) for sigma in schedule.sigmas[:-1]
    ]


@unipc_takes_sigmas
@pytest.mark.parametrize("mu", [0.5, 2.0])
@each_seed(1)
def test_unipc_with_a_shift_by_resolution(mu: float, seed: int) -> None:
    scheduler = UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True)
    schedule = replace(flow_schedule(seed, free=True), solver="unipc-2")
    _, used = run(schedule, scheduler, mu=mu)
    assert_has(used, schedule.sigmas)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_shift_by_resolution_needs_mu(kind: Any) -> None:
    flow = FLOW if kind is UniPCMultistepScheduler else {}
    scheduler = kind(use_dynamic_shifting=True, **flow)
    with pytest.raises(ExportError, match=rf"^mu: .*shifts by resolution.*{ATTACH}$"):
        export.arguments(flow_schedule(1), scheduler)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("mu", [1e9, -1e9, math.nan, math.inf, "1"])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_mu_is_a_number_that_leaves_some_times(kind: str, mu: Any, force: bool) -> None:
    if (kind, mu) == ("linear", 1e9):
        mu = 0.0
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    with pytest.raises(ValueError, match=r"^mu: expected a (positive )?number"):
        export.arguments(flow_schedule(1), scheduler, mu=mu, force=force)


# --- the shift that was searched at -------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_a_teacher_of_another_shift_is_refused(shift: float) -> None:
    schedule = make(flow_grid(20, shift), [20, 12, 5, 0])
    run(schedule, FlowMatchEulerDiscreteScheduler(shift=shift))
    other = FlowMatchEulerDiscreteScheduler(shift=5.0)
    with pytest.raises(ExportError, match=rf"^schedule: searched at a time shift of {shift:g}, "):
        run(schedule, other)
    given = export.arguments(schedule, other, force=True)
    other.set_timesteps(**given)
    assert_has(other, schedule.sigmas)


def test_a_teacher_of_another_resolution_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule = make(flow_grid(20, mu=1.15), [20, 12, 5, 0])
    run(schedule, scheduler, mu=1.15)
    with pytest.raises(ExportError, match=r"^schedule: searched at a time shift of 3.158, "):
        run(schedule, scheduler, mu=0.5)


@pytest.mark.parametrize("steps", [20, 200])
def test_a_stretched_teacher_has_the_shift_of_its_scheduler(steps: int) -> None:
    """LTX-Video at its largest resolution."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    scheduler.set_timesteps(steps, mu=2.05)
    made = export.scheduled(make(read_host(scheduler).grid(), [steps, 9, 1, 0]), scheduler)
    made.set_timesteps(steps, mu=2.05)
    assert_has(made, made.schedule.sigmas)


# --- VP and VE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 50])
def test_euler_ends_up_with_the_schedule(spacing: str, steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing=spacing, steps_offset=1)
    schedule = of_host(scheduler, steps=steps)
    given, used = run(schedule, scheduler)
    assert given["sigmas"][-1] == 0
    assert_has(used, schedule.sigmas)
    assert used.timesteps.tolist() == pytest.approx(schedule.timesteps, abs=5e-3)
    # It starts where the search did.
    host = read_host(used)
    first = host.scale(schedule.times[0]) * host.noise_scale(schedule.times[0])
    assert float(used.init_noise_sigma) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(("kind", "config", "solver"), [
    (DPMSolverMultistepScheduler, {}, "dpmpp-2m"),
    (DPMSolverMultistepScheduler, {"solver_order": 3}, "dpmpp-3m"),
    (DPMSolverMultistepScheduler, {"solver_order": 1}, "euler"),
    (HeunDiscreteScheduler, {}, "heun-sigma"),
])  # fmt: skip
def test_hosts_of_whole_timesteps_end_up_with_a_schedule_of_whole_timesteps(
    kind: Any, config: dict[str, Any], solver: str
) -> None:
    scheduler = kind(**SD, **config)
    teacher = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")  # whole timesteps
    schedule = replace(of_host(teacher), solver=solver)
    given, used = run(schedule, scheduler)
    expected = [round(t) for t in schedule.timesteps]
    assert given == {"timesteps": expected}
    assert all(type(t) is int for t in given["timesteps"])
    assert list(dict.fromkeys(used.timesteps.tolist())) == expected
    sigmas = list(dict.fromkeys(used.sigmas.tolist()))
    assert sigmas == pytest.approx(list(schedule.sigmas), rel=2e-6)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_hosts_of_whole_timesteps_refuse_others(kind: Any) -> None:
    path = VPPath()
    knots = path.flow_times(torch.tensor([20.0, 310.5, 980.0], dtype=torch.float64))
    schedule = make(torch.cat([torch.zeros(1), knots]).double(), [3, 2, 1, 0], path)
    expected = rf"takes whole timesteps only: at step 1 .*search on whole timesteps.*, or {ATTACH}"
    with pytest.raises(ExportError, match=expected):
        run(schedule, kind(**SD))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_free_start_is_refused_by_hosts_that_scale_their_noise(kind: Any) -> None:
    schedule = of_host(EulerDiscreteScheduler(**SD, timestep_spacing="trailing"), free=True)
    expected = rf"scales its noise by its first sigma.*; {ATTACH}, or search with start='pinned'"
    with pytest.raises(ExportError, match=expected):
        run(schedule, kind(**SD, timestep_spacing="trailing"))


def test_a_free_start_is_refused_by_hosts_of_unit_noise() -> None:
    schedule = of_host(EulerDiscreteScheduler(**SD, timestep_spacing="trailing"), free=True)
    with pytest.raises(ExportError, match=rf"noise of variance 1, but .*; {ATTACH}, or search"):
        run(schedule, DPMSolverMultistepScheduler(**SD))


def test_other_noise_than_the_teachers_is_refused() -> None:
    """``trailing`` starts from sigma times the noise, networks of one's own from the path's."""
    path = VPPath()
    times = path.flow_times(torch.tensor([20.0, 310.0, 700.0], dtype=torch.float64))
    schedule = make(torch.cat([torch.zeros(1), times]).double(), [3, 2, 1, 0], path)
    trailing = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    with pytest.raises(
        ExportError, match=r"Euler\w+ starts from \d\.\d% less noise than the teacher"
    ):
        run(schedule, trailing)
    assert run(schedule, trailing, force=True)
    _, used = run(schedule, EulerDiscreteScheduler(**SD, timestep_spacing="leading"))
    assert_has(used, schedule.sigmas)


# --- what takes no schedule ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (DDIMScheduler, SD | {"clip_sample": False}),
        (PNDMScheduler, SD | {"skip_prk_steps": True}),
        (UniPCMultistepScheduler, SD),
        (DEISMultistepScheduler, SD),
        (KDPM2DiscreteScheduler, SD),
        (EDMEulerScheduler, {}),
        (FlowMatchHeunDiscreteScheduler, {}),
        (DEISMultistepScheduler, FLOW),
        (DPMSolverSinglestepScheduler, FLOW),
        (DPMSolverMultistepScheduler, FLOW),
    ],
)
def test_hosts_that_take_no_schedule_point_to_attach(kind: Any, config: dict[str, Any]) -> None:
    scheduler = kind(**config)
    schedule = of_host(scheduler, steps=15)
    with pytest.raises(ExportError, match=rf"^{kind.__name__} .*{ATTACH}$"):
        run(schedule, scheduler)


@pytest.mark.parametrize("flag", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (FlowMatchEulerDiscreteScheduler, {}),
        (EulerDiscreteScheduler, SD),
        (UniPCMultistepScheduler, FLOW),
        (DPMSolverMultistepScheduler, SD),
    ],
)
def test_hosts_that_respace_are_refused(flag: str, kind: Any, config: dict[str, Any]) -> None:
    try:
        scheduler = kind(**config, **{f"use_{flag}_sigmas": True})
    except ImportError:
        pytest.skip("needs scipy")
    schedule = replace(flow_schedule(1), path=read_host(scheduler).path)
    schedule = replace(schedule, indices=None, times=(0.9, 0.5, 0.1), teacher_times=(0.1, 0.5, 0.9))
    with pytest.raises(ExportError, match=rf"use_{flag}_sigmas=True respaces .*; {ATTACH}"):
        run(schedule, scheduler)


def test_a_schedule_that_does_not_end_clean_is_refused() -> None:
    above, _ = flow_schedule(1).split(at=float(flow_schedule(1).times[2]))
    with pytest.raises(ExportError, match=rf"would make \[1.0, .*, 0.0\] of it; {ATTACH}"):
        run(above, FlowMatchEulerDiscreteScheduler())


def test_a_shift_that_was_set_later_counts() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(7.0)
    schedule = flow_schedule(1)
    _, used = run(schedule, scheduler)
    assert_has(used, schedule.sigmas)


# --- schedules of something else ----------------------------------------------------------------


def test_a_schedule_of_another_path_is_refused() -> None:
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    others = [
        of_host(EulerDiscreteScheduler(timestep_spacing="trailing")),  # other betas
        flow_schedule(1),
        of_host(EDMEulerScheduler()),
    ]
    for schedule in others:
        with pytest.raises(ExportError, match=r"^schedule: searched on the path .*configured for"):
            run(schedule, scheduler)
    given = export.arguments(others[0], scheduler, force=True)
    assert given["sigmas"] == pytest.approx(list(others[0].sigmas))
    with pytest.raises(ExportError, match=r"^schedule: searched on the path"):
        run(flow_schedule(1), FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_the_recipe_of_the_betas_does_not_matter() -> None:
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    schedule = of_host(scheduler)
    bars = tuple(scheduler.alphas_cumprod.double().tolist())
    run(replace(schedule, path=VPPath(alphas_cumprod=bars)), scheduler)


def test_the_resolution_shift_is_what_pipelines_compute() -> None:
    """FLUX at 1024 x 1024: 4096 tokens, 1.15."""
    shift = read_host(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)).shift(1.15)
    assert shift == pytest.approx(math.exp(1.15))
