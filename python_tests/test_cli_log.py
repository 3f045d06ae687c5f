"""``--log FILE``: what a command does, as JSON lines."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cli_cases import TINY, Oss, assert_misused, files
from oss_ext import __version__
from oss_ext.cli.log import _Log
from oss_ext.events import Event, following, tell
from oss_ext.files import parse_json
from oss_ext.models.analytic import GaussianMixture
from oss_ext.runs import Run

SEARCH = ("search", *TINY, "--steps=2,3")
COMPARE = ("compare", *TINY[:2], "--teacher-steps=8", "--quiet", "--calibration=4", "--samples=4",
           "--steps=2", "--methods=uniform,dp")  # fmt: skip


def logged(path: Path | str = "log.jsonl") -> list[Event]:
    """The lines of a log, each of which is an object by itself."""
    text = Path(path).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [parse_json(line) for line in text.splitlines()]


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """``act`` in the model's call of that number."""
    original, count = GaussianMixture.__call__, itertools.count(1)

    def call(self: GaussianMixture, *args: Any) -> Any:
        if next(count) == number:
            act()
        return original(self, *args)

    monkeypatch.setattr(GaussianMixture, "__call__", call)


def fail() -> None:
    raise RuntimeError("the machine went away\nand left a trace")


def test_a_search_is_logged_from_end_to_end(oss: Oss) -> None:
    outcome = oss(*SEARCH, "--log=logs/log.jsonl", "--metric=x0", "--quality=dp", "--out=run")
    assert (outcome.code, outcome.err) == (0, "")
    lines = logged("logs/log.jsonl")
    first, last = lines[0], lines[-1]
    assert (first["event"], first["stage"], first["oss_ext"]) == (
        "begin", "oss search", __version__
    )  # fmt: skip
    assert first["command"] == "oss " + " ".join(
        [*SEARCH, "--log=logs/log.jsonl", "--metric=x0", "--quality=dp", "--out=run"]
    )
    settings = first["settings"]
    assert (settings["steps"], settings["metric"], settings["quality"]) == ([2, 3], "x0", "dp")
    assert (settings["set"], settings["for"]) == ([["shape", [1, 4, 4]]], None)
    assert (settings["out"], settings["checkpoint"]) == ("run", True)
    assert (last["event"], last["stage"]) == ("done", "oss search")
    stages = [line["stage"] for line in lines if line["event"] == "begin"]
    assert stages == ["oss search", "oss search/teacher", "oss search/search"]
    (wrote,) = (line["files"] for line in lines if line["event"] == "wrote")
    assert {f"run/{name}" for name in files("run")} == {*wrote, "run/schedules.png"}
    for line in lines:
        when = datetime.fromisoformat(line["time"])
        assert when.utcoffset() == timedelta(0)
        assert list(line)[:4] == ["time", "at", "event", "stage"]
    since = [line["at"] for line in lines]
    assert since == sorted(since)
    assert since[-1] >= last["seconds"] >= 0


