"""Schedules attached to pipelines: they run as they were searched, and nothing else changes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import oss_ext as oss
from driver_cases import each_seed, one_thread  # noqa: F401
from oss_ext import export
from oss_ext.export import ExportError
from oss_ext.hosts import UnknownScheduler
from oss_ext.models import from_pipeline
from pipeline_runs import STEPS, Searched, assert_close, first_state, own_latents, search
from pipelines import CASES, LEADING, PROMPTS, SD_BETAS

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:diffusers")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.fixture(scope="module")
def sd3() -> Iterator[Searched]:
    found = search("sd3")
    yield found
    found.model.close()


# --- on and off ---------------------------------------------------------------------------------


def test_a_schedule_is_attached_for_a_block_or_until_it_is_detached(sd3: Searched) -> None:
    before = dict(vars(sd3.pipe))
    own, promised = sd3.got(num_inference_steps=3), sd3.promised()
    with export.attach(sd3.schedule, sd3.pipe) as attached:
        assert torch.equal(sd3.got(), promised)
        assert torch.equal(sd3.got(), promised)  # as often as wanted
    assert vars(sd3.pipe) == before
    assert torch.equal(sd3.got(num_inference_steps=3), own)
    attached = export.attach(sd3.schedule, sd3.pipe)
    assert torch.equal(sd3.got(), promised)
    attached.detach()
    attached.detach()
    assert vars(sd3.pipe) == before


def test_an_error_in_the_block_detaches_too(sd3: Searched) -> None:
    before = sd3.pipe.scheduler
    with pytest.raises(TypeError, match="no_such_argument"), export.attach(sd3.schedule, sd3.pipe):
        sd3.pipe(no_such_argument=1)
    assert sd3.pipe.scheduler is before


def test_what_is_attached_is_a_scheduler_of_the_same_class(sd3: Searched) -> None:
    original = sd3.pipe.scheduler
    config = dict(sd3.pipe.config)
    with export.attach(sd3.schedule, sd3.pipe):
        attached = sd3.pipe.scheduler
        assert type(attached).__name__ == type(original).__name__
        assert isinstance(attached, FlowMatchEulerDiscreteScheduler)
        assert attached.order == 1
        assert attached.config is original.config
        assert len(attached.timesteps) == sd3.schedule.steps
        assert dict(sd3.pipe.config) == config
        assert sd3.pipe.components["scheduler"] is attached


@pytest.mark.parametrize("pipe", [None, 3, torch.nn.Identity()])
def test_what_is_no_pipeline_is_refused(sd3: Searched, pipe: Any) -> None:
    message = rf"^pipe: expected a diffusers pipeline .*got {type(pipe).__name__}$"
    for attach in (export.attach, export.call_arguments):
        with pytest.raises(ValueError, match=message):
            attach(sd3.schedule, pipe, force=True)


@pytest.mark.parametrize(
    "call",
    [
        {"num_inference_steps": 1},
        {"num_inference_steps": 50},
        {"num_inference_steps": 2, "sigmas": [1.0, 0.5]},
    ],
)
def test_whatever_the_call_says_the_steps_are_the_schedules(
    sd3: Searched, call: dict[str, Any]
) -> None:
    with export.attach(sd3.schedule, sd3.pipe):
        assert torch.equal(sd3.got(**call), sd3.promised())


def test_another_schedule_takes_the_place_of_the_first() -> None:
    found = search("sd3")
    found.model.close()
    original = found.pipe.scheduler
    other = replace(found.schedule, indices=None, times=(1.0, 0.5, 0.0))
    first = export.attach(found.schedule, found.pipe)
    with export.attach(other, found.pipe):
        assert len(found.pipe.scheduler.timesteps) == 2
    assert len(found.pipe.scheduler.timesteps) == 3
    first.detach()
    assert found.pipe.scheduler is original


def test_arguments_are_those_of_the_scheduler_under_an_attached_one(sd3: Searched) -> None:
    expected = export.arguments(sd3.schedule, sd3.pipe.scheduler)
    with export.attach(replace(sd3.schedule, indices=None, times=(0.5, 0.0)), sd3.pipe):
        assert export.arguments(sd3.schedule, sd3.pipe.scheduler) == expected


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_they_are_detached_in_any_order(sd3: Searched, order: tuple[int, ...]) -> None:
    original = sd3.pipe.scheduler
    steps = [replace(sd3.schedule, indices=None, times=(*[0.9, 0.8, 0.7][:k], 0.0))
             for k in (1, 2, 3)]  # fmt: skip
    attached = [export.attach(schedule, sd3.pipe) for schedule in steps]
    there = [0, 1, 2]
    for k in order:
        assert len(sd3.pipe.scheduler.timesteps) == max(there) + 1
        attached[k].detach()
        attached[k].detach()
        there.remove(k)
    assert sd3.pipe.scheduler is original


# --- free starts --------------------------------------------------------------------------------

TRAILING = SD_BETAS | {"timestep_spacing": "trailing"}
STARTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "ddim": ("sd", lambda: None),
    "ddim_trailing": ("sd", lambda: DDIMScheduler(**TRAILING, clip_sample=False)),
    "euler": ("sdxl", lambda: None),
    "euler_trailing": ("sdxl", lambda: EulerDiscreteScheduler(**TRAILING)),
    "heun": ("sd", lambda: HeunDiscreteScheduler(**LEADING)),
    "edm": ("sd", EDMEulerScheduler),
    "pndm": ("sd", lambda: PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)),
    "unipc": ("sd", lambda: UniPCMultistepScheduler(**SD_BETAS)),
}
SCALES_NOISE = {"euler", "euler_trailing", "heun", "edm"}  # alpha = 1, beta = sigma


@pytest.mark.parametrize("start", ["free", "pinned"])
@pytest.mark.parametrize("name", STARTS)
@each_seed(1)
def test_runs_start_from_the_noise_of_the_search(name: str, start: str, seed: int) -> None:
    pipeline, scheduler = STARTS[name]
    found = search(pipeline, scheduler(), start=start)
    schedule = found.schedule
    assert schedule.starts_below == (start == "free")
    seeds = [seed, seed + 1]
    own, _ = first_state(found.pipe, found.call | {"num_inference_steps": STEPS}, seeds)
    with export.attach(schedule, found.pipe):
        state, _ = first_state(found.pipe, found.call, seeds)
    # By hand: the state in flow coordinates is the same at the teacher's and the schedule's time.
    (t_teacher, t) = schedule.teacher_times[-1], schedule.times[0]
    if name in SCALES_NOISE:
        scale = (1 - t_teacher) / (1 - t)  # 1 / (1 + sigma) = 1 - t
    else:
        norm = [(u * u + (1 - u) ** 2) ** 0.5 for u in (t_teacher, t)]
        scale = norm[0] / norm[1]  # 1 / (alpha + beta) = norm
    assert_close(state, scale * own, 2e-6)
    assert (scale == 1) == (start == "pinned")


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("start", ["free", "pinned"])
def test_runs_end_where_the_search_said(name: str, start: str) -> None:
    pipeline, scheduler = STARTS[name]
    found = search(pipeline, scheduler(), start=start)
    with export.attach(found.schedule, found.pipe):
        assert_close(found.got(), found.promised())


@pytest.mark.parametrize("name", ["dpm", "unipc"])
def test_multistep_hosts_of_flow_models_take_euler_steps(name: str) -> None:
    kind = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
    found = search("wan", kind(**FLOW, flow_shift=5.0))
    with export.attach(found.schedule, found.pipe):
        assert torch.equal(found.got(), found.promised())


SOLVED: dict[str, tuple[str, tuple[int, ...]]] = {
    "usual": ("dpmpp-2m", ()),
    "chosen": ("dpmpp-3m", (1, 2, 1)),
    "corrected": ("unipc-3", (1, 2, 1)),
    "adams": ("adams-sigma-3", (1, 2, 3)),
}


@pytest.mark.parametrize("pipeline", ["sd3", "sd", "sdxl", "wan"])
@pytest.mark.parametrize("name", SOLVED)
def test_every_multistep_solver_runs_with_its_orders(pipeline: str, name: str) -> None:
    solver, orders = SOLVED[name]
    found = search(pipeline)
    euler = found.promised()
    schedule = replace(found.schedule, solver=solver, orders=orders)
    promised = found.promised(schedule)
    assert not torch.allclose(promised, euler, rtol=1e-3)
    with export.attach(schedule, found.pipe):
        assert_close(found.got(), promised)
        assert_close(found.got(), promised)  # nothing is left of the run before
    found.model.close()


def test_orders_that_the_solver_does_not_have_are_refused(sd3: Searched) -> None:
    for orders in ((1, 3, 1), (2, 2, 1)):
        schedule = replace(sd3.schedule, solver="dpmpp-2m", orders=orders)
        with pytest.raises(
            ValueError, match=r"^orders: expected one per step, at most \[1, 2, 1\]"
        ):
            export.attach(schedule, sd3.pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_keep_the_precision_of_the_pipeline(dtype: torch.dtype) -> None:
    found = search("sd3")
    state = torch.randn(2, *found.model.shape).to(dtype)
    made = export.scheduled(found.schedule, found.pipe.scheduler)
    out = made.step(state, made.timesteps[0], state)
    assert out[0].dtype == out.prev_sample.dtype == dtype
    assert isinstance(out, tuple)
    t, t_next = found.schedule.times[:2]
    assert_close(out[0].float(), (1 + t_next - t) * state.float(), 0.01)
    assert_close(out.pred_original_sample, (1 - t) * state.float(), 0.01)


# --- what does not fit --------------------------------------------------------------------------


def test_a_schedule_of_another_pipeline_is_refused(sd3: Searched) -> None:
    other = replace(sd3.schedule, model="FluxPipeline")
    expected = r"^schedule: searched for FluxPipeline, got StableDiffusion3Pipeline; force=True"
    before = dict(vars(sd3.pipe))
    with pytest.raises(ExportError, match=expected):
        export.attach(other, sd3.pipe)
    assert vars(sd3.pipe) == before
    with export.attach(other, sd3.pipe, force=True):
        assert torch.equal(sd3.got(), sd3.promised())
    with export.attach(replace(sd3.schedule, model="my own network"), sd3.pipe):
        assert torch.equal(sd3.got(), sd3.promised())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: DDIMScheduler(clip_sample=False),
        lambda: DDIMScheduler(**SD_BETAS, clip_sample=False, rescale_betas_zero_snr=True),
        lambda: FlowMatchEulerDiscreteScheduler(),
    ],
)
def test_a_schedule_of_another_path_is_refused(scheduler: Callable[[], Any]) -> None:
    found = search("sd")
    found.model.close()
    before = vars(found.pipe)["scheduler"]
    with pytest.raises(ExportError, match=r"^schedule: searched on the path .*configured for"):
        export.attach(found.schedule, found.pipe, scheduler=scheduler())
    assert vars(found.pipe)["scheduler"] is before
    with export.attach(found.schedule, found.pipe, scheduler=scheduler(), force=True):
        assert found.got().isfinite().all()


def test_a_scheduler_that_cannot_be_read_is_refused(sd3: Searched) -> None:
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(UnknownScheduler, match=r"^scheduler: .*fresh noise"):
        export.attach(sd3.schedule, sd3.pipe, scheduler=stochastic)


def test_a_schedule_searched_with_another_scheduler_is_attached_with_it() -> None:
    case = CASES["sd"]()
    stochastic = diffusers.DDPMScheduler(**SD_BETAS, clip_sample=False)
    vars(case.pipe)["scheduler"] = stochastic
    ddim = DDIMScheduler(**SD_BETAS, clip_sample=False)
    model = from_pipeline(case.pipe, scheduler=ddim, **case.call, num_inference_steps=STEPS)
    noise = model.noise(PROMPTS, 0)
    schedule = oss.teacher(model, noise, steps=STEPS).schedule([8, 5, 2, 0])
    with export.attach(schedule, case.pipe, scheduler=ddim):
        got = own_latents(case.pipe, case.call)
    assert case.pipe.scheduler is stochastic
    assert_close(got, oss.sample(model, noise, schedule) * model.host.scale(schedule.times[-1]))
    model.close()


# --- call arguments of pipelines ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_pipelines_run_the_schedule_from_their_arguments(name: str) -> None:
    found = search(name, start="pinned")
    arguments = export.call_arguments(found.schedule, found.pipe, mu=found.model.mu)
    assert list(arguments) == ["sigmas"]
    assert_close(found.got(**arguments), found.promised())


def test_pipelines_that_take_no_sigmas_point_to_attach() -> None:
    found = search("wan")
    found.model.close()
    with pytest.raises(ExportError, match=r"^WanPipeline takes no sigmas; use export.attach"):
        export.call_arguments(found.schedule, found.pipe)


def test_pipelines_that_drop_sigmas_point_to_attach() -> None:
    found = search("flux", UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True))
    found.model.close()
    expected = r"^FluxPipeline drops sigmas when its scheduler has use_flow_sigmas; use export"
    if "sigmas" not in inspect.signature(found.pipe.scheduler.set_timesteps).parameters:
        expected = r"^UniPCMultistepScheduler takes no schedule; use export.attach"  # older ones
    with pytest.raises(ExportError, match=expected):
        export.call_arguments(found.schedule, found.pipe, mu=found.model.mu, force=True)
    with export.attach(found.schedule, found.pipe):
        assert_close(found.got(), found.promised())
    found.model.close()


def test_free_starts_of_scaled_noise_point_to_attach() -> None:
    found = search("sdxl", start="free")
    found.model.close()
    with pytest.raises(ExportError, match=r"^EulerDiscreteScheduler scales its noise .*attach"):
        export.call_arguments(found.schedule, found.pipe)
