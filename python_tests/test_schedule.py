"""The schedule as a value and as a file."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from driver_cases import each_seed, example_schedule, signed
from oss_ext import Schedule, ScheduleError, __version__
from oss_ext.schedule import AGGREGATES, LATER, Objective, aggregate_indices

FIELDS = [field.name for field in dataclasses.fields(Schedule) if field.name not in LATER]
OFF_GRID = dataclasses.replace(example_schedule(), indices=None, times=(0.9, 0.21, 0.0))


# --- the value ----------------------------------------------------------------------------------


def test_a_schedule_says_what_a_host_needs() -> None:
    schedule = example_schedule()
    assert schedule.indices == (5, 3, 1, 0)
    assert schedule.times == (1.0, 0.4, 0.1, 0.0)
    assert schedule.steps == 3
    assert schedule.sigmas == schedule.times  # a flow model's hosts call t itself sigma
    assert schedule.initial_scale == 1.0
    assert schedule.package_version == __version__


def test_a_schedule_is_frozen_and_can_be_a_key() -> None:
    schedule = example_schedule()
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.times = (1.0, 0.0)
    assert len({schedule, example_schedule(), OFF_GRID}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "^model: expected a string, got None"),
        ({"model_hash": 12}, "^model_hash: expected a string, got 12"),
        ({"solver": b"euler"}, "^solver: expected a string, got b'euler'"),
        ({"path": "warp"}, "^path: expected a path of oss_ext.noise, got 'warp'"),
        ({"samples": -1}, "^samples: expected a whole number >= 0, got -1"),
        ({"samples": True}, "^samples: expected a whole number >= 0, got True"),
        ({"search_nfe": 1.5}, "^search_nfe: expected a whole number >= 0, got 1.5"),
        ({"cost": -1.0}, "^cost: expected null or a number >= 0, got -1.0"),
        ({"cost": float("nan")}, "^cost: expected null or a number >= 0, got nan"),
        ({"cost": 10**400}, "^cost: expected null or a number >= 0, got 1000"),
        ({"cost": "low"}, "^cost: expected null or a number >= 0, got 'low'"),
        ({"indices": (5, 3, 1)}, "^times: expected the teacher's times at indices, got"),
        ({"indices": (5, 4, 1, 0)}, "^times: expected the teacher's times at indices, got"),
        ({"indices": (6, 3, 1, 0)}, "^indices: expected whole numbers from 0 to 5, got"),
        ({"indices": (5, 3, 1, False)}, "^indices: expected whole numbers from 0 to 5, got"),
        ({"times": (0.5,), "indices": None}, r"^times.*expected \[N\+1\] with N >= 1"),
        ({"times": (), "indices": None}, r"^times.*expected \[N\+1\] with N >= 1"),
        ({"times": (0.5, 0.5, 0.0), "indices": None}, "^times.*strictly increasing.*0.5 after"),
        ({"times": (0.0, 1.0), "indices": None}, "^times.*strictly increasing"),
        ({"times": (1.5, 0.0), "indices": None}, r"^times.*finite values in \[0, 1\]"),
        ({"times": (float("nan"), 0.0), "indices": None}, "^times.*finite values"),
        ({"times": ("1", "0"), "indices": None}, r"^times: expected numbers, got \('1', '0'\)"),
        ({"teacher_times": (0.0, 0.0), "indices": None}, "^teacher_times.*strictly increasing"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        dataclasses.replace(example_schedule(), **changes)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], r"^times.*expected \[N\+1\] with N >= 1"),
        ([0], r"^times.*expected \[N\+1\] with N >= 1"),
        ([6, 0], r"^indices: expected rows 0 to 5, got \(6, 0\)"),
        ([5, -1], r"^indices: expected rows 0 to 5, got \(5, -1\)"),
        ([3, 3, 0], "^times.*strictly increasing"),
        ([0, 3, 5], "^times.*strictly increasing"),
    ],
)
def test_rows_descend_within_the_grid(indices: list[int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_indices(indices, example_schedule().teacher_times, model="m", model_hash="h")


def test_rows_are_whole_numbers() -> None:
    rows: Any = [5, 2.9, 0]
    with pytest.raises(ScheduleError, match=r"^indices: expected .*, got"):
        Schedule.from_indices(rows, OFF_GRID.teacher_times, model="m", model_hash="h")


def test_a_schedule_stays_within_its_teacher() -> None:
    outside = {"times": (0.9, 0.3, 0.0), "teacher_times": (0.1, 0.5, 0.9)}
    with pytest.raises(ScheduleError, match=r"^times: expected values within the teacher's, 0.1"):
        Schedule(**outside, indices=None, model="m", model_hash="h")


@pytest.mark.parametrize("name", ["times", "teacher_times", "indices"])
def test_lists_are_refused_or_become_tuples(name: str) -> None:
    original = OFF_GRID if name == "times" else example_schedule()
    as_list: dict[str, Any] = {name: list(getattr(original, name))}
    try:
        schedule = dataclasses.replace(original, **as_list)
    except ScheduleError:
        return
    assert schedule == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "global"}, r"^scope: expected one of \('joint', 'instance'\), got 'global'"),
        ({"reduce": "max"}, r"^reduce: expected one of \('none', .*, got 'max'"),
        ({"start": "late"}, r"^start: expected one of \('free', 'pinned'\), got 'late'"),
        ({"aggregate": "mode"}, r"^aggregate: expected one of .*'median'\), got 'mode'"),
        ({"reduce": "none"}, "^reduce: expected one that suits scope 'joint', got 'none'"),
        ({"scope": "instance"}, "^reduce: expected one that suits scope 'instance', got 'log_"),
        ({"aggregate": "mean"}, "^aggregate: expected none with scope 'joint', got 'mean'"),
    ],
)
def test_an_objective_is_one_that_can_be_searched(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Objective(**changes)


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        example_schedule(),
        OFF_GRID,
        example_schedule(objective=None, cost=None),
        example_schedule(objective=Objective(), cost=5e-324, method="Übung"),
    ],
)
def test_a_saved_schedule_loads_back_equal(schedule: Schedule, tmp_path: Path) -> None:
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


def test_the_file_holds_what_other_programs_need() -> None:
    body = json.loads(OFF_GRID.to_json())
    assert (body["format"], body["format_version"], body["steps"]) == ("oss-schedule", 1, 2)
    assert body["times"] == body["sigmas"] == [0.9, 0.21, 0.0]
    assert body["initial_scale"] == 1.0


def test_any_changed_digit_is_found() -> None:
    text = example_schedule().to_json()
    flipped = 0
    for at, old in enumerate(text):
        if old.isdigit():
            damaged = text[:at] + str((int(old) + 1) % 10) + text[at + 1 :]
            try:
                assert Schedule.from_json(damaged) == example_schedule()
            except ScheduleError:
                flipped += 1
    assert flipped > 100  # the others are digits that no float64 can tell apart


def test_any_truncation_is_found() -> None:
    text = example_schedule().to_json().rstrip()
    for length in range(len(text)):
        with pytest.raises(ScheduleError, match=r"^not JSON"):
            Schedule.from_json(text[:length])


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '"oss"', '{"format": "workflow"}'])
def test_foreign_json_is_no_schedule(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"^not a schedule of this package: no .*oss-schedule"):
        Schedule.from_json(text)


def test_another_format_version_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"^format_version: this release reads 1, got 2"):
        Schedule.from_json(signed({"format_version": 2}))


def test_changed_content_is_found_by_its_checksum() -> None:
    assert Schedule.from_json(signed({})) == example_schedule()
    text = example_schedule().to_json().replace('"example"', '"other"')
    with pytest.raises(ScheduleError, match=r"^checksum: the content was changed or damaged"):
        Schedule.from_json(text)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ScheduleError, match=f"^{field}: missing"):
        Schedule.from_json(signed({}, without=field))


@pytest.mark.parametrize("field", LATER)
def test_a_file_of_an_earlier_release_has_the_usual_in_place_of_later_fields(field: str) -> None:
    assert Schedule.from_json(signed({}, without=field)) == example_schedule()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("orders", [1]),
        ("orders", [1, 0]),
        ("orders", "12"),
        ("model", ["example"]),
        ("times", "1, 0"),
        ("times", [1, 0]),
        ("times", [[1.0], [0.0]]),
        ("times", None),
        ("times", 3),
        ("times", {"a": 1}),
        ("teacher_times", None),
        ("indices", "530"),
        ("indices", [5.0, 3.0, 1.0, 0.0]),
        ("indices", [True, False]),
        ("indices", 3),
        ("path", None),
        ("cost", "0.1"),
        ("cost", [0.1]),
        ("samples", "3"),
        ("samples", None),
        ("search_nfe", 2.5),
        ("objective", "joint"),
        ("objective", ["joint"]),
        ("objective", {"scope": "joint", "speed": 1}),
        ("objective", {"metric": 3}),
    ],
)
def test_a_value_of_a_wrong_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=rf"^{field}\b"):
        Schedule.from_json(signed({field: value}))


@pytest.mark.parametrize("text", ["", "no schedule", '{"format": "workflow"}'])
def test_the_error_names_the_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ScheduleError, match=r"mine\.json: not "):
        Schedule.load(file)


def test_a_file_that_is_no_text_is_called_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(ScheduleError, match=r"mine\.json: expected UTF-8 text, got byte 0x89"):
        Schedule.load(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        Schedule.load(tmp_path / "missing.json")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        Schedule.load(tmp_path)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["to_json", "replace"])
def test_a_save_that_fails_leaves_the_old_file(
    error: BaseException, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "schedule.json"
    example_schedule().save(file)

    def fail(*args: object) -> None:
        raise error

    owner: Any = Schedule if at == "to_json" else os
    monkeypatch.setattr(owner, at, fail)
    with pytest.raises(type(error)):
        OFF_GRID.save(file)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]
    assert Schedule.load(file) == example_schedule()


def test_a_save_replaces_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    example_schedule().save(file)
    OFF_GRID.save(str(file))
    assert Schedule.load(file) == OFF_GRID


def test_others_may_read_a_schedule_as_the_umask_says(tmp_path: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            example_schedule().save(tmp_path / "schedule.json")
        finally:
            os.umask(before)
        mode = (tmp_path / "schedule.json").stat().st_mode & 0o777
        assert mode == 0o666 & ~umask


# --- aggregation --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", AGGREGATES)
@each_seed(3)
def test_aggregates_of_strictly_monotone_paths_are_so_too(how: str, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        steps, count = draw.randint(1, 12), draw.randint(1, 9)
        paths = [[*sorted(draw.sample(range(1, 16), steps), reverse=True), 0] for _ in range(count)]
        path = aggregate_indices(paths, how)
        assert all(high > low for high, low in pairwise(path)), (paths, path)
        assert all(
            min(c) <= row <= max(c) for c, row in zip(zip(*paths, strict=True), path, strict=True)
        )


@pytest.mark.parametrize(
    ("how", "paths", "expected"),
    [
        ("mean", [[9, 4, 0]], (9, 4, 0)),
        ("mean", [[9, 4, 0], [7, 1, 0], [7, 2, 0]], (8, 2, 0)),
        ("median", [[9, 4, 0], [7, 1, 0], [3, 2, 0]], (7, 2, 0)),
        ("median", [[9, 5, 0], [8, 2, 0], [1, 0, 0], [3, 1, 0]], (6, 2, 0)),
        # 1.5 and 2.5: half to even would make both 2.
        ("mean", [[3, 2, 0], [2, 1, 0]], (3, 2, 0)),
        ("median", [[3, 2, 0], [2, 1, 0]], (3, 2, 0)),
    ],
)
def test_aggregates_by_hand(how: str, paths: list[list[int]], expected: tuple[int, ...]) -> None:
    assert aggregate_indices(paths, how) == expected


@pytest.mark.parametrize(
    ("paths", "how", "message"),
    [
        ([[2, 0]], "mode", r"^aggregate: expected one of \('mean', 'median'\), got 'mode'"),
        ([[2, 0], [3, 2, 0]], "mean", r"^schedules: expected .* equal length, got \[2, 3\]"),
        ([], "mean", r"^schedules: expected one or more, .*, got \[\]"),
    ],
)
def test_only_like_paths_can_be_aggregated(paths: list[Any], how: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        aggregate_indices(paths, how)
