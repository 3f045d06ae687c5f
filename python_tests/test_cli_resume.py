"""Searches that are killed, interrupted and continued, as processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cli_cases import TINY, Oss, assert_fails, assert_misused, files
from driver_cases import each_seed
from oss_ext import Schedule
from oss_ext.checkpoint import ANSWERS
from oss_ext.models.analytic import GaussianMixture

SEARCH = ("search", "--model=digits", "--samples=4", "--teacher-steps=24", "--steps=3,4",
          "--quality=dp", "--out=run")  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MAIN = "from oss_ext.cli import main; main()"
KEPT = Path("run/checkpoint") / ANSWERS


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def kept(folder: Path) -> int:
    path = folder / KEPT
    return path.stat().st_size if path.exists() else 0


def wait_for(folder: Path, size: int, running: subprocess.Popen[str]) -> None:
    """Until as many bytes are kept, or the process has ended."""
    begin = time.monotonic()
    while kept(folder) < size and running.poll() is None and time.monotonic() - begin < 240:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with process(folder, *SEARCH) as running:
        _, err = running.communicate(timeout=240)
        assert running.returncode == 0, err
    return folder / "run"


def assert_ended_like(folder: Path, uninterrupted: Path) -> None:
    for steps in (3, 4):
        name = f"digits-{steps}.json"
        assert (folder / "run" / name).read_bytes() == (uninterrupted / name).read_bytes()
    runs = [json.loads((at / "run.json").read_text()) for at in (folder / "run", uninterrupted)]
    assert [c["schedule"] if "schedule" in c else c["file"] for c in runs[0]["contenders"]] == [
        c["schedule"] if "schedule" in c else c["file"] for c in runs[1]["contenders"]
    ]
    assert not (folder / "run/checkpoint").exists()


def killed_and_resumed(folder: Path, uninterrupted: Path, places: list[float]) -> None:
    """Killed where those shares of all answers are kept, the last time not."""
    size = 4 * 28 * 28 * 4 * (24 + 24 + 23 + 22 + 21)  # of all answers, their headers aside
    for n, place in enumerate(sorted(places)):
        arguments = ("search", "--resume=run") if n and kept(folder) else SEARCH
        with process(folder, *arguments) as running:
            wait_for(folder, max(1, int(place * size)), running)
            running.send_signal(signal.SIGKILL)
    with process(folder, "search", "--resume=run") as running:
        out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert "resumed: " in out
    assert_ended_like(folder, uninterrupted)


@each_seed(1)
def test_a_search_that_is_killed_three_times_ends_the_same(
    uninterrupted: Path, seed: int, tmp_path: Path
) -> None:
    places = np.random.default_rng(seed).uniform(0, 0.95, 3).tolist()
    killed_and_resumed(tmp_path, uninterrupted, places)


@pytest.mark.slow
@each_seed(1)
def test_a_search_that_is_killed_fifty_times_ends_the_same(
    uninterrupted: Path, seed: int, tmp_path: Path
) -> None:
    for n, places in enumerate(np.random.default_rng(seed).uniform(0, 0.95, (10, 5)).tolist()):
        folder = tmp_path / str(n)
        folder.mkdir()
        killed_and_resumed(folder, uninterrupted, places)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_search_says_how_to_go_on(
    uninterrupted: Path, number: int, code: int, word: str, tmp_path: Path
) -> None:
    with process(tmp_path, *SEARCH) as running:
        wait_for(tmp_path, 1, running)
        running.send_signal(number)
        _, err = running.communicate(timeout=240)
    assert running.returncode == code
    assert [line for line in err.splitlines() if line][-2:] == [
        "what the model answered is kept: `oss search --resume run` goes on", word
    ]  # fmt: skip
    with process(tmp_path, "search", "--resume", "run") as running:
        _, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert_ended_like(tmp_path, uninterrupted)
    assert json.loads((tmp_path / "run/run.json").read_text())["command"] == "oss " + " ".join(
        SEARCH
    )


def test_the_second_process_is_told(tmp_path: Path) -> None:
    with process(tmp_path, *SEARCH) as first:
        wait_for(tmp_path, 1, first)
        first.send_signal(signal.SIGSTOP)
        with process(tmp_path, "search", "--resume", "run") as second:
            _, err = second.communicate(timeout=240)
    assert second.returncode == 1
    assert err.splitlines()[-1] == "error: run/checkpoint: another process runs in this folder"


# --- in one process -----------------------------------------------------------------------------


COMPARE = ("compare", *TINY, "--samples=4", "--steps=2,3", "--calibration=8",
           "--methods=uniform,ld3,dp,balanced", "--out=run")  # fmt: skip


def fail_in_call(monkeypatch: pytest.MonkeyPatch, last: int) -> list[int]:
    """The model fails in that call; how many there were, and how many of them with gradients."""
    original, calls = GaussianMixture.__call__, [0, 0]

    def failing(self: object, *args: object) -> object:
        calls[0] += 1
        calls[1] += torch.is_grad_enabled()
        if calls[0] == last:
            raise ValueError("the machine went away")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(GaussianMixture, "__call__", failing)
    return calls


def begin(oss: Oss, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """A search that fails in its third model call."""
    with monkeypatch.context() as patched:
        fail_in_call(patched, 3)
        outcome = oss("search", *TINY, "--steps=2", "--out=run", *arguments)
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        "what the model answered is kept: `oss search --resume run` goes on",
        "error: the machine went away",
    ]


def test_a_search_that_failed_goes_on(oss: Oss, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(oss, monkeypatch)
    assert files("run") == {"checkpoint/answers.bin", "checkpoint/checkpoint.json"}
    again = oss("search", *TINY, "--steps=2", "--out=run")
    assert_fails(again, "run/checkpoint: holds an unfinished run; resume it, or remove that folder")
    outcome = oss("search", "--resume=run", "--quiet")
    assert outcome.code == 0, outcome.err
    assert "resumed: 2 of " in outcome.out
    assert oss("search", *TINY, "--steps=2", "--out=whole").code == 0
    assert Schedule.load("run/analytic-2.json") == Schedule.load("whole/analytic-2.json")
    assert files("run") == files("whole")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_a_comparison_that_failed_goes_on(
    share: float, oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        calls = fail_in_call(patched, 10**9)
        whole = oss(*COMPARE[:-1], "--out=whole")
        assert whole.code == 0, whole.err
    with monkeypatch.context() as patched:
        failed = fail_in_call(patched, int(share * calls[0]))
        outcome = oss(*COMPARE)
        assert outcome.code == 1
        assert "what the model answered is kept: `oss compare --resume run` goes on" in outcome.err
    with monkeypatch.context() as patched:
        again = fail_in_call(patched, 10**9)
        outcome = oss("compare", "--resume=run")
        assert outcome.code == 0, outcome.err
    # What cannot be kept is LD3's gradients: a descent that was under way begins again.
    two, three = (1 + 40 * 4 * steps for steps in (2, 3))  # of the check and of every minibatch
    assert calls[1] == two + three
    lost = failed[1] % two if failed[1] < two else (failed[1] - two) % three
    assert again[0] <= calls[0] - failed[0] + lost + 3  # the check's differences; the call failed
    before = whole.out.replace("wrote whole; `oss report whole`", "wrote run; `oss report run`")
    assert before in outcome.out
    assert files("run") == files("whole")
    for name in ("ld3-2", "dp-3", "balanced-3"):
        assert Schedule.load(f"run/schedules/{name}.json") == Schedule.load(
            f"whole/schedules/{name}.json"
        )


def test_a_comparison_goes_on_with_the_schedules_that_it_began_with(
    oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert oss("search", *TINY, "--steps=2,3", "--out=made").code == 0
    with monkeypatch.context() as patched:
        fail_in_call(patched, 3)
        assert oss("compare", "made/analytic-2.json", "--samples=4", "--out=run").code == 1
    Path("made/analytic-3.json").rename("made/analytic-2.json")
    outcome = oss("compare", "--resume=run")
    assert outcome.code == 1
    assert "run/checkpoint: schedules was ['" in outcome.err


@pytest.mark.parametrize("last", [5, 30])
def test_a_search_goes_on_without_a_folder_that_is_gone(
    last: int, oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed, or on a disk that was; nothing could go on from what it was."""
    assert oss("search", *TINY, "--steps=2", "--out=whole").code == 0
    original, calls = GaussianMixture.__call__, [0]

    def removing(self: object, *args: object) -> object:
        calls[0] += 1
        if calls[0] == last:
            shutil.rmtree("run/checkpoint")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(GaussianMixture, "__call__", removing)
    outcome = oss("search", *TINY, "--steps=2", "--out=run")
    assert calls[0] > last
    assert (outcome.code, outcome.err) == (
        0, "note: run/checkpoint is gone: nothing is kept from here on\n"
    )  # fmt: skip
    assert Schedule.load("run/analytic-2.json") == Schedule.load("whole/analytic-2.json")


