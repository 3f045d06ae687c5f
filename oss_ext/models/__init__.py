"""Model families by name. A new family is a file with a ``load`` function and a line in MODELS."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from oss_ext.models import analytic, digits
from oss_ext.models.base import Model
from oss_ext.models.custom import from_callable
from oss_ext.models.pipeline import from_folder, from_pipeline

__all__ = ["MODELS", "Model", "from_callable", "from_folder", "from_pipeline", "load"]

MODELS: dict[str, Callable[..., Model]] = {
    "digits": digits.load,
    "analytic": analytic.load,
}


def load(name: str, **options: Any) -> Model:
    """The model called ``name``; options are those of its ``load`` function.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or a bad option.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"model {name!r} has no option {option!r}; its options: {', '.join(known)}"
            )
    return MODELS[name](**options)
