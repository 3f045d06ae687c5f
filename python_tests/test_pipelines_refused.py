"""Pipelines and call arguments that a search cannot follow are refused, with the reason."""

from __future__ import annotations

import copy
import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

import oss_ext as oss
from driver_cases import one_thread  # noqa: F401
from oss_ext.models import from_pipeline
from oss_ext.models.evaluation import Evaluator
from pipelines import CASES, SD_BETAS

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:(diffusers|numpy)")


def make(pipe: Any, call: dict[str, Any]) -> Any:
    """A model, closed: only whether it can be made is asked here."""
    model = from_pipeline(pipe, **call)
    model.close()
    return model


def runs() -> list[threading.Thread]:
    gc.collect()  # models of other tests, which an error's frames may still hold
    return [thread for thread in threading.enumerate() if thread.name.startswith("oss ")]


class Pipeline:
    """The least that is a pipeline; ``edited`` is what its loop does between two steps."""

    def __init__(self) -> None:
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = {"scheduler": self.scheduler}

    def __call__(
        self, *, num_inference_steps: int, generator: Any, prompt: list[str]
    ) -> Any:  # as diffusers has it
        self.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(3, generator=g) for g in generator])
        for t in self.timesteps():
            x = self.scheduler.step(self.network(x, t), t, x, return_dict=False)[0]
            x = self.edited(x)
        return SimpleNamespace(images=x)

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        return x.sin() + t / 1000

    def timesteps(self) -> Any:
        return self.scheduler.timesteps

    def edited(self, x: Tensor) -> Tensor:
        return x


# --- schedulers ---------------------------------------------------------------------------------

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DDPMScheduler", {}, "DDPMScheduler adds fresh noise in every step.*pass scheduler="),
        ("EulerAncestralDiscreteScheduler", {}, "adds fresh noise in every step"),
        ("KDPM2AncestralDiscreteScheduler", {}, "adds fresh noise in every step"),
        ("LCMScheduler", {}, "LCMScheduler adds fresh noise in every step"),
        ("TCDScheduler", {}, "adds fresh noise in every step"),
        ("DDIMInverseScheduler", {}, "DDIMInverseScheduler is not known.*DDIMScheduler"),
        ("IPNDMScheduler", {}, "IPNDMScheduler is not known"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"},
         "algorithm_type 'sde-dpmsolver.*adds fresh noise"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True},
         "stochastic_sampling=True adds fresh noise"),
        ("DDIMScheduler", {}, "clip_sample=True changes what the network says"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True},
         "thresholding=True changes what the network says"),
        ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding=True changes"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "epsilon"},
         "flow sigmas and prediction_type 'epsilon'"),
        ("DDIMScheduler", {"clip_sample": False, "prediction_type": "other"},
         "prediction_type of DDIMScheduler: expected one of .*got 'other'"),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, "'epsilon' only"),
    ],
)  # fmt: skip
def test_a_scheduler_that_cannot_be_followed_is_refused(
    name: str, config: dict[str, Any], message: str
) -> None:
    scheduler = getattr(diffusers, name)(**config)
    case = CASES["sd"]()
    with pytest.raises(ValueError, match=f"^scheduler: .*{message}"):
        make(case.pipe, case.call | {"scheduler": scheduler})
    vars(case.pipe)["scheduler"] = scheduler
    with pytest.raises(ValueError, match=f"^scheduler: .*{message}"):
        make(case.pipe, case.call)
    # What the messages advise: one that can be followed, in place of the pipeline's.
    model = make(case.pipe, case.call | {"scheduler": CASES["sd"]().pipe.scheduler})
    assert model.host.name == "DDIMScheduler"


def test_the_scheduler_named_in_the_message_works() -> None:
    case = CASES["sd"]()
    stochastic = diffusers.DDPMScheduler(**SD_BETAS, clip_sample=False)
    case.pipe.scheduler = stochastic
    replacement = diffusers.DDIMScheduler.from_config(stochastic.config)
    model = from_pipeline(case.pipe, scheduler=replacement, **case.call, num_inference_steps=5)
    trajectory = oss.teacher(model, model.noise(2, 0), steps=5)
    assert trajectory.final.isfinite().all()
    assert case.pipe.scheduler is stochastic
    model.close()


# --- call arguments -----------------------------------------------------------------------------


