"""What legs of a run have reached stands in for the answers before, wherever the run is cut off."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oss_ext as oss
import oss_ext.checkpoint
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext.checkpoint import ANSWERS, Checkpoint, CheckpointError
from oss_ext.checkpoint.legs import read_leg, write_leg
from oss_ext.models.base import Model, Request, There
from oss_ext.models.wrapped import Wrapped
from test_checkpoint import DAMAGE, Crash, Dies, draw

Run = Callable[[Model], str]


def searched(**options: object) -> Run:
    def run(model: Model) -> str:
        teacher = oss.teacher(model, model.noise(8, 3), steps=12)
        return oss.search(model, teacher, 4, **options).schedule(4).to_json()  # type: ignore[call-overload]

    return run


def in_groups(model: Model) -> str:
    found = oss.search_groups(
        model, model.noise(7, 3), 4, group=3, aggregate="mean",
        teach=lambda part, noise: oss.teacher(part, noise, steps=12),
    )  # fmt: skip
    return found.schedule(4).to_json() + str(found.nfe) + str(found.table.cost.tolist())  # type: ignore[union-attr]


def contested(model: Model) -> str:
    from oss_ext.contest import make

    teacher = oss.teacher(model, model.noise(8, 3), steps=12)
    made = make(model, teacher, [3, 4], ["uniform", "gits", "ld3", "oss-median", "dp", "balanced"])
    schedules = [c.schedule.to_json() for c in made.contenders if c.schedule is not None]
    assert len(schedules) == 12
    return "".join(schedules) + str(made.table) + str(made.spread)


RUNS: dict[str, Run] = {
    "dp": searched(quality="dp"),
    "each sample": searched(quality="dp", scope="instance", aggregate="median"),
    "orders": searched(quality="dp", solver="dpmpp-3m"),
    "orders of each sample": searched(quality="dp", solver="dpmpp-2m", scope="instance",
                                      aggregate="mean"),
    "stages": searched(quality="dp", solver="heun"),
    "evaluated": searched(quality="dp", metric="x0-candidate"),
    "beam": searched(quality="dp", beam=2),
    "best": searched(quality="best"),
    "off grid": searched(quality="balanced", off_grid=True),
    "groups": in_groups,
    "contest": contested,
}  # fmt: skip


@pytest.fixture(params=[0, 2**26], ids=["always", "at the end"])
def least_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of answers that a state of a leg takes the place of: here every one that can, or none."""
    monkeypatch.setattr(oss_ext.checkpoint, "LEAST_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("least_bytes")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "contest")) for name in RUNS]
)
@each_seed(1)
def test_a_run_that_is_cut_off_again_and_again_ends_the_same(
    name: str, seed: int, tmp_path: Path
) -> None:
    run, model = RUNS[name], Dies(random_mixture(seed, torch.float32))
    expected, made, got = run(model), 0, ""
    for n, more in enumerate([*draw(seed, model.calls // 3, 6), 10**9]):
        dies = Dies(random_mixture(seed, torch.float32), more)
        with Checkpoint(tmp_path / "c", {}, resume=n > 0 and made > 0) as checkpoint:
            try:
                got = run(checkpoint.recorded(dies))
            except Crash:
                got = ""
            assert not checkpoint.notes
            assert name == "contest" or checkpoint.taken == made
        made += dies.calls
    assert got == expected
    assert name == "contest" or made == model.calls  # gradients are taken again


@each_seed(1)
def test_a_checkpoint_is_no_larger_than_a_few_trajectories(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oss_ext.checkpoint, "LEAST_BYTES", 0)
    torch.manual_seed(seed)
    sizes: list[int] = []

    class Watched(Wrapped):
        def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
            files = (tmp_path / "c").glob("*.bin")
            sizes.append(sum(path.stat().st_size for path in files))
            yield from super().answers(requests)

    wide = oss.models.from_callable(
        lambda x, t, sample: torch.sin(x), shape=(5000,), predicts="velocity"
    )
    with Checkpoint(tmp_path / "c", {}) as checkpoint:
        kept = checkpoint.recorded(Watched(wide))
        teacher = oss.teacher(kept, torch.randn(2, 5000), steps=20)
        oss.search(kept, teacher, 15, quality="dp")
    array = teacher.states.nbytes
    assert max(sizes) < 3.3 * array  # the teacher's answers, the states and a step's answers
    assert sizes[-1] > array


@each_seed(2)
def test_a_crash_between_what_is_kept_and_what_it_replaces(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a leg is whole then, and the answers are those that led to it."""
    monkeypatch.setattr(oss_ext.checkpoint, "LEAST_BYTES", 0)
    run, model = RUNS["dp"], random_mixture(seed, torch.float32)

    def written_then_killed(*arguments: object) -> None:
        write_leg(*arguments)  # type: ignore[arg-type]
        raise Crash

    made = 0
    for n in range(4):
        dies = Dies(model)
        with monkeypatch.context() as patched:
            patched.setattr(oss_ext.checkpoint, "write_leg", written_then_killed)
            with pytest.raises(Crash), Checkpoint(tmp_path / "c", {}, resume=n > 0) as checkpoint:
                run(checkpoint.recorded(dies))
        made += dies.calls
    dies, counted = Dies(model), Dies(model)
    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        assert run(checkpoint.recorded(dies)) == run(counted)
        assert not checkpoint.notes
    assert made + dies.calls == counted.calls


def cut(folder: Path, run: Run, model: Model, calls: int) -> None:
    with pytest.raises(Crash), Checkpoint(folder, {}) as checkpoint:
        run(checkpoint.recorded(Dies(model, calls)))


class Slow(Wrapped):
    """Takes its time."""

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for answer in super().answers(requests):
            time.sleep(0.01)
            yield answer


def test_a_resumed_search_in_groups_takes_the_time_that_it_takes(tmp_path: Path) -> None:
    model = random_mixture(5, torch.float32)
    counted = Dies(model)
    in_groups(counted)
    cut(tmp_path / "c", in_groups, Slow(model), counted.calls - 10)
    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        teach = functools.partial(oss.teacher, steps=12)
        found = oss.search_groups(
            checkpoint.recorded(model), model.noise(7, 3), 4, group=3, aggregate="mean", teach=teach
        )
    assert 0 <= found.seconds < 5
    assert found.trajectory.seconds > 0.01


@pytest.mark.parametrize("damage", DAMAGE)
@each_seed(3)
def test_a_leg_whose_file_is_damaged_is_made_again(
    damage: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oss_ext.checkpoint, "LEAST_BYTES", 0)
    run, model = RUNS["best"], random_mixture(seed, torch.float32)
    counted = Dies(model)
    expected = run(counted)
    cut(tmp_path / "c", run, model, counted.calls * 2 // 3)
    path = tmp_path / "c" / "leg-1.bin"
    data = bytearray(path.read_bytes())
    (place,) = draw(seed, len(data) - 1, 1)
    path.write_bytes(DAMAGE[damage](data, place + (damage == "longer")))
    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        assert run(checkpoint.recorded(model)) == expected
        assert checkpoint.notes[0] == (
            "what was kept of part 1 of the run is broken; the part was made again"
        )
        assert checkpoint.taken == 12  # the teacher's


def test_a_file_that_was_being_written_is_left_behind_by_nobody(tmp_path: Path) -> None:
    run, model = RUNS["dp"], random_mixture(1, torch.float32)
    cut(tmp_path / "c", run, model, 20)
    (tmp_path / "c" / ".leg-1-0123abcd.bin").write_bytes(b"half of")
    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        assert run(checkpoint.recorded(model)) == run(model)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        ANSWERS, "checkpoint.json", "leg-1.bin"
    }  # fmt: skip


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"cost": [torch.zeros(13, 8)], "parent": [torch.zeros(13, 1)], "state": torch.ones(2, 3)},
        {"counts": [torch.tensor(1)], "bad": []},
    ],
)
def test_a_whole_file_of_something_else_is_refused(
    kept: dict[str, list[Tensor]], tmp_path: Path
) -> None:
    run, model = RUNS["dp"], random_mixture(1, torch.float32)
    cut(tmp_path / "c", run, model, 20)
    counts = {"counts": torch.tensor([20, 8]), "bad": torch.zeros(0, 2)}
    words = {"legs": "1", "written": "1", "answers": "20"}
    write_leg(tmp_path / "c" / "leg-1.bin", words, {**counts, **kept} if kept else {"x": []})
    with (
        Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint,
        pytest.raises(CheckpointError, match=r"leg-1.bin: not what this run keeps there; remove"),
    ):
        run(checkpoint.recorded(model))


def test_no_memory_to_go_on_from_a_file_is_not_the_files_fault(tmp_path: Path) -> None:
    run, model = RUNS["dp"], random_mixture(1, torch.float32)
    cut(tmp_path / "c", run, model, 20)
    words = {"legs": "1", "written": "1", "answers": "20"}
    write_leg(tmp_path / "c" / "leg-1.bin", words, {"x": []})

    def full(there: There) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        leg = checkpoint.recorded(model).leg()
        assert leg.there
        with pytest.raises(torch.OutOfMemoryError):
            leg.take(full)


def test_files_of_legs_keep_their_tensors(tmp_path: Path) -> None:
    kept = {
        "rows": torch.randn(3, 2, 5).to(torch.bfloat16),
        "list": [torch.arange(4), torch.tensor(2.5, dtype=torch.float64)],
        "none": [],
        "nothing in it": torch.zeros(0, 2),
    }
    write_leg(tmp_path / "leg", {"a": "b"}, kept)
    found = read_leg(tmp_path / "leg")
    assert found is not None
    assert found[0] == {"a": "b"}
    for _ in range(2):  # as often as one wants
        for name, tensors in kept.items():
            got = list(found[1][name])
            assert len(got) == len(tensors)
            assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(got, tensors, strict=True))
    assert read_leg(tmp_path / "other") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_of_a_network_in_16_bits_take_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    def run(model: Model) -> int:
        with Checkpoint(tmp_path / model.name, {}) as checkpoint:
            oss.teacher(checkpoint.recorded(model), torch.randn(2, 5000), steps=4)
        return (tmp_path / model.name / ANSWERS).stat().st_size

    rounded, exact = (
        oss.models.from_callable(
            lambda x, t, sample, to=to: x.sin().to(to).to(x), shape=(5000,), predicts="velocity",
            name=str(to),
        )
        for to in (dtype, torch.float32)
    )  # fmt: skip
    assert run(exact) > 1.9 * run(rounded) > 1.9 * 2 * 2 * 4 * 5000


@pytest.mark.parametrize("last", [0, 5, 30])
def test_a_run_that_ended_by_lack_of_memory_asks_again(tmp_path: Path, last: int) -> None:
    """A model of fixed batches cannot be asked for fewer rows; another time there may be memory."""

    class Full(Dies):
        def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
            try:
                yield from super().answers(requests)
            except Crash:
                raise torch.OutOfMemoryError("CUDA out of memory") from None

    def run(model: Model) -> str:
        teacher = oss.teacher(model, model.noise(2, 3), steps=12)
        return oss.search(model, teacher, 4).schedule(4).to_json()

    mixture = random_mixture(1, torch.float32)
    mixture.fixed_batch = 2
    counted = Dies(mixture)
    expected = run(counted)
    with pytest.raises(torch.OutOfMemoryError), Checkpoint(tmp_path / "c", {}) as checkpoint:
        run(checkpoint.recorded(Full(mixture, last)))
    again = Dies(mixture)
    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        assert run(checkpoint.recorded(again)) == expected
        assert not checkpoint.notes
    assert again.calls == counted.calls - last


@pytest.mark.filterwarnings("ignore:model .* ran out of memory:RuntimeWarning")
def test_rows_that_there_was_memory_for_are_known_after_a_leg(tmp_path: Path) -> None:
    class Small(Dies):
        def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
            for request in requests:
                if len(request[0]) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield from super().answers([request])

    def run(model: Model) -> str:
        teacher = oss.teacher(model, model.noise(8, 3), steps=12, max_batch=2)
        return oss.search(model, teacher, 4, quality="best").schedule(4).to_json()

    counted = Small(random_mixture(1, torch.float32))
    expected = run(counted)
    with pytest.raises(Crash), Checkpoint(tmp_path / "c", {}) as checkpoint:
        run(checkpoint.recorded(Small(random_mixture(1, torch.float32), counted.calls - 5)))
    again = Small(random_mixture(1, torch.float32))
    with Checkpoint(tmp_path / "c", {}, resume=True) as checkpoint:
        assert run(checkpoint.recorded(again)) == expected
        assert not checkpoint.notes
    assert again.calls == 5
    assert again.most_rows is None  # that is the recorded one's
