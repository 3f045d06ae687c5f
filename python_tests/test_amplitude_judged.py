"""Amplitude calibration where people meet it: comparisons, the command line, files and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import oss_ext as package
from cli_cases import TINY, Oss, assert_fails, assert_misused, files
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext import Schedule, contest, models
from oss_ext.amplitude import LEVELS
from oss_ext.evaluate import Score, score_table, sharpness
from oss_ext.report import page, write_report
from oss_ext.runs import Contender, Run
from page_cases import Page
from run_cases import random_run
from test_evaluate_table import score

# --- sharpness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (3, 3, 2, 2), (2, 3, 4, 3, 6)])
def test_sharpness_is_the_mean_gradient(shape: tuple[int, ...], seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    planes = x.reshape(-1, *shape[-2:]).tolist()
    found = [
        math.hypot(p[i][j + 1] - p[i][j], p[i + 1][j] - p[i][j])
        for p in planes
        for i in range(shape[-2] - 1)
        for j in range(shape[-1] - 1)
    ]
    assert sharpness(x) == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert sharpness(-3 * x + 1) == pytest.approx(3 * sum(found) / len(found), rel=1e-12)


def test_a_blurred_picture_is_less_sharp(seed: int) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    whole, blurred = sharpness(x), sharpness(torch.nn.functional.avg_pool2d(x, 3, 1, 1))
    assert whole is not None
    assert blurred is not None
    assert blurred < whole / 2


@pytest.mark.parametrize("shape", [(4, 6), (2, 8, 8), (2, 1, 1, 8), (2, 1, 8, 1)])
def test_what_is_no_picture_has_no_sharpness(shape: tuple[int, ...]) -> None:
    assert sharpness(torch.zeros(shape)) is None


# --- compared -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> tuple[Any, package.Trajectory, Schedule]:
    """A model of pictures, held-out samples and a schedule calibrated on others."""
    model = models.load("analytic", shape=[1, 4, 4])
    calibration, held_out = (package.teacher(model, model.noise(4, s), 12) for s in (0, 1))
    schedule = package.calibrate(calibration, calibration.schedule([12, 7, 3, 0]))
    return model, held_out, schedule


def test_a_calibrated_schedule_is_judged_beside_the_plain_one(pictures: Any) -> None:
    model, held_out, schedule = pictures
    scores = package.compare(
        model, held_out, {"plain": schedule, "calibrated": schedule}, amplitude=["calibrated"]
    )
    for s, amplitude in zip(scores, (False, True), strict=True):
        images = package.sample(model, held_out.noise, schedule, amplitude=amplitude)
        assert torch.equal(s.images, images)
        assert s.calibrated == amplitude
        ours, teachers = sharpness(images), sharpness(held_out.final)
        assert ours is not None
        assert teachers is not None
        assert s.sharpness == pytest.approx(ours / teachers)
    assert scores[0].mse.tolist() != scores[1].mse.tolist()


def test_quantiles_are_those_of_states_as_steps_leave_them(pictures: Any) -> None:
    model, held_out, schedule = pictures
    plain, calibrated = package.compare(
        model, held_out, {"a": schedule, "b": schedule}, amplitude=["b"]
    )
    rows = schedule.indices

    def expected(x: Tensor) -> np.ndarray:
        return np.quantile(x.flatten(1).double().numpy(), LEVELS, axis=1).mean(axis=1)

    for s in (plain, calibrated):
        assert s.quantiles is not None
        assert s.quantiles.shape == (2, 4, 2)
        of_teacher = np.stack([expected(held_out.states[row]) for row in rows])
        np.testing.assert_allclose(s.quantiles[1], of_teacher, rtol=1e-6)
        np.testing.assert_allclose(s.quantiles[0, 0], expected(held_out.noise), rtol=1e-6)
        np.testing.assert_allclose(s.quantiles[0, -1], expected(s.images), rtol=1e-6)
    bare = replace(schedule, amplitude=None)
    assert package.compare(model, held_out, {"a": bare})[0].quantiles is None


@pytest.mark.parametrize("names", [["bare"], ["nobody"], ["with", "bare"], "with"])
def test_only_those_that_have_it_can_run_with_it(pictures: Any, names: Any) -> None:
    model, held_out, schedule = pictures
    schedules = {"with": schedule, "bare": replace(schedule, amplitude=None)}
    with pytest.raises(ValueError, match=r"^amplitude: expected names of .*, 'with', got \["):
        package.compare(model, held_out, schedules, amplitude=names)


@each_seed(1)
def test_samples_that_are_no_pictures_have_no_sharpness(seed: int) -> None:
    model, held_out = random_case("mixture", seed)
    (s,) = package.compare(model, held_out, {"s": held_out.schedule([9, 0])})
    assert s.sharpness is None


def test_a_contest_judges_both(pictures: Any) -> None:
    model, held_out, schedule = pictures
    entries = [Contender(f"s {on}", "file", 3, schedule, amplitude=on) for on in (False, True)]
    plain, calibrated = contest.judge(model, held_out, entries)
    assert isinstance(plain, Score)
    assert isinstance(calibrated, Score)
    assert (plain.calibrated, calibrated.calibrated) == (False, True)


# --- the table ----------------------------------------------------------------------------------


def test_sharpness_has_a_column_where_something_is_calibrated() -> None:
    plain = replace(score("a", [0.1, 0.2]), sharpness=0.98765)
    other = replace(score("b", [0.1, 0.2]), sharpness=None)
    sharp = replace(score("a amplitude", [0.1, 0.3]), sharpness=1.04321, calibrated=True)
    lines = score_table([plain, sharp, other]).splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["sharp", "0.988", "1.043", "-"]
    assert lines[-1] == "sharp: mean gradient magnitude over that of the teacher's samples"
    assert "sharp" not in score_table([plain, other])
    assert "sharp" not in score_table([other, replace(sharp, sharpness=None)])


def test_a_cut_name_still_says_that_it_is_calibrated() -> None:
    names = ["FluxPipeline-10", "FluxPipeline-10 amplitude", "x" * 60 + " amplitude"]
    scores = [
        replace(
            score(name, [0.01, 0.02, 0.04], 2.0, 10, 12_345),
            sharpness=1.2345,
            calibrated=name.endswith("amplitude"),
        )
        for name in names
    ]
    lines = score_table(scores, against=names[0]).splitlines()
    assert max(map(len, lines)) <= 80
    assert "… amplitude " in lines[4]
    assert " amplitude " in lines[3]
    assert " amplitude" not in lines[2]


# --- the command line ---------------------------------------------------------------------------

SHAPE = "--set=shape=1,4,4"


@pytest.fixture
def stored(oss: Oss) -> list[str]:
    """Files of searched 2- and 3-step schedules, of which only the first is calibrated."""
    assert oss("search", *TINY, "--steps=2", "--amplitude", "--out=a").code == 0
    assert oss("search", *TINY, "--steps=3", "--out=b").code == 0
    return ["a/analytic-2.json", "b/analytic-3.json"]


def test_search_stores_what_the_calibration_samples_have(oss: Oss, stored: list[str]) -> None:
    schedule = Schedule.load(stored[0])
    assert schedule.amplitude is not None
    assert (schedule.amplitude.levels, schedule.amplitude.samples) == (LEVELS, 3)
    assert Schedule.load(stored[1]).amplitude is None
    model = models.load("analytic", shape=[1, 4, 4])
    teacher = package.teacher(model, model.noise(3, 0), 8)
    assert package.calibrate(teacher, schedule) == schedule
    assert (
        "amplitude calibration to quantiles 0.05 and 0.95 of 3 samples"
        in oss("show", stored[0]).out
    )
    assert "amplitude" not in oss("show", stored[1]).out


@pytest.mark.parametrize("form", [["--amplitude=0.1,0.8"], ["--amplitude", "0.1,0.8"]])
def test_levels_can_be_chosen(oss: Oss, form: list[str]) -> None:
    assert oss("search", *TINY, "--steps=2", *form).code == 0
    amplitude = Schedule.load("schedules/analytic-2.json").amplitude
    assert amplitude is not None
    assert amplitude.levels == (0.1, 0.8)


def test_an_instance_search_stores_it_in_each(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=2", "--scope=instance", "--amplitude").code == 0
    for b in range(3):
        assert Schedule.load(f"schedules/analytic-2-{b}.json").amplitude is not None


@pytest.mark.parametrize("levels", ["0.95,0.05", "0,1", "nan,0.5", "0.5", "a,b", "0.1,0.5,0.9"])
def test_bad_levels_are_misuse(oss: Oss, levels: str) -> None:
    outcome = oss("search", *TINY, "--steps=2", f"--amplitude={levels}")
    assert_misused(outcome, "Invalid value for '--amplitude'", "expected")
    assert files() == set()


def test_sample_applies_it_where_asked_to(oss: Oss, stored: list[str]) -> None:
    for name, options in (("plain", []), ("calibrated", ["--amplitude"])):
        out = f"--out={name}.safetensors"
        assert oss("sample", stored[0], SHAPE, "--samples=2", "--quiet", *options, out).code == 0
    model = models.load("analytic", shape=[1, 4, 4])
    schedule = Schedule.load(stored[0])
    for name, on in (("plain", False), ("calibrated", True)):
        expected = package.sample(model, model.noise(2, 1), schedule, amplitude=on)
        assert load_file(f"{name}.safetensors")["samples"].equal(expected)
    outcome = oss("sample", stored[1], SHAPE, "--quiet", "--amplitude")
    assert_fails(outcome, "amplitude: expected a schedule with the teacher's quantiles")


def test_compare_adds_a_row_and_keeps_what_the_page_needs(oss: Oss, stored: list[str]) -> None:
    arguments = ("compare", *stored, SHAPE, "--samples=5", "--quiet", "--amplitude", "--out=run")
    outcome = oss(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    starts = ["uniform 2  ", "analytic-2  ", "analy", "uniform 3  ", "analytic-3  "]
    assert all(map(str.startswith, lines[2:7], starts))
    assert " amplitude  " in lines[4]
    assert "sharp" in lines[1]
    assert max(map(len, lines)) <= 80
    run = Run.load("run")
    assert [c.amplitude for c in run.contenders] == [False, False, True, False, False]
    assert run.quantiles.keys() == {"analytic-2", "analytic-2 amplitude"}
    assert oss("report", "run").code == 0
    assert "amplitude.png" in files("run")


def test_without_the_option_nothing_is_added(oss: Oss, stored: list[str]) -> None:
    outcome = oss("compare", *stored, SHAPE, "--samples=5", "--quiet")
    assert "amplitude" not in outcome.out
    assert "sharp" not in outcome.out
    outcome = oss("compare", stored[1], SHAPE, "--amplitude")
    assert_misused(outcome, "--amplitude: expected a SCHEDULE that has it")


def test_exports_say_that_hosts_leave_it_out(oss: Oss, stored: list[str]) -> None:
    Schedule.load(stored[0]).save("with.json")
    replace(Schedule.load(stored[0]), amplitude=None).save("without.json")
    noted, silent = (oss("export", f"{name}.json", "--to=text") for name in ("with", "without"))
    assert noted.out == silent.out
    assert noted.err == (
        "note: no host calibrates amplitudes; this is the schedule without\n" + silent.err
    )


# --- the page -----------------------------------------------------------------------------------


def calibrated_run(seed: int) -> Run:
    """A random run in which ours also run with calibration."""
    run = random_run(seed, mse=None)
    ours = [c for c in run.contenders if c.name in run.quantiles]
    twins = [replace(c, name=c.name + " amplitude", file="", amplitude=True) for c in ours]
    quantiles = {c.name + " amplitude": run.quantiles[c.name].flip(1) for c in ours}
    return replace(run, contenders=(*run.contenders, *twins), quantiles=run.quantiles | quantiles)


def test_a_run_with_calibrated_contenders_is_read_back(seed: int, tmp_path: Path) -> None:
    run = calibrated_run(seed)
    run.save(tmp_path)
    back = Run.load(tmp_path)
    assert back.contenders == run.contenders
    assert all(torch.equal(back.quantiles[name], run.quantiles[name]) for name in run.quantiles)


def test_in_a_run_of_before_no_one_was_calibrated(seed: int, tmp_path: Path) -> None:
    random_run(seed).save(tmp_path)
    body = json.loads((tmp_path / "run.json").read_text())
    for entry in body["contenders"]:
        del entry["amplitude"]
    (tmp_path / "run.json").write_text(json.dumps(body))
    assert Run.load(tmp_path).contenders == random_run(seed).contenders


def test_the_page_shows_every_quantile(seed: int) -> None:
    run = calibrated_run(seed)
    found = Page(page(run))
    assert found.sections[-3:] == ["amplitude", "table", "use"]
    titles = {e.text for e in found.all("title", "amplitude")}
    for c in run.contenders:
        if c.name not in run.quantiles:
            assert not any(title.startswith(f"{c.name}:") for title in titles)
            continue
        assert c.schedule is not None
        for t, values in zip(c.schedule.times, run.quantiles[c.name][0].tolist(), strict=True):
            assert {f"{c.name}: {value:.3g} at t = {t:.4g}" for value in values} <= titles
    assert "amplitude=True" in found.section("use")
    assert found.section("use").count("which no host does") == len(run.quantiles) / 2


def test_the_pictures_are_written_and_nothing_is_shown_without_data(
    seed: int, tmp_path: Path
) -> None:
    run = calibrated_run(seed)
    assert tmp_path / "amplitude.png" in write_report(run, tmp_path)
    broken = {name: values * math.nan for name, values in run.quantiles.items()}
    for quantiles in ({}, broken):
        assert "amplitude" not in Page(page(replace(run, quantiles=quantiles))).sections


def test_one_value_everywhere_is_a_chart_too(seed: int, tmp_path: Path) -> None:
    run = calibrated_run(seed)
    same = {name: torch.full_like(values, 0.5) for name, values in run.quantiles.items()}
    write_report(replace(run, quantiles=same), tmp_path)
