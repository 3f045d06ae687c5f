"""Fingerprints of pipelines: the same for the same velocities, others for others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from driver_cases import one_thread  # noqa: F401
from oss_ext.models import from_pipeline
from pipeline_runs import Wrapped, of_items, quiet, reloaded
from pipelines import CASES, Case, clip, stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:diffusers")


def fingerprint(case: Case, **changes: Any) -> str:
    model = from_pipeline(case.pipe, **(case.call | changes))
    model.close()
    return model.fingerprint()


@pytest.mark.parametrize("name", CASES)
def test_a_model_made_again_has_the_same_fingerprint(name: str, tmp_path: Path) -> None:
    case, other = CASES[name](), CASES[name]()
    prints = [fingerprint(c) for c in (case, case, other, reloaded(other, tmp_path))]
    assert len(set(prints)) == 1
    assert re.fullmatch("[0-9a-f]{16}", prints[0])


@pytest.mark.parametrize("steps", [3, 40])
def test_the_number_of_teacher_steps_is_no_part_of_the_model(steps: int) -> None:
    case = CASES["sd3"]()
    assert fingerprint(case, num_inference_steps=steps) == fingerprint(case)


def test_what_decides_the_velocities_decides_the_fingerprint() -> None:
    case = CASES["sd3"]()
    embeds = case.call["prompt_embeds"].clone()
    embeds[1, 3, 7] += 1e-3
    prints = [
        fingerprint(case),
        fingerprint(case, guidance_scale=5.5),
        fingerprint(case, prompt_embeds=embeds),
        fingerprint(case, height=32),
        fingerprint(case, **of_items(case.call, 1)),
        fingerprint(case, **of_items(case.call, 1, 0)),
    ]
    with torch.no_grad():
        case.pipe.transformer.proj_out.bias[0] += 1e-3
    prints.append(fingerprint(case))
    assert len(set(prints)) == len(prints)


def test_texts_decide_the_fingerprint(tmp_path: Path) -> None:
    case = stable_diffusion(*clip(tmp_path))
    calls = [
        {"prompt": ["a b", "c"]},
        {"prompt": ["a b", "d"]},
        {"prompt": ["a b"]},
        {"prompt": ["a b", "c"], "negative_prompt": "e"},
    ]
    prints = [fingerprint(case, **call) for call in calls]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint(case, **calls[0])


def test_the_pipelines_configuration_decides_the_fingerprint() -> None:
    case = CASES["wan_two_experts"]()
    before = fingerprint(case)
    case.pipe.register_to_config(boundary_ratio=0.5)  # of the experts
    assert fingerprint(case) != before


def test_the_weights_of_a_wrapped_network_decide_the_fingerprint() -> None:
    case = CASES["sd3"]()
    pipe = quiet(case.pipe, transformer=Wrapped(case.pipe.transformer))
    before = fingerprint(replace(case, pipe=pipe))
    with torch.no_grad():
        case.pipe.transformer.proj_out.weight.mul_(2)
    assert fingerprint(replace(case, pipe=pipe)) != before
