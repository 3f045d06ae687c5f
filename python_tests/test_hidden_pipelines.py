"""What a module of a pipeline's denoiser gives while the pipeline is evaluated in its own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import oss_ext as oss
from driver_cases import dp_search, one_thread  # noqa: F401
from oss_ext import dp
from oss_ext.models import from_pipeline
from oss_ext.models.hidden import Hidden
from pipelines import CASES, PROMPTS

# A module of every denoiser, and how often its rows come in an evaluation: guidance in one call of
# twice the rows, in two calls, and in none.
MODULES = {
    "sd": ("unet.mid_block", 2),
    "sd3": ("transformer.proj_out", 2),
    "wan": ("transformer.proj_out", 2),
    "flux": ("transformer.proj_out", 1),
}
each_pipeline = pytest.mark.parametrize("name", MODULES)


def make(name: str, steps: int = 4) -> tuple[Any, Any]:
    case = CASES[name]()
    return case.pipe, from_pipeline(case.pipe, **case.call, num_inference_steps=steps)


@each_pipeline
def test_only_what_was_asked_for_is_heard_when_the_loop_begins_again(name: str) -> None:
    """A run of 4 turns serves 3 evaluations, and the next begins with one of its own."""
    pipe, model = make(name)
    module, times = MODULES[name]
    part, _, path = module.partition(".")
    outputs: list[torch.Tensor] = []
    x = torch.randn(PROMPTS, *model.shape, generator=torch.Generator().manual_seed(1))
    t, sample = torch.full((PROMPTS,), 0.6, dtype=torch.float64), torch.arange(PROMPTS)
    heard = []
    with Hidden(model, module) as hidden:
        for _ in range(6):
            handle = (
                getattr(pipe, part)
                .get_submodule(path)
                .register_forward_hook(
                    lambda module, given, output: outputs.append(output.detach().clone())
                )
            )
            model(x, t, sample)
            handle.remove()
            heard.append(hidden.take(PROMPTS))
    model.close()
    rows = torch.cat(outputs[-2 if len(outputs[-1]) == PROMPTS and times == 2 else -1 :])
    expected = torch.cat([part.reshape(PROMPTS, -1) for part in rows.split(PROMPTS)], dim=1)
    assert len(rows) == times * PROMPTS
    assert all(torch.equal(features, expected) for features in heard)


@each_pipeline
def test_a_search_compares_what_a_pipelines_denoiser_sees(name: str) -> None:
    _, model = make(name, steps=6)
    trajectory = oss.teacher(model, model.noise(3, 0), steps=6)
    module, _ = MODULES[name]
    result = dp_search(model, trajectory, 2, metric=f"perceptual:{module}")
    assert result.nfe <= dp.evaluations(6, 2, "free", evaluated=True)
    schedule = result.schedule(2)
    assert schedule.objective is not None
    assert schedule.objective.metric == f"perceptual:{module}"
    images = oss.sample(model, trajectory.noise, schedule)
    errors = (images - trajectory.final).square().flatten(1).mean(dim=1)
    assert float(errors.mean()) == pytest.approx(schedule.cost, rel=1e-5)
    model.close()


def test_a_part_that_is_not_evaluated_is_refused() -> None:
    _, model = make("sd")
    trajectory = oss.teacher(model, model.noise(2, 0), steps=4)
    with pytest.raises(ValueError, match=r"^metric: expected module 'vae.decoder' to be called"):
        dp_search(model, trajectory, 2, metric="perceptual:vae.decoder")
    with pytest.raises(ValueError, match=r"such as .*unet.mid_block, .*got 'unet.midblock'"):
        dp_search(model, trajectory, 2, metric="perceptual:unet.midblock")
    model.close()
