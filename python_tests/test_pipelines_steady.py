"""Pipelines whose network says something else the next time, or of another state, are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from driver_cases import one_thread  # noqa: F401
from oss_ext import export
from oss_ext.models import from_pipeline
from oss_ext.models.pipeline_call import count_items, select
from pipeline_runs import own_latents, search
from pipelines import CASES
from test_pipelines_refused import Pipeline, runs

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:(diffusers|numpy)")


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No run of a pipeline is left behind that was not there before."""
    before = runs()
    yield
    assert [thread for thread in runs() if thread not in before] == []


class Momentum(Pipeline):
    """Adds some of what the steps before have said."""

    share = 0.75

    def __init__(self) -> None:
        super().__init__()
        self.said = torch.zeros(2, 3)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        self.said = super().network(x, t) - self.share * self.said
        return self.said


class Drawing(Pipeline):
    """Leaves out numbers at random."""

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().network(x, t), 0.5)


class FreeInit(Pipeline):
    free_init_enabled = True


@pytest.mark.parametrize("kind", [Momentum, Drawing])
def test_what_is_not_the_same_the_next_time_is_refused(
    kind: type[Pipeline], nothing_left: None
) -> None:
    message = rf"^pipe: {kind.__name__} says something else .*\d% apart"
    with pytest.raises(ValueError, match=message):
        from_pipeline(kind(), prompt=["a", "b"], num_inference_steps=9)


def test_a_little_of_it_is_rounding() -> None:
    pipe = Momentum()
    pipe.share = 0.02
    from_pipeline(pipe, prompt=["a", "b"], num_inference_steps=9).close()


def test_a_loop_within_a_loop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pipe: FreeInit .*disable_free_init"):
        from_pipeline(FreeInit(), prompt=["a", "b"], num_inference_steps=9)


def test_inpainting_is_refused_by_what_it_does(nothing_left: None) -> None:
    case = CASES["sd"]()
    pipe = diffusers.StableDiffusionInpaintPipeline(
        **case.pipe.components, requires_safety_checker=False
    )
    image, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    call = case.call | {"image": image, "mask_image": mask, "num_inference_steps": 9}
    with pytest.raises(RuntimeError, match=r"^StableDiffusionInpaintPipeline changed the state"):
        from_pipeline(pipe, **call)


def with_times_of_tokens(pipe: Any) -> Any:
    """LTX-Video's other pipeline, of the same weights, which negates what the network says."""
    members = dict(pipe.components)
    members["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXConditionPipeline(**members)


def test_times_of_every_token_are_refused(nothing_left: None) -> None:
    case = CASES["ltx"]()
    pipe = with_times_of_tokens(case.pipe)
    with pytest.raises(ValueError, match=r"^per_token_timesteps: expected none of them"):
        from_pipeline(pipe, **case.call, num_inference_steps=9)


def test_a_schedule_is_not_run_with_times_of_every_token() -> None:
    found = search("ltx", diffusers.FlowMatchEulerDiscreteScheduler())
    pipe = with_times_of_tokens(found.pipe)
    with (
        export.attach(found.schedule, pipe, force=True),
        pytest.raises(ValueError, match=r"^per_token_timesteps: expected none of them"),
    ):
        own_latents(pipe, found.call | {"num_inference_steps": 3})


@pytest.mark.parametrize(
    ("call", "items"),
    [
        ({}, 1),
        ({"batch_size": 3}, 3),
        ({"prompt_embeds_t5": torch.zeros(2, 6, 8)}, 2),
        ({"image": torch.zeros(3, 8, 8)}, 1),
        ({"image": torch.zeros(3, 3, 8, 8)}, 3),
        ({"video": np.zeros((2, 9, 3, 8, 8))}, 2),
        ({"class_labels": torch.tensor([1, 2])}, 2),
        ({"prompt_embeds": torch.zeros(6)}, 1),
    ],
)
def test_items_are_counted(call: dict[str, Any], items: int) -> None:
    assert count_items(call) == items


@pytest.mark.parametrize("batch", [1, 3])
def test_one_image_for_several_prompts_stays_whole(batch: int) -> None:
    image = torch.zeros(3, 8, 8)
    chosen = select({"prompt": ["a", "b", "c"], "image": image}, 3, 1, batch)
    assert chosen == {"prompt": "b" if batch == 1 else ["a", "b", "c"]}
    several = select({"image": torch.arange(3)[:, None, None, None]}, 3, 1, 1)
    assert several["image"].flatten().tolist() == [1]
