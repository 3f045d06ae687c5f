"""Pipelines whose shift, or what they tell the network, goes by how many steps they are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from driver_cases import one_thread  # noqa: F401
from oss_ext import export
from oss_ext.export import ExportError
from pipeline_runs import STEPS, assert_close, search
from pipelines import CASES, PROMPTS, Case, draw, image_vae, randomised


def flux_2() -> Case:
    transformer = randomised(
        diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )  # fmt: skip
    vae = randomised(
        diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4,
            use_quant_conv=False, use_post_quant_conv=False,
        )
    )  # fmt: skip
    pipe = diffusers.Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=vae,
        text_encoder=None, tokenizer=None, transformer=transformer,
    )  # fmt: skip
    call = {"prompt_embeds": draw(1, PROMPTS, 6, 32), "height": 16, "width": 16}
    return Case(pipe, call, (16, 16))


def cogview_4() -> Case:
    transformer = randomised(
        diffusers.CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, text_embed_dim=32, time_embed_dim=8, condition_dim=4,
            pos_embed_max_size=16, sample_size=8, rope_axes_dim=(4, 4),
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
        time_shift_type="linear",
    )  # fmt: skip
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(4), transformer=transformer,
        scheduler=scheduler,
    )  # fmt: skip
    call = {
        "prompt_embeds": draw(1, PROMPTS, 6, 32),
        "negative_prompt_embeds": draw(2, PROMPTS, 6, 32),
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
    }
    return Case(pipe, call, (4, 4, 4))


@pytest.fixture(autouse=True)
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "flux 2", flux_2)
    monkeypatch.setitem(CASES, "cogview 4", cogview_4)


def ones_own(pipe: Any) -> Any:
    """The same pipeline, of a class that a user derived."""
    return type("MyPipeline", (type(pipe),), {})(**pipe.components)


@pytest.mark.parametrize("kind", [None, ones_own])
@pytest.mark.parametrize("steps", [STEPS, 3, 50])
def test_a_shift_by_the_number_of_steps_is_the_searchs(kind: Any, steps: int) -> None:
    """Whatever number the pipeline is called with while a schedule is attached."""
    found = search("flux 2", kind=kind)
    with export.attach(found.schedule, found.pipe):
        assert_close(found.got(num_inference_steps=steps), found.promised())


def test_arguments_cannot_undo_a_shift_by_the_number_of_steps() -> None:
    found = search("flux 2")
    message = r"^Flux2Pipeline shifts by the number of steps .*attach"
    with pytest.raises(ExportError, match=message):
        export.call_arguments(found.schedule, found.pipe, mu=found.model.mu)
    with pytest.raises(ExportError, match=message):
        export.arguments(found.schedule, found.pipe.scheduler, mu=found.model.mu)


@pytest.mark.parametrize("kind", [None, ones_own])
def test_timesteps_are_handed_over_where_they_are_not_made_of_the_sigmas(kind: Any) -> None:
    found = search("cogview 4", kind=kind, start="pinned")
    given = export.call_arguments(found.schedule, found.pipe, mu=found.model.mu)
    assert set(given) == {"sigmas", "timesteps"}
    if kind is None:  # a scheduler alone does not know of pipelines that diffusers does not have
        assert export.arguments(found.schedule, found.pipe.scheduler, mu=found.model.mu) == given
    assert_close(found.got(num_inference_steps=3, **given), found.promised())


def test_others_take_either() -> None:
    found = search("sd3", start="pinned")
    assert set(export.call_arguments(found.schedule, found.pipe)) == {"sigmas"}


@pytest.mark.parametrize("name", ["utils", "ConfigMixin", "FluxPipeline", "no such thing"])
def test_a_model_may_be_called_what_diffusers_calls_something(name: str) -> None:
    found = search("sd3", start="pinned")
    schedule = replace(found.schedule, model=name)
    assert set(export.arguments(schedule, found.pipe.scheduler)) == {"sigmas"}
