"""Image-to-image pipelines: searched at a strength, attached, and run from the first step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import oss_ext as oss
from driver_cases import one_thread  # noqa: F401
from oss_ext import export
from oss_ext.cli.students import draw as draw_pictures
from oss_ext.export import ExportError
from oss_ext.models import from_pipeline
from pipeline_runs import Searched, assert_close, first_state, search
from pipelines import CASES, LEADING, PROMPTS, draw
from test_pipelines_refused import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:(diffusers|numpy)")


def sd_image(pipe: Any) -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )


IMAGES: dict[str, tuple[str, Callable[[], Any], Any]] = {
    "flow": ("flux_img2img", lambda: None, None),
    "vp": ("sd", lambda: None, sd_image),
    "ve": ("sd", lambda: EulerDiscreteScheduler(**LEADING), sd_image),
}


def searched(name: str, **options: Any) -> Searched:
    pipeline, scheduler, kind = IMAGES[name]
    image = draw(5, PROMPTS, 3, 16, 16).sigmoid()
    return search(pipeline, scheduler(), kind=kind, image=image, **options)


@pytest.mark.parametrize("name", IMAGES)
def test_image_to_image_runs_a_cut_schedule_at_full_strength(name: str) -> None:
    found = searched(name, start="pinned", strength=1.0)
    parts = [found.schedule, *(found.schedule.cut(strength=share) for share in (0.6, 0.35))]
    states = []
    for part in parts:
        with export.attach(part, found.pipe):
            state, _ = first_state(found.pipe, found.call, range(PROMPTS))
            got = found.got()
        states.append(state)
        x = state.view(PROMPTS, *found.model.shape) / found.model.host.scale(part.times[0])
        assert_close(got, found.promised(part, x))
    # All start from the one image, with the one noise at the level of their first times.
    levels = torch.tensor([found.model.host.alpha_beta(part.times[0]) for part in parts])
    image_and_noise = torch.linalg.solve(levels[:2], torch.stack(states[:2]).flatten(1))
    assert_close(states[2].flatten(), levels[2] @ image_and_noise, 1e-4)
    assert float(levels[1, 1]) < float(levels[0, 1])


@pytest.mark.parametrize("start", ["free", "pinned"])
@pytest.mark.parametrize("strength", [0.6, 0.8])
@pytest.mark.parametrize("name", IMAGES)
def test_what_was_searched_at_a_strength_runs_at_full_strength(
    name: str, strength: float, start: str
) -> None:
    found = searched(name, start=start, strength=strength)
    assert found.schedule.starts_below == (start == "free")
    with export.attach(found.schedule, found.pipe):
        for steps in (found.schedule.steps, 50):
            got = found.got(strength=1.0, num_inference_steps=steps)
            assert_close(got, found.promised())


@pytest.mark.parametrize(
    ("name", "steps", "where"),
    [
        ("flow", 4, "at step 2"),
        ("flow", 50, "at step 2"),  # it counts the steps that its scheduler has
        ("vp", 3, "at step 3"),
        ("vp", 50, "beyond the last step"),
        ("ve", 3, "at step 3"),
    ],
)
def test_a_call_that_cuts_once_more_is_refused(name: str, steps: int, where: str) -> None:
    found = searched(name, strength=0.8)
    message = rf"^schedule: the pipeline begins {where} of 3, .*strength=1"
    with export.attach(found.schedule, found.pipe), pytest.raises(ExportError, match=message):
        found.got(strength=0.5, num_inference_steps=steps)


def test_a_picture_of_a_schedule_is_of_all_its_steps() -> None:
    found = searched("flow", strength=0.6)
    evaluations = 0

    def count(*_: object) -> None:
        nonlocal evaluations
        evaluations += 1

    hook = found.pipe.transformer.register_forward_hook(count)
    pictures = draw_pictures(found.model, found.schedule, PROMPTS, 0, False)
    hook.remove()
    assert evaluations == found.schedule.steps
    with export.attach(found.schedule, found.pipe):
        call = found.model.call(0, found.model.seeds(0, 0))
        own = found.pipe(**call | {"strength": 1.0, "output_type": "pt"})[0]
    assert_close(pictures, 2 * own - 1, 0.02)  # a picture has 255 levels


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (diffusers.StableDiffusionInpaintPipeline, {"strength": 0.6}),
        (diffusers.StableDiffusionXLInpaintPipeline, {}),  # its default is 0.9999
    ],
)
def test_inpainting_below_full_strength_is_refused(kind: Any, call: dict[str, float]) -> None:
    sd = CASES["sd" if kind is diffusers.StableDiffusionInpaintPipeline else "sdxl"]()
    takes = {"requires_safety_checker": False} if "XL" not in kind.__name__ else {}
    pipe = kind(**sd.pipe.components, **takes)
    image, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    message = rf"^strength: expected 1.0 for {kind.__name__}, got 0\.[69]"
    with pytest.raises(ValueError, match=message):
        from_pipeline(pipe, **sd.call, image=image, mask_image=mask, **call)


class Unscaled(Pipeline):
    """Starts from noise as it is, whatever its scheduler says."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.components = {"scheduler": self.scheduler}


def test_a_free_start_of_a_pipeline_that_does_not_scale_its_noise_is_refused() -> None:
    pipe = Unscaled()
    model = from_pipeline(pipe, prompt=["a", "b"], num_inference_steps=9)
    trajectory = oss.teacher(model, model.noise(2), steps=9)
    call: dict[str, Any] = {"prompt": ["a", "b"], "num_inference_steps": 3}
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    with export.attach(trajectory.schedule([9, 4, 0]), pipe):
        got = pipe(**call, generator=generators).images
    promised = oss.sample(model, model.noise(2), trajectory.schedule([9, 4, 0]))
    assert_close(got, model.host.scale(float(trajectory.times[0])) * promised)
    free = trajectory.schedule([7, 4, 0])
    message = r"^schedule: starts from [\d.]+ times the noise .*start='pinned'"
    with export.attach(free, pipe), pytest.raises(ExportError, match=message):
        pipe(**call, generator=generators)
