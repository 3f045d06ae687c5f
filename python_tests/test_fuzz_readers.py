"""Whatever bytes a reader is given, it reads them or says what is wrong: nothing else happens."""

from __future__ import annotations

import dataclasses
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_cases import Oss, assert_fails
from driver_cases import example_schedule, signed
from noise_cases import EXAMPLES
from oss_ext import Schedule, ScheduleError, files, presets
from oss_ext.amplitude import Amplitude
from oss_ext.noise import Path as NoisePath
from oss_ext.noise import VPPath, path_from_dict
from oss_ext.runs import ARRAYS, RUN, Run, RunError
from property_cases import altered, damaged, few_or_many, read, values
from run_cases import random_run

WHOLE = dataclasses.replace(
    example_schedule(),
    path=VPPath(alphas_cumprod=(0.9, 0.5, 0.1)),
    orders=(1, 2, 1),
    teacher_timesteps=(1.0, 2.0, 3.0, 4.0, 5.0),
    amplitude=Amplitude((0.05, 0.95), (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0), 3),
)
"""A schedule with something in every field."""

# --- schedules ----------------------------------------------------------------------------------


@given(content=damaged(WHOLE.to_json().encode()) | st.binary(max_size=64))
def test_a_damaged_schedule_is_never_read(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    file.write_bytes(content)
    loaded = read(lambda: Schedule.load(file), ScheduleError)
    assert loaded in (None, WHOLE)


FIELDS = [field.name for field in dataclasses.fields(Schedule)]


@pytest.mark.parametrize("name", [*FIELDS, "format_version", "checksum"])
@few_or_many(15, 300)
def test_any_value_of_a_field_is_read_or_refused(name: str, examples: int) -> None:
    body = json.loads(WHOLE.to_json())

    @settings(max_examples=examples)
    @given(value=altered(body[name]) | values)
    def check(value: Any) -> None:
        schedule = read(lambda: Schedule.from_json(signed({name: value}, of=WHOLE)), ScheduleError)
        if schedule is not None:
            assert Schedule.from_json(schedule.to_json()) == schedule
            read(lambda: (schedule.sigmas, schedule.timesteps, schedule.initial_scale), ValueError)
            hash(schedule)

    check()


HOSTILE = {
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested as deep as Python goes": "[" * 400 + "]" * 400,
    "unclosed lists": "[" * 1_000_000,
    "digits": "9" * 100_000,
    "more than 64 bits": str(2**63),
    "less than 64 bits": str(-(2**63) - 1),
    "more than a float": "1e400",
    "less than a float": "-1e400",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "half a pair": '"\\ud800"',
    "twice": '{"a": 1, "a": 2}',
    "control characters": '"\x00"',
}


@pytest.mark.parametrize("token", HOSTILE)
def test_what_json_should_not_hold_is_refused(token: str, tmp_path: Path) -> None:
    text = signed({"cost": "mark"}).replace('"mark"', HOSTILE[token])
    with pytest.raises(ScheduleError, match=r"^not JSON: .{3,200}$"):
        Schedule.from_json(text)
    (tmp_path / RUN).write_text(text)
    with pytest.raises(RunError, match=r"run\.json: not JSON: .{3,200}$"):
        Run.load(tmp_path)


@pytest.mark.parametrize("name", ["times", "teacher_times", "teacher_timesteps", "indices"])
def test_long_lists_are_read_in_linear_time_and_refused_in_few_words(name: str) -> None:
    count = 50_000
    value: list[Any] = [0] * count if name == "indices" else [0.5] * count
    with pytest.raises(ScheduleError, match=r"^\w+: expected") as refused:
        Schedule.from_json(signed({name: value}))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["schedule.json", RUN])