class TakesAnything(Pipeline):
    """Has the arguments of many pipelines, which are all the same to it."""

    def __call__(
        self, *, num_inference_steps: int, generator: Any, prompt: list[str], timesteps: Any = None,
        sigmas: Any = None, latents: Any = None, callback_on_step_end: Any = None,
        callback: Any = None, output_type: Any = "pil", return_dict: Any = True, eta: Any = 0.0,
        skip_guidance_layers: Any = None, control_guidance_start: Any = 0.0,
        control_guidance_end: Any = 1.0, cfg_trunc_ratio: Any = 1.0, cfg_truncation: Any = 1.0,
        use_dynamic_cfg: Any = False, adapter_conditioning_factor: Any = 1.0,
        denoising_start: Any = None, denoising_end: Any = None, num_images_per_prompt: int = 1,
        num_videos_per_prompt: int = 1,
    ) -> Any:  # fmt: skip
        return super().__call__(
            num_inference_steps=num_inference_steps, generator=generator, prompt=prompt
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timesteps", [900, 500]),
        ("sigmas", [1.0, 0.5]),
        ("latents", torch.zeros(2, 3)),
        ("generator", torch.Generator()),
        ("callback_on_step_end", lambda pipe, step, t, options: options),
        ("callback", print),
        ("output_type", "latent"),
        ("return_dict", False),
    ],
)
def test_arguments_that_are_the_searchs_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected none of it, because the "):
        make(TakesAnything(), {"prompt": ["a", "b"], name: value})
    make(TakesAnything(), {"prompt": ["a", "b"], name: None})


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("eta", 1.0, 0.0),
        ("skip_guidance_layers", [7, 8, 9], None),
        ("control_guidance_start", 0.1, 0.0),
        ("control_guidance_end", 0.8, 1.0),
        ("control_guidance_end", [1.0, 0.8], 1.0),
        ("cfg_trunc_ratio", 0.25, 1.0),
        ("cfg_truncation", 0.25, 1.0),
        ("use_dynamic_cfg", True, False),
        ("adapter_conditioning_factor", 0.5, 1.0),
        ("denoising_start", 0.8, None),
        ("denoising_end", 0.8, None),
    ],
)
def test_arguments_that_go_by_the_number_of_the_step_are_refused(
    name: str, value: Any, off: Any
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected {off}, got .*number of the step"):
        make(TakesAnything(), {"prompt": ["a", "b"], name: value})
    for value in (off, [off], [off, off]):
        make(TakesAnything(), {"prompt": ["a", "b"], name: value})


@pytest.mark.parametrize("name", ["num_images_per_prompt", "num_videos_per_prompt"])
def test_several_images_of_a_prompt_are_several_prompts(name: str) -> None:
    with pytest.raises(ValueError, match=r"^num_images_per_prompt: expected 1; repeat the prompts"):
        make(TakesAnything(), {"prompt": ["a", "b"], name: 2})
    make(TakesAnything(), {"prompt": ["a", "b"], name: 1})


@pytest.mark.parametrize("name", ["sd3", "sd"])  # the latter drops what it does not know
def test_arguments_that_the_pipeline_does_not_have_are_refused(name: str) -> None:
    case = CASES[name]()
    with pytest.raises(ValueError, match=f"^{type(case.pipe).__name__} has no argument 'promt'"):
        make(case.pipe, case.call | {"promt": "a cat"})


@pytest.mark.parametrize(
    ("pipeline", "name"), [("sd", "prompt"), ("sd3", "prompt_embeds"), ("dit", "class_labels")]
)
def test_an_empty_list_of_prompts_is_refused(pipeline: str, name: str) -> None:
    case = CASES[pipeline]()
    with pytest.raises(ValueError, match=f"^{name}: expected at least one item, got none"):
        make(case.pipe, {name: []})


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9", None])
def test_the_number_of_teacher_steps_is_a_whole_number(value: Any) -> None:
    case = CASES["sd3"]()
    with pytest.raises(ValueError, match=r"^num_inference_steps: expected .*, got"):
        make(case.pipe, case.call | {"num_inference_steps": value})


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "2"])
def test_a_batch_is_a_whole_number(value: Any) -> None:
    case = CASES["sd3"]()
    with pytest.raises(ValueError, match=r"^batch: expected .*, got"):
        make(case.pipe, case.call | {"batch": value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "^batch: expected at least 1, got 0"),
        ((2.0, 0), "^batch: expected a whole number"),
        ((1_000_001, 0), "^batch: expected at most 1000000, got 1000001"),
        ((2, -1), "^seed: expected 0 to 9223372036853, got -1"),
        ((2, 2**43 + 2**40), "^seed: expected 0 to 9223372036853, got "),
        ((2, "1"), "^seed: expected a whole number"),
    ],
)
def test_noise_that_makes_no_sense_is_refused(arguments: tuple[Any, Any], message: str) -> None:
    case = CASES["sd3"]()
    model = make(case.pipe, case.call)
    with pytest.raises(ValueError, match=message):
        model.noise(*arguments)
    with pytest.raises(ValueError, match=r"^steps: expected"):
        model.times(0)


