"""Metrics that evaluate the model at candidates, and models with modules of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oss_ext as oss
from driver_cases import SAMPLES, SHAPE, random_times
from oss_ext.metrics import CandidateDataMetric, EvaluatedMetric, PerceptualMetric, Selection
from oss_ext.models import Model, from_callable

WEIGHTS = torch.tensor([[0.5], [2.0]])
METRICS: dict[str, EvaluatedMetric] = {
    "x0-candidate": CandidateDataMetric(),
    "weighted": CandidateDataMetric(Selection(weights=WEIGHTS)),
    "random": CandidateDataMetric(Selection(channels=1, how="random", seed=3)),
    "perceptual": PerceptualMetric("inner.1"),
}
each_metric = pytest.mark.parametrize("metric", METRICS)
each_solver = pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun"])


class Layers(nn.Module):
    """A smooth random velocity with a hidden layer of its own name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.outer = nn.Linear(16, 6)
        self.double().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def hidden(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        """What ``inner.1`` gives."""
        own = torch.stack([t, sample.to(t)], dim=1)
        return self.inner(torch.cat([x.flatten(1), own], dim=1))

    def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return 2 * self.outer(self.hidden(x, t, sample)).view_as(x)


def layered(seed: int) -> Model:
    return from_callable(Layers(seed), SHAPE, dtype=torch.float64, data_range=2.0)


def case(seed: int, steps: int = 7, samples: int = SAMPLES) -> tuple[Any, oss.Trajectory]:
    model = layered(seed)
    return model, oss.teacher(model, model.noise(samples, seed), times=random_times(seed, steps))


class Blind(Layers):
    """Its hidden layer sees odd samples only, or none; the velocity does not depend on it."""

    def __init__(self, seed: int, sees: bool) -> None:
        super().__init__(seed)
        self.sees = sees

    def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        seen = (sample % 2 * self.sees).to(x)
        self.hidden(x * seen[:, None, None], t * seen, sample * seen)
        return (3 * x + t[:, None, None]).sin()


def blind(seed: int, steps: int, sees: bool) -> tuple[Any, oss.Trajectory]:
    model = from_callable(Blind(seed, sees), SHAPE, dtype=torch.float64)
    noise = model.noise(SAMPLES, seed)
    return model, oss.teacher(model, noise, times=random_times(seed, steps))
