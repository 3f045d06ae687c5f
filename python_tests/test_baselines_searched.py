"""Baselines that minimise something: each against its own definition, brute force, or its start."""

from __future__ import annotations

import importlib
import itertools
import math
import sys

import numpy as np
import pytest
import torch

import oss_ext as oss
from baseline_cases import each_kind, model_on, teacher_on
from driver_cases import (
    one_thread,  # noqa: F401
)
from oss_ext.baselines import (
    Calibration,
    UnableError,
    dm,
    logsnr,
)
from oss_ext.noise import Path, VPPath

dm_module = importlib.import_module(
    "oss_ext.baselines.dm"
)  # the package has a function of its name
bound, minimised = dm_module.bound, dm_module.minimised


def error_of(calibration: Calibration, schedule: oss.Schedule) -> float:
    images = oss.sample(calibration.model, calibration.trajectory.noise, schedule)
    return float((images - calibration.trajectory.final).square().mean())


# --- dm -------------------------------------------------------------------------------------------


def integrated(lambdas: np.ndarray, order: int, power: float) -> float:
    """The bound by a fine midpoint rule, node by node as the paper writes it."""
    steps, total = len(lambdas) - 1, 0.0
    alpha = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    error = np.sqrt(1 - alpha**2) ** power / alpha
    for n in range(steps):
        nodes = range(n, n - min(order, n + 1, steps - n), -1)
        edges = np.linspace(lambdas[n], lambdas[n + 1], 4001)
        at, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        square = 0.0
        for j in nodes:
            basis = np.ones_like(at)
            for m in set(nodes) - {j}:
                basis *= (at - lambdas[m]) / (lambdas[j] - lambdas[m])
            square += (np.sum(np.exp(at) * basis) * width * error[j]) ** 2
        total += math.sqrt(square)
    return total


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_bound_is_the_papers_integrals(steps: int, order: int, power: float) -> None:
    lambdas = np.linspace(-3, 2.5, steps + 1) + 0.1 * np.sin(np.arange(steps + 1))
    expected = integrated(lambdas, order, power)
    assert bound(lambdas, order, power) == pytest.approx(expected, rel=1e-5)


@each_kind
def test_dm_lowers_its_bound_within_its_constraints(path: Path) -> None:
    calibration = Calibration(model_on(path), teacher_on(path), 5)
    found = dm(calibration, 5)
    times = torch.tensor([*found.times[:-1], logsnr(calibration.trajectory, 5).times[-2]])
    assert bool((times.logit().diff()[:-1] < 0).all())
    start = np.linspace(-3, 4, 6)
    lower = minimised(start, 3, 1.0)
    assert bound(lower, 3, 1.0) < 0.9 * bound(start, 3, 1.0)
    assert (lower[0], lower[-1]) == (-3, 4)
    assert np.diff(lower).min() > 0


def test_the_bound_of_dm_has_no_neighbour_below() -> None:
    found = minimised(np.linspace(-4, 3.5, 6), 3, 2.0)
    least = bound(found, 3, 2.0)
    for k, step in itertools.product(range(1, 5), (-0.05, 0.05)):
        moved = found.copy()
        moved[k] += step
        assert bound(moved, 3, 2.0) > least


def test_dm_of_first_order_without_a_preference_is_uniform_in_log_snr() -> None:
    """``sum_n (e^h_n - 1)`` is convex: equal steps are its minimum."""
    calibration = Calibration(model_on(VPPath()), teacher_on(VPPath()), 4)
    expected = logsnr(calibration.trajectory, 4).times
    assert dm(calibration, 4, order=1, power=1.0).times == pytest.approx(expected, abs=1e-6)


def test_dm_weighs_latents_as_its_paper_does() -> None:
    model = model_on(VPPath())  # without a data range
    calibration = Calibration(model, teacher_on(VPPath()), 4)
    assert dm(calibration, 4) == dm(calibration, 4, power=2.0)
    model.data_range = 2.0
    assert dm(calibration, 4) == dm(calibration, 4, power=1.0)
    assert dm(calibration, 4) != dm(calibration, 4, power=2.0)


def test_dm_says_that_it_needs_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(model_on(VPPath()), teacher_on(VPPath()), 4)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UnableError, match="needs SciPy: pip install scipy"):
        dm(calibration, 4)
