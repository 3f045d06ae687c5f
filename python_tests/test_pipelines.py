"""Real pipelines as models: what they say is what the pipeline itself would have done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import oss_ext as oss
from driver_cases import dp_search, each_seed, one_thread  # noqa: F401
from oss_ext.models import from_pipeline
from oss_ext.models.evaluation import Evaluator
from pipeline_runs import Wrapped, first_state, of_items, own_latents, quiet, reloaded
from pipelines import CASES, PROMPTS, Case, stable_diffusion_xl

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:diffusers")

TEACHER_STEPS = 12
SEED_STRIDE = 1_000_000  # of `noise`: sample b has the generator of seed 1_000_000 seed + b


@dataclass(frozen=True)
class Searched:
    """A pipeline that was saved and loaded, searched from its own noise of seed 0."""

    name: str
    made: Case
    case: Case
    model: Any
    trajectory: oss.Trajectory
    schedule: oss.Schedule

    @property
    def is_flow(self) -> bool:
        return self.model.host.state == "flow"

    def in_host_terms(self, x: Tensor, t: float) -> Tensor:
        return x * self.model.host.scale(t)


@pytest.fixture(scope="module", params=CASES)
def searched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Searched]:
    made = CASES[request.param]()
    case = reloaded(made, Path(tmp_path_factory.mktemp(request.param)))
    model = from_pipeline(case.pipe, **case.call, num_inference_steps=TEACHER_STEPS)
    trajectory = oss.teacher(model, model.noise(PROMPTS, seed=0), steps=TEACHER_STEPS)
    schedule = dp_search(model, trajectory, steps=4, start="free").schedule(4)
    yield Searched(request.param, made, case, model, trajectory, schedule)
    model.close()


def assert_close(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """To ``bound``, relative to the largest value expected."""
    assert got.shape == expected.shape
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"relative error {error:.2e}"


def velocities(model: Any, x: Tensor, t: float = 0.6) -> Tensor:
    return Evaluator(model, len(x)).at(x, t)


def states(model: Any, samples: int, seed: int) -> Tensor:
    return torch.randn(samples, *model.shape, generator=torch.Generator().manual_seed(seed))


# --- every pipeline -----------------------------------------------------------------------------


def test_the_weights_come_back_from_safetensors_files(searched: Searched) -> None:
    modules = {
        name: part for name, part in searched.made.pipe.components.items() if hasattr(part, "to")
    }
    assert {"vae"} < modules.keys()
    for name, module in modules.items():
        before, after = module.state_dict(), getattr(searched.case.pipe, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert any(bool(value.ne(0).any()) for value in before.values())


def test_a_model_has_the_shape_and_name_of_its_pipeline(searched: Searched) -> None:
    model = searched.model
    assert model.shape == searched.case.state
    assert model.name == type(searched.case.pipe).__name__
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.one_time_per_call
    assert model.slots == PROMPTS


def test_the_teacher_is_the_pipelines_own_run(searched: Searched) -> None:
    call = searched.case.call | {"num_inference_steps": TEACHER_STEPS}
    own = own_latents(searched.case.pipe, call)
    trajectory = searched.trajectory
    ended = searched.in_host_terms(trajectory.final, float(trajectory.times[0]))
    assert_close(ended, own.view_as(ended))


def test_the_teacher_takes_the_pipelines_own_steps(searched: Searched) -> None:
    scheduler = searched.model._scheduler
    mu = {} if searched.model.mu is None else {"mu": searched.model.mu}
    assert bool(mu) == bool(scheduler.config.get("use_dynamic_shifting", False))
    left_out = TEACHER_STEPS * (1 - searched.case.call.get("strength", 1.0))
    assert searched.trajectory.steps == TEACHER_STEPS - int(left_out)
    if mu:
        return  # pipelines then hand in sigmas of their own; the run above compares them
    scheduler.set_timesteps(TEACHER_STEPS)
    told = searched.model.host.timesteps(searched.trajectory.times[1:].flip(0))
    assert told.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)


def test_an_attached_schedule_ends_where_the_search_said(searched: Searched) -> None:
    trajectory, schedule, pipe = searched.trajectory, searched.schedule, searched.case.pipe
    assert schedule.steps == 4
    promised = oss.sample(searched.model, trajectory.noise, schedule)
    promised = searched.in_host_terms(promised, schedule.times[-1])
    call = searched.case.call | ({"strength": 1.0} if "strength" in searched.case.call else {})
    with oss.export.attach(schedule, pipe):
        got = own_latents(pipe, call).view_as(promised)
    if searched.is_flow:
        assert torch.equal(got, promised)
    else:
        assert_close(got, promised)


@each_seed(1)
def test_noise_is_what_the_pipeline_starts_from(searched: Searched, seed: int) -> None:
    model, call = searched.model, searched.case.call
    call = call | {"num_inference_steps": TEACHER_STEPS}
    seeds = [SEED_STRIDE * seed + b for b in range(PROMPTS)]
    state, timestep = first_state(searched.case.pipe, call, seeds)
    start = float(searched.trajectory.times[-1])
    noise = searched.in_host_terms(model.noise(PROMPTS, seed), start)
    assert_close(noise, state[:PROMPTS].view_as(noise), 0 if searched.is_flow else 1e-6)
    told = float(model.host.timesteps(torch.tensor([start], dtype=torch.float64)))
    assert told == pytest.approx(timestep, abs=1e-3)


@each_seed(1)
def test_samples_of_noise_depend_on_seed_and_number_alone(searched: Searched, seed: int) -> None:
    model = searched.model
    few, many, other = (
        model.noise(*arguments) for arguments in [(3, seed), (5, seed), (5, seed + 1)]
    )
    assert (many.shape, many.dtype) == ((5, *model.shape), torch.float32)
    assert torch.equal(few, many[:3])
    rows = [row for noise in (many, other) for row in noise]
    equal = [torch.equal(a, b) for k, a in enumerate(rows) for b in rows[:k]]
    assert not any(equal)


# --- prompts and batches ------------------------------------------------------------------------

BATCHED = ("sd", "sd3", "dit", "pixart", "wan_two_experts")


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("batch", [1, 3])
@each_seed(1)
def test_other_batches_of_the_prompts_give_the_same_velocities(
    name: str, batch: int, seed: int
) -> None:
    case = CASES[name]()
    plain = from_pipeline(case.pipe, **case.call, num_inference_steps=9)
    model = from_pipeline(case.pipe, batch=batch, **case.call, num_inference_steps=9)
    assert model.slots == batch
    x = states(model, 5, seed)
    expected = velocities(plain, x)
    assert_close(velocities(model, x), expected)
    # The prompts do matter: what was compared was not the same for all samples.
    assert float((velocities(plain, x[:1].expand_as(x)) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("item", range(PROMPTS))
@each_seed(1)
def test_one_prompt_for_two_rows_is_that_prompt_twice(name: str, item: int, seed: int) -> None:
    case = CASES[name]()
    plain = from_pipeline(case.pipe, **case.call, num_inference_steps=9)
    one = of_items(case.call, item)
    model = from_pipeline(case.pipe, batch=2, **one, num_inference_steps=9)
    x = states(model, 3, seed)
    # Sample k of the plain model has prompt k modulo 2.
    expected = velocities(plain, x.repeat_interleave(2, 0))[item::2]
    assert_close(velocities(model, x), expected)


# --- where runs start ---------------------------------------------------------------------------


@each_seed(1)
def test_noise_can_be_asked_for_at_another_first_time(seed: int) -> None:
    case = stable_diffusion_xl()  # its scheduler scales noise by its first sigma
    model = from_pipeline(case.pipe, **case.call, num_inference_steps=10)
    first = float(model.times(10)[-1])
    noise = model.noise(2, seed)
    assert torch.equal(model.noise(2, seed, start=first), noise)
    ratio = model.host.noise_scale(0.8) / model.host.noise_scale(first)
    assert ratio < 0.99
    assert_close(model.noise(2, seed, start=0.8), ratio * noise, 1e-6)


@pytest.mark.parametrize(("steps", "taken"), [(10, 6), (5, 3), (20, 12)])
def test_image_to_image_starts_at_its_strength(steps: int, taken: int) -> None:
    case = CASES["flux_img2img"]()
    model = from_pipeline(case.pipe, **case.call, num_inference_steps=7)
    times = model.times(steps)
    assert len(times) == taken + 1
    _, timestep = first_state(case.pipe, case.call | {"num_inference_steps": steps}, range(2))
    assert 1000 * float(times[-1]) == pytest.approx(timestep, abs=1e-3)
    assert timestep < 990


@pytest.mark.parametrize(
    ("steps", "shift"),
    [
        (10, 5.0),
        (10, 12.0),
        (50, 5.0),
        (50, 12.0),
        (200, 5.0),
        (100, 12.0),
        (250, 5.0),
    ],
)
def test_no_step_is_lost_where_whole_timesteps_repeat(steps: int, shift: float) -> None:
    case = CASES["wan"]()
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    model = from_pipeline(case.pipe, scheduler=scheduler, **case.call)
    times = model.times(steps)
    scheduler.set_timesteps(steps)
    assert torch.equal(times, scheduler.sigmas.double().flip(0))


# --- what pipelines do with the time ------------------------------------------------------------


@pytest.mark.parametrize("t", [0.999, 0.88, 0.87, 0.3, 0.9, 0.1])
def test_the_expert_of_the_noise_level_is_asked(t: float) -> None:
    case = CASES["wan_two_experts"]()
    called: list[str] = []
    for name in ("transformer", "transformer_2"):
        getattr(case.pipe, name).register_forward_pre_hook(
            lambda module, args, name=name: called.append(name)
        )
    model = from_pipeline(case.pipe, **case.call, num_inference_steps=6)
    x = states(model, 2, 0)
    for other in (0.95, 0.2):  # whichever expert was asked before
        velocities(model, x, other)
        called.clear()
        velocities(model, x, t)
        expected = "transformer" if t >= case.pipe.config.boundary_ratio else "transformer_2"
        assert called == [expected, expected]  # with and without the prompt


def test_a_scheduler_can_be_given_in_place_of_the_pipelines() -> None:
    case = CASES["sd3"]()
    shifted = FlowMatchEulerDiscreteScheduler(shift=7.0)
    model = from_pipeline(case.pipe, scheduler=shifted, **case.call)
    shifted.set_timesteps(8)
    assert torch.equal(model.times(8), shifted.sigmas.double().flip(0))
    assert case.pipe.scheduler.config.shift == 3.0


# --- precision, wrappers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "sd", "wan_two_experts"])
def test_a_half_precision_pipeline_has_a_float32_teacher(name: str) -> None:
    case = CASES[name]()
    full = from_pipeline(case.pipe, **case.call, num_inference_steps=5)
    x = full.noise(2, 1)
    exact = oss.teacher(full, x, steps=5)
    full.close()
    case.pipe.to(torch.bfloat16)
    call = {
        key: value.bfloat16() if isinstance(value, Tensor) else value
        for key, value in case.call.items()
    }
    model = from_pipeline(case.pipe, **call, num_inference_steps=5)
    # In 16 bits, generators of torch 2.11 draw other numbers than in 32.
    trajectory = oss.teacher(model, x, steps=5)
    assert {model.noise(2, 1).dtype, trajectory.states.dtype, model.dtype} == {torch.float32}
    # Its states are no bfloat16 numbers: only the network rounds.
    assert not torch.equal(trajectory.final, trajectory.final.bfloat16().float())
    assert_close(trajectory.final, exact.final, 0.1)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_a_network_may_be_wrapped_in_something_that_is_no_module(name: str) -> None:
    case = CASES[name]()
    pipe = quiet(case.pipe, transformer=Wrapped(case.pipe.transformer))
    plain, model = (from_pipeline(p, **case.call) for p in (case.pipe, pipe))
    x = states(plain, 2, 5)
    assert torch.equal(velocities(model, x), velocities(plain, x))
    schedule = dp_search(model, oss.teacher(model, x, steps=4), steps=2).schedule(2)
    promised = oss.sample(model, x, schedule)
    with oss.export.attach(schedule, pipe):
        got = own_latents(pipe, case.call | {"latents": x})
    assert torch.equal(got, promised)
