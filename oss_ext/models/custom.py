"""Your own network as a model: any callable that returns the flow-matching velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from oss_ext.models.base import Model, hash_of


class CallableModel(Model):
    """``fn(x, t, sample) -> v`` with the declarations of ``Model``; see ``from_callable``."""

    def __init__(
        self, fn: Callable[[Tensor, Tensor, Tensor], Tensor], name: str, shape: Sequence[int]
    ) -> None:
        self._fn, self.name, self.shape = fn, name, tuple(shape)

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return self._fn(x, t, sample)

    def fingerprint(self) -> str:
        weights = self._fn.state_dict().values() if isinstance(self._fn, nn.Module) else ()
        return hash_of([self.name, self.shape, *weights])


def from_callable(
    fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape: Sequence[int],
    *,
    name: str = "custom",
    data_range: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    one_time_per_call: bool = False,
    fixed_batch: int | None = None,
) -> CallableModel:
    """Wrap ``fn(x [R, *shape], t [R], sample [R]) -> v [R, *shape]``, the velocity ``eps - x0``.

    ``t`` is float64 from 0 (clean) to 1 (noise); ``sample`` says which item of your conditioning
    each row belongs to. The other arguments are those of ``Model``. The fingerprint covers the
    weights when ``fn`` is a ``torch.nn.Module``, else only name and shape.
    """
    model = CallableModel(fn, name, shape)
    model.data_range, model.dtype, model.device = data_range, dtype, torch.device(device)
    model.one_time_per_call, model.fixed_batch = one_time_per_call, fixed_batch
    return model
