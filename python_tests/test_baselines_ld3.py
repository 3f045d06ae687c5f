"""LD3: better than where it starts, and what it says of models that it cannot descend through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oss_ext as oss
from baseline_cases import each_kind, model_on, random_calibration, teacher_on
from driver_cases import (
    Network,
    constant_velocity,
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from noise_cases import EXAMPLES
from oss_ext.baselines import (
    Calibration,
    UnableError,
    flow_shift,
    flow_shift_free,
    ld3,
    logsnr,
    uniform,
)
from oss_ext.models import Model, from_callable
from oss_ext.models.base import Request
from oss_ext.models.wrapped import Wrapped
from oss_ext.noise import FlowPath, Path, VPPath
from oss_ext.sharing import ProcessError
from test_evaluation_memory import ERRORS


def error_of(calibration: Calibration, schedule: oss.Schedule) -> float:
    images = oss.sample(calibration.model, calibration.trajectory.noise, schedule)
    return float((images - calibration.trajectory.final).square().mean())


@each_kind
def test_ld3_is_better_than_its_starts(path: Path) -> None:
    pinned, free = (
        Calibration(model_on(path), teacher_on(path, samples=6), 3, start=start)
        for start in ("pinned", "free")
    )
    for calibration, makes in (
        (pinned, (uniform, logsnr, flow_shift)),
        (free, (uniform, logsnr, flow_shift, flow_shift_free)),
    ):
        starts = (make(calibration.trajectory, 3) for make in makes)
        found = ld3(calibration, 3, epochs=20)
        assert error_of(calibration, found) < 0.95 * min(error_of(calibration, s) for s in starts)
        assert ld3(calibration, 3, epochs=20) == found  # nothing in it is left to chance


@each_seed(2)
def test_ld3_finds_the_best_of_two_steps(seed: int) -> None:
    model = random_mixture(seed)
    trajectory = oss.teacher(model, model.noise(4, seed), 40)
    calibration = Calibration(model, trajectory, 2, start="pinned")
    at = calibration.trajectory.schedule_at
    best = min(error_of(calibration, at((1.0, t / 200, 0.0))) for t in range(1, 200))
    assert error_of(calibration, ld3(calibration, 2)) <= 1.01 * best


@each_seed(2)
def test_ld3_with_a_free_start_finds_the_best_of_one_step(seed: int) -> None:
    model = random_mixture(seed)
    calibration = Calibration(model, oss.teacher(model, model.noise(4, seed), 40), 1)
    at = calibration.trajectory.schedule_at
    best = min(error_of(calibration, at((t / 400, 0.0))) for t in range(1, 401))
    assert error_of(calibration, ld3(calibration, 1)) <= 1.01 * best


def test_ld3_of_one_step_has_nothing_to_learn_with_a_pinned_start() -> None:
    pinned = replace(random_calibration(0), start="pinned")
    assert ld3(pinned, 1).indices == (9, 0)


def test_ld3_is_unable_with_other_solvers() -> None:
    calibration = replace(random_calibration(0), solver="dpmpp-2m")
    with pytest.raises(UnableError, match=r"^ld3: descends through Euler steps, .* dpmpp-2m$"):
        ld3(calibration, 3)


def model_like(velocity: Any, **declared: Any) -> Model:
    return from_callable(velocity, (2, 3), dtype=torch.float64, **declared)


def without_autograd(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    with torch.no_grad():
        return x.tanh() * t[:, None, None].clamp(max=1)


def outside_of_torch(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.numpy())) * t[:, None, None]


def timeless(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return x.sin()


def stepped(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return x.sin() + (10 * t[:, None, None]).round()


def with_a_nan_behind(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return x.sin() * t[:, None, None] + torch.where(x == x, 0.0, (x * 0).sqrt())


@pytest.mark.parametrize(
    ("velocity", "declared", "message"),
    [
        (without_autograd, {}, "with respect to states, .* model 'custom' gives none"),
        (without_autograd, {"path": VPPath(), "predicts": "eps"}, "not those of its velocity"),
        (outside_of_torch, {}, "does not run under autograd: Can't call numpy"),
        (timeless, {}, "with respect to times, .* gives none"),
        (stepped, {}, "with respect to times, .* gives none"),
        (with_a_nan_behind, {}, "with respect to states, .* gives none"),
    ],
)
def test_ld3_says_what_is_wrong_with_the_gradients(
    velocity: Any, declared: dict[str, Any], message: str
) -> None:
    model = model_like(velocity, **declared)
    calibration = Calibration(model, oss.teacher(model, model.noise(2), 6), 3)
    with pytest.raises(UnableError, match=f"^ld3: .*{message}"):
        ld3(calibration, 3)


def test_ld3_has_gradients_where_its_caller_has_none() -> None:
    model = oss.models.load("analytic", shape=(2, 3))

    def found() -> oss.Schedule:
        return ld3(Calibration(model, oss.teacher(model, model.noise(2), 6), 3), 3)

    with torch.inference_mode():
        inside = found()
    assert inside == found()


@pytest.mark.parametrize("error", ERRORS)
def test_ld3_says_where_there_is_no_memory_for_gradients(error: str) -> None:
    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ERRORS[error]
        return -x

    model = model_like(velocity)
    calibration = Calibration(model, oss.teacher(model, model.noise(2), 6), 3)
    with pytest.raises(UnableError, match=r"^ld3: the model has no memory for autograd: "):
        ld3(calibration, 3)


def test_ld3_is_not_unable_where_another_process_is_gone() -> None:
    class Gone(Wrapped):
        def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
            raise ProcessError("process 1 is gone")

        def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
            return self._model(x, t, sample)

    model = random_mixture(1)
    teacher = oss.teacher(model, model.noise(2), 6)
    with pytest.raises(ProcessError, match=r"^process 1 is gone$"):
        ld3(Calibration(Gone(model), teacher, 3), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ld3_takes_the_gradients_of_any_precision(dtype: torch.dtype) -> None:
    mixture = random_mixture(0)

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return mixture(x.double(), t, sample).to(x.dtype)

    model = from_callable(velocity, mixture.shape, dtype=dtype)
    calibration = Calibration(model, oss.teacher(model, model.noise(3).float(), 8), 3)
    start = min(error_of(calibration, uniform(calibration.trajectory, 3)),
                error_of(calibration, logsnr(calibration.trajectory, 3)))  # fmt: skip
    assert error_of(calibration, ld3(calibration, 3, epochs=20)) < start


def test_ld3_refuses_a_model_without_any_dependence_and_one_with_tied_rows() -> None:
    model = constant_velocity()
    calibration = Calibration(model, oss.teacher(model, model.noise(2), 6), 3)
    with pytest.raises(UnableError, match=r"^ld3: needs finite gradients"):
        ld3(calibration, 3)
    model.slots = 2
    with pytest.raises(UnableError, match=r"^ld3: needs gradients of the velocity; a pipeline"):
        ld3(calibration, 3)


@pytest.mark.parametrize("declared", [{"fixed_batch": 5}, {"one_time_per_call": True}, {}])
def test_ld3_calls_the_model_as_it_is_to_be_called(declared: dict[str, Any]) -> None:
    network = Network(1)  # whose weights want gradients, as in training
    seen = set()

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        assert len(t.unique()) == 1
        seen.add(len(x))
        return network(x, t, sample)

    model = model_like(velocity, **declared)
    calibration = Calibration(model, oss.teacher(model, model.noise(3), 8), 3, max_batch=2)
    seen.clear()
    with torch.no_grad():  # wherever it is called from
        found = ld3(calibration, 3, epochs=2)
    assert found.steps == 3
    assert seen == ({5} if "fixed_batch" in declared else {1, 2})
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("epochs", 1.5), ("rate", 0.0)])
def test_parameters_of_ld3_are_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ld3(random_calibration(0), 3, **{name: value})


@pytest.mark.parametrize("path", [EXAMPLES["flow"], FlowPath()], ids=["named", "default"])
def test_ld3_reaches_pure_noise_without_infinities(path: Path) -> None:
    calibration = Calibration(model_on(path), teacher_on(path), 3, start="pinned")
    assert ld3(calibration, 3).times[0] == 1.0
