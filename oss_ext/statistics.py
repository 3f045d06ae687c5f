"""What per-sample errors say of a schedule: PSNRs, their intervals, paired differences, Frechet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oss_ext import arguments, cpu

LEVEL = 0.95
RESAMPLES = 10_000
CHUNK = (
    2**20
)  # resampled errors held at a time: 8 MiB, whatever the numbers of samples and resamples

Interval = tuple[float, float]


def psnr(mse: Tensor, data_range: float) -> Tensor:
    """``10 log10(R^2 / mse)`` of every element, dB; infinite for an error of zero.

    Raises:
        ValueError: ``data_range`` R is not positive, as that of a constant image.
    """
    data_range = arguments.number("data_range", data_range, positive=True)
    return 20 * math.log10(data_range) - 10 * mse.log10()


@dataclass(frozen=True)
class Statistics:
    """Errors of B samples in dB; or differences of such, or bounds of either.

    Attributes:
        psnr_of_mean: PSNR of the mean error, ruled by the worst samples.
        mean_psnr: mean over samples of each one's PSNR.
        median_psnr: their median; of an even number the mean of the middle two.
        worst_decile: PSNR of the mean error of the worst ``ceil(B / 10)`` samples.
    """

    psnr_of_mean: float
    mean_psnr: float
    median_psnr: float
    worst_decile: float


def worst_count(samples: int) -> int:
    """How many samples the worst decile of ``samples`` is."""
    return math.ceil(samples / 10)


def _ascending(values: Tensor) -> Tensor:
    # numpy's sort works on vectors, torch's on one element at a time: most of a bootstrap's time.
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def _worst_decile(mse: Tensor, data_range: float) -> Tensor:
    worst = _ascending(mse)[..., -worst_count(mse.shape[-1]) :]
    return psnr(worst.mean(dim=-1), data_range)


def _median_psnr(mse: Tensor, data_range: float) -> Tensor:
    samples = mse.shape[-1]
    # torch's own median is the lower of the middle two.
    middle = _ascending(mse)[..., (samples - 1) // 2 : samples // 2 + 1]
    return psnr(middle, data_range).mean(dim=-1)


# The definition of each statistic, [..., B] -> [...], for the samples and for any resamples.
MEASURES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "psnr_of_mean": lambda mse, data_range: psnr(mse.mean(dim=-1), data_range),
    "mean_psnr": lambda mse, data_range: psnr(mse, data_range).mean(dim=-1),
    "median_psnr": _median_psnr,
    "worst_decile": _worst_decile,
}


def statistics_of(mse: Tensor, data_range: float) -> Statistics:
    """All statistics of the errors ``[B]``, computed in float64.

    Raises:
        ValueError: errors that are none (NaN, infinite, negative, not a vector), or a
            ``data_range`` that is not positive.
    """
    mse = _errors("mse", mse)
    return Statistics(**{name: float(f(mse, data_range)) for name, f in MEASURES.items()})


def bootstrap(
    mse: Tensor,
    statistic: str,
    data_range: float,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Percentile bootstrap interval of a statistic over the samples (Efron 1979), in dB.

    The samples are drawn with replacement, B at a time; the bounds are those resamples' values
    that leave ``(1 - level) / 2`` on either side, rounded outwards. Of few samples and of errors
    with a long tail the interval is too narrow: of 64 log-normal errors (sigma 1) the 95 % interval
    holds the true mean or median PSNR 19 times in 20, but the PSNR of the mean 18 times and the
    worst decile 15 times. BCa intervals do little better there (18 and 16).

    Args:
        mse: ``[B]``.
        statistic: a field of ``Statistics``.
        data_range: R of the PSNR.
        level: share of such intervals that should hold the true value.
        resamples: how many, 100 or more.
        seed: of the resamples; the same for equal B draws the same samples.

    Returns:
        ``(low, high)``; None for a single sample, which says nothing of its spread.

    Raises:
        ValueError: an unknown statistic, or as ``statistics_of``.
    """
    arguments.one_of("statistic", statistic, MEASURES)
    mse = _errors("mse", mse)
    if len(mse) == 1:
        return None
    measure = MEASURES[statistic]
    draws = [measure(mse[rows], data_range) for rows in _resamples(len(mse), resamples, seed)]
    return _interval(torch.cat(draws), level)


@dataclass(frozen=True)
class Difference:
    """How much better one schedule is than another on the same samples.

    Attributes:
        value: in every statistic, dB; positive is better. Two infinite PSNRs differ by 0.
        interval: lower and upper bound of each; None for a single sample.
        better: share of the samples with a smaller error than the baseline's; ties are not.
    """

    value: Statistics
    interval: tuple[Statistics, Statistics] | None
    better: float


