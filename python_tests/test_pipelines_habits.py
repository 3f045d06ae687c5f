"""What pipelines do beside stepping: searches and attached schedules keep up with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

import oss_ext as oss
from driver_cases import one_thread  # noqa: F401
from oss_ext import export
from oss_ext.export import ExportError
from oss_ext.models import from_pipeline
from oss_ext.noise import shifted
from pipeline_runs import assert_close, generators
from test_pipelines_refused import Pipeline

STEPS = 9


class ByClass(Pipeline):
    """Scales what the network sees, unless its scheduler is of one certain class."""

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        if type(self.scheduler) is not diffusers.FlowMatchEulerDiscreteScheduler:
            x = self.scheduler.scale_model_input(x, t)
        return super().network(x, t)


class Twice(Pipeline):
    """Sets its timesteps twice, and loops over those that it had first."""

    def timesteps(self) -> Any:
        first = self.scheduler.timesteps
        self.scheduler.set_timesteps(len(first))
        return first


class Replacing(Pipeline):
    """Gives its scheduler timesteps of its own, and loops over these."""

    def timesteps(self) -> Any:
        self.scheduler.timesteps = self.scheduler.timesteps.clone()
        return self.scheduler.timesteps


class Shifting(Pipeline):
    """Shifts the sigmas itself, for a scheduler that does not."""

    shift = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.components = {"scheduler": self.scheduler}

    def set_timesteps(self, steps: int) -> None:
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        self.scheduler.set_timesteps(sigmas=shifted(even, self.shift).tolist())


def searched(pipe: Any) -> tuple[Any, oss.Schedule, Tensor]:
    model = from_pipeline(pipe, prompt=["a", "b"], num_inference_steps=STEPS)
    noise = model.noise(2)
    schedule = oss.teacher(model, noise, steps=STEPS).schedule([7, 4, 0])
    model.close()
    return model, schedule, oss.sample(model, noise, schedule)


def run(pipe: Any) -> Tensor:
    made = pipe(prompt=["a", "b"], num_inference_steps=STEPS, generator=generators(range(2)))
    return made.images


@pytest.mark.parametrize("kind", [Pipeline, ByClass, Twice, Replacing, Shifting])
def test_a_pipeline_with_habits_is_searched_and_runs_what_was(kind: type[Pipeline]) -> None:
    pipe = kind()
    model, schedule, promised = searched(pipe)
    trajectory = oss.teacher(model, model.noise(2), steps=STEPS)
    assert_close(trajectory.final, run(pipe))
    with export.attach(schedule, pipe):
        assert_close(run(pipe), promised)


def test_a_pipeline_that_shifts_otherwise_is_refused() -> None:
    pipe = Shifting()
    _, schedule, promised = searched(pipe)
    pipe.shift = 5.0
    message = r"^schedule: searched at a time shift of 3, but \w+ is at 5 here"
    with export.attach(schedule, pipe), pytest.raises(ExportError, match=message):
        run(pipe)
    with export.attach(schedule, pipe, force=True):
        assert_close(run(pipe), promised)


class OneText(Pipeline):
    """Takes a text, and no list of them."""

    def __call__(
        self, *, num_inference_steps: int, generator: Any, prompt: Any, negative_prompt: Any = ""
    ) -> Any:
        self.texts.append((prompt, negative_prompt))
        return super().__call__(
            num_inference_steps=num_inference_steps, generator=[generator], prompt=prompt
        )

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[Any, Any]] = []


@pytest.mark.parametrize(
    ("prompt", "negative", "texts"),
    [
        ("a", "n", {("a", "n")}),
        (["a"], "n", {("a", "n")}),
        (["a", "b"], ["n", "m"], {("a", "n"), ("b", "m")}),
    ],
)
def test_a_call_for_one_item_has_texts_that_are_no_lists(
    prompt: Any, negative: Any, texts: set[tuple[str, str]]
) -> None:
    pipe = OneText()
    model = from_pipeline(
        pipe, prompt=prompt, negative_prompt=negative, batch=1, num_inference_steps=STEPS
    )
    oss.teacher(model, model.noise(2), steps=STEPS)
    model.close()
    assert set(pipe.texts) == texts


@pytest.mark.parametrize("says", ["cuda", "cuda:2"])
def test_a_run_has_the_gpu_of_the_thread_that_asked(
    says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group offloading says "cuda" without a number; a new thread would take it for the first."""

    class OnCard(Pipeline):
        _execution_device = torch.device(says)

    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    model = from_pipeline(OnCard(), prompt=["a", "b"], num_inference_steps=STEPS)
    oss.teacher(model, model.noise(2, 0), STEPS)
    assert set(chosen) == {1 if says == "cuda" else 2}
