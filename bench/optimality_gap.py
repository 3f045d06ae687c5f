"""How far from the best schedule that exists what a search finds is, where all can be tried.

    python bench/optimality_gap.py            # 40 random mixtures, N = 24, 3 steps
    python bench/optimality_gap.py --cases 10 --teacher-steps 20 --steps 4

Errors are the geometric mean of the final errors on the samples searched with, as ratios to those
of the best of all schedules on the teacher's grid.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

import oss_ext as oss

SAMPLES = 7  # fewer than a search leaves some of out
SEARCHES = {
    "dp": {"quality": "dp"},
    "beam of 8": {"quality": "dp", "beam": 8},
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
}


def error(model: oss.models.Model, teacher: oss.Trajectory, schedule: oss.Schedule) -> float:
    (score,) = oss.compare(model, teacher, {"": schedule})
    return float(score.mse.log().mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--teacher-steps", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, list[float]] = {"uniform": [], **{name: [] for name in SEARCHES}}
    spent: dict[str, list[int]] = {name: [0] for name in ratios}
    for seed in range(options.cases):
        shape = [(4,), (16,), (64,)][seed % 3]
        model = oss.models.load("analytic", shape=list(shape), components=6, sd=0.3, seed=seed)
        teacher = oss.teacher(model, model.noise(SAMPLES, seed), options.teacher_steps)
        _, least = oss.exhaustive(model, teacher, options.steps)
        uniform = oss.baselines.uniform(teacher, options.steps)
        ratios["uniform"].append(error(model, teacher, uniform) / least)
        for name, how in SEARCHES.items():
            result = oss.search(model, teacher, options.steps, **how)
            ratios[name].append(error(model, teacher, result.schedule(options.steps)) / least)
            spent[name].append(teacher.nfe + result.nfe)
    print(f"{options.cases} mixtures, N = {options.teacher_steps}, {options.steps} steps; error "
          f"over the least there is; torch {torch.__version__}")  # fmt: skip
    print("            median  geometric mean  worst  optimum found  evaluations")
    for name, values in ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, values)))
        found = sum(value < 1 + 1e-6 for value in values)
        print(f"{name:10}  {statistics.median(values):6.3f}  {mean:14.3f}  {max(values):5.2f}  "
              f"{found:5d} of {len(values):2d}  {max(spent[name]):11d}")  # fmt: skip


if __name__ == "__main__":
    main()
