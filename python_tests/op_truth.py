"""What the operators must give, in float64, and how close to it a kernel has to be.

The definition is written out once more here, all sources of a target at a time, so that
``oss_ext.ops.reference`` is under test like any other backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from op_cases import Inputs, same_bits

LOG_FLOOR = 2.0**-126


def flat64(x: Tensor) -> Tensor:
    """[rows, B, D] float64."""
    return x.double().reshape(*x.shape[:2], -1)


def rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1).sqrt()


def true_costs(inputs: Inputs) -> Tensor:
    """``dp_cost``: [N+1, N+1, B] (source, target, sample)."""
    z, v, x = (flat64(t) for t in (inputs.state, inputs.velocity, inputs.teacher))
    rows, samples = z.shape[:2]
    cost = z.new_full((rows, rows, samples), torch.inf)
    for j in range(rows - 1):
        step = (inputs.times[j] - inputs.times[j + 1 :])[:, None, None]
        cost[j + 1 :, j] = (z[j + 1 :] + step * v[j + 1 :] - x[j]).square().mean(dim=-1)
    return torch.where(inputs.live[:, None], cost, torch.inf)


def tolerance(cost: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """The error model stated at ``oss_ext.ops.dp_step``; ``size`` is the RMS of all summands.

    Squares underflow in float32 only; there is room for sums of what they lack.
    """
    double = dtype == torch.float64
    relative, unit, lack = (1e-12, 2.0**-53, 0.0) if double else (1e-5, 2.0**-24, 2.0**-120)
    d = 4 * unit * size
    return relative * cost + 2 * cost.sqrt() * d + d.square() + lack


def score(cost: Tensor, reduce: str) -> Tensor:
    """What the argmin compares: [..., B] or, reduced, [..., 1]; inf where it cannot win."""
    if reduce == "none":
        return torch.where(cost.isfinite(), cost, torch.inf)
    value = cost.clamp(min=LOG_FLOOR).log() if reduce == "log_mean" else cost
    counts = cost.isfinite().all(dim=-1, keepdim=True)
    return torch.where(counts, value.mean(dim=-1, keepdim=True), torch.inf)


def assert_within(actual: Tensor, expected: Tensor, slack: Tensor, what: str) -> None:
    error = (actual.double() - expected).abs()
    bad = ~(error <= slack)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        got, want, off, most = (float(x[at]) for x in (actual, expected, error, slack))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} are off; at {at}: "
            f"{got}, expected {want}, off by {off:.3g} > {most:.3g}"
        )


class Truth:
    """What the operators must answer to some inputs."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.cost = true_costs(inputs)
        z, v, x = (flat64(t).abs() for t in (inputs.state, inputs.velocity, inputs.teacher))
        size = rms(z + v)[:, None] + rms(x)  # at least rms(|z| + |v| + |x|), without N x N x D
        self.slack = tolerance(self.cost, size, inputs.state.dtype)

    def check_costs(self, cost: Tensor) -> None:
        """``cost`` is what ``dp_cost`` must return."""
        assert cost.shape == self.cost.shape
        assert cost.dtype == torch.float64
        finite = self.cost.isfinite()
        assert torch.equal(cost.isfinite(), finite)
        assert_within(cost[finite], self.cost[finite], self.slack[finite], "cost")
        below = torch.ones(cost.shape[:2], dtype=torch.bool, device=cost.device).tril(-1)
        counted = below[:, :, None] & self.inputs.live[:, None]
        assert bool((cost[~counted] == torch.inf).all())

    def check_step(self, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """``outputs`` are what ``dp_step`` must return."""
        next_state, cost, parent = outputs
        rows, samples = self.inputs.state.shape[:2]
        double = self.inputs.state.dtype == torch.float64
        assert cost.shape == (rows, samples)
        assert cost.dtype == (torch.float64 if double else torch.float32)
        self.check_parent(parent)
        parents = parent.expand(rows, samples)
        alive = parents >= 0
        picked = parents.clamp(min=0)[None]
        own, slack = self.cost.gather(0, picked)[0], self.slack.gather(0, picked)[0]
        assert_within(cost[alive], own[alive], slack[alive], "cost of the winner")
        assert bool((cost[~alive] == torch.inf).all())
        self.check_advance(next_state, parent)

    def check_parent(self, parent: Tensor) -> None:
        """``parent`` has the least score, or one that the tolerance cannot tell from it."""
        rows, samples = self.inputs.state.shape[:2]
        assert parent.shape == (rows, samples if self.inputs.reduce == "none" else 1)
        assert parent.dtype == torch.int64
        upper = score(self.cost + self.slack, self.inputs.reduce)
        lower = score((self.cost - self.slack).clamp(min=0), self.inputs.reduce)
        has_source = upper.isfinite().any(dim=0)
        assert torch.equal(parent >= 0, has_source)
        assert bool((parent[~has_source] == -1).all())
        winner = lower.gather(0, parent.clamp(min=0)[None])[0]
        wrong = has_source & ~(winner <= upper.amin(dim=0))
        assert not bool(wrong.any()), f"(target, sample) {wrong.nonzero().tolist()}: not the best"

    def check_advance(self, next_state: Tensor, parent: Tensor) -> None:
        """``next_state`` is what ``dp_advance`` must return for these parents."""
        assert next_state.shape == self.inputs.state.shape
        assert next_state.dtype == self.inputs.state.dtype
        z, v, times = flat64(self.inputs.state), flat64(self.inputs.velocity), self.inputs.times
        parents = parent.expand(z.shape[:2])
        alive = parents >= 0
        source = parents.clamp(min=0)
        z, v = (x.gather(0, source[:, :, None].expand_as(x)) for x in (z, v))
        value = z + (times[:, None] - times[source])[:, :, None] * v
        number = torch.finfo(next_state.dtype)
        unit = 2.0**-53 if next_state.dtype == torch.float64 else 2.0**-24
        slack = 4 * unit * (z.abs() + v.abs()) + number.eps / 2 * value.abs()
        slack += number.smallest_normal * number.eps  # where the storage type is subnormal
        got = flat64(next_state)
        assert_within(got[alive], value[alive], slack[alive], "next state")
        assert same_bits(next_state[~alive], self.inputs.state[~alive]), "a dead row changed"
