"""Checks of plain arguments, all with one message: name, what was expected, what came."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")


def of_type(name: str, value: Any, kind: type) -> None:
    """``ValueError`` unless ``value`` is a ``kind``, which may say what makes one (``made_by``)."""
    if not isinstance(value, kind):
        made = f" ({kind.made_by} makes one)" if hasattr(kind, "made_by") else ""
        raise ValueError(f"{name}: expected a {kind.__name__}{made}, got {type(value).__name__}")


def takes(**kinds: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose arguments of these names are checked by ``of_type`` before it runs."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            given = signature.bind(*args, **options).arguments
            for name, kind in kinds.items():
                of_type(name, given[name], kind)
            return function(*args, **options)

        return checked

    return decorate


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``; ``ValueError`` if it is none (nor a bool)."""
    expected = f"at least {least}" if most is None else f"{least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: expected a whole number, {expected}, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """``value``; ``ValueError`` unless it is one of the names ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r:.100}")
    return value


def number(name: str, value: Any, positive: bool = False) -> float:
    """``value`` as a finite float, above zero if ``positive``; ``ValueError`` if it is none."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    # Not isfinite, which whole numbers may be too large for.
    if not real or not abs(value) <= sys.float_info.max or (positive and value <= 0):
        kind = "a positive number" if positive else "a finite number"
        raise ValueError(f"{name}: expected {kind}, got {value!r:.100}")
    return float(value)


def between(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """``value`` as a float; ``ValueError`` unless ``least < value < most``."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not least < value < most or value > sys.float_info.max:
        got = f"{value!r:.100}"
        raise ValueError(f"{name}: expected a number between {least} and {most}, got {got}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """``value``; ``ValueError`` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {value!r:.100}")
    return value


def device(name: str, value: Any) -> torch.device:
    """``value`` as a device that this machine has, with its number: of those without one, that of
    the current device. ``ValueError`` if it is none."""
    try:
        return torch.empty(0, device=torch.device(value)).device
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{name}: expected a device of this machine, got {value!r} ({reason})"
        ) from None
