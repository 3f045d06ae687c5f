"""Checkpoints: a run that was cut off anywhere ends as if it had not been."""

from __future__ import annotations

import json
import resource
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext.checkpoint import (
    ANSWERS,
    HEADER,
    MAGIC,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    settings_of,
)
from oss_ext.models.base import Model, Request
from oss_ext.models.wrapped import Wrapped

SETTINGS = {"steps": [3], "model": "m"}


class Crash(Exception):
    """What a machine does to a process."""


class Dies(Wrapped):
    """A model that raises at its ``last``-th call, and counts them."""

    def __init__(self, model: Model, last: float = float("inf")) -> None:
        super().__init__(model)
        self.calls, self.last = 0, last

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for request in requests:
            if self.calls == self.last:
                raise Crash
            self.calls += 1
            yield from super().answers([request])


def draw(seed: int, most: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, most, count).tolist()


def run(model: Model, quality: str, solver: str = "euler") -> str:
    teacher = oss.teacher(model, model.noise(8, 3), steps=12)
    found = oss.search(model, teacher, [3], quality=quality, solver=solver)
    return found.schedule(3).to_json()


def begin(folder: Path, model: Model, calls: int) -> None:
    """A run that is cut off after ``calls`` calls."""
    with pytest.raises(Crash), Checkpoint(folder, SETTINGS) as checkpoint:
        run(checkpoint.recorded(Dies(model, calls)), "balanced")


