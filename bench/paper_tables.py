"""The paper's tables 2, 3, 4, 6 and figure 6, in shape, on a network that is here.

    python bench/paper_tables.py                              # all, on the bundled digits
    python bench/paper_tables.py --model analytic --tables 2 figure-6
    python bench/paper_tables.py --model examples/power_spectra.py:calibration \
      --judge examples/power_spectra.py:unseen --grid edm --max-batch 16 \
      --tables figure-6 --solvers euler dpmpp-2m

Networks and data are others than the paper's, so its figures stand beside ours for their order
alone: which of two is above the other, and by about how much. Where ours say something else, the
line says so. PSNR in dB against the teacher's own result.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import oss_ext as oss
from oss_ext import baselines
from oss_ext.machine import cpu_name
from oss_ext.models import GRIDS, Model, teacher_times
from oss_ext.statistics import psnr

Lines = list[str]

SOLVERS = ("euler", "dpmpp-2m", "dpmpp-3m", "unipc-3")
PAPER_BUDGETS = (20, 10, 5)
PERCEPTUAL = {
    "digits": ["perceptual:mid2"],
    "21cmPSDenoiser": ["perceptual:network.mid_block2"],
}
"""Metrics by hidden features, of models that have some."""


@dataclass(frozen=True, eq=False)
class Case:
    """A network and two sets of samples: to search with and to judge by.

    Attributes:
        model, judge: the network with what each set is conditioned on.
        samples, held_out: their sizes.
        grid: of the teachers, where a table does not name it.
        solvers: of figure 6.
    """

    model: Model
    judge: Model
    samples: int
    held_out: int
    grid: str
    solvers: Sequence[str]
    max_batch: int | None
    made: dict[tuple[str, int, str], list[oss.Trajectory]] = field(default_factory=dict)

    def teachers(
        self, grid: str | None = None, steps: int = 200, solver: str = "euler"
    ) -> list[oss.Trajectory]:
        """Of both sets, made once."""
        grid = grid or self.grid
        key = (grid, steps, solver)
        if key not in self.made:
            times = teacher_times(self.model, steps, grid)
            start = float(times[-1])
            self.made[key] = [
                oss.teacher(model, model.noise(count, seed, start=start), times=times,
                            solver=solver, keep_x0=True, max_batch=self.max_batch)
                for seed, (model, count) in enumerate(
                    [(self.model, self.samples), (self.judge, self.held_out)]
                )
            ]  # fmt: skip
        return self.made[key]

    def searched(self, teacher: oss.Trajectory, steps: int | list[int], **options: Any) -> Any:
        return oss.search(self.model, teacher, steps, max_batch=self.max_batch, **options)

    def judged(
        self, schedule: oss.Schedule, target: oss.Trajectory, held_out: bool = True
    ) -> oss.evaluate.Score:
        """Against ``target``, of the held-out samples or of the calibration's."""
        model = self.judge if held_out else self.model
        (score,) = oss.compare(model, target, {"": schedule}, max_batch=self.max_batch)
        return score


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> Lines:
    cells = [[c if isinstance(c, str) else f"{c:.2f}" for c in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


def verdict(claim: str, holds: Sequence[bool]) -> str:
    said = "holds" if all(holds) else f"does not hold in {holds.count(False)} of {len(holds)} cases"
    return f"Paper: {claim}. Here it {said}."


def mean_psnr(mse: Tensor, trajectory: oss.Trajectory) -> float:
    return float(psnr(mse.double(), trajectory.data_range).mean())


def table_2(case: Case) -> Lines:
    """Three teacher schedules; every sample with its own schedule, as the paper has it."""
    budgets, grids = (50, *PAPER_BUDGETS), ("edm", "ddim", "flow")
    rows, holds = [], []
    for grid in grids:
        teacher, _ = case.teachers(grid)
        found = case.searched(teacher, list(budgets), scope="instance")
        assert found.table is not None
        for k in budgets:
            uniform = baselines.uniform(teacher, k)
            naive = case.judged(uniform, teacher, held_out=False).mean_psnr
            searched = mean_psnr(found.table.cost[k - 1, 0], teacher)
            rows.append([grid, str(k), naive, searched, searched - naive])
            holds.append(searched > naive)
    claim = "OSS above naive step reduction for every teacher schedule, by 2.65 dB on average"
    gains = [float(row[-1]) for row in rows if row[1] != "50"]
    gain = sum(gains) / len(gains)
    head = ["teacher", "steps", "naive", "OSS, own schedule each", "gain"]
    return [
        *table(head, rows),
        "",
        f"{verdict(claim, holds)} On average {gain:.2f} dB at the paper's 20, 10 and 5.",
    ]


def table_3(case: Case) -> Lines:
    """Teachers of more and fewer steps, judged by the one of the most."""
    counts, k = (100, 200, 500, 1000), 20
    finest, unseen = case.teachers(steps=counts[-1])
    rows, reached = [], []
    for n in counts:
        teacher, _ = case.teachers(steps=n)
        found = case.searched(teacher, k, scope="instance", aggregate="mean")
        instance = [
            oss.sample(case.model, teacher.noise, schedule, max_batch=case.max_batch)[b]
            for b, schedule in enumerate(found.schedules(k))
        ]
        own, each = (
            mean_psnr((images - finest.final).double().square().flatten(1).mean(dim=1), finest)
            for images in (teacher.final, torch.stack(instance))
        )
        reached.append(each)
        average = (
            case.judged(found.schedule(k), target, held_out=target is unseen).mean_psnr
            for target in (finest, unseen)
        )
        rows.append([str(n), own if n < counts[-1] else "-", each, *average])
    claim = f"nearly the same from 200 steps on ({k} student steps)"
    head = ["teacher steps", "teacher itself", "OSS, own schedule each", "OSS-ave",
            "OSS-ave, held out"]  # fmt: skip
    return [*table(head, rows), "", verdict(claim, [abs(reached[-1] - reached[1]) < 1])]


def table_4(case: Case) -> Lines:
    """What the search compares; first order, joint, held-out samples."""
    teacher, held_out = case.teachers()
    rows = []
    for name in [*oss.metrics.METRICS, *PERCEPTUAL.get(case.model.name, [])]:
        found = case.searched(teacher, [10, 5], quality="dp", metric=name)
        rows.append([name, *(case.judged(found.schedule(k), held_out).mean_psnr for k in (10, 5))])
    at_10 = {str(row[0]): float(row[1]) for row in rows}
    said = [verdict("x0 above xt (22.45 and 18.54 dB)", [at_10["x0"] > at_10["xt"]])]
    for name in at_10.keys() - oss.metrics.METRICS.keys():
        claim = "perceptual no better than xt (18.27 and 18.54 dB)"
        said.append(verdict(claim, [at_10[name] <= at_10["xt"]]))
    return [*table(["metric", "10 steps", "5 steps"], rows), "", *said]


def table_6(case: Case) -> Lines:
    """Usual schedules and published methods against ours, held-out samples."""
    teacher, held_out = case.teachers()
    rows, values = [], {}
    calibration = baselines.Calibration(case.model, teacher, 10)
    for name in ("karras", "uniform", "flow-shift", "dm", "gits", "oss-mean"):
        made = [baselines.BASELINES[name].make(calibration, k) for k in (10, 5)]
        values[name] = [case.judged(s, held_out).mean_psnr for s in made]
    found = case.searched(teacher, [10, 5])
    values["ours, balanced"] = [case.judged(found.schedule(k), held_out).mean_psnr for k in (10, 5)]
    rows = [[name, *figures] for name, figures in values.items()]
    others = [v for name, v in values.items() if name not in ("oss-mean", "ours, balanced")]
    holds = [values["oss-mean"][c] >= max(v[c] for v in others) for c in (0, 1)]
    head = ["method", "10 steps", "5 steps"]
    claim = "OSS-ave above all others at 10 and at 5 steps"
    return [*table(head, rows), "", verdict(claim, holds)]


def figure_6(case: Case) -> Lines:
    """Solver and schedule: each adds to the other. The teacher is of second order."""
    teacher, held_out = case.teachers(solver="dpmpp-2m")
    grids = ("uniform", "time-uniform", "logsnr", "karras", "flow-shift")
    calibration = baselines.Calibration(case.model, teacher, 10)
    rows, searched, usual = [], {}, {}
    for solver in case.solvers:
        for k in (5, 10):
            scores = {}
            for grid in grids:
                made = baselines.BASELINES[grid].make(calibration, k)
                plain = replace(made, solver=solver)
                scores[grid] = case.judged(plain, held_out)
            best = max(scores, key=lambda grid: scores[grid].psnr_of_mean)
            found = case.searched(teacher, k, solver=solver).schedule(k)
            score = case.judged(found, held_out)
            searched[solver, k], usual[solver, k] = score.psnr_of_mean, scores[best].psnr_of_mean
            rows.append(
                [solver, str(k), best, usual[solver, k], score.psnr_of_mean,
                 scores[best].mean_psnr, score.mean_psnr]
            )  # fmt: skip
    high = [solver for solver in case.solvers if solver != "euler"]
    best_at_10 = max(searched[solver, 10] for solver in high)
    gains = {k: max(searched[s, k] - usual[s, k] for s in high) for k in (5, 10)}
    head = ["solver", "steps", "best usual grid", "PSNR of mean error", "searched",
            "mean PSNR", "searched"]  # fmt: skip
    claim = "third order with searched steps above first order with searched steps"
    holds = [max(searched[s, k] for s in high) > searched["euler", k] for k in (5, 10)]
    return [
        *table(head, rows),
        "",
        verdict(claim, holds),
        f"At 10 steps {best_at_10 - searched['euler', 10]:.2f} dB above searched Euler; above the "
        f"same solver on its best usual grid by at most {gains[5]:.2f} dB at 5 steps and "
        f"{gains[10]:.2f} dB at 10.",
    ]


TABLES: dict[str, Callable[[Case], Lines]] = {
    "2": table_2, "3": table_3, "4": table_4, "6": table_6, "figure-6": figure_6,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="digits", metavar="NAME|FILE.py:FUNCTION")
    parser.add_argument(
        "--judge",
        metavar="NAME|FILE.py:FUNCTION",
        help="the network with what the held-out samples are conditioned on; "
        "default: the model itself",
    )
    parser.add_argument("--grid", choices=GRIDS, default="own")
    parser.add_argument(
        "--solvers",
        nargs="+",
        choices=list(oss.solvers.SOLVERS),
        metavar="NAME",
        default=SOLVERS,
        help=f"of figure 6: euler and others; default: {' '.join(SOLVERS)}",
    )
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--held-out", type=int, default=64)
    options = parser.parse_args()
    model = oss.models.load(options.model)
    judge = model if options.judge is None else oss.models.load(options.judge)
    case = Case(model, judge, options.samples, options.held_out, options.grid, options.solvers,
                options.max_batch)  # fmt: skip
    print(f"{model.name}, grid {options.grid}, {options.samples} calibration and "
          f"{options.held_out} held-out samples; {cpu_name()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, Python {platform.python_version()}", flush=True)  # fmt: skip
    for name in options.tables:
        title = (TABLES[name].__doc__ or "").split("\n")[0]
        print(f"\n## {name if name.startswith('figure') else f'table {name}'}: {title}\n")
        print("\n".join(TABLES[name](case)), flush=True)


if __name__ == "__main__":
    main()
