"""``oss compare --methods`` and ``oss report``: the whole way from a model to a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import oss_ext as package
from cli_cases import TINY, Oss, assert_fails, assert_misused, files
from driver_cases import one_thread  # noqa: F401
from oss_ext.baselines import BASELINES, Baseline, Calibration, UnableError
from oss_ext.contest import METHODS
from oss_ext.runs import Run
from oss_ext.schedule import Schedule

MIX = (*TINY[:2], "--teacher-steps=12", "--quiet", "--calibration=4", "--samples=5")


def test_every_method_is_made_judged_and_kept(oss: Oss) -> None:
    outcome = oss("compare", *MIX, "--methods=all", "--steps=2,3", "--out=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    run = Run.load("run")
    assert [c.name for c in run.contenders] == [f"{m} {k}" for k in (2, 3) for m in METHODS]
    assert (run.calibration, run.held_out, run.teacher_steps) == (4, 5, 12)
    assert run.mse is not None
    assert run.table is not None
    assert run.table.shape == (3, 13)
    assert {k: tuple(rows.shape) for k, rows in run.spread.items()} == {2: (4, 3), 3: (4, 4)}
    for c, mse in zip(run.contenders, run.mse, strict=True):
        assert c.name in outcome.out
        assert bool(mse.isnan().all()) == (c.schedule is None)
        assert (c.note != "") == (c.schedule is None)
        if c.schedule is not None:
            assert c.schedule.steps == c.steps
            assert run.images[c.name].shape == (5, 1, 4, 4)
            assert run.along[c.name][-1] == pytest.approx(float(mse.log().mean().exp()))
    assert re.search(r"paired difference: .* that of uniform of as many", outcome.out)

    outcome = oss("report", "run")
    assert outcome.code == 0, outcome.err
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert all(c.name in page for c in run.contenders)


def test_a_method_that_is_unable_says_why_and_the_rest_goes_on(
    oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(calibration: Calibration, steps: int) -> Schedule:
        raise UnableError(f"karras: needs the moon for {steps} steps")

    monkeypatch.setitem(BASELINES, "karras", Baseline("karras", "", unable))
    methods = "--methods=karras,uniform,fast"
    outcome = oss("compare", *MIX, methods, "--steps=2", "--out=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "needs the moon for 2" in outcome.out
    run = Run.load("run")
    assert [c.schedule is None for c in run.contenders] == [True, False, False]
    assert run.contenders[0].note == "karras: needs the moon for 2 steps"
    assert oss("report", "run").code == 0


def test_files_and_methods_are_judged_together(oss: Oss, found: list[str]) -> None:
    outcome = oss(
        "compare", found[0], "--set=shape=1,4,4", "--samples=5", "--quiet", "--calibration=3",
        "--methods=uniform,fast", "--out=run", "--against=fast",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    run = Run.load("run")
    assert [c.method for c in run.contenders] == ["uniform", "fast", "file"]
    assert "that of fast of as many" in outcome.out


def test_samples_that_methods_have_seen_are_not_held_out(oss: Oss) -> None:
    for seeds in (["--seed=0"], ["--seed=4", "--calibration-seed=4"]):
        outcome = oss("compare", *TINY, "--methods=uniform", "--steps=2", *seeds)
        assert_misused(outcome, "--seed: expected another than --calibration-seed")


def test_what_is_judged_on_is_held_out(oss: Oss) -> None:
    assert oss("compare", *MIX, "--methods=uniform,dp", "--steps=2,3", "--out=run").code == 0
    run = Run.load("run")
    model = package.models.load("analytic", shape=[1, 4, 4])
    unseen = package.teacher(model, model.noise(run.held_out, 1), run.teacher_steps)
    seen = package.teacher(model, model.noise(run.held_out, 0), run.teacher_steps)
    assert torch.equal(run.images["teacher"], unseen.final)
    assert run.mse is not None
    for c, mse in zip(run.contenders, run.mse, strict=True):
        assert c.schedule is not None
        on_unseen, on_seen = (
            package.compare(model, teacher, {"": c.schedule})[0].mse for teacher in (unseen, seen)
        )
        assert torch.equal(mse, on_unseen)
        assert not torch.equal(mse, on_seen)


@pytest.mark.parametrize(
    "options",
    [
        ("--quality=dp",),
        ("--quality=dp", "--storage=float16"),
        ("--scope=instance", "--aggregate=mean"),
        ("--solver=unipc-3", "--fixed-order", "--quality=dp"),
        ("--amplitude", "--samples=9"),
    ],
)
def test_a_file_that_is_judged_on_the_samples_it_was_found_on_is_noticed(
    oss: Oss, options: tuple[str, ...]
) -> None:
    assert oss("search", *TINY, "--steps=2", "--seed=4", "--out=found", *options).code == 0
    file = ["found/analytic-2.json", "--set=shape=1,4,4", "--quiet"]
    file += ["--amplitude"] * ("--amplitude" in options)  # runs twice
    for seed, samples, told in (("4", "5", 1), ("4", "3", 1), ("5", "5", 0)):
        outcome = oss("compare", *file, f"--samples={samples}", f"--seed={seed}")
        assert outcome.code == 0
        assert outcome.err.count("note: analytic-2 was found on these very samples") == told


def test_a_schedule_that_saw_no_samples_is_of_none(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=2", "--out=found").code == 0
    model = package.models.load("analytic", shape=[1, 4, 4])
    teacher = package.teacher(model, model.noise(3, 0), steps=8)
    package.baselines.uniform(teacher, 2).save("uniform.json")
    outcome = oss("compare", "uniform.json", "--set=shape=1,4,4", "--seed=0", "--samples=3")
    assert outcome.code == 0
    assert "very samples" not in outcome.err


def test_an_unknown_reference_is_named(oss: Oss) -> None:
    outcome = oss("compare", *MIX, "--methods=uniform", "--steps=2", "--against=karras", "--out=a")
    assert_fails(outcome, "--against: expected one of uniform, got 'karras'")
    assert not Path("a").exists()  # found before the teacher took its time


ON_GRID = """
from oss_ext import models

