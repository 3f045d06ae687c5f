"""Whole searches on the device that the model is on: what they hold, share, keep and survive there.

On a CPU they always run; on a GPU where there is one (``bench/gpu_check.py`` runs them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
)
from oss_ext import ops
from oss_ext.checkpoint import Checkpoint
from oss_ext.models.base import Model
from test_checkpoint import Crash, Dies
from test_sharing import ended, processes

SHAPE, STEPS, SAMPLES = (3, 5, 7), 16, 4


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


def network(device: torch.device, seed: int, room: int = 10**6) -> Model:
    """A small network, whose calls of more than ``room`` rows want more memory than there is."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(SHAPE).numel()
    weights = [torch.randn(size, size, generator=generator).div(size**0.5) for _ in range(2)]
    first, second = (w.to(device) for w in weights)

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        if len(x) > room:
            torch.empty(2**60, dtype=torch.uint8, device=x.device)
        hidden = torch.tanh(x.flatten(1) @ first + t.to(x.dtype)[:, None])
        return (hidden @ second).view(x.shape)

    return oss.models.from_callable(
        velocity, shape=SHAPE, predicts="velocity", device=device, data_range=2.0
    )


def searched(model: Model, noise: Tensor | None = None, **options: Any) -> oss.SearchResult:
    of_teacher = {name: options.pop(name) for name in ("storage", "scratch") if name in options}
    noise = model.noise(SAMPLES, 3) if noise is None else noise
    teacher = oss.teacher(model, noise, STEPS, max_batch=2, **of_teacher)
    return oss.search(model, teacher, 3, max_batch=2, **options)


def assert_ends_as_well(found: oss.SearchResult, other: oss.SearchResult) -> None:
    """Roundings differ from device to device, and with them the rows in near-ties."""
    ends = [float(result.schedule(3).cost or 0) for result in (found, other)]
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": "dp"},
        {"quality": "dp", "solver": "dpmpp-2m"},
        {"quality": "dp", "solver": "heun"},
        {"quality": "dp", "beam": 2},
        {"quality": "dp", "metric": "x0-candidate"},
        {"quality": "balanced"},
    ],
    ids=str,
)
@each_seed(1)
def test_a_search_ends_as_on_the_cpu(
    options: dict[str, Any], seed: int, device: torch.device
) -> None:
    found = searched(network(device, seed), **options)
    assert found.trajectory.states.device == device
    assert ops.serving(device.type).name in ("native", "triton")
    assert_ends_as_well(found, searched(network(torch.device("cpu"), seed), **options))


@pytest.mark.parametrize("storage", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "files"])
@each_seed(1)
def test_trajectories_may_be_anywhere(
    place: str, storage: torch.dtype | None, seed: int, device: torch.device, tmp_path: Path
) -> None:
    model = network(device, seed)
    noise = model.noise(SAMPLES, 3)
    noise = noise if place == "device" else noise.cpu()
    scratch = tmp_path if place == "files" else None
    found = searched(model, noise, storage=storage, scratch=scratch, quality="dp")
    assert found.trajectory.states.device == noise.device
    if storage is None:
        assert_ends_as_well(found, searched(network(torch.device("cpu"), seed), quality="dp"))
    image = oss.sample(model, noise, found.schedule(3), max_batch=2)
    error = float((image - found.trajectory.final).double().square().flatten(1).mean(1).mean())
    assert found.cost(3) == pytest.approx(error, rel=1e-3 if storage is None else 0.5)


@pytest.mark.parametrize("quality", ["dp", "best"])
@each_seed(1)
def test_a_search_that_is_cut_off_ends_the_same(
    quality: str, seed: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oss_ext.checkpoint.LEAST_BYTES", 0)
    counted = Dies(network(device, seed))
    expected = searched(counted, quality=quality).schedule(3)
    for n, calls in enumerate((counted.calls // 3, counted.calls // 3, 10**9)):
        with Checkpoint(tmp_path / "c", {}, resume=n > 0) as checkpoint:
            try:
                model = checkpoint.recorded(Dies(network(device, seed), calls))
                found = searched(model, quality=quality).schedule(3)
            except Crash:
                assert n < 2
            assert not checkpoint.notes
    assert found == expected


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@each_seed(1)
def test_calls_that_the_device_has_no_memory_for_are_halved(
    seed: int, device: torch.device
) -> None:
    found = searched(network(device, seed, room=1), quality="dp")
    assert found.block == 1
    assert_ends_as_well(found, searched(network(device, seed), quality="dp"))


@each_seed(1)
def test_a_trajectory_comes_back_to_the_device(
    seed: int, device: torch.device, tmp_path: Path
) -> None:
    model = network(device, seed)
    made = oss.teacher(model, model.noise(SAMPLES), STEPS)
    made.save(tmp_path / "teacher")
    got = oss.Trajectory.load(tmp_path / "teacher", device=device)
    assert got.states.device == device
    assert got.states.equal(made.states)
    schedules = [oss.search(model, it, 3, quality="dp").schedule(3) for it in (got, made)]
    assert schedules[0] == schedules[1]


SHARED = """
import sys
import torch
import oss_ext as oss
from test_search_devices import network, searched

model = network(torch.device(sys.argv[1]), 1)
with oss.sharing(model) as shared:
    if shared is not None:
        print(*(searched(shared, quality=q).schedule(3).to_json() for q in ("dp", "balanced")))
"""


@pytest.mark.slow
def test_processes_share_a_device(device: torch.device, tmp_path: Path) -> None:
    """As they would share several: each call is made on one, and what is sent is in the host's
    memory."""
    found = []
    for count in (1, 2):
        with processes(count, "-c", SHARED, str(device), folder=tmp_path) as started:
            (code, out, err), *_ = ended(started)
        assert code == 0, err
        found.append(out)
    assert found[0] == found[1]
    assert json.loads(found[0][: found[0].index("}\n") + 2])["model"]
