"""Objects that stand in for a scheduler: of its class, with some answers of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class StandIn:
    """Mixed into a scheduler's own class by ``stand_in``: overrides some of its answers.

    ``INSTEAD`` names methods that take the place of those that not every scheduler has: pipelines
    look whether they are there.
    """

    INSTEAD: ClassVar[Mapping[str, str]] = {}


class StepOutput(tuple[Tensor]):
    """What ``step`` returns: a tuple, and its parts by the names that pipelines use."""

    pred_original_sample: Tensor | None

    def __new__(cls, values: tuple[Tensor], x0: Tensor | None = None) -> StepOutput:
        made = super().__new__(cls, values)
        made.pred_original_sample = x0
        return made

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


def check_step(options: Mapping[str, Any]) -> None:
    """``ValueError`` if ``step`` was given ``options`` that make it another step.

    With times of its own for every token a state has no time (and the output the other sign).
    """
    if options.get("per_token_timesteps") is not None:
        raise ValueError(
            "per_token_timesteps: expected none of them: the pipeline gives its scheduler a time "
            "for every token, but a schedule has one for all"
        )


def stand_in(mixin: type[StandIn], scheduler: Any) -> Any:
    """A copy of ``scheduler`` whose class also derives from ``mixin``, which goes first.

    Pipelines ask schedulers for their class, configuration, levels and the parameters of their
    methods, and so find what they would find in the original, which is left alone.
    """
    scheduler = original_of(scheduler)
    original = type(scheduler)
    methods = {}
    for name, ours in {"set_timesteps": "set_timesteps", "step": "step", **mixin.INSTEAD}.items():
        if hasattr(original, name):
            methods[name] = _signed_as(getattr(mixin, ours), getattr(original, name))
    kind = type(original.__name__, (mixin, original), methods)
    copy: Any = object.__new__(kind)
    vars(copy).update(vars(scheduler), _original=scheduler)
    return copy


def original_of(scheduler: Any) -> Any:
    """What ``scheduler`` stands in for, or itself."""
    return getattr(scheduler, "__dict__", {}).get("_original", scheduler)


def scheduler_of(pipe: Any, scheduler: Any = None) -> Any:
    """``scheduler``, or the one that ``pipe`` has; ``ValueError`` if that is no pipeline."""
    scheduler = getattr(pipe, "scheduler", None) if scheduler is None else scheduler
    if not callable(pipe) or scheduler is None:
        raise ValueError(
            f"pipe: expected a diffusers pipeline with a scheduler, got {type(pipe).__name__}"
        )
    return scheduler


def _signed_as(function: Any, like: Any) -> Any:
    """``function``, which takes whatever comes, with the parameters that ``like`` shows."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        return function(self, *args, **options)

    method.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return method