def test_a_file_that_is_too_large_is_not_read(name: str, oss: Oss, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(files.MOST_BYTES + 1)
    load, error = (Schedule.load, ScheduleError) if name != RUN else (Run.load, RunError)
    with pytest.raises(error, match=rf"{name}: expected at most 64 MiB, got more"):
        load(tmp_path / (name if name != RUN else ""))  # type: ignore[operator]
    if name != RUN:
        assert_fails(oss("show", name), "expected at most 64 MiB")


def test_a_file_without_an_end_is_not_read() -> None:
    with pytest.raises(ScheduleError, match="expected at most 64 MiB"):
        Schedule.load("/dev/zero")


# --- paths and presets --------------------------------------------------------------------------


@few_or_many(60, 1000)
def test_any_path_is_read_or_refused(examples: int) -> None:
    bodies = [json.loads(json.dumps(path.to_dict())) for path in EXAMPLES.values()]

    @settings(max_examples=examples)
    @given(body=st.sampled_from(bodies).flatmap(altered))
    def check(body: Any) -> None:
        path: NoisePath | None = read(lambda: path_from_dict(body), ValueError)
        if path is not None:
            assert path_from_dict(json.loads(json.dumps(path.to_dict()))) == path
            assert 0 <= path.span[0] <= path.span[1] <= 1

    check()


@given(name=st.text(st.characters(exclude_categories=())))
def test_a_preset_has_one_of_the_names(name: str) -> None:
    assert read(lambda: presets.load(name), ValueError) is None or name in presets.names()


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    random_run(0, (1, 2, 2), budgets=(3,)).save(folder)
    return folder


@pytest.fixture
def whole(folder: Path) -> Any:
    """The folder of a run, which is made whole again afterwards."""
    before = {name: (folder / name).read_bytes() for name in (RUN, ARRAYS)}
    yield folder
    for name, content in before.items():
        (folder / name).write_bytes(content)


def check_run(folder: Path) -> None:
    run = read(lambda: Run.load(folder), RunError, OSError)
    if run is not None:
        with tempfile.TemporaryDirectory() as again:
            run.save(again)
            assert Run.load(again).contenders == run.contenders


@pytest.mark.parametrize("name", [RUN, ARRAYS])
@few_or_many(30, 500)
def test_a_damaged_run_is_read_or_refused(name: str, examples: int, whole: Path) -> None:
    @settings(max_examples=examples)
    @given(content=damaged((whole / name).read_bytes()))
    def check(content: bytes) -> None:
        (whole / name).write_bytes(content)
        check_run(whole)

    check()


@few_or_many(60, 1000)
def test_any_value_in_a_run_is_read_or_refused(examples: int, whole: Path) -> None:
    @settings(max_examples=examples)
    @given(body=altered(json.loads((whole / RUN).read_bytes())))
    def check(body: Any) -> None:
        (whole / RUN).write_text(json.dumps(body))
        check_run(whole)

    check()


@few_or_many(60, 1000)
def test_any_header_of_the_arrays_is_read_or_refused(examples: int, whole: Path) -> None:
    before = (whole / ARRAYS).read_bytes()
    (size,) = struct.unpack("<Q", before[:8])
    arrays = before[8 + size :]

    @settings(max_examples=examples)
    @given(
        header=altered(json.loads(before[8 : 8 + size])),
        size=st.none() | st.integers(0, 2**64 - 1),
    )
    def check(header: Any, size: int | None) -> None:
        text = json.dumps(header).encode()
        claimed = struct.pack("<Q", len(text) if size is None else size)
        (whole / ARRAYS).write_bytes(claimed + text + arrays)
        check_run(whole)

    check()


@pytest.mark.parametrize("value", [None, True, -1, "x", [0.5], {"a": 1}], ids=str)
def test_a_run_has_values_of_its_own_kinds(value: Any, whole: Path) -> None:
    body = json.loads((whole / RUN).read_bytes())
    plain = body.keys() - {"format", "format_version", "contenders"}
    for name in {name for name in plain if type(body[name]) is not type(value)} | {"machine"}:
        (whole / RUN).write_text(json.dumps(body | {name: value}))
        with pytest.raises(RunError, match=rf"{name}: expected .*, got"):
            Run.load(whole)


@pytest.mark.parametrize("file", ["/etc/x.json", "../x.json", "a/../../x", "C:x", "..\\x", "\\x"])
def test_a_run_keeps_to_its_folder(file: str, whole: Path) -> None:
    body = json.loads((whole / RUN).read_bytes())
    body["contenders"][0]["file"] = file
    (whole / RUN).write_text(json.dumps(body))
    (whole.parent / "x.json").write_text(example_schedule().to_json())
    with pytest.raises(RunError, match="file: expected a path within the run folder, got"):
        Run.load(whole)
