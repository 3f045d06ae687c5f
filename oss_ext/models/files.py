"""Models that a user's own Python file makes, named ``FILE.py:FUNCTION``."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SUFFIX = ".py"


def is_file(name: str) -> bool:
    """Whether ``name`` has the form of a file and, perhaps, a function in it."""
    return name.endswith(SUFFIX) or SUFFIX + ":" in name


def function(name: str) -> Callable[..., Any]:
    """The function that ``FILE.py:FUNCTION`` names.

    The file is run, as ``python FILE.py`` would, so that it finds the modules beside it. What goes
    wrong in the function is a ``ValueError``, as below.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no function named, or none of that name (the message lists those there are);
            an error in the file, with its line.
    """
    file, _, wanted = name.rpartition(":") if not name.endswith(SUFFIX) else (name, "", "")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", file)
    # A name of its own, for a file may be called like a package.
    spec = importlib.util.spec_from_file_location(f"model_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # classes look themselves up there
    with errors_of(file):
        spec.loader.exec_module(module)
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == spec.name
    }
    if wanted not in own:
        known = ", ".join(own) or "none there"
        raise ValueError(f"model: expected {file}:FUNCTION, one of {known}, got {name!r}")
    return errors_of(file)(own[wanted])


@contextlib.contextmanager
def errors_of(file: str) -> Iterator[None]:
    """An error in the block as a ``ValueError`` with what and where in the user's file it was."""
    try:
        yield
    except Exception as error:
        lines = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            lines.append((error.filename or "", error.lineno))
        own = [line for where, line in lines if Path(where).name == Path(file).name]
        place = f"{file}, line {own[-1]}" if own else file
        raise ValueError(f"model: {place}: {type(error).__name__}: {error}") from error
