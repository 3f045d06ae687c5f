"""Statistics of errors: by hand, against closed forms, and against slower ways to the same."""

from __future__ import annotations

import math
import statistics as plain
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from driver_cases import each_seed
from oss_ext import statistics
from oss_ext.statistics import (
    MEASURES,
    Interval,
    Statistics,
    bootstrap,
    frechet_distance,
    paired,
    psnr,
    statistics_of,
)

each_statistic = pytest.mark.parametrize("statistic", MEASURES)


def errors(samples: int, seed: int, sigma: float = 1.0) -> Tensor:
    """Log-normal, as errors are."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(samples, generator=generator, dtype=torch.float64)
    return 1e-3 * (sigma * normal).exp()


def interval_of(mse: Tensor, statistic: str, **options: Any) -> Interval:
    found = bootstrap(mse, statistic, 2.0, **options)
    assert found is not None
    return found


def brute_force(mse: list[float], data_range: float) -> Statistics:
    def decibels(value: float) -> float:
        return math.inf if value == 0 else 10 * math.log10(data_range**2 / value)

    each = [decibels(value) for value in mse]
    worst = sorted(mse)[-math.ceil(len(mse) / 10) :]
    return Statistics(
        psnr_of_mean=decibels(sum(mse) / len(mse)),
        mean_psnr=sum(each) / len(each),
        median_psnr=plain.median(each),
        worst_decile=decibels(sum(worst) / len(worst)),
    )


@pytest.mark.parametrize(
    ("mse", "data_range", "decibels"),
    [
        (0.01, 1.0, 20.0),
        (0.01, 2.0, 26.0206),
        (4.0, 2.0, 0.0),
        (1e-6, 1.0, 60.0),
        (0.0, 2.0, math.inf),
    ],
)
def test_psnr_by_hand(mse: float, data_range: float, decibels: float) -> None:
    found = psnr(torch.tensor([mse, 1.0], dtype=torch.float64), data_range)
    assert found.tolist() == pytest.approx([decibels, 20 * math.log10(data_range)], abs=1e-4)


@pytest.mark.parametrize("data_range", [0.0, -1.0, math.nan])
def test_a_psnr_needs_a_range(data_range: float) -> None:
    for of in (psnr, statistics_of):
        with pytest.raises(ValueError, match=r"^data_range: expected a positive number, got "):
            of(torch.tensor([0.01, 0.02]), data_range)


def test_the_averages_differ() -> None:
    s = statistics_of(torch.tensor([0.01, 0.0001, 0.001], dtype=torch.float64), 1.0)
    assert s.psnr_of_mean == pytest.approx(-10 * math.log10(0.0037))
    assert s.mean_psnr == pytest.approx((20 + 40 + 30) / 3)
    assert s.median_psnr == pytest.approx(30)
    assert s.worst_decile == pytest.approx(20)


@pytest.mark.parametrize(
    ("samples", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3), (64, 7)]
)
def test_the_worst_decile_is_a_tenth_rounded_up(samples: int, worst: int) -> None:
    """Errors 1 to B in some order: the mean of the largest k is B - (k - 1) / 2."""
    mse = torch.arange(1.0, samples + 1).double()[torch.randperm(samples)]
    expected = -10 * math.log10(samples - (worst - 1) / 2)
    assert statistics_of(mse, 1.0).worst_decile == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 64, 101])
def test_every_statistic_is_what_plain_python_makes_of_it(samples: int) -> None:
    mse = errors(samples, samples)
    found, expected = statistics_of(mse, 2.0), brute_force(mse.tolist(), 2.0)
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-12)
    assert list(MEASURES) == [field.name for field in fields(Statistics)]


def test_no_error_is_infinitely_good_where_it_counts() -> None:
    s = statistics_of(torch.tensor([0.0, 0.01, 0.01, 0.01]), 1.0)
    assert s.mean_psnr == math.inf
    assert (s.psnr_of_mean, s.median_psnr) == pytest.approx((-10 * math.log10(0.0075), 20))
    assert astuple(statistics_of(torch.zeros(4), 1.0)) == (math.inf,) * 4


@pytest.mark.parametrize(
    ("mse", "message"),
    [
        (torch.zeros(0), r"expected errors \[B\] with B >= 1, got \(0,\)"),
        (torch.zeros(2, 2), r"expected errors \[B\] with B >= 1, got \(2, 2\)"),
        (torch.tensor([0.1, math.nan]), r"expected finite errors >= 0, got \[0.1"),
        (torch.tensor([0.1, math.inf]), "expected finite errors >= 0"),
        (torch.tensor([0.1, -0.1]), "expected finite errors >= 0"),
    ],
)
def test_errors_that_are_none_are_refused(mse: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^mse: {message}"):
        statistics_of(mse, 1.0)
    with pytest.raises(ValueError, match=f"^mse: {message}"):
        bootstrap(mse, "mean_psnr", 1.0)
    with pytest.raises(ValueError, match=f"^mse_baseline: {message}"):
        paired(torch.ones(2), mse)


@each_seed(1)
def test_the_interval_of_a_mean_is_that_of_normal_theory(seed: int) -> None:
    """PSNRs of log-normal errors are normal: mean +- 1.96 s / sqrt(B)."""
    mse = errors(2000, seed)
    each = psnr(mse, 2.0)
    half = 1.959964 * float(each.std(correction=0)) / math.sqrt(len(mse))
    low, high = interval_of(mse, "mean_psnr")
    assert low == pytest.approx(float(each.mean()) - half, abs=0.08 * half)
    assert high == pytest.approx(float(each.mean()) + half, abs=0.08 * half)


@each_statistic
def test_the_interval_is_that_of_resamples_made_elsewhere(statistic: str) -> None:
    mse = errors(23, 3)
    rows = np.random.default_rng(0).integers(23, size=(3000, 23))
    values = [getattr(brute_force(resample, 2.0), statistic) for resample in mse.numpy()[rows]]
    low, high = interval_of(mse, statistic)
    expected = np.quantile(values, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.08 * (high - low))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_hold_the_truth_as_often_as_they_say(level: float) -> None:
    """400 experiments of 100 samples; the true mean PSNR of the errors is known."""
    truth, runs = 10 * math.log10(4 / 1e-3), 400
    hits = 0
    for run in range(runs):
        low, high = interval_of(errors(100, run), "mean_psnr", level=level, resamples=400)
        hits += low <= truth <= high
    # Three standard errors, and a per cent that 100 samples cost.
    allowed = 3 * math.sqrt(level * (1 - level) / runs) + 0.01
    assert hits / runs == pytest.approx(level, abs=allowed)


@each_statistic
def test_memory_is_bounded_and_changes_nothing(
    statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mse = errors(30, 1)
    whole = interval_of(mse, statistic, resamples=500)
    difference = paired(mse, mse.flip(0), resamples=500)
    sizes = []
    measure = MEASURES[statistic]

    def recorded(resampled: Tensor, data_range: float) -> Tensor:
        sizes.append(resampled.numel())
        return measure(resampled, data_range)

    monkeypatch.setitem(MEASURES, statistic, recorded)
    for chunk, largest in ((1000, 33 * 30), (1, 30)):
        monkeypatch.setattr(statistics, "CHUNK", chunk)
        sizes.clear()
        assert interval_of(mse, statistic, resamples=500) == whole
        assert max(sizes) == largest
        assert sum(sizes) == 500 * 30
        assert paired(mse, mse.flip(0), resamples=500) == difference


def test_the_seed_alone_decides() -> None:
    mse = errors(30, 1)
    first = interval_of(mse, "mean_psnr", seed=5)
    torch.rand(10)
    assert interval_of(mse, "mean_psnr", seed=5) == first
    assert interval_of(mse, "mean_psnr", seed=6) != first


@each_statistic
def test_a_wider_level_holds_a_narrower_one(statistic: str) -> None:
    mse = errors(40, 2)
    bounds = [interval_of(mse, statistic, level=level) for level in (0.99, 0.8, 0.3)]
    value = getattr(statistics_of(mse, 2.0), statistic)
    ordered = [bound[0] for bound in bounds] + [bound[1] for bound in reversed(bounds)]
    assert ordered == sorted(ordered)
    assert bounds[0][0] < value < bounds[0][1]


@each_statistic
def test_one_sample_has_no_interval(statistic: str) -> None:
    assert bootstrap(torch.tensor([0.1]), statistic, 2.0) is None


@each_statistic
@pytest.mark.parametrize("mse", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.1], [0.0, 0.2, 0.1]])
def test_infinite_values_never_make_nan(statistic: str, mse: list[float]) -> None:
    low, high = interval_of(torch.tensor(mse), statistic)
    assert low <= high  # false of NaN
    if not any(mse):
        assert (low, high) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "mode"}, "statistic: expected one of psnr_of_mean, mean_psnr, "),
        ({"level": 1.0}, "level: expected a number between 0 and 1"),
        ({"resamples": 99}, "resamples: expected at least 100"),
        ({"data_range": 0.0}, "data_range: expected a positive number"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"statistic": "mean_psnr", "data_range": 1.0}
    with pytest.raises(ValueError, match=f"^{message}"):
        bootstrap(errors(5, 0), **given | options)


def test_differences_are_those_of_the_statistics() -> None:
    mse, baseline = errors(25, 1), 3 * errors(25, 2)
    found = paired(mse, baseline)
    ours, theirs = statistics_of(mse, 7.0), statistics_of(baseline, 7.0)
    expected = [a - b for a, b in zip(astuple(ours), astuple(theirs), strict=True)]
    assert astuple(found.value) == pytest.approx(expected, rel=1e-9)
    better = [a < b for a, b in zip(mse.tolist(), baseline.tolist(), strict=True)]
    assert found.better == sum(better) / 25
    assert found.interval is not None
    for low, value, high in zip(
        astuple(found.interval[0]), astuple(found.value), astuple(found.interval[1]), strict=True
    ):
        assert low < value < high


def test_both_are_resampled_together() -> None:
    """A constant factor is a constant difference, however much the errors vary."""
    mse = errors(25, 1, sigma=2.0)
    found = paired(mse / 10, mse)
    assert found.interval is not None
    for bound in (found.value, *found.interval):
        assert astuple(bound) == pytest.approx([10.0] * 4, abs=1e-9)
    assert found.better == 1.0


@each_seed(1)
def test_pairing_narrows_the_interval_of_errors_that_go_together(seed: int) -> None:
    mse = errors(64, seed)
    ours = mse * errors(64, seed + 1, sigma=0.03) / 1e-3
    found = paired(ours, mse)
    assert found.interval is not None
    for name in MEASURES:
        low, high = (getattr(bound, name) for bound in found.interval)
        alone = [interval_of(x, name) for x in (ours, mse)]
        unpaired = math.hypot(*(bound[1] - bound[0] for bound in alone))
        assert high - low < unpaired / 3


def test_the_paired_resamples_are_those_of_the_interval() -> None:
    """Against errors that are all one, the difference varies as the statistic itself."""
    mse = errors(30, 4)
    found = paired(mse, torch.ones(30))
    assert found.interval is not None
    for name in MEASURES:
        bounds = [getattr(bound, name) for bound in found.interval]
        assert bounds == pytest.approx(bootstrap(mse, name, 1.0), rel=1e-12)


def test_ties_are_not_better_and_exact_copies_do_not_differ() -> None:
    zeros = torch.zeros(6)
    found = paired(zeros, zeros)
    assert (astuple(found.value), found.better) == ((0.0,) * 4, 0.0)
    assert found.interval is not None
    assert [astuple(bound) for bound in found.interval] == [(0.0,) * 4] * 2
    found = paired(zeros, torch.tensor([0.0, 0, 0, 1, 1, 1]))
    assert found.better == 0.5
    assert found.value.psnr_of_mean == math.inf
    assert found.value.mean_psnr == 0.0  # both infinite
    assert found.interval is not None
    assert not any(map(math.isnan, (*astuple(found.interval[0]), *astuple(found.interval[1]))))


def test_one_sample_has_a_difference_without_interval() -> None:
    found = paired(torch.tensor([0.01]), torch.tensor([0.1]))
    assert astuple(found.value) == pytest.approx([10.0] * 4)
    assert (found.interval, found.better) == (None, 1.0)


def test_pairs_need_the_same_samples() -> None:
    with pytest.raises(ValueError, match=r"^mse_baseline: expected errors of the same 3 .*, got 4"):
        paired(torch.ones(3), torch.ones(4))


def whitened(samples: int, count: int, seed: int) -> Tensor:
    """``[samples, count]`` of mean 0 and covariance 1 exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(dim=0)).Q * math.sqrt(samples - 1)


