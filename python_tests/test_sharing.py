"""Model calls made by several processes: equal bits for any number, and failures are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext.checkpoint import ANSWERS, Checkpoint
from oss_ext.models.base import Model, Request
from oss_ext.models.evaluation import Evaluator
from oss_ext.models.wrapped import Wrapped
from oss_ext.sharing import Shared

HERE = Path(__file__).resolve().parent


class AtOnce(Wrapped):
    """Asked for ``at_once`` calls together; notes how many came, and has no memory in some."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def __init__(self, model: Model, at_once: int, room: int = 100, after: int = 0) -> None:
        super().__init__(model)
        self.at_once, self.room, self.left = at_once, room, after
        self.rounds: list[int] = []

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        self.rounds.append(len(requests))
        for request in requests:
            self.left -= 1
            if self.left < 0 and len(request[0]) > self.room:
                raise self.error
            yield from super().answers([request])


def velocities(model: Model, rows: int, max_batch: int) -> tuple[Tensor, Evaluator]:
    torch.manual_seed(rows)
    states = torch.randn(rows, 3, *model.shape, dtype=model.dtype)
    times = torch.linspace(0.1, 1, rows, dtype=torch.float64)
    asked = torch.rand(rows, 3) < 0.8
    evaluator, out = Evaluator(model, 3, max_batch), torch.full_like(states, 7.0)
    evaluator.fill(out, states, times, asked.nonzero())
    assert bool((out[~asked] == 7).all())
    return out, evaluator


