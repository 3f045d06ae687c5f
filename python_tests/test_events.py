"""What long work tells those who follow it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import dp_search, random_case, random_mixture, recorded
from oss_ext import contest, events
from oss_ext.baselines import BASELINES, Baseline, Calibration, UnableError, uniform
from oss_ext.events import Event, following, stage, tell
from oss_ext.models import from_callable
from oss_ext.models.evaluation import Evaluator, NonFiniteError
from oss_ext.progress import progress_bar
from run_cases import random_run

Facts = list[tuple[str, str]]


class Clock:
    """Stands for ``time`` in the module: it goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(events, "time", clock)
    return clock


@pytest.fixture
def told() -> Iterator[list[Event]]:
    """Everything that is told in the test."""
    heard: list[Event] = []
    with following(heard.append):
        yield heard


def kinds(heard: list[Event]) -> Facts:
    return [(event["event"], event["stage"]) for event in heard]


def of(heard: list[Event], event: str, stage: str = "") -> list[Event]:
    return [e for e in heard if e["event"] == event and e["stage"].endswith(stage)]


def bracketed(heard: list[Event]) -> None:
    """Every stage ends within the one that it began in, and what is told lies in the last one."""
    open_: list[str] = []
    for event in heard:
        if event["event"] == "begin":
            outer = open_[-1] if open_ else ""
            assert event["stage"].startswith(f"{outer}/" if outer else "")
            open_.append(event["stage"])
            continue
        assert event["stage"] == (open_[-1] if open_ else "")
        if event["event"] in ("done", "failed", "interrupted"):
            open_.pop()
    assert open_ == []


# --- what is told of a run ----------------------------------------------------------------------


def test_teacher_search_and_refinement_are_told_in_order(seed: int, told: list[Event]) -> None:
    model, calls = recorded(random_mixture(seed))
    trajectory = oss.teacher(model, model.noise(6, seed), steps=16)
    assert kinds(told) == [("begin", "teacher"), ("progress", "teacher"), ("done", "teacher")]
    assert told[0] | told[-1] == {
        "event": "done", "stage": "teacher", "total": 96, "unit": "eval", "done": 96,
        "seconds": told[-1]["seconds"],
    }  # fmt: skip
    told.clear()
    calls.clear()
    result = oss.search(model, trajectory, [2, 3], quality="best")
    bracketed(told)
    stages = [(e["stage"], e.get("steps")) for e in of(told, "begin")]
    assert stages == [("search", None), ("refine", 2), ("refine", 3)]
    assert [(e["step"], e["steps"], e["teacher_steps"]) for e in of(told, "step")] == [
        (k, 3, rows) for rows in (16, 4, 16) for k in (1, 2, 3)
    ]
    assert result.table is not None
    for k, event in enumerate(of(told, "step")[:3]):
        assert event["cost"] == float(result.table.cost[k, 0].double().mean())
    for event, steps in zip(of(told, "refined"), (2, 3), strict=True):
        refined = result.refined[steps]
        assert event["steps"] == steps
        assert (event["error"], event["start_error"]) == (refined.error, refined.start_error)
        assert event["trials"] == refined.trials
    assert of(told, "round", "refine")
    assert all(e["moves"] in ("sweep", "gauss-newton") for e in of(told, "round"))
    # What was counted is what the model was asked for, and never more than was announced.
    ended = [e for e in told if e["event"] == "done"]
    assert all(e["done"] <= e["total"] for e in ended)
    nfe = math.ceil(ended[0]["done"] / 6)
    assert result.nfe == nfe + math.ceil(sum(e["done"] for e in ended[1:]) / 6)


def test_the_totals_of_a_dynamic_programme_are_what_it_takes(seed: int, told: list[Event]) -> None:
    model, trajectory = random_case("network", seed)
    told.clear()
    result = dp_search(model, trajectory, 3)
    (begin,), (done,) = of(told, "begin"), of(told, "done")
    assert begin["total"] == done["done"] == result.nfe * trajectory.samples


def test_samples_in_groups_have_stages_of_their_own(seed: int, told: list[Event]) -> None:
    model = random_mixture(seed)
    oss.search_groups(model, model.noise(5, seed), 2, group=3, max_batch=1)
    bracketed(told)
    assert [e["stage"] for e in of(told, "begin")] == [
        "samples", *2 * ["samples/teacher", "samples/search"]
    ]  # fmt: skip
    assert told[0] == {"event": "begin", "stage": "samples", "total": 5, "unit": "sample"}
    assert told[-1]["done"] == 5


