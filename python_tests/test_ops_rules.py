"""Who wins and who is left out: ties, NaN and inf, dead rows, reductions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from op_cases import REDUCTIONS, Case, Inputs, Runner, same_bits
from op_truth import Truth
from oss_ext.ops import native


def with_twin_sources(inputs: Inputs, seed: int) -> Inputs:
    """Sources 1 and 2, 3 and 4, ... that reach the same point from every target's view."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(len(inputs.state) // 2 + 1, *inputs.state.shape[1:], generator=generator)
    twins = points.repeat_interleave(2, dim=0)[1 : len(inputs.state) + 1]
    return dataclasses.replace(
        inputs,
        state=twins.to(inputs.state),
        velocity=torch.zeros_like(inputs.velocity),
        teacher=twins.flip(0).to(inputs.state),
    )


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_larger_of_equal_sources_wins(backend: Runner, reduce: str, seed: int) -> None:
    inputs = with_twin_sources(backend.draw(Case(steps=32, reduce=reduce), seed), seed)
    _, _, parent = outputs = backend.dp_step(inputs)
    Truth(inputs).check_step(outputs)
    assert bool((parent[:-1] % 2 == 0).all()), "a source of odd index has an equal above it"


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_last_source_wins_where_all_are_equal(backend: Runner, reduce: str) -> None:
    inputs = backend.draw(Case(steps=32, dims=(1000,), reduce=reduce), seed=0)
    inputs.state[:], inputs.velocity[:] = inputs.state[0], 0
    parent = backend.dp_step(inputs)[2]
    assert bool((parent[:-1] == len(inputs.state) - 1).all())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["state", "velocity", "teacher"])
def test_nan_and_inf_never_win(
    backend: Runner, where: str, value: float, reduce: str, seed: int
) -> None:
    if backend.interpreted and (value == -math.inf or reduce == "mean"):
        pytest.skip("takes too long to be done for every combination")
    inputs = backend.draw(Case(steps=12, reduce=reduce), seed)
    spoilt = getattr(inputs, where)
    spoilt[7, 1, -1] = value  # where an unrolled loop leaves its remainder
    spoilt[10, 2, 5] = value
    truth = Truth(inputs)
    truth.check_step(backend.dp_step(inputs))
    truth.check_costs(backend.dp_cost(inputs))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_target_without_sources_keeps_its_state(backend: Runner, reduce: str, seed: int) -> None:
    inputs = backend.draw(Case(steps=12, reduce=reduce), seed)
    live = torch.arange(13, device=backend.device) < 8
    inputs = dataclasses.replace(inputs, source_mask=live)
    next_state, cost, parent = backend.dp_step(inputs)
    assert bool((parent[:7] > 0).all())
    assert bool((parent[7:] == -1).all())
    assert bool((cost[7:] == torch.inf).all())
    assert same_bits(next_state[7:], inputs.state[7:])


def test_without_a_reduction_samples_have_their_own_sources(backend: Runner, seed: int) -> None:
    inputs = backend.draw(Case(steps=6, samples=2), seed)
    mask = torch.ones(7, 2, dtype=torch.bool, device=backend.device)
    mask[:, 1] = torch.arange(7) == 3
    parent = backend.dp_step(dataclasses.replace(inputs, source_mask=mask))[2]
    assert parent[:, 1].tolist() == [3, 3, 3, -1, -1, -1, -1]
    assert bool((parent[:6, 0] > 0).all())


@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
def test_with_a_reduction_a_source_must_serve_every_sample(
    backend: Runner, reduce: str, seed: int
) -> None:
    inputs = backend.draw(Case(steps=6, samples=3, reduce=reduce), seed)
    mask = torch.ones(7, 3, dtype=torch.bool, device=backend.device)
    mask[6, 0] = mask[4, 2] = False
    inputs.state[5, 1, 0] = torch.nan
    inputs = dataclasses.replace(inputs, source_mask=mask)
    _, _, parent = outputs = backend.dp_step(inputs)
    Truth(inputs).check_step(outputs)
    assert parent.tolist()[3:] == [[-1]] * 4
    assert set(parent[:3].flatten().tolist()) <= {1, 2, 3}