# --- pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pipe", [None, object(), "sd3", torch.nn.Linear(1, 1), len])
def test_something_that_is_no_pipeline_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^pipe: expected a diffusers pipeline with a scheduler"):
        from_pipeline(pipe, prompt="a")


def test_a_network_that_caches_its_steps_is_refused() -> None:
    case = CASES["wan"]()
    case.pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: 500,
        )
    )
    with pytest.raises(ValueError, match=r"^pipe: transformer caches .*transformer.disable_cache"):
        make(case.pipe, case.call)
    case.pipe.transformer.disable_cache()
    make(case.pipe, case.call)


class Editing(Pipeline):
    """Keeps a part of the state as it likes, as inpainting does."""

    def edited(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1)


class EditingInPlace(Pipeline):
    def edited(self, x: Tensor) -> Tensor:
        return x.mul_(0.9)


class Copying(Pipeline):
    """Keeps timesteps of its own, which nobody can overwrite."""

    def timesteps(self) -> Any:
        return list(self.scheduler.timesteps.tolist())


class Following(Pipeline):
    """Hands over what it was given, in a new tensor."""

    def edited(self, x: Tensor) -> Tensor:
        return x.clone()


class DeepCopying(Pipeline):
    """Moves a second state with a copy of its scheduler."""

    def timesteps(self) -> Any:
        copy.deepcopy(self.scheduler)
        return self.scheduler.timesteps


class Stepless(Pipeline):
    def timesteps(self) -> Any:
        return []


class Untimed(Pipeline):
    """Does not ask its scheduler for timesteps."""

    def __call__(self, *, num_inference_steps: int, generator: Any, prompt: list[str]) -> Any:
        x = torch.stack([torch.randn(3, generator=g) for g in generator])
        for t in torch.tensor([900.0, 500.0]):
            x = self.scheduler.step(self.network(x, t), t, x, return_dict=False)[0]


def velocities(pipe: Any, *times: float) -> list[Tensor]:
    model = from_pipeline(pipe, prompt=["a", "b"], num_inference_steps=9)
    try:
        return [Evaluator(model, 2).at(torch.ones(2, 3), t) for t in times]
    finally:
        model.close()


@pytest.mark.parametrize("kind", [Pipeline, Following])
def test_a_minimal_pipeline_is_a_model(kind: type[Pipeline]) -> None:
    for t, v in zip((0.9, 0.2), velocities(kind(), 0.9, 0.2), strict=True):
        torch.testing.assert_close(v, torch.ones(2, 3).sin() + t)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Editing, "Editing changed the state between two steps .as inpainting does"),
        (EditingInPlace, "EditingInPlace changed the state between two steps"),
        (Copying, "Copying went to timestep .* where it was given .*keeps its own copy"),
        (DeepCopying, "DeepCopying copies its scheduler to move a second state"),
        (Untimed, "Untimed did not set its scheduler's timesteps"),
    ],
)
def test_a_loop_that_does_more_than_step_is_refused(kind: type[Pipeline], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}"):
        velocities(kind(), 0.9, 0.6, 0.3)
    assert runs() == []


class Steep(Pipeline):
    """Has noise levels of another kind of path."""

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(sigmas=torch.linspace(5.8, 0.1, steps).tolist())


def test_levels_of_another_path_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^scheduler: FlowMatchEuler\w+ has sigmas up to [\d.]+"):
        velocities(Steep(), 0.5)


def test_a_pipeline_that_takes_no_step_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^Stepless took no step of its own scheduler"):
        velocities(Stepless(), 0.5)
    assert runs() == []


class Guided(Pipeline):
    def __init__(self, guider: Any) -> None:
        super().__init__()
        self.guider = guider
        self.components["guider"] = guider


@pytest.mark.parametrize(
    ("guider", "fault"),
    [
        (diffusers.ClassifierFreeGuidance(start=0.1), r"start=0\.1"),
        (diffusers.ClassifierFreeGuidance(stop=0.9), r"stop=0\.9"),
        (diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
         r"\w*momentum=-0\.5"),
        (diffusers.ClassifierFreeGuidance(), ""),
        (diffusers.ClassifierFreeGuidance(start=0.1, enabled=False), ""),
    ],
)  # fmt: skip
def test_a_guider_that_looks_at_the_number_of_the_step_is_refused(guider: Any, fault: str) -> None:
    if fault:
        with pytest.raises(
            ValueError, match=rf"^pipe: guider is a \w+ with {fault}, which changes"
        ):
            make(Guided(guider), {"prompt": ["a", "b"]})
    else:
        make(Guided(guider), {"prompt": ["a", "b"]})
