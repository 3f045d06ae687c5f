"""Trajectories in the host's memory beside a model on a device, here one that is pretended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import oss_ext as oss
from cli_cases import TINY, Oss
from driver_cases import SHAPE, each_seed
from oss_ext import Schedule
from oss_ext.baselines import BASELINES, Calibration

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
MEANT = (CARD, torch.device("cuda"))  # both are the card


class Pretended(TorchFunctionMode):
    """Tensors that were moved to ``CARD`` are marked, and meet no others, as on a card."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        marks = {hasattr(x, "on_card") for x in tensors if x.dim()}  # numbers go with any
        marks = marks or {any(hasattr(x, "on_card") for x in tensors)}
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return CARD if hasattr(args[0], "on_card") else function(*args)
        if function is torch.Tensor.to:
            marks = {hasattr(args[0], "on_card")}
            wanted = [kwargs["device"]] if "device" in kwargs else []
            wanted += [x for x in args[1:] if isinstance(x, str | torch.device)]
            wanted += [CARD if hasattr(x, "on_card") else torch.device("cpu")
                       for x in args[1:] if isinstance(x, Tensor)]  # fmt: skip
            kwargs.pop("device", None)
            args = [x for x in args if not isinstance(x, str | torch.device)]
            if wanted:
                marks = {torch.device(wanted[0]) in MEANT}
                self.moved += True in marks
        elif function is torch.Tensor.cpu:
            marks = {False}
        elif function is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            marks = {hasattr(args[0], "on_card")}  # places may be on the CPU
        assert len(marks) < 2, f"{function} takes tensors of two devices"
        for name in ("device", "pin_memory"):
            if torch.device(kwargs.get(name) or "cpu") in MEANT:
                kwargs[name], marks = None, {True}
        result = function(*args, **kwargs)
        if function in (torch.Tensor.to, torch.Tensor.cpu):
            result = result.clone()  # without a mark
        for x in tree_leaves(result) if True in marks else ():
            if isinstance(x, Tensor):
                x.on_card = True  # type: ignore[attr-defined]
        return result


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    for name in ("max_memory_allocated", "memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (2**15, 2**20))
    with Pretended() as mode:
        yield mode


def network(device: torch.device, seed: int) -> oss.models.Model:
    """A network whose weights are on ``device``, and which is to be given nothing else."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(6, 6, generator=generator).div(3).to(device) for _ in range(2)]

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        assert x.device == t.device == sample.device == weights[0].device
        hidden = torch.tanh(x.flatten(1) @ weights[0] + t.to(x.dtype)[:, None])
        return (hidden @ weights[1]).view(x.shape) + 0.1 * sample.to(x.dtype).view(-1, 1, 1)

    return oss.models.from_callable(velocity, shape=SHAPE, predicts="velocity", device=device)


def searched(device: torch.device, seed: int, quality: str, **options: Any) -> oss.SearchResult:
    model = network(device, seed)
    noise = model.noise(4, seed).cpu()
    teacher = oss.teacher(model, noise, 12, keep_x0=True)
    assert teacher.states.device.type == "cpu"
    return oss.search(model, teacher, 3, quality=quality, **options)


@pytest.mark.parametrize(
    ("quality", "options"),
    [
        ("dp", {}),
        ("dp", {"scope": "instance", "aggregate": "median"}),
        ("dp", {"solver": "dpmpp-3m"}),
        ("dp", {"solver": "dpm-2s"}),
        ("dp", {"metric": "x0"}),
        ("dp", {"metric": "x0-candidate"}),
        ("dp", {"beam": 2}),
        ("fast", {}),
        ("balanced", {"off_grid": True}),
        ("best", {"solver": "unipc-2"}),
    ],
    ids=str,
)
@each_seed(1)
def test_a_search_is_the_same_wherever_the_model_is(
    quality: str, options: dict[str, Any], seed: int, card: Pretended
) -> None:
    there, here = (searched(device, seed, quality, **options) for device in (CARD, CPU))
    assert card.moved > 20  # states, times and samples of every call
    for ours, plain in zip(there.schedules(3), here.schedules(3), strict=True):
        assert (ours.times, ours.orders, ours.cost) == (plain.times, plain.orders, plain.cost)


@each_seed(1)
def test_students_are_run_and_compared_with_it(seed: int, card: Pretended) -> None:
    found = searched(CARD, seed, "fast")
    model, teacher = network(CARD, seed), found.trajectory
    image = oss.sample(model, teacher.noise, found.schedule(3))
    assert image.device == CPU
    (score,) = oss.compare(model, teacher, {"ours": found.schedule(3)})
    assert score.mse.tolist() == pytest.approx(
        (image - teacher.final).double().square().flatten(1).mean(dim=1).tolist()
    )
    made = BASELINES["ld3"].make(Calibration(model, teacher, 3), 3)
    assert made.steps == 3


@pytest.mark.parametrize("says", ["cuda:0", "cuda", "cuda of its own"])
@each_seed(1)
def test_a_plan_tells_the_two_memories_apart(
    says: str, seed: int, card: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = network(torch.device(says.split()[0]), seed)
    assert model.device == CARD
    if says == "cuda of its own":  # a class of the user's
        model.device = torch.device("cuda")
    noise = model.noise(8, seed)
    for initial, arrays in ((noise.cpu(), "host"), (noise, "cuda:0")):
        outline = oss.teacher(model, initial, 300, dry_run=True)
        planned = oss.search(model, outline, 4, quality="dp", dry_run=True)
        size = outline.held()[0].bytes
        assert planned.memory.keys() == {"host", "cuda:0"}
        (other,) = {"host", "cuda:0"} - {arrays}
        assert planned.memory[arrays] > 2 * size
        assert "memory, cuda:0: " in str(planned)
        assert planned.memory[other] < size / 2 or other == "host"
        short = [line for line in planned.shortages() if "cuda:0" in line]
        assert len(short) == (arrays == "cuda:0")


def test_noise_on_a_third_device_is_refused(card: Pretended) -> None:
    model = oss.models.from_callable(lambda x, t, sample: x, shape=SHAPE, device=CARD)
    expected = r"^noise: expected a tensor on cuda:0 or cpu, got meta"
    with pytest.raises(ValueError, match=expected):
        oss.teacher(model, torch.zeros(1, *SHAPE, device="meta"), 5)


def test_the_command_line_keeps_trajectories_in_the_hosts_memory(
    oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU there is no other, and nothing changes."""
    assert oss("search", *TINY, "--steps=2", "--out=plain").code == 0
    assert oss("search", *TINY, "--steps=2", "--out=host", "--host-memory").code == 0
    times = [Schedule.load(f"{folder}/analytic-2.json").times for folder in ("plain", "host")]
    assert times[0] == times[1]


@pytest.mark.parametrize("device", ["cuda"])
def test_a_search_on_a_gpu_keeps_its_trajectory_in_the_hosts_memory(device: str, seed: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = searched(torch.device(device, 0), seed, "dp")
    assert found.trajectory.states.device == CPU
    image = oss.sample(network(CARD, seed), found.trajectory.noise, found.schedule(3))
    error = float((image - found.trajectory.final).double().square().mean())
    assert found.cost(3) == pytest.approx(error, rel=1e-4)
