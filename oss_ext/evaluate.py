"""Judge schedules on samples the search has not seen: distance to the teacher's own result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from oss_ext import arguments
from oss_ext.models.base import Model
from oss_ext.sampling import sample
from oss_ext.schedule import Schedule
from oss_ext.teacher import Trajectory


def psnr(mse: float, data_range: float) -> float:
    """``10 log10(R^2 / mse)`` in dB; infinite for an error of zero.

    Raises:
        ValueError: ``data_range`` R is not positive, as that of a constant image.
    """
    data_range = arguments.number("data_range", data_range, positive=True)
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)


@dataclass(frozen=True, eq=False)
class Score:
    """How near a schedule comes to the teacher.

    Attributes:
        name: what the schedule is called in the comparison.
        steps: model evaluations per sample of the student.
        mse: ``[B]`` float64, mean squared error per held-out sample.
        data_range: R of the PSNR.
        images: the student's samples ``[B, *dims]``.
    """

    name: str
    steps: int
    mse: Tensor
    data_range: float
    images: Tensor

    @property
    def psnr_of_mean(self) -> float:
        """PSNR of the mean error, dB: ruled by the worst samples."""
        return psnr(float(self.mse.mean()), self.data_range)

    @property
    def mean_psnr(self) -> float:
        """Mean over samples of each one's PSNR, dB."""
        values = [psnr(mse, self.data_range) for mse in self.mse.tolist()]
        return sum(values) / len(values)


def compare(
    model: Model,
    held_out: Trajectory,
    schedules: Mapping[str, Schedule],
    *,
    max_batch: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """Run every schedule from the held-out trajectory's noise and measure the final error.

    Args:
        model: the model that made ``held_out``.
        held_out: a teacher trajectory on samples that no search has used.
        schedules: schedules by name; the scores come in the same order.

    Raises:
        ValueError: a model other than that of ``held_out``.
    """
    held_out.check_model(model)
    scores = []
    for name, schedule in schedules.items():
        images = sample(model, held_out.noise, schedule, max_batch=max_batch, progress=progress)
        mse = (images - held_out.final).double().square().flatten(1).mean(dim=1).cpu()
        scores.append(Score(name, schedule.steps, mse, held_out.data_range, images))
    return scores


def score_table(scores: list[Score]) -> str:
    """The comparison as text: a line per schedule, dB against the teacher."""
    if not scores:
        raise ValueError("scores: expected at least one, got none")
    width = max(len("schedule"), *(len(score.name) for score in scores))
    lines = [f"{'schedule':{width}}  steps  PSNR of mean error  mean PSNR"]
    lines += [
        f"{s.name:{width}}  {s.steps:5d}  {s.psnr_of_mean:15.2f} dB  {s.mean_psnr:6.2f} dB"
        for s in scores
    ]
    held_out, data_range = len(scores[0].mse), scores[0].data_range
    lines.append(f"{held_out} held-out samples; PSNR with data range {data_range:.4g}")
    return "\n".join(lines)
