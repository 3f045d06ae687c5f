"""The teacher: many small steps, kept as the frozen trajectory that students are compared with."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, solvers
from oss_ext import scratch as scratch_files
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.noise import Path, check_grid
from oss_ext.progress import progress_bar
from oss_ext.schedule import Schedule
from oss_ext.scratch import Held


def in_order(values: Sequence[float], top: int) -> tuple[int, ...]:
    """The nearest whole rows to ``values``, moved apart where they do not descend strictly from at
    most ``top`` to at least 1; there must be room."""
    rows = [min(max(round(value), 1), top) for value in values]
    for k in range(len(rows) - 1, -1, -1):  # room for those below
        rows[k] = max(rows[k], rows[k + 1] + 1 if k + 1 < len(rows) else 1)
    for k in range(len(rows)):  # and for those above
        rows[k] = min(rows[k], rows[k - 1] - 1 if k else top)
    return tuple(rows)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States of a teacher run, index 0 the clean end.

    Attributes:
        times: ``[N+1]`` float64 on the CPU, strictly increasing.
        timesteps: ``[N]`` float64, what the network is told at ``times[1:]``.
        states: ``[N+1, B, *dims]``; ``states[N]`` is the initial noise.
        x0: the clean sample that the model saw in each of them, ``x - t v``, if that was kept;
            the final state at row 0.
        model, model_hash, solver: what made it, by name and fingerprint.
        path: the model's noise path.
        data_range: R of the PSNR: the model's, or the range of the final states.
        block: rows per model call.
        nfe: model evaluations per sample.
        seconds: wall time.
        scratch: folder of the files that arrays as large as ``states`` are in; None: in memory.
        outline: whether it was not run: every state is the noise, in the memory of that alone.
        ends: ``final`` and ``noise``, where ``states`` are in 16 bits and these are not.
    """

    times: Tensor
    timesteps: Tensor
    states: Tensor
    model: str
    model_hash: str
    path: Path
    solver: str
    data_range: float
    block: int
    nfe: int
    seconds: float
    x0: Tensor | None = None
    scratch: scratch_files.Folder = None
    outline: bool = False
    ends: tuple[Tensor, Tensor] | None = None

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def samples(self) -> int:
        return self.states.shape[1]

    @property
    def final(self) -> Tensor:
        """The clean samples ``[B, *dims]``."""
        return self.states[0] if self.ends is None else self.ends[0]

    @property
    def noise(self) -> Tensor:
        """The initial states ``[B, *dims]``."""
        return self.states[-1] if self.ends is None else self.ends[1]

    def at(self, t: float) -> Tensor:
        """The states ``[B, *dims]`` at flow time t; beyond the ends those at the end.

        Between rows they are taken to be linear in flow time, as Euler steps have it.
        """
        times = self.times.tolist()
        row = min(bisect_left(times, t), self.steps)
        if row == 0 or times[row] <= t:
            return self._row(row)
        weight = (t - times[row - 1]) / (times[row] - times[row - 1])
        return torch.lerp(self._row(row - 1), self._row(row), weight)

    def _row(self, row: int) -> Tensor:
        """``[B, *dims]`` in the type of the ends."""
        if row in (0, self.steps):
            return self.noise if row else self.final
        return self.states[row].to(self.noise.dtype)

    def first(self, samples: int) -> Trajectory:
        """The same run of the first ``samples`` samples alone; views."""
        x0 = None if self.x0 is None else self.x0[:, :samples]
        ends = None if self.ends is None else (self.ends[0][:samples], self.ends[1][:samples])
        return replace(self, states=self.states[:, :samples], x0=x0, ends=ends)

    def held(self) -> list[Held]:
        """What it holds, as long as it lasts."""
        arrays = {"teacher": self.states, "x0": self.x0}
        there = [Held(name, x.nbytes, self.scratch) for name, x in arrays.items() if x is not None]
        one = self.noise.nbytes
        return [*there, Held("noise", one), *[Held("final", one)] * (self.ends is not None)]

    def check_model(self, model: Model, *, outline: bool = False) -> None:
        """``ValueError`` unless ``model`` is the one that made this trajectory.

        Nor may it be an outline, unless ``outline``.
        """
        if self.outline and not outline:
            raise ValueError("trajectory: expected one that was run, got that of a dry run")
        if model.fingerprint() != self.model_hash:
            raise ValueError(
                f"model: expected the teacher's, {self.model!r} with hash {self.model_hash}, "
                f"got {model.name!r} with hash {model.fingerprint()}"
            )

    def thinned(self, stride: int) -> tuple[Trajectory, tuple[int, ...]]:
        """The same run seen at every ``stride``-th row and at the initial noise.

        Returns:
            The trajectory of those rows, views of this one's where ``stride`` divides N, and the
            rows of this one that they are: 0, stride, 2 stride, ... and N.

        Raises:
            ValueError: ``stride`` not within 1 to N.
        """
        stride = arguments.whole_number("stride", stride, most=self.steps)
        rows = (*range(0, self.steps, stride), self.steps)
        even = self.steps % stride == 0
        kept: slice | list[int] = slice(None, None, stride) if even else list(rows)
        steps = slice(stride - 1, None, stride) if even else [row - 1 for row in rows[1:]]
        seen = replace(
            self,
            times=self.times[kept],
            timesteps=self.timesteps[steps],
            states=self.states[kept],
            x0=None if self.x0 is None else self.x0[kept],
        )
        return seen, rows

    def schedule(self, indices: Sequence[int], **attributes: Any) -> Schedule:
        """A schedule over this trajectory's grid; ``attributes`` as ``Schedule`` has them."""
        return Schedule.from_indices(indices, self.times.tolist(), **self._origin(), **attributes)

    def schedule_at(self, times: Sequence[float], **attributes: Any) -> Schedule:
        """A schedule of descending flow times, on the grid or between its rows.

        It has ``indices`` only where every time is one of the grid.
        """
        grid = self.times.tolist()
        rows = {t: row for row, t in enumerate(grid)}
        if all(t in rows for t in times):
            return self.schedule([rows[t] for t in times], **attributes)
        return Schedule(
            times=tuple(times),
            teacher_times=tuple(grid),
            indices=None,
            **self._origin(),
            **attributes,
        )

    def nearest_rows(self, times: Sequence[float]) -> tuple[int, ...]:
        """The rows nearest to descending ``times``, kept apart; the last is the clean end."""
        wanted = torch.tensor(times[:-1], dtype=torch.float64)
        rows = (self.times[:, None] - wanted).abs().argmin(dim=0).tolist()
        return (*in_order(rows, self.steps), 0)

    def _origin(self) -> dict[str, Any]:
        """What a schedule says of the teacher it was made with."""
        return {
            "teacher_timesteps": tuple(self.timesteps.tolist()),
            "model": self.model,
            "model_hash": self.model_hash,
            "path": self.path,
            "teacher_solver": self.solver,
        }