def test_a_comparison_tells_of_every_contender(
    seed: int, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(calibration: Calibration, steps: int) -> oss.Schedule:
        raise UnableError("karras: needs the moon")

    monkeypatch.setitem(BASELINES, "karras", Baseline("karras", "", unable))
    model, trajectory = random_case("mixture", seed)
    told.clear()
    made = contest.make(model, trajectory, 2, ["uniform", "karras", "dp"])
    scores = contest.judge(model, trajectory, made.contenders)
    bracketed(told)
    assert [e["stage"] for e in of(told, "begin")] == [
        "uniform 2", "karras 2", "dp 2", "dp 2/search", "sample", "sample"
    ]  # fmt: skip
    assert [e["error"] for e in of(told, "failed", "karras 2")] == ["karras: needs the moon"]
    judged = [s for s in scores if isinstance(s, oss.evaluate.Score)]
    assert [(e["name"], e["steps"], e["cost"]) for e in of(told, "score")] == [
        (s.name, 2, float(s.mse.mean())) for s in judged
    ]


def test_less_memory_than_hoped_for_is_noted(told: list[Event]) -> None:
    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return -x

    model = from_callable(velocity, (1,), name="small")
    with pytest.warns(RuntimeWarning) as warned:
        Evaluator(model, 4).at(torch.ones(4, 1), 0.5)
    (note,) = told
    assert note == {"event": "note", "stage": "", "text": str(warned[0].message)}


def test_an_error_in_the_comparison_ends_the_stage_of_its_student(
    seed: int, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trajectory = random_case("mixture", seed)
    told.clear()

    def interrupted(*args: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr("oss_ext.evaluate._distance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        oss.compare(model, trajectory, {"mine": uniform(trajectory, 3)})
    assert kinds(told) == [("begin", "sample"), ("interrupted", "sample")]


# --- stages -------------------------------------------------------------------------------------


def test_progress_is_told_once_a_second_and_at_the_end(clock: Clock, told: list[Event]) -> None:
    with stage("work", 100, "eval") as work:
        for _ in range(7):
            clock.now += 0.4
            work.update(10)
    assert told == [
        {"event": "begin", "stage": "work", "total": 100, "unit": "eval"},
        {"event": "progress", "stage": "work", "done": 30, "total": 100},
        {"event": "progress", "stage": "work", "done": 60, "total": 100},
        {"event": "progress", "stage": "work", "done": 70, "total": 100},
        {"event": "done", "stage": "work", "seconds": 2.8, "done": 70, "total": 100},
    ]


def test_what_was_told_is_not_told_again_at_the_end(clock: Clock, told: list[Event]) -> None:
    with stage("work", unit="eval") as work:
        clock.now += 5
        work.update(1)
    assert [e["event"] for e in told] == ["begin", "progress", "done"]
    assert told[1]["total"] is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no\nstack"), {"event": "failed", "error": "no"}),
        (ValueError(), {"event": "failed", "error": "ValueError()"}),
        (KeyboardInterrupt(), {"event": "interrupted"}),
        (SystemExit(3), {"event": "interrupted"}),
    ],
)
def test_how_a_stage_ended_is_told(
    error: BaseException, expected: Event, clock: Clock, told: list[Event]
) -> None:
    def work() -> None:
        with stage("outer"), stage("inner", 4, "eval") as inner:
            inner.update(3)
            raise error

    with pytest.raises(type(error)):
        work()
    counted = {"done": 3, "total": 4}
    assert told[2:] == [
        {"stage": "outer/inner", "seconds": 0.0} | counted | expected,
        {"stage": "outer", "seconds": 0.0} | expected,
    ]
    tell("note", text="outside again")
    assert told[-1]["stage"] == ""


def test_a_bar_shows_what_is_told(monkeypatch: pytest.MonkeyPatch, told: list[Event]) -> None:
    shown: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            shown.append(options)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            shown.append("closed")

        def update(self, count: int) -> None:
            shown.append(count)

    monkeypatch.setattr("oss_ext.progress.tqdm", Bar)
    with progress_bar("work", 0, True, budget=3) as bar:
        bar.update(2)
        bar.update(5)
    options = {"total": None, "desc": "work", "unit": "eval", "disable": None, "leave": False}
    assert shown == [options, 2, 5, "closed"]
    assert told[0] == {
        "event": "begin", "stage": "work", "total": None, "unit": "eval", "budget": 3
    }  # fmt: skip
    assert told[-1]["done"] == 7


# --- followers ----------------------------------------------------------------------------------


def test_events_are_what_json_has(told: list[Event]) -> None:
    tell("mine", nan=math.nan, list=[1, (math.inf, True)], table={2: torch.float32}, text="é")
    expected = {
        "event": "mine", "stage": "", "nan": None, "list": [1, [None, True]],
        "table": {"2": "torch.float32"}, "text": "é",
    }  # fmt: skip
    assert told == [expected]
    assert json.loads(json.dumps(told[0], allow_nan=False)) == expected


def test_followers_within_one_another_all_follow_and_share_nothing() -> None:
    outer: list[Event] = []
    inner: list[Event] = []

    def spoil(event: Event) -> None:
        assert outer[-1] == event  # which was told first
        inner.append(event)
        event["facts"].clear()

    with following(outer.append):
        with following(spoil):
            tell("one", facts=[1])
        tell("two")
    tell("three")
    assert [e["event"] for e in outer] == ["one", "two"]
    assert [e["event"] for e in inner] == ["one"]
    assert outer[0]["facts"] == [1]


def test_another_thread_is_followed_for_itself(told: list[Event]) -> None:
    there: list[Event] = []

    def work() -> None:
        tell("unheard")
        with following(there.append), stage("there"):
            tell("heard")

    with stage("here"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert kinds(told) == [("begin", "here"), ("done", "here")]
    assert kinds(there) == [("begin", "there"), ("heard", "there"), ("done", "there")]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("when", ["begin", "progress", "step", "done"])
def test_a_callback_that_raises_ends_the_run(seed: int, when: str, told: list[Event]) -> None:
    model, trajectory = random_case("mixture", seed)

    def stop(event: Event) -> None:
        if event["event"] == when:
            raise Stopped(when)

    with pytest.raises(Stopped, match=when), following(stop):
        dp_search(model, trajectory, 3)
    bracketed(told[3:])
    assert told[-1]["event"] == ("done" if when == "done" else "failed")
    told.clear()
    with stage("after"):  # nothing is left of the stages that were cut off
        pass
    assert told[0]["stage"] == "after"


def test_what_a_callback_ends_goes_on_from_its_checkpoint(seed: int, tmp_path: Path) -> None:
    model, calls = recorded(random_mixture(seed))
    noise = model.noise(3, seed)

    def stop(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise Stopped

    def run(answers: Any) -> oss.SearchResult:
        return dp_search(answers, oss.teacher(answers, noise, steps=6), 3)

    with (
        oss.Checkpoint(tmp_path / "c", {}) as checkpoint,
        pytest.raises(Stopped),
        following(stop),
    ):
        run(checkpoint.recorded(model))
    made = len(calls)
    assert checkpoint.kept == made > 0
    with oss.Checkpoint(tmp_path / "c", {}, resume=True) as again:
        result = run(again.recorded(model))
    assert again.taken == made
    assert run(model).schedule(3) == result.schedule(3)


def test_a_failed_run_tells_why(seed: int, told: list[Event]) -> None:
    model = from_callable(lambda x, t, sample: x * math.nan, (2,), name="broken")
    with pytest.raises(NonFiniteError) as raised:
        oss.teacher(model, model.noise(2, seed), steps=4)
    assert kinds(told) == [("begin", "teacher"), ("failed", "teacher")]
    assert told[-1]["error"] == str(raised.value)
    assert told[-1]["done"] == 2


def test_a_written_run_is_told(seed: int, told: list[Event], tmp_path: Path) -> None:
    random_run(seed).save(tmp_path)
    (wrote,) = of(told, "wrote")
    there = {str(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(wrote["files"]) == there


def test_a_follower_is_a_function() -> None:
    message = r"^callback: expected a function of an event, got 3"
    with pytest.raises(ValueError, match=message), oss.following(3):  # type: ignore[arg-type]
        raise AssertionError("entered")
