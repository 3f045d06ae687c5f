"""The teacher: many small steps, kept as a trajectory."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from oss_ext import arguments, solvers
from oss_ext import scratch as scratch_files
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.noise import check_grid
from oss_ext.progress import progress_bar
from oss_ext.trajectory import Trajectory


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

    Warns (``UserWarning``) of networks in training mode that then answer at random or change.
    """
    model.check_noise(noise)
    grid = check_grid(model.times(steps) if times is None else times)
    model.path.within_span(grid[1:])
    start, samples = time.perf_counter(), len(noise)
    # The search compares in float32 or better whatever precision the model runs in.
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    kept = _storage(storage, dtype)
    scratch_files.check(scratch, noise.device)
    _warn_of_training(model)
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


def _warn_of_training(model: Model) -> None:
    enclosed = [("", module) for module in model.enclosed()]
    for name, network in [*model.networks().items(), *enclosed]:
        for module in network.modules():
            drops = isinstance(module, _DropoutNd) and module.p > 0
            if module.training and (drops or isinstance(module, _BatchNorm)):
                warnings.warn(
                    f"model: {name or model.name!r} is in training mode and has a "
                    f"{type(module).__name__}, so that no two runs are alike; call .eval() first",
                    UserWarning,
                    stacklevel=4,  # whoever called ``teacher``, which ``takes`` wraps
                )
                return
