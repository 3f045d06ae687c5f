"""A model that is another one, but for what a subclass changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from oss_ext.models.base import Leg, Model, Request


class Wrapped(Model):
    """Answers as ``model`` does; what a subclass changes, it changes in ``answers``."""

    def __init__(self, model: Model) -> None:
        self._model = model
        for name in Model.__annotations__:
            setattr(self, name, getattr(model, name))

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return next(iter(self.answers([(x, t, sample)])))

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        return self._model.answers(requests)

    def ahead(self, requests: Sequence[Request]) -> Sequence[Tensor] | None:
        return self._model.ahead(requests)

    def leg(self) -> Leg:
        return self._model.leg()

    def fingerprint(self) -> str:
        return self._model.fingerprint()

    @property
    def setting_up(self) -> bool:
        return self._model.setting_up

    def networks(self) -> Mapping[str, nn.Module]:
        return self._model.networks()

    def enclosed(self) -> Sequence[nn.Module]:
        return self._model.enclosed()

    def times(self, steps: int) -> Tensor:
        return self._model.times(steps)

    def timesteps(self, times: Tensor) -> Tensor:
        return self._model.timesteps(times)

    def noise(self, batch: int, seed: int = 0, *, start: float | None = None) -> Tensor:
        return self._model.noise(batch, seed, start=start)
