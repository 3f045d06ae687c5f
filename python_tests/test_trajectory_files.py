"""A teacher's run in a file: the same bits again, read from where they are, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext import arrays
from property_cases import altered, damaged, few_or_many, read

DTYPES = [torch.float32, torch.float64]


def run(seed: int, **options: Any) -> oss.Trajectory:
    model = random_mixture(seed, options.pop("dtype", torch.float32))
    return oss.teacher(model, model.noise(3, seed), steps=9, **options)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float64},
        {"keep_x0": True},
        {"storage": torch.float16},
        {"storage": torch.bfloat16, "keep_x0": True},
        {"solver": "dpmpp-2m", "max_batch": 2},
    ],
    ids=str,
)
@each_seed(1)
def test_a_trajectory_comes_back(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    made = run(seed, **options)
    made.save(tmp_path / "teacher.safetensors")
    got = oss.Trajectory.load(tmp_path / "teacher.safetensors")
    for name in ("times", "timesteps", "states", "x0", "final", "noise"):
        assert same(getattr(got, name), getattr(made, name)), name
    for name in ("model", "model_hash", "path", "solver", "data_range", "block", "nfe", "seconds"):
        assert getattr(got, name) == getattr(made, name), name
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


@pytest.mark.parametrize("quality", ["dp", "balanced"])
@pytest.mark.parametrize("scratch", [False, True])
@each_seed(1)
def test_a_search_of_it_is_the_same(quality: str, scratch: bool, seed: int, tmp_path: Path) -> None:
    model, made = random_mixture(seed, torch.float32), run(seed)
    made.save(tmp_path / "teacher")
    folder = tmp_path if scratch else None
    got = oss.Trajectory.load(tmp_path / "teacher", scratch=folder)
    expected = oss.search(model, made, 3, quality=quality).schedule(3)
    assert oss.search(model, got, 3, quality=quality).schedule(3) == expected
    said = oss.search(model, got, 3, quality=quality, dry_run=True)
    assert "teacher" not in {held.what for stage in said.stages for held in stage.held}
    # Nothing of it is written to.
    assert oss.Trajectory.load(tmp_path / "teacher").states.equal(made.states)


def test_any_program_reads_the_file(tmp_path: Path) -> None:
    made = run(1, keep_x0=True)
    made.save(tmp_path / "teacher")
    with safe_open(tmp_path / "teacher", framework="np") as file:
        assert sorted(file.keys()) == ["states", "times", "timesteps", "x0"]
        assert torch.from_numpy(file.get_tensor("states")).equal(made.states)
        facts = json.loads(file.metadata()["oss-trajectory"])
    assert facts["model"] == "analytic"


MEMORY = """
import sys
import torch
import oss_ext as oss
from oss_ext.machine import Watch

model = oss.models.from_callable(lambda x, t, sample: x.sin(), shape=(2**20,), predicts="velocity")
if sys.argv[1] == "save":
    oss.teacher(model, model.noise(1), steps=40, scratch=".").save("teacher")
    watch = Watch()
    trajectory = oss.teacher(model, model.noise(1), steps=40)
    watch.start()
    trajectory.save("again")
else:
    oss.Trajectory.load("teacher")
    watch = Watch()
    watch.start()
    trajectory = oss.Trajectory.load("teacher")
    float(trajectory.states.sum())
print(watch.stop()[0] - (trajectory.states.nbytes if sys.argv[1] == "save" else 0))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system says nothing")
def test_neither_saving_nor_loading_takes_memory_of_its_size(tmp_path: Path) -> None:
    """160 MiB, in rows of 4; some that was freed the system does not get back."""
    for what in ("save", "load"):
        command = [sys.executable, "-c", MEMORY, what]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 2**26, what
    assert (tmp_path / "again").stat().st_size == (tmp_path / "teacher").stat().st_size


def test_what_is_no_trajectory_is_refused(tmp_path: Path) -> None:
    made, path = run(1), tmp_path / "teacher"
    outline = run(1, dry_run=True)
    with pytest.raises(ValueError, match="expected one that was run, got that of a dry run"):
        outline.save(path)
    with pytest.raises(FileNotFoundError):
        oss.Trajectory.load(path)
    arrays.save(path, {"x": torch.zeros(2, 2)}, {"of": "another"})
    with pytest.raises(ValueError, match="teacher: holds no trajectory: not a trajectory of this"):
        oss.Trajectory.load(path)
    path.write_bytes(b"nothing like it")
    with pytest.raises(ValueError, match="teacher: holds no trajectory: "):
        oss.Trajectory.load(path)
    made.save(path)
    with pytest.raises(ValueError, match="scratch: expected noise on the CPU"):
        oss.Trajectory.load(path, device="meta", scratch=tmp_path)
    model = random_mixture(2, torch.float32)
    with pytest.raises(ValueError, match="model: expected the teacher's"):
        oss.search(model, oss.Trajectory.load(path), 3)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(1)
    made.save(tmp_path / "teacher")
    before = (tmp_path / "teacher").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(2).save(tmp_path / "teacher")
    assert (tmp_path / "teacher").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@few_or_many(60, 2000)
def test_damaged_files_are_refused_or_read(examples: int, tmp_path: Path) -> None:
    """Numbers that are other ones cannot be told."""
    path = tmp_path / "teacher"
    run(1).save(path)
    whole = path.read_bytes()

    @settings(max_examples=examples)
    @given(content=damaged(whole) | st.binary(max_size=100))
    def one(content: bytes) -> None:
        path.write_bytes(content)
        read(lambda: oss.Trajectory.load(path), ValueError)

    one()


@few_or_many(60, 2000)
def test_any_facts_are_refused_or_read(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    run(1).save(path)
    words, tensors = arrays.load(path)
    facts = json.loads(words["oss-trajectory"])

    @settings(max_examples=examples)
    @given(changed=altered(facts), dropped=st.sets(st.sampled_from(sorted(tensors)), max_size=1))
    def one(changed: Any, dropped: set[str]) -> None:
        rest = {name: tensor for name, tensor in tensors.items() if name not in dropped}
        arrays.save(tmp_path / "other", rest, words | {"oss-trajectory": json.dumps(changed)})
        found = read(lambda: oss.Trajectory.load(tmp_path / "other"), ValueError)
        assert found is None or not dropped

    one()