@pytest.mark.parametrize("at_once", [2, 3, 100])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_calls_asked_for_together_give_the_same_bits(rows: int, at_once: int) -> None:
    alone, one = velocities(random_mixture(1), rows, 2)
    model = AtOnce(random_mixture(1), at_once)
    together, several = velocities(model, rows, 2)
    assert together.equal(alone)
    assert several.nfe == one.nfe
    calls = -(-one.nfe // 2)
    assert sorted(model.rounds, reverse=True) == model.rounds
    assert sum(model.rounds) == calls
    assert len(model.rounds) == -(-calls // at_once)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_memory_that_runs_out_in_one_of_several_calls(after: int) -> None:
    """What came before it holds, as if the calls had been made one by one."""
    alone, one = velocities(AtOnce(random_mixture(1), 1, room=2, after=after), 9, 4)
    together, several = velocities(AtOnce(random_mixture(1), 3, room=2, after=after), 9, 4)
    assert together.equal(alone)
    assert (several.nfe, several.block) == (one.nfe, one.block) == (one.nfe, 2)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@pytest.mark.parametrize("room", [1, 100])
@pytest.mark.parametrize("at_once", [(1, 3), (3, 1), (3, 2)])
def test_a_run_goes_on_with_another_number_of_calls_at_once(
    at_once: tuple[int, int], room: int, tmp_path: Path
) -> None:
    def run(model: Model) -> str:
        teacher = oss.teacher(model, model.noise(4, 3), steps=12, max_batch=2)
        return oss.search(model, teacher, [3], max_batch=2).schedule(3).to_json()

    files = []
    for number in at_once:
        folder = tmp_path / str(number)
        with Checkpoint(folder, {}) as checkpoint:
            run(checkpoint.recorded(AtOnce(random_mixture(1), number, room, after=7)))
        files.append((folder / ANSWERS).read_bytes())
    assert files[0] == files[1]
    before = tmp_path / str(at_once[0])
    with (before / ANSWERS).open("r+b") as file:
        file.truncate(len(files[0]) * 2 // 3)
    with Checkpoint(before, {}, resume=True) as checkpoint:
        resumed = run(checkpoint.recorded(AtOnce(random_mixture(1), at_once[1], min(room, 2))))
        assert all("is broken" in note for note in checkpoint.notes)  # as it was cut there
    assert resumed == run(AtOnce(random_mixture(1), 1, room, after=7))


class Peer:
    """Another process, in this one: gives what ``model`` gives, or fails."""

    number, silent = 1, True

    def __init__(self, model: Model, error: str = "", room: int = 100) -> None:
        self.model, self.error, self.room = model, error, room
        self.owed: list[dict[str, Tensor]] = []

    def send(self, kind: str, **tensors: Tensor) -> None:
        assert kind == "ask"
        assert not self.owed  # never two questions at a time
        self.owed.append(tensors)

    def receive(self) -> tuple[str, dict[str, Tensor]]:
        asked = self.owed.pop()
        if len(asked["x"]) > self.room:
            return "memory", {}
        return (self.error, {}) if self.error else ("answer", {"v": self.model(**asked)})


def shared(model: Model, *peers: Any) -> Shared:
    return Shared(model, peers)


def test_other_processes_answer() -> None:
    model = random_mixture(1)
    together, _ = velocities(shared(model, Peer(model), Peer(model)), 33, 2)
    assert together.equal(velocities(model, 33, 2)[0])


@pytest.mark.parametrize("rooms", [(2, 100), (100, 2), (2, 2)])
def test_memory_that_runs_out_anywhere_halves_the_calls(rooms: tuple[int, int]) -> None:
    model = random_mixture(1)
    both = shared(AtOnce(model, 1, room=rooms[0]), Peer(model, room=rooms[1]))
    with pytest.warns(RuntimeWarning, match="ran out of memory with 4 rows in a call; there are 2"):
        found, evaluator = velocities(both, 9, 4)
    assert evaluator.block == 2
    torch.testing.assert_close(found, velocities(model, 9, 2)[0], rtol=1e-12, atol=1e-14)


def test_an_error_elsewhere_is_told_with_its_process() -> None:
    model = random_mixture(1)
    with pytest.raises(oss.ProcessError, match="process 1: ValueError: no such prompt"):
        velocities(shared(model, Peer(model, "ValueError: no such prompt")), 9, 2)


def test_an_error_here_leaves_no_answer_behind() -> None:
    model, peer = random_mixture(1), Peer(random_mixture(1))
    broken = AtOnce(model, 1, room=0)
    both = shared(broken, peer)
    with pytest.raises(torch.OutOfMemoryError):
        list(both.answers([(model.noise(1), torch.ones(1), torch.zeros(1).long())] * 2))
    assert peer.owed == []


# ---- as processes

RUN = """
import json, sys, warnings
import oss_ext as oss
from driver_cases import random_mixture, random_network
from test_sharing import found

model = random_mixture(int(sys.argv[1]))
with oss.sharing(model) as shared:
    if shared is not None:
        print(json.dumps(found(shared)))
"""


def found(model: Model) -> list[str]:
    """Schedules of every kind of search, and an evaluation."""
    noise = model.noise(5, 3)
    teacher = oss.teacher(model, noise, steps=9, max_batch=2)
    made: list[str] = []
    options: list[dict[str, Any]] = [
        {"quality": "dp"},
        {"quality": "best"},
        {"quality": "dp", "solver": "dpmpp-2m"},
        {"quality": "dp", "solver": "heun"},
        {"scope": "instance", "aggregate": "mean"},
    ]
    for option in options:
        made.append(oss.search(model, teacher, [3], max_batch=2, **option).schedule(3).to_json())
    grouped = oss.search_groups(model, noise, [3], group=3, aggregate="median", max_batch=2)
    made.append(grouped.schedule(3).to_json())
    held_out = oss.teacher(model, model.noise(7, 4), steps=9, max_batch=2)
    (score,) = oss.compare(model, held_out, {"": oss.Schedule.from_json(made[0])}, max_batch=2)
    return [*made, repr(score.mse.tolist())]


@contextmanager
def processes(
    count: int, *arguments: str, folder: Path, **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """``python ARGUMENTS`` as that many processes of one run, as ``torchrun`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_PORT": str(port),
              "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count), **environment}  # fmt: skip
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *arguments], cwd=folder, text=True,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )
            for rank in range(count)
        ]  # fmt: skip
        for one in started:
            stack.callback(one.kill)
        yield started


def ended(started: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code and output of each."""
    outcomes = []
    for one in started:
        out, err = one.communicate(timeout=240)
        outcomes.append((one.returncode, out, err))
    return outcomes


@pytest.mark.parametrize(
    "count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))]
)
@each_seed(1)
def test_any_number_of_processes_finds_the_same(count: int, seed: int, tmp_path: Path) -> None:
    with processes(count, "-c", RUN, str(seed), folder=tmp_path) as started:
        first, *others = ended(started)
    assert first[0] == 0, first[2]
    assert all(outcome == (0, "", "") for outcome in others), others
    assert json.loads(first[1]) == found(random_mixture(seed))


TWICE = """
import os, time
import oss_ext as oss
from driver_cases import random_mixture
from oss_ext.models.evaluation import Evaluator

model = random_mixture(1)
for opened in range(2):
    time.sleep(2 * opened * (os.environ["RANK"] == "1"))
    with oss.sharing(model) as shared:
        if shared is not None:
            v = Evaluator(shared, 2, 1).at(shared.noise(2), 1.0)
            print(v.equal(Evaluator(model, 2, 1).at(model.noise(2), 1.0)))
"""


@pytest.mark.parametrize("agent", [False, True])
def test_a_run_may_share_again_also_where_the_others_come_late(agent: bool, tmp_path: Path) -> None:
    """``torchrun`` keeps the addresses of what was open before."""
    (tmp_path / "twice.py").write_text(TWICE)
    if agent:
        command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "twice.py")
        with processes(1, *command, folder=tmp_path) as started:
            ((code, out, err),) = ended(started)
    else:
        with processes(2, "twice.py", folder=tmp_path) as started:
            (code, out, err), other = ended(started)
        assert other == (0, "", "")
    assert code == 0, err
    assert out.split() == ["True"] * 2


MODEL = """
import os, signal
import oss_ext as oss
from driver_cases import random_mixture
from oss_ext.models.wrapped import Wrapped

class Odd(Wrapped):
    calls = 0

    def answers(self, requests):
        for x, t, sample in requests:
            self.calls += 1
            if self.calls == 20 and os.environ["RANK"] == "1":
                if os.environ["FAULT"] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if os.environ["FAULT"] == "raises":
                    raise ValueError("no such prompt")
            (v,) = super().answers([(x, t, sample)])
            yield v * (1.1 if (os.environ["FAULT"], os.environ["RANK"]) == ("differs", "1") else 1)

def model():
    weights = 2 if (os.environ["FAULT"], os.environ["RANK"]) == ("weights", "1") else 1
    return Odd(random_mixture(weights))
"""
SEARCH = ("-m", "oss_ext", "search", "--model=model.py:model", "--samples=4", "--max-batch=2",
          "--teacher-steps=16", "--steps=4", "--quality=dp", "--out=run", "--quiet")  # fmt: skip


@pytest.mark.parametrize("fault", ["killed", pytest.param("raises", marks=pytest.mark.slow)])
def test_a_process_that_fails_ends_the_run_which_goes_on_with_fewer(
    fault: str, tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    with processes(2, *SEARCH, folder=tmp_path, FAULT=fault) as started:
        (code, _, err), other = ended(started)
    assert code == 1
    told = " is gone" if fault == "killed" else ": ValueError: no such prompt"
    assert err.splitlines()[-1] == f"error: process 1{told}"
    assert "`oss search --resume run` goes on" in err
    assert other[0] == (-9 if fault == "killed" else 0), other
    with processes(1, "-m", "oss_ext", "search", "--resume=run", "--quiet", folder=tmp_path,
                   FAULT="none") as started:  # fmt: skip
        ((code, out, err),) = ended(started)
    assert code == 0, err
    assert "model calls were there" in out
    model = random_mixture(1)
    teacher = oss.teacher(model, model.noise(4), steps=16, max_batch=2)
    wanted = oss.search(model, teacher, 4, quality="dp", max_batch=2).schedule(4)
    assert oss.Schedule.load(tmp_path / "run/analytic-4.json") == wanted


@pytest.mark.parametrize(
    ("fault", "told"),
    [("weights", "as the first process has it, got model"), ("differs", "within 1% of their root")],
)
def test_another_model_in_a_process_is_refused(fault: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    with processes(2, *SEARCH, folder=tmp_path, FAULT=fault) as started:
        (code, out, err), other = ended(started)
    assert (code, out) == (1, "")
    assert err.startswith("error: process 1: expected")
    assert told in err
    assert other == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_torchrun_runs_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "--", *SEARCH[1:], "--start=pinned", "--log=log.jsonl"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FAULT": "none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    log = (tmp_path / "log.jsonl").read_text()
    assert log.count('"event": "begin", "stage": "oss search"') == 1
    assert (tmp_path / "run/analytic-4.json").exists()