def test_every_line_is_there_when_it_is_told(oss: Oss, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    at_call(
        monkeypatch, 3, lambda: seen.extend((e["event"], e["stage"]) for e in logged())
    )  # fmt: skip
    assert oss(*SEARCH, "--log=log.jsonl").code == 0
    assert seen[:2] == [("begin", "oss search"), ("begin", "oss search/teacher")]


def test_a_comparison_is_logged(oss: Oss) -> None:
    outcome = oss(*COMPARE, "--log=log.jsonl")
    assert (outcome.code, outcome.err) == (0, "")
    lines = logged()
    assert lines[0]["settings"]["methods"] == ["uniform", "dp"]
    assert [line["stage"] for line in lines if line["event"] == "begin"] == [
        "oss compare", "oss compare/teacher", "oss compare/uniform 2", "oss compare/dp 2",
        "oss compare/dp 2/search", "oss compare/teacher", *2 * ["oss compare/sample"],
    ]  # fmt: skip
    assert [line["name"] for line in lines if line["event"] == "score"] == ["uniform 2", "dp 2"]
    assert (lines[-1]["event"], lines[-1]["stage"]) == ("done", "oss compare")


def test_a_failed_run_says_why_and_one_that_goes_on_is_appended(
    oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        at_call(patched, 3, fail)
        outcome = oss(*SEARCH, "--log=log.jsonl", "--out=run")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == "error: the machine went away"
    before = logged()
    assert [(e["event"], e["stage"], e["error"]) for e in before[-2:]] == [
        ("failed", "oss search/teacher", "the machine went away"),
        ("failed", "oss search", "the machine went away"),
    ]
    assert oss("search", "--resume=run", "--quiet").code == 0
    lines = logged()
    assert lines[: len(before)] == before
    again = lines[len(before)]
    assert again["command"] == before[0]["command"]
    assert (again["settings"]["resume"], again["settings"]["steps"]) == ("run", [2, 3])
    assert (lines[-1]["event"], lines[-1]["stage"]) == ("done", "oss search")


@pytest.mark.parametrize("begun", ["--log=log.jsonl", "--seed=0"])
def test_a_run_may_go_on_with_another_log(
    begun: str, oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        at_call(patched, 3, fail)
        assert oss(*SEARCH, begun, "--out=run").code == 1
    before = files()
    outcome = oss("search", "--resume=run", "--log=other.jsonl", "--quiet")
    assert outcome.code == 0, outcome.err
    assert "resumed: 2 of " in outcome.out
    assert [e["event"] for e in logged("other.jsonl")[:: len(logged("other.jsonl")) - 1]] == [
        "begin", "done"
    ]  # fmt: skip
    if "log.jsonl" in before:
        assert logged()[-1]["event"] == "failed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_that_it_was(
    number: signal.Signals, code: int, oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call(monkeypatch, 3, lambda: signal.raise_signal(number))
    assert oss(*SEARCH, "--log=log.jsonl").code == code
    ended = [(e["event"], e["stage"]) for e in logged()[-2:]]
    assert ended == [("interrupted", "oss search/teacher"), ("interrupted", "oss search")]


def test_an_error_before_the_work_is_logged_too(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=99", "--log=log.jsonl").code == 1
    assert [e["event"] for e in logged()] == ["begin", "failed"]
    assert logged()[1]["error"] == "steps: expected 1 to 8, got 99"


def test_a_log_that_cannot_be_written_is_an_error_beforehand(oss: Oss) -> None:
    Path("file").write_text("mine")
    Path("folder").mkdir()
    for command in (SEARCH, COMPARE):
        outcome = oss(*command, "--log=file/log.jsonl")
        assert_misused(outcome, "--log: cannot write file/log.jsonl: ")
        assert_misused(oss(*command, "--log=folder"), "--log")
    assert files() == {"file"}
    assert Path("file").read_text() == "mine"


def test_a_disk_that_fills_up_ends_the_log_and_not_the_run(oss: Oss) -> None:
    """A limit of a file's size stands for the disk's; this command writes nothing else."""
    assert oss(*COMPARE, "--log=whole.jsonl").code == 0
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        outcome = oss(*COMPARE, "--log=log.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert outcome.code == 0
    assert outcome.err == "warning: --log: log.jsonl ends here: File too large\n"
    assert "dp 2" in outcome.out
    kept, whole = logged(), logged("whole.jsonl")
    assert 1 < len(kept) < len(whole)
    assert [e["event"] for e in kept] == [e["event"] for e in whole[: len(kept)]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full_ends_the_log_and_not_the_run(oss: Oss) -> None:
    outcome = oss(*SEARCH, "--log=/dev/full")
    assert outcome.code == 0
    assert outcome.err == "warning: --log: /dev/full ends here: No space left on device\n"


def test_a_line_is_a_line_whatever_is_in_it(tmp_path: Path) -> None:
    log = _Log(tmp_path / "log.jsonl")
    with following(log.write):
        tell("wrote", files=[b"caf\xe9.json".decode(errors="surrogateescape"), "café\u2028\n"])
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert parse_json(line.decode())["files"] == ["caf?.json", "café\u2028\n"]


def test_a_run_can_be_read_whatever_its_files_are_called(oss: Oss) -> None:
    """Names may be bytes that are no text, and the command line is kept."""
    name = b"caf\xe9.jsonl".decode(errors="surrogateescape")
    outcome = oss("search", *TINY, "--steps=2", "--quality=dp", "--log", name, "--out=run")
    assert outcome.code == 0
    assert "caf?.jsonl" in Run.load("run").command
