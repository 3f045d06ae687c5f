"""Whatever bytes a checkpoint holds, the run ends as if it had not been cut off, or is refused."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

import oss_ext as oss
import oss_ext.checkpoint
from driver_cases import one_thread, random_mixture  # noqa: F401
from oss_ext.checkpoint import (
    ANSWERS,
    HEADER,
    MAGIC,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    settings_of,
)
from oss_ext.checkpoint.legs import read_leg, write_leg
from oss_ext.models.base import Model, Request
from oss_ext.models.wrapped import Wrapped
from property_cases import altered, damaged, few_or_many, read

SETTINGS = {"steps": [3], "model": "m"}
CALLS = 5
MODEL = random_mixture(1, torch.float32)


def asked(model: Model) -> Tensor:
    """What follows from the answers to so many calls, each of which depends on the last."""
    x, sample = torch.ones(2, *model.shape), torch.arange(2)
    for n in range(CALLS):
        x = x - model(x, torch.full((2,), 1 - n / CALLS, dtype=torch.float64), sample)
    return x


EXPECTED = asked(MODEL)
LEG = "leg-1.bin"
SEARCH_CALLS = 6 + 6 + 5 + 4


def searched(model: Model) -> str:
    teacher = oss.teacher(model, MODEL.noise(2), steps=6, max_batch=2)
    return oss.search(model, teacher, 3, quality="dp", max_batch=2).schedule(3).to_json()


class Killed(Exception):
    pass


class Dies(Wrapped):
    def __init__(self, model: Model, left: int) -> None:
        super().__init__(model)
        self._left = left

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        self._left -= 1
        if self._left < 0:
            raise Killed
        yield from super().answers(requests)


@pytest.fixture
def begun(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """A checkpoint of a run that was killed before its last call, with one file as it is given."""
    folder = tmp_path / "c"
    with pytest.raises(Killed), Checkpoint(folder, SETTINGS) as checkpoint:
        asked(checkpoint.recorded(Dies(MODEL, CALLS - 1)))
    whole = {name: (folder / name).read_bytes() for name in (MANIFEST, ANSWERS)}

    def with_file(name: str, content: bytes) -> Path:
        for other, before in whole.items():
            (folder / other).write_bytes(content if other == name else before)
        return folder

    return with_file


def check(folder: Path) -> None:
    """The run goes on and ends as ever, or is refused."""

    def resumed() -> Tensor:
        with Checkpoint(folder, SETTINGS, resume=True) as checkpoint:
            return asked(checkpoint.recorded(MODEL))

    ended = read(resumed, CheckpointError)
    assert ended is None or ended.equal(EXPECTED)


@few_or_many(60, 2000)
def test_damaged_answers_are_made_again(examples: int, begun: Callable[[str, bytes], Path]) -> None:
    whole = (begun("", b"") / ANSWERS).read_bytes()

    @settings(max_examples=examples)
    @given(content=damaged(whole) | st.binary(max_size=100))
    def one(content: bytes) -> None:
        check(begun(ANSWERS, content))

    one()


@few_or_many(60, 2000)
def test_damaged_payloads_with_the_right_checksum_are_no_answers(
    examples: int, begun: Callable[[str, bytes], Path]
) -> None:
    """Or they are answers to something else: a model's own are the only ones that are taken."""
    payload = save({"answer": torch.zeros(2, *MODEL.shape)}, {"request": "0"})

    @settings(max_examples=examples)
    @given(payload=damaged(payload) | st.binary(max_size=100))
    def one(payload: bytes) -> None:
        record = HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload
        check(begun(ANSWERS, record))

    one()


@few_or_many(60, 2000)
def test_damaged_manifests_are_refused(examples: int, begun: Callable[[str, bytes], Path]) -> None:
    whole = (begun("", b"") / MANIFEST).read_bytes()

    @settings(max_examples=examples)
    @given(content=damaged(whole) | st.binary(max_size=100))
    def one(content: bytes) -> None:
        check(begun(MANIFEST, content))

    one()


@few_or_many(60, 2000)
def test_any_value_in_a_manifest_is_read_or_refused(
    examples: int, begun: Callable[[str, bytes], Path]
) -> None:
    body = json.loads((begun("", b"") / MANIFEST).read_bytes())

    @settings(max_examples=examples)
    @given(changed=altered(body))
    def one(changed: Any) -> None:
        folder = begun(MANIFEST, json.dumps(changed).encode())
        found = read(lambda: settings_of(folder), CheckpointError)
        assert found is None or isinstance(found, dict)
        check(folder)

    one()


SEARCHED = searched(MODEL)


@pytest.fixture
def with_leg(tmp_path: Path) -> Callable[[bytes], Path]:
    """A checkpoint of a search that was killed in its last step, with a leg's file as given."""
    folder, whole = tmp_path / "s", tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(oss_ext.checkpoint, "LEAST_BYTES", 0)
        with pytest.raises(Killed), Checkpoint(whole, SETTINGS) as checkpoint:
            searched(checkpoint.recorded(Dies(MODEL, SEARCH_CALLS - 1)))

    def with_file(content: bytes) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        if content:
            (folder / LEG).write_bytes(content)
        return folder

    return with_file


def check_search(folder: Path) -> None:
    def resumed() -> str:
        with Checkpoint(folder, SETTINGS, resume=True) as checkpoint:
            return searched(checkpoint.recorded(MODEL))

    assert read(resumed, CheckpointError) in (None, SEARCHED)


@few_or_many(40, 1000)
def test_damaged_legs_are_made_again(examples: int, with_leg: Callable[[bytes], Path]) -> None:
    whole = (with_leg(b"") / LEG).read_bytes()

    @settings(max_examples=examples)
    @given(content=damaged(whole) | st.binary(min_size=1, max_size=100))
    def one(content: bytes) -> None:
        check_search(with_leg(content))

    one()


SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    SHAPES,
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
@few_or_many(40, 1000)
def test_whole_legs_of_anything_else_are_refused(
    examples: int, with_leg: Callable[[bytes], Path]
) -> None:
    """Where they fit, they are what was reached: a checkpoint is as good as who may write it."""
    folder = with_leg(b"")
    found = read_leg(folder / LEG)
    assert found is not None
    words, kept = found[0], {name: list(tensors) for name, tensors in found[1].items()}

    @settings(max_examples=examples)
    @given(
        changed=st.dictionaries(st.sampled_from(sorted(kept)), st.lists(TENSORS, max_size=4),
                                min_size=1),
        dropped=st.sets(st.sampled_from(sorted(kept))),
        said=st.dictionaries(st.sampled_from(sorted(words)), st.text(max_size=5), max_size=2),
    )  # fmt: skip
    def one(changed: dict[str, list[Tensor]], dropped: set[str], said: dict[str, str]) -> None:
        folder = with_leg(b"")
        rest = {name: tensors for name, tensors in kept.items() if name not in dropped}
        write_leg(folder / LEG, words | said, rest | changed)
        try:
            with Checkpoint(folder, SETTINGS, resume=True) as checkpoint:
                searched(checkpoint.recorded(MODEL))
        except CheckpointError:
            pass

    one()