@pytest.mark.parametrize("quality", ["dp", "balanced", "best"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun"])
@each_seed(1)
def test_a_run_that_is_cut_off_again_and_again_ends_the_same(
    quality: str, solver: str, seed: int, tmp_path: Path
) -> None:
    model = Dies(random_mixture(seed, torch.float32))
    expected = run(model, quality, solver)
    made = 0
    for n, more in enumerate([*draw(seed, model.calls // 4, 6), None]):
        dies = Dies(random_mixture(seed, torch.float32), float("inf") if more is None else more)
        with Checkpoint(tmp_path / "c", SETTINGS, resume=n > 0 and made > 0) as checkpoint:
            try:
                got = run(checkpoint.recorded(dies), quality, solver)
            except Crash:
                got = ""
            assert checkpoint.taken == made
            assert not checkpoint.notes
        made += dies.calls
    assert got == expected
    assert made == model.calls  # no evaluation was made twice


def test_a_run_that_has_ended_leaves_nothing(tmp_path: Path) -> None:
    with Checkpoint(tmp_path / "c", SETTINGS) as checkpoint:
        run(checkpoint.recorded(random_mixture(1, torch.float32)), "dp")
        assert {path.name for path in (tmp_path / "c").iterdir()} == {
            ANSWERS,
            "leg-1.bin",
            MANIFEST,
        }
        checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_an_answer_leaves_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "c", random_mixture(1, torch.float32), 0)
    assert list(tmp_path.iterdir()) == []


def test_answers_keep_their_bits(tmp_path: Path) -> None:
    """Of every type, not-a-number among them."""
    x, t, sample = torch.randn(2, 5), torch.tensor([0.1, 0.2]), torch.arange(2)
    bits = torch.randint(-(2**15), 2**15, (2, 5), dtype=torch.int16)
    answers = [bits.view(torch.bfloat16), bits.view(torch.float16), x.double(), x]

    class Fixed(Wrapped):
        def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
            return iter([answers[int(x[0, 0])] for x, _, _ in requests])

    def ask(model: Model) -> list[Tensor]:
        return [model(torch.full_like(x, n), t, sample) for n in range(len(answers))]

    model = Fixed(random_mixture(1))
    with Checkpoint(tmp_path / "c", SETTINGS) as checkpoint:
        ask(checkpoint.recorded(model))
    with Checkpoint(tmp_path / "c", SETTINGS, resume=True) as checkpoint:
        got = ask(checkpoint.recorded(Dies(model, 0)))
    for a, b in zip(got, answers, strict=True):
        assert a.dtype == b.dtype
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


# --- files that are not as they were left -------------------------------------------------------


def flipped(data: bytearray, place: int) -> bytearray:
    data[place] ^= 0x40
    return data


def zeroed(data: bytearray, place: int) -> bytearray:
    """Zeros from ``place`` on, or from where that alters something."""
    place = min(place, len(data.rstrip(b"\0")) - 1)
    return data[:place] + bytearray(len(data) - place)


DAMAGE: dict[str, Callable[[bytearray, int], bytearray]] = {
    "truncated": lambda data, place: data[:place],
    "altered": flipped,
    "overwritten": zeroed,
    "longer": lambda data, place: data + data[:place],
}


@pytest.mark.parametrize("damage", DAMAGE)
@each_seed(3)
def test_what_lies_before_the_damage_is_used(damage: str, seed: int, tmp_path: Path) -> None:
    model = random_mixture(seed, torch.float32)
    counted = Dies(model)
    expected = run(counted, "balanced")
    begin(tmp_path / "c", model, counted.calls // 2)
    path = tmp_path / "c" / ANSWERS
    data = bytearray(path.read_bytes())
    (place,) = draw(seed, len(data) - 1, 1)
    path.write_bytes(DAMAGE[damage](data, place + (damage == "longer")))
    again = Dies(model)
    with Checkpoint(tmp_path / "c", SETTINGS, resume=True) as checkpoint:
        assert run(checkpoint.recorded(again), "balanced") == expected
        taken, notes = checkpoint.taken, checkpoint.notes
    assert taken + again.calls == counted.calls
    whole = damage == "longer"
    assert (taken == counted.calls // 2) == whole
    assert len(notes) <= 1
    assert all("is broken" in note or "another course" in note for note in notes)


def test_another_course_is_taken_and_noted(tmp_path: Path) -> None:
    """A machine whose arithmetic is another gives other states from the same answers."""
    model = random_mixture(1, torch.float32)
    begin(tmp_path / "c", model, 9)
    with Checkpoint(tmp_path / "c", SETTINGS, resume=True) as checkpoint:
        recorded = checkpoint.recorded(model)
        noise = model.noise(8, 3)
        noise[0, ..., 0] += 1e-6
        got = oss.teacher(recorded, noise, steps=12)
        assert checkpoint.taken == 0
        assert "another course than before after 0 model calls" in checkpoint.notes[0]
    assert got.states.equal(oss.teacher(model, noise, steps=12).states)


# --- refused ------------------------------------------------------------------------------------


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    begin(tmp_path / "c", random_mixture(1, torch.float32), 5)
    with pytest.raises(CheckpointError, match=r"c: holds an unfinished run; resume it, or remove"):
        Checkpoint(tmp_path / "c", SETTINGS)


PAYLOADS = {
    "nothing": b"",
    "too little": b"abc",
    "no header": (5).to_bytes(8, "little") + b"[1,2]",
    "no request": (19).to_bytes(8, "little") + b'{"__metadata__":{}}',
    "a header of an exabyte": (2**60).to_bytes(8, "little") + b"{}",
    "not hexadecimal": (33).to_bytes(8, "little") + b'{"__metadata__":{"request":"xyz"}}',
    "a tensor that is not there": (97).to_bytes(8, "little")
    + b'{"__metadata__":{"request":"0"},"answer":{"dtype":"F32","shape":[9999],'
    + b'"data_offsets":[0,39996]}}',
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_records_that_no_run_wrote_are_broken(name: str, tmp_path: Path) -> None:
    """Also where their checksum is right."""
    model = random_mixture(1, torch.float32)
    begin(tmp_path / "c", model, 3)
    payload = PAYLOADS[name]
    header = HEADER.pack(MAGIC, len(payload), zlib.crc32(payload))
    (tmp_path / "c" / ANSWERS).write_bytes(header + payload)
    with Checkpoint(tmp_path / "c", SETTINGS, resume=True) as checkpoint:
        assert run(checkpoint.recorded(model), "dp") == run(model, "dp")
        assert checkpoint.taken == 0
        assert "is broken" in checkpoint.notes[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": [4], "model": "m"}, r"c: steps was \[3\] when the run began, got \[4\]"),
        ({"steps": [3], "model": "n"}, r"c: model was 'm' when the run began, got 'n'"),
        ({"steps": [3]}, r"c: model was 'm' when the run began, got None"),
        ({**SETTINGS, "more": 1}, r"c: more was None when the run began, got 1"),
    ],
)
def test_another_setting_is_refused_by_name(
    changed: dict[str, object], message: str, tmp_path: Path
) -> None:
    begin(tmp_path / "c", random_mixture(1, torch.float32), 5)
    before = (tmp_path / "c" / ANSWERS).read_bytes()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "c", changed, resume=True)
    assert (tmp_path / "c" / ANSWERS).read_bytes() == before


def test_a_second_process_is_told(tmp_path: Path) -> None:
    model = random_mixture(1, torch.float32)
    begin(tmp_path / "c", model, 5)
    with (
        Checkpoint(tmp_path / "c", SETTINGS, resume=True),
        pytest.raises(CheckpointError, match="another process runs in this folder"),
    ):
        Checkpoint(tmp_path / "c", SETTINGS, resume=True)
    # Two that begin at once: the one without a first answer yet is the second.
    first, second = (Checkpoint(tmp_path / "d", SETTINGS) for _ in range(2))
    x = model.noise(2), torch.full((2,), 0.5, dtype=torch.float64), torch.arange(2)
    first.recorded(model)(*x)
    with pytest.raises(CheckpointError, match="another process"):
        second.recorded(model)(*x)
    first.close()
    with pytest.raises(CheckpointError, match="another process has begun a run here"):
        second.recorded(model)(*x)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: "),
        ("[1]", "not a checkpoint of this package"),
        ("[" * 100_000, "not JSON: "),
        ('{"format": "oss-checkpoint", "format_version": 2}', "a checkpoint of version 2"),
        ('{"format": "oss-checkpoint", "format_version": 1}', "a checkpoint of version 1"),
    ],
)
def test_other_manifests_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        settings_of(tmp_path)


def test_another_machine_is_noted(tmp_path: Path) -> None:
    model = random_mixture(1, torch.float32)
    begun: dict[str, object] = {"torch": "2.12", "threads": 2}
    with Checkpoint(tmp_path / "c", SETTINGS, machine=begun) as checkpoint:
        oss.teacher(checkpoint.recorded(model), model.noise(2), steps=3)
    note = "torch was '2.12' when the run began, and is '2.13': the result may differ in near-ties"
    for machine, notes in ((begun, []), (begun | {"torch": "2.13"}, [note])):
        with Checkpoint(tmp_path / "c", SETTINGS, machine=machine, resume=True) as checkpoint:
            assert checkpoint.notes == notes


def test_settings_come_back(tmp_path: Path) -> None:
    begin(tmp_path / "c", random_mixture(1, torch.float32), 5)
    assert settings_of(tmp_path / "c") == json.loads(json.dumps(SETTINGS))
    with pytest.raises(CheckpointError, match="none: holds no unfinished run"):
        settings_of(tmp_path / "none")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A limit of a file's size stands for the disk's."""
    model = random_mixture(1, torch.float32)
    counted = Dies(model)
    expected = run(counted, "balanced")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with (
            pytest.raises(CheckpointError, match=r"c: cannot keep an answer of \d+ bytes: .*kept"),
            Checkpoint(tmp_path / "c", SETTINGS) as checkpoint,
        ):
            run(checkpoint.recorded(model), "balanced")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert 0 < checkpoint.kept < counted.calls
    with Checkpoint(tmp_path / "c", SETTINGS, resume=True) as again:
        assert run(again.recorded(model), "balanced") == expected
        assert again.taken == checkpoint.kept
        assert not again.notes
