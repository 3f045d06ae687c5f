"""Nothing depends on where a process makes its tensors by default: here, nowhere at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import one_thread  # noqa: F401
from oss_ext import contest, evaluate, export, presets
from oss_ext.noise import VEPath, VPPath
from oss_ext.solvers import SOLVERS

STEPS = 3


@pytest.fixture(autouse=True)
def own_device() -> Iterator[None]:
    """Whatever happens, the next test has none."""
    yield
    torch.set_default_device(None)


def everywhere(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``run`` gives as usual, and where tensors made by default have no values."""
    torch.set_default_device(None)
    usual = run()
    torch.set_default_device("meta")
    return usual, run()


def taught(name: str, samples: int = 6, seed: int = 0) -> tuple[Any, oss.Trajectory]:
    options = {"shape": [1, 4, 4]} if name == "analytic" else {}
    model = oss.models.load(name, **options)
    return model, oss.teacher(model, model.noise(samples, seed), 16, keep_x0=True)


@pytest.mark.parametrize("name", ["analytic", "digits"])
def test_teachers_are_the_same(name: str) -> None:
    usual, other = everywhere(lambda: taught(name)[1])
    assert torch.equal(usual.states, other.states)
    assert usual.model_hash == other.model_hash


@pytest.mark.parametrize(
    "options",
    [
        *({"quality": quality} for quality in ("dp", "fast", "balanced", "best")),
        *({"solver": solver} for solver in SOLVERS),
        *({"metric": metric, "quality": "dp"} for metric in ("x0", "x0-candidate")),
        {"quality": "dp", "beam": 3},
        {"scope": "instance", "aggregate": "median"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_searches_are_the_same(options: dict[str, Any]) -> None:
    def run() -> oss.Schedule:
        return oss.search(*taught("analytic"), STEPS, **options).schedule(STEPS)

    usual, other = everywhere(run)
    assert usual == other


def test_all_methods_and_their_judgement_are_the_same() -> None:
    def run() -> tuple[list[Any], str]:
        model, teacher = taught("analytic")
        made = contest.make(model, teacher, STEPS).contenders
        scores = contest.judge(model, taught("analytic", seed=1)[1], made)
        return [c.schedule for c in made], evaluate.score_table(scores, against="uniform {steps}")

    usual, other = everywhere(run)
    assert usual == other


def test_what_schedules_are_made_into_is_the_same() -> None:
    def run() -> list[Any]:
        made: list[Any] = []
        for name in presets.names():
            schedule = presets.load(name).schedule
            made += [schedule.sigmas, schedule.timesteps, *schedule.split(at=0.5)]
            for form in export.FORMATS:
                try:
                    made.append(export.to(schedule, form, force=True))
                except export.ExportError as error:
                    made.append(str(error))
        model, teacher = taught("analytic")
        found = oss.search(model, teacher, STEPS).schedule(STEPS)
        return [*made, oss.calibrate(teacher, found)]

    usual, other = everywhere(run)
    assert usual == other


@pytest.mark.parametrize("path", [VPPath("linear"), VPPath("cosine"), VEPath()], ids=str)
def test_grids_of_other_paths_are_the_same(path: Any) -> None:
    usual, other = everywhere(lambda: path.grid(8).tolist())
    assert usual == other
