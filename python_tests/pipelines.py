"""Real pipeline classes of diffusers, tiny and with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.utils import logging
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import set_verbosity_error

# They warn of optional packages, of which nothing here needs any, and show bars while they load.
logging.set_verbosity_error()
logging.disable_progress_bar()
set_verbosity_error()

PROMPTS = 2


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, also in the layers that start as zero, so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


@dataclass(frozen=True)
class Case:
    """A pipeline, how to call it, and a first-order deterministic scheduler that it runs with.

    ``call`` are the arguments of a call for ``PROMPTS`` items; ``state`` is the shape of a sample
    as its scheduler moves it.
    """

    pipe: Any
    call: dict[str, Any]
    state: tuple[int, ...]


def image_vae(channels: int) -> AutoencoderKL:
    return randomised(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.1,
            scaling_factor=0.5,
        )
    )


def flux() -> Case:
    transformer = randomised(
        FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler, vae=image_vae(4), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    call = {
        "prompt_embeds": draw(1, PROMPTS, 6, 32),
        "pooled_prompt_embeds": draw(2, PROMPTS, 16),
        "height": 16,
        "width": 16,
        "guidance_scale": 3.5,
    }
    return Case(pipe, call, (16, 16))


def pooled_prompts() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, PROMPTS, 6, 32),
        "negative_prompt_embeds": draw(2, PROMPTS, 6, 32),
        "pooled_prompt_embeds": draw(3, PROMPTS, 16),
        "negative_pooled_prompt_embeds": draw(4, PROMPTS, 16),
    }


def stable_diffusion_3() -> Case:
    transformer = randomised(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
        )
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(4), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call = pooled_prompts() | {"height": 16, "width": 16, "guidance_scale": 5.0}
    return Case(pipe, call, (4, 8, 8))


def wan(experts: int = 1) -> Case:
    def transformer(seed: int) -> torch.nn.Module:
        return randomised(
            WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
                out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1,
                cross_attn_norm=True, rope_max_seq_len=32,
            ),
            seed,
        )  # fmt: skip

    vae = randomised(
        AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )
    )  # fmt: skip
    two = {"transformer_2": transformer(1), "boundary_ratio": 0.875} if experts == 2 else {}
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer(0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), **two,
    )  # fmt: skip
    call = {
        "prompt_embeds": draw(1, PROMPTS, 6, 32),
        "negative_prompt_embeds": draw(2, PROMPTS, 6, 32),
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "guidance_scale": 5.0,
    }
    if experts == 2:
        call["guidance_scale_2"] = 3.0
    return Case(pipe, call, (16, 2, 2, 2))


def wan_two_experts() -> Case:
    return wan(experts=2)


def clip(folder: Path) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, which knows letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: k for k, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=32,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
    )  # fmt: skip
    return randomised(CLIPTextModel(config)), tokenizer


def unet(**options: Any) -> torch.nn.Module:
    return randomised(
        UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4,
            out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
            norm_num_groups=4, attention_head_dim=4, **options,
        )
    )  # fmt: skip


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = SD_BETAS | {"timestep_spacing": "leading", "steps_offset": 1}


def stable_diffusion(text_encoder: Any = None, tokenizer: Any = None) -> Case:
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(), scheduler=scheduler, vae=image_vae(4), text_encoder=text_encoder,
        tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    call = {"height": 16, "width": 16, "guidance_scale": 4.0}
    if text_encoder is None:
        call |= {
            "prompt_embeds": draw(1, PROMPTS, 6, 32),
            "negative_prompt_embeds": draw(2, PROMPTS, 6, 32),
        }
    return Case(pipe, call, (4, 8, 8))


def stable_diffusion_xl() -> Case:
    net = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, transformer_layers_per_block=1,
        use_linear_projection=True,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=net, scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading",
        steps_offset=1), vae=image_vae(4), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    call = pooled_prompts() | {"height": 16, "width": 16, "guidance_scale": 4.0}
    return Case(pipe, call, (4, 8, 8))


def dit() -> Case:
    transformer = randomised(
        DiTTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
            num_attention_heads=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
        )
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(
        transformer=transformer, vae=image_vae(4),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip
    return Case(pipe, {"class_labels": [3, 7], "guidance_scale": 2.0}, (4, 8, 8))


def pixart() -> Case:
    transformer = randomised(
        PixArtTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
            num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24,
            out_channels=8, norm_type="ada_norm_single",
        )
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(4), transformer=transformer,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip
    call = {
        "prompt_embeds": draw(1, PROMPTS, 6, 32),
        "prompt_attention_mask": torch.ones(PROMPTS, 6),
        "negative_prompt_embeds": draw(2, PROMPTS, 6, 32),
        "negative_prompt_attention_mask": torch.ones(PROMPTS, 6),
        "negative_prompt": None,
        "height": 16,
        "width": 16,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
    }
    return Case(pipe, call, (4, 8, 8))


def ltx() -> Case:
    transformer = randomised(
        LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
            cross_attention_dim=32, num_layers=1, caption_channels=32,
        )
    )  # fmt: skip
    vae = randomised(
        AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096, shift_terminal=0.1,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    call = {
        "prompt_embeds": draw(1, PROMPTS, 6, 32),
        "prompt_attention_mask": torch.ones(PROMPTS, 6),
        "negative_prompt_embeds": draw(2, PROMPTS, 6, 32),
        "negative_prompt_attention_mask": torch.ones(PROMPTS, 6),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }
    return Case(pipe, call, (2, 8))


def flux_image_to_image() -> Case:
    text_to_image = flux()
    pipe = diffusers.FluxImg2ImgPipeline(**text_to_image.pipe.components)
    image = draw(5, 1, 3, 16, 16).sigmoid()
    call = text_to_image.call | {"image": image.expand(PROMPTS, -1, -1, -1), "strength": 0.6}
    return Case(pipe, call, text_to_image.state)


CASES: dict[str, Callable[[], Case]] = {
    "flux": flux,
    "flux_img2img": flux_image_to_image,
    "sd3": stable_diffusion_3,
    "wan": wan,
    "wan_two_experts": wan_two_experts,
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "dit": dit,
    "pixart": pixart,
    "ltx": ltx,
}
