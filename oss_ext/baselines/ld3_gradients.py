"""Whether a model can be descended through: gradients that are there, and those of its velocity.

A network that runs without autograd can stand in a model that runs with it: what is around the
network (scalings, the prediction's own share of the state) then gives gradients that are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from oss_ext.baselines.base import UnableError
from oss_ext.events import one_line
from oss_ext.models.base import Model
from oss_ext.models.evaluation import out_of_memory
from oss_ext.trajectory import Trajectory

AGREEMENT = 0.05
"""How far a derivative and a difference may be apart, relative to the length of the gradient."""


def velocity(model: Model, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """The model's, in the dtype of ``x`` [R, *dims], at one time ``t`` [] for the samples ``rows``.

    Called directly, because an evaluator does without autograd.
    """
    times = t.to(model.device).expand(len(x))
    return model(x.to(model.device, model.dtype), times, rows.to(model.device)).to(x)


@contextmanager
def differentiating() -> Iterator[None]:
    """With autograd; ``UnableError`` where the model does not run under it, or has no memory to.

    For calls that are made here and by this process: errors of others are none of autograd's.
    """
    try:
        with torch.enable_grad():
            yield
    except (MemoryError, RuntimeError) as error:
        failed = "has no memory for" if out_of_memory(error) else "does not run under"
        raise UnableError(f"ld3: the model {failed} autograd: {one_line(error)}") from error


def check_gradients(model: Model, trajectory: Trajectory, rows: Tensor) -> int:
    """Differentiate the velocity half-way along the teacher, and compare with a difference.

    Returns:
        Evaluations spent, a backward pass counted as two.

    Raises:
        UnableError: no gradients with respect to states or times, or bad ones.
    """
    middle, place = (trajectory.steps + 1) // 2, rows.to(trajectory.noise.device)
    along = trajectory.noise[place]
    x = trajectory.states[middle, place].to(along.dtype).requires_grad_()
    t = trajectory.times[middle].clone().requires_grad_()
    v = velocity(model, x, t, rows)
    gradients: tuple[Tensor, ...] = (torch.zeros_like(x), torch.zeros_like(t))
    if v.requires_grad:
        gradients = torch.autograd.grad((v * along).sum(), [x, t], materialize_grads=True)
    for name, gradient in zip(("states", "times"), gradients, strict=True):
        if not bool(gradient.isfinite().all() & gradient.any()):
            raise UnableError(
                f"ld3: needs finite gradients of the velocity with respect to {name}, not all of "
                f"them zero; model {model.name!r} gives none"
            )
    with torch.no_grad():
        step = torch.finfo(model.dtype).eps ** (1 / 3)
        up, down = (velocity(model, x + sign * step * along, t, rows) for sign in (1, -1))
        off = ((up - down) / (2 * step) * along).sum() - (gradients[0] * along).sum()
        apart = float(off.abs() / (gradients[0].norm() * along.norm()))
    if not apart <= AGREEMENT + step:  # low precision makes long steps
        raise UnableError(
            f"ld3: the gradients that autograd has of model {model.name!r} are not those of its "
            f"velocity ({apart:.1%} apart); does its network run without autograd?"
        )
    return 5 * len(rows)
