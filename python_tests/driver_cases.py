"""Random models, teachers and schedules that the tests of the driver share."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oss_ext as oss
from oss_ext import dp
from oss_ext.models import Model, from_callable
from oss_ext.models.analytic import GaussianMixture
from oss_ext.models.evaluation import Evaluator

SHAPE = (2, 3)
SAMPLES = 3


def each_seed(count: int = 2) -> pytest.MarkDecorator:
    """Run a test with ``count`` fresh seeds: the fixture ``seed`` depends on the test's name."""
    return pytest.mark.parametrize("seed", range(count), indirect=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: these tensors are so small that threads only get in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_mixture(seed: int, dtype: torch.dtype = torch.float64) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return GaussianMixture(mu.to(dtype), sd=0.3, shape=SHAPE)


class Network(nn.Module):
    """A smooth random velocity field that knows the time and each sample's own condition."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return nn.Parameter((values / rows**0.5).to(dtype))

        self.condition = draw(SAMPLES, 6)
        self.first, self.second = draw(13, 16), draw(16, 6)

    def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        condition = self.condition[sample % len(self.condition)]
        inputs = torch.cat([x.flatten(1), 2 * condition, 3 * t[:, None].to(x.dtype)], dim=1)
        return (3 * (2 * inputs @ self.first).tanh() @ self.second).view_as(x)


def random_network(seed: int, dtype: torch.dtype = torch.float64) -> Model:
    network = Network(seed, dtype).requires_grad_(False)
    return from_callable(network, SHAPE, dtype=dtype, data_range=2.0)


FAMILIES: dict[str, Callable[..., Model]] = {"mixture": random_mixture, "network": random_network}
each_reduction = pytest.mark.parametrize("reduce", ["none", "mean", "log_mean"])
each_start = pytest.mark.parametrize("start", ["free", "pinned"])
each_family = pytest.mark.parametrize("family", FAMILIES)


def random_times(seed: int, steps: int) -> Tensor:
    """An uneven grid ``[steps + 1]`` from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.2 + torch.rand(steps, generator=generator, dtype=torch.float64)
    times = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)])
    return times / times[-1]


def random_case(
    family: str,
    seed: int,
    *,
    steps: int = 9,
    samples: int = SAMPLES,
    dtype: torch.dtype = torch.float64,
) -> tuple[Model, oss.Trajectory]:
    """A random model and its teacher on an uneven grid."""
    model = FAMILIES[family](seed, dtype)
    times = random_times(seed, steps)
    return model, oss.teacher(model, model.noise(samples, seed), times=times)


def fill_table(
    model: Model,
    trajectory: oss.Trajectory,
    steps: int,
    *,
    reduce: str = "none",
    start: str = "free",
    max_batch: int | None = None,
    **options: Any,
) -> dp.Table:
    evaluator = Evaluator(model, trajectory.samples, max_batch)
    return dp.run(evaluator, trajectory, steps, reduce=reduce, start=start, **options)


@dataclass(frozen=True, eq=False)
class Call:
    """What a recorded model was asked for."""

    x: Tensor
    t: Tensor
    sample: Tensor


def recorded(model: Model, **declared: Any) -> tuple[Model, list[Call]]:
    """The same velocities, and the list that every call is added to."""
    calls: list[Call] = []

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        calls.append(Call(x.clone(), t.clone(), sample.clone()))
        return model(x, t, sample)

    return from_callable(velocity, model.shape, dtype=model.dtype, **declared), calls


def faulty(
    model: Model, broken: Callable[[Tensor, Tensor], Tensor], value: float = float("nan")
) -> Model:
    """The same velocities, but ``value`` in the rows where ``broken(t, sample)``."""

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        v = model(x, t, sample)
        v[broken(t, sample)] = value
        return v

    return from_callable(velocity, model.shape, dtype=model.dtype, name="faulty")


def constant_velocity(value: float = 1.0, shape: Sequence[int] = SHAPE, **declared: Any) -> Model:
    """``v = value`` everywhere: straight paths, on which every schedule is exact."""
    return from_callable(lambda x, t, sample: torch.full_like(x, value), shape, **declared)


def example_schedule(**changes: Any) -> oss.Schedule:
    """A schedule with every attribute set to something that is no default."""
    attributes: dict[str, Any] = {
        "model": "example",
        "model_hash": "0123456789abcdef",
        "objective": oss.schedule.Objective("instance", "none", "pinned", "median"),
        "cost": 0.1 + 0.2,
        "samples": 3,
        "search_nfe": 47,
    }
    return oss.Schedule.from_indices(
        [5, 3, 1, 0], [0, 0.1, 1 / 3, 0.4, 0.7, 1], **(attributes | changes)
    )


def signed(
    changes: dict[str, Any], without: str | None = None, of: oss.Schedule | None = None
) -> str:
    """The JSON of a schedule, or the example's, with ``changes`` and a checksum that fits them."""
    body = json.loads((of or example_schedule()).to_json()) | changes
    body.pop("checksum")
    body.pop(without, None)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"checksum": hashlib.sha256(text.encode()).hexdigest()})


dp_search = functools.partial(oss.search, quality="dp")
"""Algorithm 1 alone."""


def assert_replays(
    model: Model, trajectory: oss.Trajectory, table: dp.Table, solver: str, steps: int
) -> None:
    """Every sample's path of ``steps`` steps, run in its orders, has the costs of the table."""
    for b in range(trajectory.samples):
        column = min(b, table.parent.shape[2] - 1)
        rows = table.backtrack(steps, column)
        orders = table.orders(rows, column)
        _, errors = dp.replay(model, trajectory, rows, solver=solver, orders=orders)
        expected = torch.stack([table.cost[k, row, b] for k, row in enumerate(rows[1:])])
        torch.testing.assert_close(errors[:, b], expected, rtol=1e-9, atol=1e-12)
