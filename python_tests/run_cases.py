"""Run folders with random contents, for the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from driver_cases import random_times
from oss_ext.amplitude import LEVELS, Amplitude
from oss_ext.noise import FLOW, Path
from oss_ext.runs import Contender, Run
from oss_ext.schedule import Objective, Schedule

TEACHER_STEPS, CALIBRATION, HELD_OUT = 12, 5, 4


def random_run(
    seed: int,
    shape: Sequence[int] = (1, 28, 28),
    *,
    budgets: Sequence[int] = (3, 5),
    held_out: int = HELD_OUT,
    path: Path = FLOW,
    grid: Sequence[float] | None = None,
    named: Callable[[str], str] = str,
    **changes: Any,
) -> Run:
    """A judged run with everything in it: per budget uniform steps, a schedule off the grid, one
    that could not be made, and two of ours with amplitudes, of which one starts below the teacher's
    first time.

    Args:
        named: what becomes of every text that a user could have written.
        changes: attributes of the run to be set to something else.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    times = random_times(seed, TEACHER_STEPS).tolist() if grid is None else list(grid)
    n = len(times) - 1
    origin: dict[str, Any] = {"model": named("model"), "model_hash": "0" * 16, "path": path}
    searched = {"objective": Objective(), "samples": CALIBRATION, "search_nfe": 99, "cost": 0.01}
    contenders = []
    for k in budgets:

        def on_grid(first: int, k: int = k, **attributes: Any) -> Schedule:
            inner = (1 + torch.randperm(first - 1, generator=generator)[: k - 1]).tolist()
            rows = [first, *sorted(inner, reverse=True), 0]
            return Schedule.from_indices(rows, times, **origin, **attributes)

        between = [(times[row] + times[row - 1]) / 2 for row in range(k, 1, -1)]
        off_grid = Schedule(
            times=(times[-1], *between, times[0]), teacher_times=tuple(times), indices=None,
            method="karras", **origin,
        )  # fmt: skip
        low, high = (uniform(2, k) * torch.tensor([[-1], [1]])).tolist()
        ours = searched | {"amplitude": Amplitude(LEVELS, low, high, CALIBRATION)}
        contenders += [
            Contender(named(f"uniform {k}"), "uniform", k, on_grid(n, method="uniform")),
            Contender(named(f"karras {k}"), named("karras"), k, off_grid, 0.2, named("off grid")),
            Contender(named(f"gits {k}"), "gits", k, None, 0.0, named("needs more steps")),
            Contender(named(f"dp {k}"), "dp", k, on_grid(n - 1, **ours), 8.1),
            Contender(named(f"best {k}"), "best", k, on_grid(n, **ours), 30.9, named("slow")),
        ]
    able = [c for c in contenders if c.schedule is not None]
    mse = (-4 * uniform(len(contenders), held_out)).exp() / 50
    mse[[c.schedule is None for c in contenders]] = torch.nan
    table = uniform(max(budgets), n + 1) / 10
    table[:, n] = torch.inf
    spread = {k: uniform(CALIBRATION, n - 1).argsort(dim=1)[:, : k + 1] for k in budgets}
    images = {name: (2 * uniform(2, *shape) - 1).float()
              for name in ("teacher", *(c.name for c in able))}  # fmt: skip
    attributes: dict[str, Any] = {
        "command": named("oss compare --model model"),
        "created": named("2025-01-02T03:04:05+00:00"),
        "machine": {named("device"): named("a machine")},
        "model": named("model"),
        "data_range": 2.0,
        "teacher_steps": n,
        "teacher_nfe": n,
        "teacher_seconds": 3.2,
        "calibration": CALIBRATION,
        "held_out": held_out,
        "peak_bytes": 300 * 2**20,
        "contenders": tuple(contenders),
        "mse": mse,
        "along": {c.name: uniform(c.steps) / 100 for c in able},
        "quantiles": {
            c.name: 2 * uniform(2, c.steps + 1, 2) - 1
            for c in able
            if c.schedule is not None and c.schedule.amplitude is not None
        },
        "images": images,
        "table": table,
        "spread": {k: rows.sort(dim=1, descending=True).values for k, rows in spread.items()},
    }
    return Run(**attributes | changes)