def test_reductions_disagree_where_they_should(backend: Runner) -> None:
    """Source 1 is fair in both samples, source 2 perfect in one and poor in the other."""
    cost = torch.full((3, 3, 2), torch.inf, dtype=torch.float64, device=backend.device)
    cost[1, 0] = torch.tensor([1.0, 1.0])
    cost[2, 0] = torch.tensor([2.0**-20, 4.0])
    assert backend.dp_select(cost, "none")[1][0].tolist() == [2, 1]
    assert backend.dp_select(cost, "mean")[1][0].tolist() == [1]
    assert backend.dp_select(cost, "log_mean")[1][0].tolist() == [2]


def test_log_mean_takes_costs_below_its_floor_as_equal(backend: Runner) -> None:
    cost = torch.full((4, 4, 2), torch.inf, dtype=torch.float64, device=backend.device)
    cost[1, 0], cost[2, 0], cost[3, 0] = 0, 2.0**-130, 2.0**-125
    best, parent = backend.dp_select(cost, "log_mean")
    assert parent[0].tolist() == [2]
    assert best[0].tolist() == [2.0**-130] * 2


def slow_select(cost: Tensor, reduce: str, target: int) -> list[int]:
    """The argmin, in as many words."""
    rows, _, samples = cost.shape
    groups = [[b] for b in range(samples)] if reduce == "none" else [list(range(samples))]
    parents = []
    for group in groups:
        best, parent = math.inf, -1
        for i in range(target + 1, rows):
            costs = [float(cost[i, target, b]) for b in group]
            if not all(map(math.isfinite, costs)):
                continue
            if reduce == "log_mean":
                costs = [math.log(max(c, 2.0**-126)) for c in costs]
            score = sum(costs) / len(costs)
            if score <= best:
                best, parent = score, i
        parents.append(parent)
    return parents


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("samples", [1, 3])
def test_select_is_the_argmin_with_ties_to_the_larger(
    backend: Runner, samples: int, reduce: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    different = torch.rand(6, samples, generator=generator, dtype=torch.float64)
    # Equal costs in all samples, so that no way to add them up can break a tie.
    which = torch.randint(6, (20, 20), generator=generator)
    cost = different[which].to(backend.device)
    cost[3, :, 0], cost[5, :, -1], cost[4, 2] = torch.nan, torch.inf, -torch.inf
    cost[:, 11] = torch.nan
    best, parent = backend.dp_select(cost, reduce)
    assert parent.tolist() == [slow_select(cost, reduce, j) for j in range(20)]
    for j, sources in enumerate(parent.expand(20, samples).tolist()):
        expected = [float(cost[i, j, b]) if i >= 0 else math.inf for b, i in enumerate(sources)]
        assert best[j].tolist() == expected


def test_a_step_along_the_teacher_itself_costs_nothing(backend: Runner, seed: int) -> None:
    """Euler's own path has cost exactly 0 in float32, so a search finds its teacher again."""
    inputs = backend.draw(Case(steps=40, dims=(3, 20, 20)), seed)
    path = inputs.teacher.clone()
    for i in range(len(path) - 1, 0, -1):
        step = float(inputs.times[i - 1] - inputs.times[i])
        path[i - 1] = torch.add(path[i], inputs.velocity[i], alpha=step)
    inputs = dataclasses.replace(inputs, state=path, teacher=path)
    own = backend.dp_cost(inputs).diagonal(offset=-1)  # of each target from the row above it
    # float64 sees the rounding of the path, and so do kernels that round the product, unlike torch.
    plain = backend.device == "cpu" and native.build_info().get("cpu_capability") == "plain"
    exact = not (plain or backend.interpreted or backend.name == "reference")
    assert float(own.max()) <= (0 if exact else 1e-13)