def random_rotation(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64)).Q


@each_seed(2)
def test_frechet_of_independent_features_adds_up_and_does_not_turn(seed: int) -> None:
    """Diagonal covariances: the sum over features of (m - m')^2 + (s - s')^2."""
    generator = torch.Generator().manual_seed(seed)
    m, s = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    a = m[0] + s[0].abs() * whitened(40, 5, seed)
    b = m[1] + s[1].abs() * whitened(60, 5, seed + 1)
    expected = float(((m[0] - m[1]) ** 2 + (s[0].abs() - s[1].abs()) ** 2).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    turn = random_rotation(5, seed)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-11)
    # By how much it differs is chance; that it does is not.
    assert frechet_distance(a @ turn, b) != pytest.approx(expected, rel=1e-9)


def test_frechet_of_one_feature() -> None:
    a, b = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0], [5.0]])
    expected = (2 - 2) ** 2 + (math.sqrt(2) - math.sqrt(7)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-14)


@each_seed(2)
def test_frechet_is_the_formula_with_a_matrix_root(seed: int) -> None:
    a = whitened(30, 6, seed) @ random_rotation(6, seed + 1) * torch.arange(1, 7) + 0.3
    b = a.sin() + whitened(30, 6, seed + 2)
    root = np.real(sqrtm(np.cov(a.T) @ np.cov(b.T)))
    shift = ((a.mean(dim=0) - b.mean(dim=0)) ** 2).sum()
    expected = float(shift) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_fewer_samples_than_features_is_exact() -> None:
    """Supports that share nothing: only the traces and the means count."""
    a, b = torch.zeros(2, 4, 50, dtype=torch.float64)
    a[:, :3], b[:, 10:13] = whitened(4, 3, 0), 2 * whitened(4, 3, 1)
    b[:, 40] = 7.0
    turn = random_rotation(50, 2)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(3 + 12 + 49, rel=1e-13)


@pytest.mark.parametrize(("samples", "count"), [(2, 1), (5, 64), (64, 5), (30, 30)])
def test_equal_sets_have_no_frechet_distance(samples: int, count: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    a = 1e3 * torch.randn(samples, count, generator=generator, dtype=torch.float64)
    for b in (a, a.flip(0), a + 1e-9):
        assert 0 <= frechet_distance(a, b) < 1e-13 * float(a.var(dim=0).sum() + 1)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 3), "features_b: expected at least 2 samples, got 1"),
        (torch.zeros(4), r"features_b: expected \[B, F\], got \(4,\)"),
        (torch.zeros(4, 2), "features_b: expected 3 features a sample, got 2"),
        (torch.tensor([[0.0] * 3, [0, 0, math.inf]]), "features_b: NaN or inf in sample 1"),
    ],
)
def test_bad_features_are_refused(features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        frechet_distance(torch.ones(4, 3), features)
