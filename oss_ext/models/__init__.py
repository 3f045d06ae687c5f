"""Model families by name. A new family is a file with a ``load`` function and a line in MODELS."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from oss_ext import arguments
from oss_ext.models import analytic, digits, files
from oss_ext.models.base import Model
from oss_ext.models.custom import from_callable
from oss_ext.models.grids import GRIDS, teacher_times
from oss_ext.models.pipeline import from_folder, from_pipeline

__all__ = [
    "GRIDS",
    "MODELS",
    "Model",
    "from_callable",
    "from_folder",
    "from_pipeline",
    "load",
    "teacher_times",
]

MODELS: dict[str, Callable[..., Model]] = {
    "digits": digits.load,
    "analytic": analytic.load,
}


def load(name: str, **options: Any) -> Model:
    """The model called ``name``, or what a function of yours returns: ``FILE.py:FUNCTION``.

    Args:
        options: those of the model's ``load`` function, or of yours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name (the message lists the known ones), a bad option, an error in
            your file or a function there that does not return a ``Model``.
    """
    arguments.of_type("name", name, str)
    if name in MODELS:
        make = MODELS[name]
    elif files.is_file(name):
        make = files.function(name)
    else:
        raise ValueError(
            f"unknown model {name!r}; known models: {', '.join(MODELS)}, and FILE.py:FUNCTION"
        )
    known = inspect.signature(make).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for option in options:
        if option not in known and not takes_any:
            raise ValueError(
                f"model {name!r} has no option {option!r}; its options: {', '.join(known)}"
            )
    model = make(**options)
    if not isinstance(model, Model):
        raise ValueError(
            f"model: expected {name!r} to return a Model, as oss_ext.models.from_callable makes "
            f"it, got {type(model).__name__}"
        )
    return model
