"""Baselines that minimise something: each against its own definition, brute force, or its start."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import oss_ext as oss
from baseline_cases import each_kind, model_on, random_calibration, teacher_on
from driver_cases import (
    SAMPLES,
    each_seed,
    one_thread,  # noqa: F401
    random_network,
    random_times,
    recorded,
)
from oss_ext.baselines import (
    Calibration,
    UnableError,
    dm,
    gits,
    logsnr,
    oss_mean,
    oss_median,
)
from oss_ext.baselines.gits import COEFFICIENTS, cheapest_path, deviation_costs
from oss_ext.baselines.oss import middle
from oss_ext.models.evaluation import Evaluator
from oss_ext.noise import Path, VPPath

dm_module = importlib.import_module(
    "oss_ext.baselines.dm"
)  # the package has a function of its name
bound, minimised = dm_module.bound, dm_module.minimised


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


# --- gits -----------------------------------------------------------------------------------------


def deviation(y: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Distance of ``y`` [B, D] from the line through ``first`` and ``last``."""
    along = (first - last) / (first - last).norm(dim=1, keepdim=True)
    offset = y - last
    return (offset - (offset * along).sum(1, keepdim=True) * along).norm(dim=1)


@each_seed(2)
@pytest.mark.parametrize("last", [1.0, 0.98])
def test_the_costs_of_gits_are_deviations_in_the_papers_coordinates(seed: int, last: float) -> None:
    model = random_network(seed)
    times = last * random_times(seed, 7)
    trajectory = oss.teacher(model, model.noise(3, seed), times=times)
    cost = deviation_costs(trajectory, Evaluator(model, 3))
    # Pure noise is infinitely far in these coordinates: that nearly is enough for a direction.
    scale = (1 - times.clamp(max=1 - 1e-9))[:, None, None]
    y = trajectory.states.flatten(2) / scale
    for i, j in itertools.product(range(8), range(8)):
        if j >= i:
            assert cost[i, j] == math.inf
            continue
        x, sample = trajectory.states[i], torch.arange(3)
        velocity = model(x, times[i].expand(3), sample)
        moved = (x + (times[j] - times[i]) * velocity).flatten(1) / scale[j]
        added = deviation(moved, y[-1], y[0]) - deviation(y[j], y[-1], y[0])
        assert float(cost[i, j]) == pytest.approx(float(added.mean()), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_gits_does_not_take_rounded_states_for_velocities(storage: torch.dtype) -> None:
    model = oss.models.load("analytic")
    kept = [oss.teacher(model, model.noise(8), 200, storage=kind) for kind in (None, storage)]
    exact, rounded = (
        cheapest_path(deviation_costs(each, Evaluator(model, 8)), 10, COEFFICIENTS[0])
        for each in kept
    )
    # The rounding of its states is left, which is least where steps are long.
    assert exact[:8] == pytest.approx(rounded[:8], abs=2)


@each_seed(3)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("coefficient", [0.8, 1.0, 1.15])
def test_gits_takes_the_cheapest_of_all_paths(seed: int, steps: int, coefficient: float) -> None:
    cost = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost[torch.ones(9, 9).triu().bool()] = math.inf

    def total(path: tuple[int, ...]) -> float:
        pairs = itertools.pairwise(path)
        return sum(coefficient**k * float(cost[i, j]) for k, (i, j) in enumerate(pairs))

    inner = itertools.combinations(range(7, 0, -1), steps - 1)
    best = min(((8, *rows, 0) for rows in inner), key=total)
    assert tuple(cheapest_path(cost, steps, coefficient)) == best


def test_gits_takes_the_nearest_of_equals() -> None:
    cost = torch.zeros(7, 7, dtype=torch.float64)
    cost[torch.ones(7, 7).triu().bool()] = math.inf
    assert cheapest_path(cost, 3, COEFFICIENTS[0]) == [6, 5, 4, 0]


@each_seed(2)
def test_gits_knows_the_velocities_of_an_euler_teacher_only(seed: int) -> None:
    calibration = random_calibration(seed)
    trajectory = calibration.trajectory
    other = dataclasses.replace(trajectory, solver="other")
    evaluated = gits(dataclasses.replace(calibration, trajectory=other), 4, [1.15])
    known = gits(calibration, 4, [1.15])
    assert evaluated.indices == known.indices
    assert (known.search_nfe, evaluated.search_nfe) == (trajectory.nfe, 2 * trajectory.nfe)


@each_seed(4)
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun", "dpm-3s"])
def test_gits_takes_the_coefficient_whose_student_ends_nearest(seed: int, solver: str) -> None:
    model, calls = recorded(random_network(seed))
    trajectory = oss.teacher(model, model.noise(SAMPLES, seed), times=random_times(seed, 9))
    calibration = Calibration(model, trajectory, 4, solver=solver)
    nfe = trajectory.nfe
    alone = [gits(calibration, 3, [c]) for c in COEFFICIENTS]
    assert {found.search_nfe for found in alone} == {nfe}
    calls.clear()
    found = gits(calibration, 3)
    assert found.search_nfe == nfe + sum(len(call.t) for call in calls) // SAMPLES
    assert calibration.error(found) == min(map(calibration.error, alone))


@pytest.mark.parametrize("coefficients", [[], [1.0, 0.0], [float("nan")]])
def test_coefficients_of_gits_are_positive(coefficients: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^coefficients: expected"):
        gits(random_calibration(0), 3, coefficients)


# --- oss-median, oss-mean -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([(9, 4, 0)], (9, 4, 0)),
        ([(9, 4, 0), (8, 1, 0)], (8, 2, 0)),  # 8.5 and 2.5
        ([(9, 4, 0), (6, 1, 0), (8, 3, 0)], (7, 2, 0)),  # the medians are 8 and 3
        ([(9, 8, 0), (3, 2, 0), (7, 5, 0), (6, 1, 0)], (6, 3, 0)),  # 6.5 and 3.5
    ],
)
def test_the_published_median(paths: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    assert middle(paths) == expected


@each_seed(20)
def test_the_published_median_of_descending_paths_descends(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = 1 + seed % 6
    draws = (torch.randperm(12, generator=generator)[:9] + 1 for _ in range(count))
    paths = [(*draw.sort(descending=True).values.tolist(), 0) for draw in draws]
    found = middle(paths)
    assert all(high > low for high, low in itertools.pairwise(found))


@each_seed(2)
def test_the_papers_schedules_are_averages_of_the_instance_search(seed: int) -> None:
    calibration = random_calibration(seed)
    result = oss.search(calibration.model, calibration.trajectory, 4, scope="instance",
                        aggregate="mean")  # fmt: skip
    spent = result.nfe + calibration.trajectory.nfe
    for steps in range(1, 4):
        paths = [schedule.indices for schedule in result.schedules(steps)]
        assert oss_median(calibration, steps).indices == middle([p for p in paths if p])
        assert oss_mean(calibration, steps).indices == result.schedule(steps).indices
    assert oss_median(calibration, 4).search_nfe == oss_mean(calibration, 4).search_nfe == spent


@each_seed(2)
@pytest.mark.parametrize("start", ["free", "pinned"])
@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun"])
def test_the_papers_schedules_are_searched_with_the_students_solver(
    solver: str, start: str, seed: int
) -> None:
    calibration = dataclasses.replace(random_calibration(seed), solver=solver, start=start)
    result = oss.search(
        calibration.model, calibration.trajectory, 4, scope="instance", aggregate="mean",
        solver=solver, start=start, fixed_order=True,
    )  # fmt: skip
    found = oss_mean(calibration, 4)
    assert (found.indices, found.solver) == (result.schedule(4).indices, solver)
    assert found.search_nfe == calibration.trajectory.nfe + calibration.table_nfe(4)
    if start == "pinned":
        assert found.times[0] == oss_median(calibration, 4).times[0] == 1.0


def test_all_budgets_share_one_search() -> None:
    calibration = random_calibration(0)
    table = calibration.table
    oss_median(calibration, 2)
    oss_mean(calibration, 4)
    assert calibration.table is table
    with pytest.raises(ValueError, match=r"^steps: expected 1 to 4"):
        oss_mean(calibration, 5)
