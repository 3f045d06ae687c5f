"""What a dynamic programme leaves: costs and parents of every step, and the paths in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.models.base import Kept, There
from oss_ext.models.evaluation import Evaluator, NonFiniteError
from oss_ext.schedule import REDUCTIONS, STARTS
from oss_ext.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Table:
    """The result of a dynamic programme over a trajectory with N steps and B samples.

    Attributes:
        cost: ``[M, N+1, B]``: ``cost[k-1, j, b]`` after exactly k steps at target ``j``.
        parent: int64 ``[M, N+1, B]``, or ``[M, N+1, 1]`` for a joint search; -1 where dead.
        order: of the step from the parent, int64 like ``parent``; 0 where dead. None: Euler.
    """

    cost: Tensor
    parent: Tensor
    order: Tensor | None = None

    @property
    def steps(self) -> int:
        """M, the largest budget."""
        return len(self.cost)

    def kept(self) -> Kept:
        """What ``there`` takes."""
        orders = {} if self.order is None else {"order": self.order}
        return {"cost": self.cost, "parent": self.parent, **orders}

    @classmethod
    def there(cls, kept: There, shape: tuple[int, int, int], joint: bool) -> Table:
        """That which ``kept`` was called of.

        Raises:
            ValueError: it is not of ``shape`` [M at most, N+1, B], or of another kind of search.
        """
        order = torch.stack([*kept["order"]]) if "order" in kept else None
        table = cls(torch.stack([*kept["cost"]]), torch.stack([*kept["parent"]]), order)
        steps, rows, samples = shape
        paths = (table.steps, rows, 1 if joint else samples)
        given = [x for x in (table.parent, order) if x is not None]
        right = table.cost.shape == (table.steps, rows, samples) and table.steps <= steps
        if not right or not all(x.shape == paths and x.dtype == torch.int64 for x in given):
            raise ValueError(f"expected a table of shape {shape}, got {tuple(table.cost.shape)}")
        if not bool(((table.parent >= -1) & (table.parent < rows)).all()):
            raise ValueError(f"expected parents below {rows}")
        return table

    def backtrack(self, steps: int, sample: int = 0) -> tuple[int, ...]:
        """Teacher rows of the best path of exactly ``steps`` steps, descending to 0.

        Args:
            steps: the budget, 1 to M.
            sample: which sample's path; 0 for a joint search.

        Raises:
            ValueError: a budget or a sample that the table does not hold, or one without a path.
        """
        steps = arguments.whole_number("steps", steps, most=self.steps)
        arguments.whole_number("sample", sample, least=0, most=self.parent.shape[2] - 1)
        rows = [0]
        for k in range(steps, 0, -1):
            rows.append(int(self.parent[k - 1, rows[-1], sample]))
            if rows[-1] < 0:
                raise ValueError(f"steps: expected a budget with a finite path, got {steps}")
        return tuple(reversed(rows))

    def paths(self, steps: int) -> Tensor:
        """``backtrack`` of every sample of an instance search, int64 ``[B, steps + 1]``."""
        return cpu.tensor([self.backtrack(steps, b) for b in range(self.parent.shape[2])])

    def orders(self, rows: Sequence[int], sample: int = 0) -> tuple[int, ...]:
        """The orders of the steps along ``rows``, a path that ``backtrack`` gave; () for Euler."""
        if self.order is None:
            return ()
        return tuple(int(self.order[k, row, sample]) for k, row in enumerate(rows[1:]))


FEW = 2
"""Sources of a target that evaluations are spent on, where one operator cannot find the best."""


def evaluations(
    teacher_steps: int,
    steps: int,
    start: str,
    per_step: int = 1,
    evaluated: bool = False,
    clean: bool = True,
) -> int:
    """Model evaluations per sample of a search to ``steps`` steps (teacher not included).

    One for every live source, and ``FEW (per_step - 1)`` at most for every target that a solver
    of ``per_step`` evaluations has between the steps, which is all but the ``clean`` end: a
    teacher's last time, if that is 0. A metric that is ``evaluated`` takes one for the teacher's
    state at every row between the ends, and from the second step on ``FEW`` at most in place of a
    source's one: of the candidates that it was chosen from.
    """
    first = teacher_steps if start == "free" else 1
    targets = sum(teacher_steps - k + (not clean) for k in range(1, steps + 1))
    later = sum(teacher_steps - k + 1 for k in range(2, steps + 1))
    if evaluated:
        first, later = first + teacher_steps - 1, FEW * later
    return first + later + FEW * (per_step - 1) * targets


def first_sources(trajectory: Trajectory, reduce: str, start: str) -> Tensor:
    """Sources of the first step, bool ``[N+1, B]``; ``ValueError`` for an unknown option."""
    arguments.one_of("reduce", reduce, REDUCTIONS)
    arguments.one_of("start", start, STARTS)
    live = cpu.zeros(trajectory.steps + 1, trajectory.samples, dtype=torch.bool)
    live[1 if start == "free" else trajectory.steps :] = True
    return live


def next_sources(parent: Tensor, samples: int) -> Tensor:
    """Sources of the step after ``parent`` ``[..., N+1, B or 1]``: what it reached, but row 0."""
    live = (parent >= 0).expand(*parent.shape[:-1], samples).clone()
    live[..., 0, :] = False
    return live


def check_reached(parent: Tensor, step: int, reduce: str, evaluator: Evaluator) -> None:
    """``NonFiniteError`` unless ``parent`` ``[N+1, B or 1]`` reaches the clean end everywhere."""
    dead = (parent[0] < 0).nonzero()
    if len(dead):
        sample = int(dead[0]) if reduce == "none" else None
        who = "the batch" if sample is None else f"sample {sample}"
        raise NonFiniteError(
            f"step {step} has no finite path to the clean end for {who}: "
            f"{evaluator.describe_bad(sample) or 'every cost overflowed'}"
        )


COEFFICIENT_BYTES = 2**25
"""For the coefficients of a chunk of sources; making them takes a few times as much."""


def source_chunks(rows: int, bytes_per_source: int) -> Iterator[Tensor]:
    """Rows 1 to N, in the chunks of sources that coefficients are made for at once."""
    yield from cpu.arange(1, rows).split(max(1, COEFFICIENT_BYTES // bytes_per_source))


def chunk_bytes(rows: int, bytes_per_source: int) -> int:
    """Of the coefficients of the largest of ``source_chunks``."""
    return len(next(source_chunks(rows, bytes_per_source))) * bytes_per_source


def fill_rows(array: Tensor, rows: Iterable[Tensor]) -> Tensor:
    """``array``, with ``rows`` copied into it one after the other."""
    for row, kept in zip(array, rows, strict=True):
        row.copy_(kept)
    return array


def of_costs(states: Tensor) -> torch.dtype:
    """The type of the costs of ``states``."""
    return torch.promote_types(states.dtype, torch.float32)


def errors(states: Tensor, teacher: Tensor, parent: Tensor) -> Tensor:
    """Mean squared distance of ``states`` to the teacher's rows, ``[N+1, B]`` float64.

    Inf where ``parent`` ``[N+1, B or 1]`` is -1. Row by row: nothing as large as the states.
    """
    found = cpu.full(states.shape[:2], torch.inf, dtype=torch.float64)
    for row, x in enumerate(states):
        error = (x - teacher[row]).double().square().flatten(1).mean(dim=1).cpu()
        found[row] = torch.where(parent[row] >= 0, error, torch.inf)
    return found