@arguments.takes(model=Model)
def teacher(
    model: Model,
    noise: Tensor,
    steps: int = 200,
    *,
    times: Tensor | None = None,
    solver: str = "euler",
    max_batch: int | None = None,
    keep_x0: bool = False,
    storage: torch.dtype | None = None,
    scratch: scratch_files.Folder = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Trajectory:
    """Sample with many steps and keep every state.

    Args:
        model: the velocity model.
        noise: initial states ``[B, *dims]``, e.g. ``model.noise(16, seed=0)``. Where it is, the
            states of the teacher and of students are, too, and the operators run: on the model's
            device, or with ``.cpu()`` in the host's memory, where the device's has no room.
        steps: N, on the model's own grid; ignored when ``times`` is given.
        times: the grid itself, ``[N+1]`` ascending flow times.
        solver: the teacher's, a name in ``oss_ext.solvers.SOLVERS``.
        max_batch: rows per model call; None: all B samples in one.
        keep_x0: keep what metrics of the clean sample compare, as much again as the states.
        storage: type that states are kept in, here and of students in dynamic programmes: None is
            float32 (float64 for noise of it). In float16 or bfloat16 they take half the memory, and
            costs are those of rounded states; refinement starts and ends at exact ones.
        scratch: folder for files in place of memory, for this trajectory's states and for those of
            Euler students that are searched with it; with noise on the CPU only.
        progress: show a progress bar.
        dry_run: evaluate nothing; give the outline of the trajectory, for dry runs of searches.

    Raises:
        ValueError: bad arguments, an unknown solver, a velocity of the wrong shape, or a state
            beyond the range of ``storage``.
        OSError: no room in ``scratch``.
        NonFiniteError: the model returned NaN or inf; the message names time and sample.
    """
    model.check_noise(noise)
    grid = check_grid(model.times(steps) if times is None else times)
    model.path.within_span(grid[1:])
    start, samples = time.perf_counter(), len(noise)
    # The search compares in float32 or better whatever precision the model runs in.
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    kept = _storage(storage, dtype)
    scratch_files.check(scratch, noise.device)
    shape = (len(grid), *noise.shape)
    used, descending = solvers.get(solver), grid.flip(0).tolist()
    per_sample = solvers.evaluations(used, descending)
    made: dict[str, Any] = {"times": grid, "timesteps": model.timesteps(grid[1:])}
    made |= {"model": model.name, "model_hash": model.fingerprint(), "path": model.path}
    made |= {"solver": solver, "nfe": per_sample, "scratch": scratch}
    if dry_run:
        states, start_at = noise.to(kept).expand(shape), noise.to(dtype)
        return Trajectory(
            **made,
            states=states,
            ends=None if kept == dtype else (start_at, start_at),
            data_range=model.data_range or 0.0,
            block=Evaluator(model, samples, max_batch).block,
            seconds=0.0,
            x0=states if keep_x0 else None,
            outline=True,
        )
    states = scratch_files.empty(shape, kept, noise.device, scratch)
    states[-1] = x = noise.to(dtype)
    x0 = scratch_files.empty(shape, kept, noise.device, scratch) if keep_x0 else None
    row_of = {t: row for row, t in enumerate(grid.tolist())}
    with progress_bar("teacher", per_sample * samples, progress) as bar:
        evaluator = Evaluator(model, samples, max_batch, bar.update)

        def velocity(x: Tensor, t: float) -> Tensor:
            v = evaluator.at(x, t)
            if x0 is not None and t in row_of:  # a stage may come first, the state comes last
                torch.add(x, v, alpha=-t, out=x0[row_of[t]])
            return v

        path = solvers.integrate(used, velocity, x, descending)
        for row, final in zip(range(len(grid) - 2, -1, -1), path, strict=True):
            states[row] = final
            _check_range(states[row], final)
    if x0 is not None:
        x0[0] = final
    return Trajectory(
        **made,
        states=states,
        data_range=model.data_range or float(final.max() - final.min()),
        block=evaluator.block,
        seconds=time.perf_counter() - start,
        x0=x0,
        ends=None if kept == dtype else (final, x.clone()),
    )


def _storage(storage: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """What states of ``dtype`` are kept in."""
    known = (dtype, torch.float16, torch.bfloat16)
    if storage not in (None, *known):
        expected = ", ".join(map(str, known))
        raise ValueError(f"storage: expected one of {expected}, got {storage!r}")
    return storage or dtype


def _check_range(kept: Tensor, x: Tensor) -> None:
    """``ValueError`` where ``kept`` is inf and ``x`` is not."""
    if kept.dtype == torch.float16 and not bool(kept.isfinite().all()):
        most = float(x.abs().max())
        raise ValueError(f"storage: {kept.dtype} has no room for states of {most:.3g}")
