"""What a baseline is: a way to choose steps that others use, made where ours are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from oss_ext import arguments, dp
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.schedule import Schedule
from oss_ext.teacher import Trajectory


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
    """

    model: Model
    trajectory: Trajectory
    most: int
    max_batch: int | None = None

    def __post_init__(self) -> None:
        arguments.whole_number("most", self.most, most=self.trajectory.steps)
        self.trajectory.check_model(self.model)

    @cached_property
    def table(self) -> dp.Table:
        """The dynamic programme of every sample for itself, up to ``most`` steps."""
        evaluator = Evaluator(self.model, self.trajectory.samples, self.max_batch)
        return dp.run(evaluator, self.trajectory, self.most, reduce="none")


@dataclass(frozen=True)
class Baseline:
    """A named way to choose steps.

    Attributes:
        name: in the registry, in schedules (``method``) and in tables.
        title: what it is and where it is from, in one line.
        make: ``make(calibration, steps)``, the schedule. Its ``search_nfe`` is what it costs to
            make this one schedule alone, the teacher's evaluations included if it looks at the
            teacher. Raises ``UnableError``.
    """

    name: str
    title: str
    make: Callable[[Calibration, int], Schedule]