def test_options_beside_resume_are_refused(oss: Oss, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(oss, monkeypatch)
    outcome = oss("search", "--resume=run", "--steps=3")
    assert_misused(outcome, "--steps: expected none beside --resume, which takes all options from")
    assert_fails(oss("search", "--resume=none"), "none/checkpoint: holds no unfinished run")


def test_a_run_of_another_command_is_named(oss: Oss, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(oss, monkeypatch)
    outcome = oss("compare", "--resume=run")
    expected = "--resume: expected a run of `oss compare`, got one of `oss search`, which"
    assert_misused(outcome, f"{expected} `oss search --resume run` goes on with")
    assert oss("search", "--resume=run").code == 0


def test_a_run_of_another_model_is_refused(oss: Oss, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(oss, monkeypatch)
    manifest = Path("run/checkpoint/checkpoint.json")
    body = json.loads(manifest.read_text())
    body["settings"]["model"] = "analytic with hash 0"
    manifest.write_text(json.dumps(body))
    outcome = oss("search", "--resume=run")
    assert outcome.code == 1
    expected = "run/checkpoint: model was 'analytic with hash 0' when the run began, got 'analytic"
    assert expected in outcome.err


def test_a_checkpoint_of_something_else_is_refused(oss: Oss) -> None:
    from oss_ext import Checkpoint, models, teacher

    model = models.load("analytic")
    with Checkpoint("run/checkpoint", {"mine": 1}) as checkpoint:
        teacher(checkpoint.recorded(model), model.noise(2), steps=3)
    assert_misused(oss("search", "--resume=run"), "--resume: expected a run of `oss search` in run")


def test_no_checkpoint_leaves_none(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--out=run", "--no-checkpoint")
    assert outcome.code == 0
    assert not Path("run/checkpoint").exists()


def test_a_disk_without_room_is_told_beforehand(oss: Oss, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    outcome = oss("search", *TINY, "--steps=2", "--out=run")
    assert outcome.code == 0
    assert outcome.err.startswith("note: no checkpoint: the answers take up to 3.75 KiB, and ")
