"""The command line's metrics."""

from __future__ import annotations

import pytest

from cli_cases import TINY, Oss, assert_fails, assert_misused, files
from driver_cases import one_thread  # noqa: F401
from oss_ext import Schedule

DIGITS = ("--samples=2", "--teacher-steps=6", "--quiet", "--steps=2", "--quality=dp")


@pytest.mark.parametrize("metric", ["x0-candidate", "perceptual:mid2"])
def test_search_takes_metrics_that_evaluate_candidates(metric: str, oss: Oss) -> None:
    assert oss("search", *DIGITS, f"--metric={metric}").code == 0
    schedule = Schedule.load("schedules/digits-2.json")
    assert schedule.objective is not None
    assert schedule.objective.metric == metric
    assert f"metric {metric}" in oss("show", "schedules/digits-2.json").out


def test_what_they_cost_is_said_before(oss: Oss) -> None:
    loud = [option for option in DIGITS if option != "--quiet"]
    plain, evaluated = (oss("search", *loud, f"--metric={m}").err for m in ("xt", "x0-candidate"))
    assert "dp: 11 evaluations per sample (11 for the dynamic programme)" in plain
    assert "dp: 21 evaluations per sample (21 for the dynamic programme)" in evaluated


def test_unknown_metrics_and_modules_are_refused_before_long_work(oss: Oss) -> None:
    assert_misused(oss("search", *DIGITS, "--metric=psnr"), "x0-candidate", "perceptual:MODULE")
    assert_misused(oss("search", *DIGITS, "--metric=perceptual"), "perceptual:MODULE")
    slow = ("--samples=1000", "--teacher-steps=10000", "--steps=2", "--quality=dp")
    outcome = oss("search", *slow, "--metric=perceptual:mid3")
    assert_fails(outcome, "metric: expected a module of 'digits' such as mid", "got 'mid3'")
    outcome = oss("search", *TINY, "--steps=2", "--quality=dp", "--metric=perceptual:mid2")
    assert_fails(outcome, "metric: expected a model of torch modules", "'analytic'")
    outcome = oss("search", *slow, "--metric=x0", "--solver=heun")
    assert_fails(outcome, "metric: expected one of states ('xt')", "with solver 'heun', got 'x0'")
    for option in ("--metric=x0", "--solver=heun"):
        outcome = oss("search", *slow, option, "--beam=2")
        assert_fails(outcome, "beam: expected 1", "got 2; there is one with 'euler' and 'xt'")
    assert files() == set()


def test_a_quality_that_compares_nothing_takes_no_metric(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--quality=fast", "--metric=x0")
    assert_fails(outcome, "metric: expected 'xt' where quality 'fast'", "got 'x0'")