def paired(
    mse: Tensor,
    mse_baseline: Tensor,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference to a baseline's errors on the same samples, in the same order.

    Both are resampled together, so that what makes a sample hard for either cancels; so does the
    data range, hence it is not asked for. Options as ``bootstrap`` has them.

    Raises:
        ValueError: errors of different lengths, or as ``statistics_of``.
    """
    mse, baseline = _errors("mse", mse), _errors("mse_baseline", mse_baseline)
    if len(mse) != len(baseline):
        raise ValueError(
            f"mse_baseline: expected errors of the same {len(mse)} samples, got {len(baseline)}"
        )
    both = torch.stack([mse, baseline])
    value = Statistics(**{name: float(_gain(name, both)) for name in MEASURES})
    interval = None
    if len(mse) > 1:
        draws: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
        for rows in _resamples(len(mse), resamples, seed):
            for name, values in draws.items():
                values.append(_gain(name, both[:, rows]))
        bounds = {name: _interval(torch.cat(values), level) for name, values in draws.items()}
        low, high = (Statistics(**{n: bound[i] for n, bound in bounds.items()}) for i in (0, 1))
        interval = low, high
    return Difference(value, interval, float((mse < baseline).double().mean()))


def _gain(statistic: str, both: Tensor) -> Tensor:
    """``[2, ..., B]`` errors -> ``[...]`` dB that the first is better."""
    ours, theirs = MEASURES[statistic](both, 1.0)
    # Exact copies on both sides: inf - inf would be NaN.
    return torch.where(ours == theirs, 0.0, ours - theirs)


def _resamples(samples: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Rows of samples drawn with replacement, ``[chunk, B]`` int64, ``resamples`` in all."""
    resamples = arguments.whole_number("resamples", resamples, least=100)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, CHUNK // samples)
    for first in range(0, resamples, chunk):
        shape = (min(chunk, resamples - first), samples)
        yield cpu.randint(samples, shape, generator=generator)


def _interval(values: Tensor, level: float) -> Interval:
    """The middle ``level`` of the values, by order statistics: interpolating makes inf NaN."""
    tail = (1 - arguments.between("level", level, 0, 1)) / 2 * (len(values) - 1)
    ordered, low = values.sort().values, math.floor(tail)
    return float(ordered[low]), float(ordered[-1 - low])


def _errors(name: str, mse: Tensor) -> Tensor:
    """``mse`` in float64 on the CPU; ``ValueError`` unless it is ``[B]``, finite and >= 0."""
    if mse.ndim != 1 or not len(mse):
        raise ValueError(f"{name}: expected errors [B] with B >= 1, got {tuple(mse.shape)}")
    mse = mse.detach().cpu().double()
    if not (mse.isfinite() & (mse >= 0)).all():
        raise ValueError(f"{name}: expected finite errors >= 0, got {mse.tolist()!s:.100}")
    return mse


def check_features(name: str, features: Tensor) -> Tensor:
    """``features`` in float64 on the CPU; ``ValueError`` unless ``[B >= 2, F >= 1]`` and finite."""
    if features.ndim != 2 or not features.shape[-1]:
        raise ValueError(f"{name}: expected [B, F], got {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"{name}: expected at least 2 samples, got {len(features)}")
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{name}: NaN or inf in sample {bad}")
    return features


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians with the features' means and covariances.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (Dowson and Landau 1982; FID is this of
    Inception features), covariances over B - 1, in float64. With ``C = X^T X`` the last trace is
    the sum of the singular values of ``X_a X_b^T``: no root is taken of a rounded zero, so that
    covariances of low rank are as exact as others. Biased upwards for few samples: compare values
    of equal B only.

    Args:
        features_a, features_b: ``[B, F]``; B may differ.

    Raises:
        ValueError: fewer than 2 samples, features of another length, NaN or inf.
    """
    a, b = check_features("features_a", features_a), check_features("features_b", features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_b: expected {a.shape[1]} features a sample, got {b.shape[1]}")
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    a, b = _root_of_covariance(a), _root_of_covariance(b)
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(shift + a.square().sum() + b.square().sum() - 2 * shared))


def _root_of_covariance(features: Tensor) -> Tensor:
    """X ``[min(B, F), F]`` with ``X^T X`` the covariance of the features."""
    centred = (features - features.mean(dim=0)) / math.sqrt(len(features) - 1)
    return torch.linalg.qr(centred, mode="r").R
