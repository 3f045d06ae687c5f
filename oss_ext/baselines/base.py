"""What a baseline is: a way to choose steps that others use, made where ours are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from oss_ext import arguments, cpu, dp, solvers
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.noise import VEPath, is_clean, shifted
from oss_ext.sampling import sample
from oss_ext.schedule import STARTS, Schedule
from oss_ext.trajectory import Trajectory

SNAP = 1e-9
"""How near a row of the teacher's grid a time is that row: further apart than roundings are."""

SHIFT = 3.0
"""Of flow times at 1024 x 1024 (Esser et al. 2024, SD3, eq. 23)."""

EDM = VEPath()
"""For its sigma, ``beta / alpha``, of which the highest stands in for pure noise."""


class UnableError(ValueError):
    """A baseline that cannot serve this model or budget; the message says what it needs."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What baselines may use: the model and its teacher on the calibration samples.

    Attributes:
        model: the model the teacher was made with.
        trajectory: the teacher.
        most: the largest budget that will be asked for; what serves all budgets is made once.
        max_batch: rows per model call; None: the number of samples.
        solver: that the students are run with. What searches, does so with it.
        start: ``free`` or ``pinned``: whether what searches or learns may choose the first time.
    """

    model: Model
    trajectory: Trajectory
    most: int
    max_batch: int | None = None
    solver: str = "euler"
    start: str = "free"

    def __post_init__(self) -> None:
        arguments.whole_number("most", self.most, most=self.trajectory.steps)
        arguments.one_of("start", self.start, STARTS)
        solvers.get(self.solver)
        self.trajectory.check_model(self.model)

    @cached_property
    def table(self) -> dp.Table:
        """The dynamic programme of every sample for itself, up to ``most`` steps.

        In the solver's usual orders: an average of paths has none of its own.
        """
        evaluator = Evaluator(self.model, self.trajectory.samples, self.max_batch)
        return dp.run(
            evaluator, self.trajectory, self.most, reduce="none", start=self.start,
            solver=self.solver, fixed_order=True,
        )  # fmt: skip

    def error(self, schedule: Schedule) -> float:
        """Mean squared final error of a student of the calibration samples."""
        noise, final = self.trajectory.noise, self.trajectory.final
        images = sample(self.model, noise, schedule, max_batch=self.max_batch)
        return float((images - final).double().square().mean())

    def table_nfe(self, steps: int) -> int:
        """Evaluations per sample that ``table`` takes for ``steps`` steps, the teacher's not."""
        known, per_step = self.trajectory, solvers.get(self.solver).evaluations
        clean = is_clean(known.times)
        return dp.evaluations(known.steps, steps, self.start, per_step, clean=clean)


@dataclass(frozen=True)
class Baseline:
    """A named way to choose steps.

    Attributes:
        name: in the registry, in schedules (``method``) and in tables.
        title: what it is and where it is from, in one line.
        make: ``make(calibration, steps)``, the schedule. Its ``search_nfe`` is what it costs to
            make this one schedule alone, the teacher's evaluations included if it looks at the
            teacher. Raises ``UnableError``.
        uses_table: whether it reads ``Calibration.table``, which serves all budgets.
    """

    name: str
    title: str
    make: Callable[[Calibration, int], Schedule]
    uses_table: bool = False


def schedule_through(
    trajectory: Trajectory, times: Tensor, method: str, *, pinned: bool = True
) -> Schedule:
    """The schedule that asks the network at ``times`` and ends at the teacher's clean end.

    Times beyond what the teacher spans, or its network knows, are moved to the end of that.

    Args:
        times: ``[steps]`` descending flow times, float64.
        method: the baseline's name.
        pinned: the first is the teacher's last time, whatever it is.

    Raises:
        UnableError: times that repeat or do not descend: there is no room for so many.
    """
    grid, (known, _) = trajectory.times, trajectory.path.span
    times = times.clamp(known, float(grid[-1]))
    if pinned:
        times[0] = grid[-1]
    # A rounding beside a row is that row, at which hosts have timesteps of their own.
    distance, row = (grid - times[:, None]).abs().min(dim=1)
    knots = [*torch.where(distance < SNAP, grid[row], times).tolist(), float(grid[0])]
    if not all(high > low for high, low in pairwise(knots)):
        raise UnableError(
            f"{method}: {len(times)} steps need times that descend, between {knots[-1]:.6g} and "
            f"{float(grid[-1]):.6g}, got {', '.join(f'{t:.6g}' for t in knots)}; ask for fewer"
        )
    return trajectory.schedule_at(knots, method=method)


def even_rows(n: int, steps: int) -> list[int]:
    """``floor(n k / steps + 1/2)`` for ``k = steps .. 0``: rows of a teacher with n steps."""
    return [(2 * n * k + steps) // (2 * steps) for k in range(steps, -1, -1)]


def levels(trajectory: Trajectory) -> tuple[float, float]:
    """The lowest and the highest ``sigma = beta / alpha`` that the teacher asks its network at.

    At equal signal-to-noise ratio, also on flow paths. Pure noise counts as EDM's highest sigma.
    """
    low, high = EDM.sigmas(trajectory.times[[1, -1]]).nan_to_num(posinf=EDM.sigma_max).tolist()
    return low, high


def even_lambdas(trajectory: Trajectory, steps: int) -> Tensor:
    """``lambda = ln(alpha / beta)`` uniform over ``levels``, ``[steps + 1]`` float64 ascending."""
    low, high = levels(trajectory)
    return cpu.linspace(-math.log(high), -math.log(low), steps + 1, dtype=torch.float64)


def shifted_times(trajectory: Trajectory, steps: int, shift: float) -> Tensor:
    """``s u / (1 + (s - 1) u)`` at ``u = k / steps``, ``k = steps .. 1``, ``[steps]`` float64.

    Scaled to what the teacher spans, which may start below pure noise.
    """
    u = cpu.arange(steps, 0, -1, dtype=torch.float64) / steps
    first, last = trajectory.times[[0, -1]]
    return first + (last - first) * shifted(u, shift)


def model_times_at(trajectory: Trajectory, fractions: Tensor) -> Tensor:
    """Flow times by what the network is told: 0 at the clean end, 1 at the teacher's start.

    A clean end that the network does not know counts as the least time that it does (timestep 0,
    the least sigma).
    """
    path = trajectory.path
    ends = trajectory.times[[0, -1]].clamp(min=path.span[0])
    clean, noisy = path.model_times(ends)
    told = clean + fractions * (noisy - clean)
    # Rounding must not leave the network's range.
    return path.flow_times(told.clamp(torch.minimum(clean, noisy), torch.maximum(clean, noisy)))
