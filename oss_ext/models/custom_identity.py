"""What tells one network of one's own from another: its weights, and the plain values it uses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

Fact = bool | int | float | str


class Identity:
    """The torch modules behind something that is called, and the plain values that it refers to.

    A function refers to what it encloses, to globals, to its defaults and to the numbers in its
    code; a bound method and an object with ``__call__`` also to the object's attributes. Functions
    of the same file are looked into. Tensors, lists and other objects are not: a network may write
    to them, and what it is would depend on when that is asked.

    Attributes:
        modules: in the order in which they were found; their weights may change.
        facts: names and values, as they were when this was made.
    """

    def __init__(self, network: Any) -> None:
        self.modules: list[nn.Module] = []
        self.facts: list[tuple[str, Fact]] = []
        self._seen: set[int] = set()
        self._home: str | None = None  # the file that the outermost function or object is of
        self._look("", network)

    def _look(self, name: str, value: Any) -> None:
        if isinstance(value, Fact):
            self.facts.append((name, value))
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            if isinstance(value, nn.Module):
                self.modules.append(value)
            elif isinstance(value, functools.partial):
                self._look(name, value.func)
                self._look_all({str(k): given for k, given in enumerate(value.args)})
                self._look_all(value.keywords)
            elif inspect.ismethod(value):
                self._look(name, value.__func__)
                self._look(name, value.__self__)
            elif callable(value) and not inspect.isclass(value):
                self._look_into(name, value)

    def _look_all(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._look(name, value)

    def _look_into(self, name: str, value: Any) -> None:
        home = getattr(value, "__module__", None)
        self._home = self._home or home
        if home != self._home:
            return
        if not inspect.isfunction(value):
            self._look_all(getattr(value, "__dict__", {}))
            self._look(name, type(value).__call__)
            return
        numbers = [c for c in value.__code__.co_consts if isinstance(c, int | float)]
        self._look_all({f"constant {k}": number for k, number in enumerate(numbers)})
        self._look_all({p.name: p.default for p in inspect.signature(value).parameters.values()})
        try:
            used = inspect.getclosurevars(value)
        except ValueError:  # a variable that it encloses has no value yet
            return
        self._look_all(used.nonlocals)
        self._look_all(dict(sorted(used.globals.items())))
