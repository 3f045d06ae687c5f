"""What a search is said to take: its evaluations to the last one, its memory within a tenth."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from cli_cases import TINY, Oss, assert_fails, assert_misused, files
from driver_cases import (
    SHAPE,
    each_seed,
    one_thread,  # noqa: F401
    random_network,
    recorded,
)
from oss_ext import estimate
from oss_ext.models import from_callable
from oss_ext.models.evaluation import NonFiniteError
from oss_ext.models.wrapped import Wrapped

BENCH = Path(__file__).parents[1] / "bench" / "bench_estimate.py"
STEPS, SAMPLES = 12, 8


def planned(seed: int, steps: list[int], **options: Any) -> tuple[oss.Estimate, oss.SearchResult]:
    model = random_network(seed, torch.float32)
    noise, keep = model.noise(SAMPLES, seed), options.get("metric") == "x0"
    teach = functools.partial(oss.teacher, model, noise, STEPS, keep_x0=keep)
    said = oss.search(model, teach(dry_run=True), steps, dry_run=True, **options)
    return said, oss.search(model, teach(), steps, **options)


@pytest.mark.parametrize("start", ["free", "pinned"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "instance"},
        {"metric": "x0"},
        {"solver": "dpmpp-3m"},
        {"beam": 3},
        {"max_batch": 3},
    ],
    ids=str,
)
@each_seed(1)
def test_a_dynamic_programme_takes_as_many_evaluations_as_said(
    options: dict[str, Any], start: str, seed: int
) -> None:
    said, found = planned(seed, [2, 4], quality="dp", start=start, **options)
    assert said.nfe == found.trajectory.nfe + found.nfe
    assert [stage.nfe for stage in said.stages] == [STEPS, found.nfe]


@pytest.mark.parametrize(
    "options",
    [
        {"quality": "fast"},
        {"quality": "balanced"},
        {"quality": "best", "solver": "dpmpp-2m"},
        {"quality": "dp", "solver": "dpmpp-2s"},
        {"quality": "dp", "metric": "x0-candidate"},
    ],
    ids=str,
)
@each_seed(1)
def test_no_search_takes_more_evaluations_than_said(options: dict[str, Any], seed: int) -> None:
    said, found = planned(seed, [2, 4], **options)
    assert found.trajectory.nfe + found.nfe <= said.nfe == STEPS + found.plan.nfe
    assert said.samples == SAMPLES
    assert "at most " in str(said) or options["quality"] == "dp"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_memory_is_as_said() -> None:
    cases = ["euler, on disk", "dpmpp-2m"]
    result = subprocess.run(
        [sys.executable, BENCH, "--shape", "4", "96", "96", "--steps", "20", "--max-batch", "1",
         "--cases", *cases],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert result.stdout.count("\n| ") >= len(cases), result.stderr
    assert result.returncode == 0, result.stdout


def test_what_is_not_one_array_is_said_too() -> None:
    model = random_network(0, torch.float32)
    outline = oss.teacher(model, model.noise(SAMPLES), STEPS, keep_x0=True, dry_run=True)
    array = outline.states.nbytes
    said = oss.search(model, outline, 4, quality="dp", metric="x0", dry_run=True)
    held = {part.what: part.bytes for part in said.peak.held}
    assert {held[name] for name in ("teacher", "x0", "states", "velocities")} == {array}
    half = oss.metrics.DataMetric(oss.metrics.Selection(weights=torch.tensor([[1.0], [0.0]])))
    said = oss.search(model, outline, 4, quality="dp", metric=half, dry_run=True)
    held = {part.what: part.bytes for part in said.peak.held}
    # Of state, velocity and the teacher's clean samples, the part that weighs something.
    assert held["features"] == 3 * array // 2


def test_an_outline_takes_no_memory_and_cannot_be_searched() -> None:
    model, calls = recorded(random_network(0, torch.float32))
    noise = model.noise(SAMPLES)
    outline = oss.teacher(model, noise, STEPS, dry_run=True)
    assert outline.states.shape == (STEPS + 1, *noise.shape)
    assert outline.states.untyped_storage().nbytes() == noise.nbytes
    assert calls == []
    with pytest.raises(ValueError, match=r"^trajectory: expected one that was run, got that of a"):
        oss.search(model, outline, 4)
    with pytest.raises(ValueError, match=r"^trajectory: expected one that was run"):
        oss.refine(model, outline, outline.schedule([STEPS, 4, 0]))
    oss.search(model, outline, 4, quality="dp", dry_run=True)
    assert len(calls) == estimate.CALLS
    made = oss.teacher(model, noise, STEPS)
    said = oss.search(model, made, 4, quality="dp", dry_run=True)
    assert [stage.name for stage in said.stages] == ["dynamic programme"]


def test_groups_take_the_memory_of_two() -> None:
    model = random_network(0, torch.float32)
    noise = model.noise(SAMPLES)
    teach = functools.partial(oss.teacher, steps=STEPS)
    said = oss.estimate_groups(model, noise, 4, group=2, teach=teach)
    found = oss.search_groups(model, noise, 4, group=2, teach=teach)
    assert (said.nfe, said.samples) == (found.trajectory.nfe + found.nfe, SAMPLES)
    held = {part.what: part.bytes for part in said.peak.held}
    assert held["teacher"] == held["first group's teacher"] == (STEPS + 1) * noise[:2].nbytes


def test_files_are_counted_by_folder(tmp_path: Path) -> None:
    model = random_network(0, torch.float32)
    noise = model.noise(SAMPLES)
    outline = oss.teacher(model, noise, STEPS, scratch=tmp_path, dry_run=True)
    said = oss.search(model, outline, 4, quality="dp", dry_run=True)
    assert said.files == {str(tmp_path): 2 * outline.states.nbytes}
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fails_says_so_before_anything_long() -> None:
    broken = from_callable(lambda x, t, sample: x * torch.nan, SHAPE, name="broken")
    outline = oss.teacher(broken, broken.noise(2), STEPS, dry_run=True)
    with pytest.raises(NonFiniteError, match=r"^model 'broken' returned NaN or inf at t = 1"):
        oss.search(broken, outline, 4, dry_run=True)

    def misshapen(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return x[:, :1]

    other = from_callable(misshapen, SHAPE)
    outline = oss.teacher(other, other.noise(2), STEPS, dry_run=True)
    with pytest.raises(ValueError, match=r"returned torch.float32 .*, expected a floating-point"):
        oss.search(other, outline, 4, dry_run=True)


# --- the command --------------------------------------------------------------------------------

PLAN = TINY[:-1]  # it has no bar to be quiet about


def test_the_command_says_what_a_search_takes_and_writes_nothing(oss: Oss) -> None:
    before = files()
    outcome = oss("plan", *PLAN, "--steps=2,3", "--quality=dp")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "evaluations: 29 per sample (8 teacher, 21 dynamic programme), 87 in all"
    starts = ("memory, host: ", "  at its peak, ", "disk, schedules: ", "time: about ", "  from")
    assert all(line.startswith(start) for line, start in zip(lines[1:], starts, strict=True))
    assert files() == before


def test_the_command_counts_the_checkpoint_where_there_is_one(oss: Oss) -> None:
    Path("here").mkdir()
    outcome = oss("plan", *PLAN, "--steps=2", "--no-checkpoint")
    assert "disk" not in outcome.out
    outcome = oss("plan", *PLAN, "--steps=2", "--scratch=here", "--out=new/run")
    assert "disk, here: " in outcome.out
    assert "disk, new/run: " in outcome.out


def test_the_command_plans_groups(oss: Oss) -> None:
    outcome = oss("plan", *PLAN, "--steps=2", "--scope=instance", "--group=1")
    assert outcome.code == 0
    assert "first group's teacher" in outcome.out
    assert "(8 teacher, " in outcome.out
    outcome = oss("plan", *PLAN, "--steps=2", "--scope=instance", "--group=1", "--amplitude")
    assert "(32 teacher, " in outcome.out  # once more for each sample's schedule


@pytest.mark.parametrize("place", ["host", "schedules"])
def test_what_does_not_fit_is_said_and_no_error(
    oss: Oss, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {"host": "free_memory", "schedules": "_free_disk"}[place]
    monkeypatch.setattr(estimate, full, lambda where: 7)
    outcome = oss("plan", *PLAN, "--steps=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"does not fit: {place} needs " in outcome.out.splitlines()[-1]
    assert outcome.out.endswith(", 7 bytes free\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps=9"],
        ["--steps=2", "--group=2"],
        ["--steps=2", "--quality=fast", "--scope=instance"],
        ["--steps=2", "--for=comfyui", "--start=free"],
        ["--steps=2", "--metric=perceptual:none"],
        ["--steps=2", "--budget=3"],
        ["--steps=2", "--scope=all"],
    ],
)
def test_bad_options_are_refused_as_by_a_search(oss: Oss, arguments: list[str]) -> None:
    refused, searched = (oss(command, *PLAN, *arguments) for command in ("plan", "search"))
    assert refused.code == searched.code > 0
    said, expected = (outcome.err.splitlines()[-1] for outcome in (refused, searched))
    assert said == expected


def test_a_dry_run_is_not_resumed(oss: Oss) -> None:
    assert_misused(oss("plan", *PLAN, "--steps=2", "--resume=run"), "No such option")
    assert_fails(oss("plan", "--model=none"), "none")


@pytest.mark.parametrize("processes", [2, 3, 100])
def test_processes_share_what_is_asked_for_together(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a call of a second and steps that take none."""
    model = random_network(1, torch.float32)
    one = estimate._Probe(rows=2, seconds=1.0, model=1.0, within=0)
    monkeypatch.setattr(estimate, "_probe", lambda *arguments: one)
    monkeypatch.setattr(estimate, "_op_seconds", lambda *arguments: 0.0)

    def stages(at_once: int) -> dict[str, float]:
        shared = Wrapped(model)
        shared.at_once = at_once
        outline = oss.teacher(shared, model.noise(10), STEPS, max_batch=2, dry_run=True)
        options: dict[str, Any] = {"quality": "best", "max_batch": 2, "dry_run": True}
        said = oss.search(shared, outline, 3, **options)
        return {stage.name: stage.seconds for stage in said.stages}

    alone, together = stages(1), stages(processes)
    assert alone["teacher"] == STEPS * 5
    assert together["teacher"] == pytest.approx(STEPS * {2: 3, 3: 2, 100: 1}[processes])
    share = together["dynamic programme"] / alone["dynamic programme"]
    assert 1 / processes <= share < 1.05 / min(processes, STEPS * 4)
    share = together["refinement of 3 steps"] / alone["refinement of 3 steps"]
    assert share == pytest.approx({2: 1 / 2, 3: 1 / 2, 100: 1 / 4}[processes])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_grid_is_probed_where_the_network_knows_its_times(steps: int) -> None:
    path = oss.noise.VPPath()
    model = oss.models.from_callable(lambda x, t, sample: x, (4,), path=path, predicts="eps")
    outline = oss.teacher(model, model.noise(4), steps, dry_run=True)
    assert oss.search(model, outline, 1, dry_run=True).nfe >= steps