def build():
    mixture = models.load("analytic", shape=[1, 4, 4])

    def velocity(x, t, sample):
        off = (8 * t).round() != 8 * t
        return mixture(x, t, sample).masked_fill(off[:, None, None, None], float("nan"))

    return models.from_callable(velocity, mixture.shape, name="on grid", data_range=2.0)
"""


def test_a_student_that_breaks_the_model_is_unable_and_the_rest_goes_on(oss: Oss) -> None:
    Path("on_grid.py").write_text(ON_GRID, encoding="utf-8")
    model = ("--model=on_grid.py:build", "--teacher-steps=8", "--samples=3", "--quiet")
    outcome = oss("compare", *model, "--methods=karras,ld3,uniform,fast", "--steps=4", "--out=run")
    assert (outcome.code, outcome.err) == (0, "")
    why = "model 'on grid' returned NaN or inf at t = "
    run = Run.load("run")
    karras, ld3, uniform, fast = run.contenders
    assert karras.note.startswith(why)
    assert karras.schedule is not None  # that it broke the model on these samples is not all of it
    assert (ld3.schedule, ld3.note.startswith(why)) == (None, True)
    assert (uniform.note, fast.note) == ("", "")
    assert run.mse is not None
    assert run.mse.isfinite().all(dim=1).tolist() == [False, False, True, True]
    assert oss("report", "run").code == 0

    outcome = oss("compare", *model, "--methods=karras,logsnr", "--steps=4", "--against=karras")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count(why[:20]) == 2


def test_a_search_is_a_run_too(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=2,3", "--quality=best", "--out=run").code == 0
    run = Run.load("run")
    assert [c.file for c in run.contenders] == ["analytic-2.json", "analytic-3.json"]
    assert (run.held_out, run.mse) == (0, None)
    assert run.table is not None
    assert oss("report", "run").code == 0
    assert "report.html" in files("run")


def test_arrays_can_be_read_by_whoever_may_read_the_rest(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=2", "--out=run").code == 0
    modes = {path.stat().st_mode & 0o777 for path in Path("run").glob("*.*")}
    assert len(modes) == 1


def test_a_comparison_is_the_same_again(oss: Oss) -> None:
    arguments = (*MIX, "--methods=balanced,oss-median", "--steps=3")
    assert oss("compare", *arguments, "--out=b").err == ""
    assert oss("compare", *arguments, "--out=b").err.startswith("note: b holds an earlier run;")
    for folder in ("a", "b"):
        assert oss("compare", *arguments, f"--out={folder}").code == 0
    first, second = Run.load("a"), Run.load("b")
    assert first.mse is not None
    assert second.mse is not None
    assert torch.equal(first.mse, second.mse)


def test_files_are_told_from_one_another_and_from_what_stands_beside_them(oss: Oss) -> None:
    """Also where a stem is what a method's schedule is called in a run's folder."""
    assert oss("compare", *MIX, "--methods=uniform,logsnr", "--steps=3", "--out=a").code == 0
    given = ("a/schedules/uniform-3.json", "a/schedules/logsnr-3.json")
    outcome = oss("compare", *given, "--set=shape=1,4,4", "--samples=5", "--quiet", "--out=b")
    assert (outcome.code, outcome.err) == (0, "")
    assert [c.name for c in Run.load("b").contenders] == ["uniform 3", *given]


def test_a_file_that_is_given_twice_is_found_before_the_teacher_runs(
    oss: Oss, found: list[str]
) -> None:
    outcome = oss("compare", found[0], found[1], found[0], "--set=shape=1,4,4", "--out=run")
    assert_misused(outcome, f"SCHEDULE: expected every file once, got {' '.join(found)} {found[0]}")
    assert not Path("run").exists()
