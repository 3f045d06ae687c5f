"""Inputs of ``dp_argmin_``, what it must answer in float64, and how the tests call it.

As in ``op_cases`` and ``op_truth``, from which the trajectories come. What no operator may read is
NaN: coefficients of targets not below their source, of terms that an order does not use, rows of
the basis that no candidate needs.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from op_cases import LAYOUTS, Case, Inputs, Runner, draw, euler_terms, poison_memory, same_bits
from op_truth import assert_within, flat64, rms, score, tolerance
from oss_ext import ops

Best = tuple[Tensor, Tensor, Tensor]  # cost, parent, order


@dataclass(frozen=True)
class AffineCase(Case):
    """``Case``, and: how many terms each order uses; whether samples share the coefficients;
    whether candidates and terms are missing here and there. ``velocity_dtype`` is that of all the
    basis but the first."""

    terms: tuple[int, ...] = (2, 3, 4)
    shared: bool = False
    holes: bool = True

    @property
    def work(self) -> int:
        return super().work * sum(self.terms)


def random_affine_case(seed: int) -> AffineCase:
    choose = random.Random(seed)
    dtype, other = choose.choice(
        [(torch.float32, None), (torch.float64, None), (torch.float32, torch.bfloat16),
         (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.float16)]
    )  # fmt: skip
    return AffineCase(
        choose.choice([1, 2, 9, 14]),
        choose.choice([1, 2, 5]),
        choose.choice([(1,), (7,), (255,), (257,), (3, 5, 17), ()]),
        dtype,
        other,
        layout=choose.choice([*LAYOUTS, "mixed"]),
        mask=choose.choice(["none", "rows", "samples"]),
        reduce=choose.choice(["none", "mean", "log_mean"]),
        terms=tuple(choose.choices(range(1, 7), k=choose.randint(1, 4))),
        shared=choose.random() < 0.5,
        holes=choose.random() < 0.7,
    )


@dataclass(frozen=True, eq=False)
class AffineInputs:
    """Arguments of ``dp_argmin_`` for all sources at once, and the live ones [N+1, B]."""

    basis: list[Tensor]
    index: Tensor
    coefficients: Tensor
    terms: list[int]
    target: Tensor
    source_mask: Tensor | None
    reduce: str
    live: Tensor

    def to(self, device: str) -> AffineInputs:
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, basis=[x.to(device) for x in self.basis], **moved)

    @property
    def there(self) -> Tensor:
        """[O, N, N+1, B]: which candidates there are; source c + 1 is at c."""
        rows = torch.arange(len(self.target), device=self.target.device)
        below = rows < rows[1:, None]
        return ~self.coefficients[:, 0].isnan() & below[:, :, None] & self.live[1:, None]


def draw_affine(case: AffineCase, seed: int) -> AffineInputs:
    inputs = draw(case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows, samples = inputs.state.shape[:2]
    terms = max(case.terms)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    euler = euler_terms(inputs)
    index = torch.randint(rows, (terms, rows - 1, samples), generator=generator)
    index[:2] = euler["index"][:terms]
    coefficients = 0.02 * rand(len(case.terms), terms, rows - 1, rows, samples) - 0.01
    coefficients[:, :2] += euler["coefficients"][:, :terms]
    if case.shared:
        coefficients = coefficients[..., :1]
    if case.holes:
        coefficients[:, 0][rand(*coefficients[:, 0].shape) < 0.2] = torch.nan
        short = rand(rows - 1, samples) < 0.3  # no history: orders of one or two terms at most
        if case.shared:
            short = short[:, :1].expand(-1, samples)
        for order, count in enumerate(case.terms):
            if count > 2:
                missing = short[:, None, : coefficients.shape[-1]]
                coefficients[order, 0].masked_fill_(missing, torch.nan)
        index[2:].masked_fill_(short, -1)
    source = torch.arange(1, rows)
    coefficients.masked_fill_((torch.arange(rows) >= source[:, None])[..., None], torch.nan)
    for order, count in enumerate(case.terms):
        coefficients[order, count:] = torch.nan

    given = AffineInputs(
        basis=[inputs.state, inputs.velocity][:terms],
        index=index,
        coefficients=coefficients,
        terms=list(case.terms),
        target=inputs.teacher,
        source_mask=inputs.source_mask,
        reduce=case.reduce,
        live=inputs.live,
    )
    for r in range(2, terms):  # more rows than there are sources; NaN where none of them looks
        pool = torch.full((rows + r, *inputs.state.shape[1:]), torch.nan, dtype=torch.float64)
        uses = given.there[[n > r for n in case.terms]].any(dim=2).any(dim=0)
        for c, b in uses.nonzero().tolist():
            pool[index[r, c, b], b] = 2 * rand(*case.dims) - 1
        given.basis.append(pool.to(case.velocity_dtype or case.dtype))
    return given


def arrange_affine(inputs: AffineInputs, layout: str) -> AffineInputs:
    if layout == "contiguous":
        return inputs
    names = list(LAYOUTS) if layout == "mixed" else [layout]
    spread = LAYOUTS["every_other"]
    return dataclasses.replace(
        inputs,
        basis=[LAYOUTS[names[r % len(names)]](x) for r, x in enumerate(inputs.basis)],
        target=LAYOUTS[names[-1]](inputs.target),
        index=spread(inputs.index),
        coefficients=LAYOUTS["reversed_axes"](inputs.coefficients),
        source_mask=None if inputs.source_mask is None else spread(inputs.source_mask),
    )


def new_best(inputs: AffineInputs) -> Best:
    rows, samples = inputs.target.shape[:2]
    cost = inputs.coefficients.new_full((rows, samples), torch.inf)
    columns = samples if inputs.reduce == "none" else 1
    parent = torch.full_like(cost[:, :columns], -1, dtype=torch.int64)
    return cost, parent, parent.clone()


@dataclass(frozen=True)
class AffineRunner:
    """``Runner`` for ``dp_argmin_`` and ``dp_combine``."""

    runner: Runner

    def draw(self, case: AffineCase, seed: int) -> AffineInputs:
        case = self.runner.fitting(case)
        return arrange_affine(draw_affine(case, seed).to(self.runner.device), case.layout)

    def argmin(self, inputs: AffineInputs, chunk: int | None = None) -> Best:
        """Over all sources, ``chunk`` at a time."""
        best = new_best(inputs)
        sources = inputs.index.shape[1]
        for c in range(0, sources, chunk or sources):
            part = slice(c, c + (chunk or sources))
            ops.dp_argmin_(
                inputs.basis, inputs.index[:, part], inputs.coefficients[:, :, part],
                inputs.terms, c + 1, inputs.target, *best, source_mask=inputs.source_mask,
                reduce=inputs.reduce, backend=self.runner.name,
            )  # fmt: skip
        return best

    def combine(self, inputs: AffineInputs, index: Tensor, coefficients: Tensor) -> Tensor:
        shape = (index.shape[1], *inputs.target.shape[1:])
        like = inputs.target.new_empty(shape)
        poison_memory(Inputs(like, like, like, coefficients, None, "none"))
        return ops.dp_combine(inputs.basis, index, coefficients, backend=self.runner.name)


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(["cost", "parent", "order"], one, other, strict=True):
        assert same_bits(a, b), name


class AffineTruth:
    """What ``dp_argmin_`` must answer: costs [O, N+1, N+1, B] (order, source, target, sample)."""

    def __init__(self, inputs: AffineInputs) -> None:
        self.inputs = inputs
        x = flat64(inputs.target)
        rows, samples = x.shape[:2]
        factors = inputs.coefficients.expand(*inputs.coefficients.shape[:4], samples)
        self.cost = x.new_full((len(inputs.terms), rows, rows, samples), torch.inf)
        self.slack = torch.zeros_like(self.cost)
        basis = [flat64(b) for b in inputs.basis]
        sample = torch.arange(samples, device=x.device)
        for o, c in inputs.there.any(dim=(2, 3)).nonzero().tolist():
            there = inputs.there[o, c]
            value, size = torch.zeros_like(x), x.abs()
            for r in range(inputs.terms[o]):
                row = basis[r][inputs.index[r, c].clamp(min=0), sample]
                term = factors[o, r, c][:, :, None] * row
                value, size = value + term, size + term.abs()
            cost = (value - x).square().mean(dim=-1)
            self.cost[o, c + 1] = torch.where(there, cost, torch.inf)
            self.slack[o, c + 1] = tolerance(cost, rms(size), inputs.target.dtype)

    def check(self, best: Best) -> None:
        """The winner's own cost, and a score that is the least or cannot be told from it."""
        cost, parent, order = best
        rows, samples = self.inputs.target.shape[:2]
        reduce = self.inputs.reduce
        assert parent.shape == order.shape == (rows, samples if reduce == "none" else 1)
        assert parent.dtype == order.dtype == torch.int64
        upper = score((self.cost + self.slack).flatten(0, 1), reduce)
        lower = score((self.cost - self.slack).clamp(min=0).flatten(0, 1), reduce)
        has_source = upper.isfinite().any(dim=0)
        assert torch.equal(parent >= 0, has_source)
        assert torch.equal(order >= 0, has_source)
        assert bool((parent[~has_source] == -1).all() and (order[~has_source] == -1).all())
        picked = torch.where(has_source, order * rows + parent, 0)
        wrong = has_source & ~(lower.gather(0, picked[None])[0] <= upper.amin(dim=0))
        assert not bool(wrong.any()), f"(target, sample) {wrong.nonzero().tolist()}: not the best"
        picked = picked.expand(rows, samples)[None]
        own, slack = (x.flatten(0, 1).gather(0, picked)[0] for x in (self.cost, self.slack))
        alive = has_source.expand(rows, samples)
        assert_within(cost[alive], own[alive], slack[alive], "cost of the winner")
        assert bool((cost[~alive] == torch.inf).all())


def chosen(inputs: AffineInputs, best: Best) -> tuple[Tensor, Tensor]:
    """``index`` and ``coefficients`` [R, N+1, B] of the winners, for ``dp_combine``."""
    rows, samples = inputs.target.shape[:2]
    index = inputs.index.new_full((len(inputs.basis), rows, samples), -1)
    coefficients = inputs.coefficients.new_full(index.shape, torch.nan)
    parent, order = (x.expand(rows, samples).tolist() for x in best[1:])
    factors = inputs.coefficients.expand(*inputs.coefficients.shape[:4], samples)
    for j in range(rows):
        for b in range(samples):
            if parent[j][b] >= 0:
                used, c, o = slice(inputs.terms[order[j][b]]), parent[j][b] - 1, order[j][b]
                index[used, j, b] = inputs.index[used, c, b]
                coefficients[used, j, b] = factors[o, used, c, j, b]
    return index, coefficients
