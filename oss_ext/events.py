"""What long work tells those who follow it: events, in the order that they happen.

An event is a dict of what JSON has. ``event`` says what happened, ``stage`` within what, the
outermost stage first (``oss search/refine``; empty outside of any), and the rest depends on it:

| event | besides | when |
|---|---|---|
| ``begin`` | ``total`` and ``unit`` of what is counted, what else is known | a stage begins |
| ``progress`` | ``done``, ``total`` | about once a second, and when all of a stage is done |
| ``done`` | ``seconds``, ``done``, ``total`` | a stage ends |
| ``failed`` | as ``done``, ``error`` | by an error that goes up through it |
| ``interrupted`` | as ``done`` | by Ctrl-C, or what else is no error |
| ``note`` | ``text`` | there is something to know of the result |
| ``step`` | ``step`` of ``steps``, ``cost``, ``teacher_steps`` | of a dynamic programme |
| ``round`` | ``moves``, ``error``, ``trials`` of its descent | of a refinement |
| ``refined`` | ``steps``, ``trials``, errors before and after as ``Refinement`` has them | |
| ``score`` | ``name``, ``steps``, ``cost`` | a schedule was judged |
| ``wrote`` | ``files`` | a run was written |

``cost`` is the mean squared error of the final state, mean over the samples, ``error`` what a
refinement lowers: that, or the geometric mean. ``step`` has it of the best schedule of so many
steps, on a teacher that is thinned where a search goes from coarse to fine.

Totals are evaluations of the model, in rows, unless ``unit`` says otherwise. They are what a stage
takes at most, None where nobody knows. Numbers that are not finite are None too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Event = dict[str, Any]

SECONDS = 1.0
"""At least so much time lies between two events on the progress of a stage."""

_followers: ContextVar[tuple[Callable[[Event], object], ...]] = ContextVar("followers", default=())
_path: ContextVar[str] = ContextVar("path", default="")


@contextmanager
def following(callback: Callable[[Event], object]) -> Iterator[None]:
    """Call ``callback`` with every event of this thread (or asyncio task) while the block lasts.

        with oss_ext.following(print):
            oss_ext.search(...)

    It is called where the work is done, which waits for it. Blocks within one another all follow,
    the outermost is told first; a thread that is begun within one follows nothing, unless it runs
    in a copy of the context (``contextvars.copy_context``).

    Raises:
        ValueError: ``callback`` cannot be called.
        Exception: whatever ``callback`` raises goes up through the work and ends it, as an error of
            the model would. That is how a follower stops a run: nothing is lost that a checkpoint
            keeps.
    """
    if not callable(callback):
        raise ValueError(f"callback: expected a function of an event, got {callback!r:.100}")
    token = _followers.set((*_followers.get(), callback))
    try:
        yield
    finally:
        _followers.reset(token)


def tell(event: str, **facts: Any) -> None:
    """Tell those who follow that ``event`` happened in the stage that has begun last."""
    _send(event, _path.get(), facts)


class Stage:
    """How much of a part of the work is done; ``stage`` makes it."""

    def __init__(self, path: str, total: int | None, show: Callable[[int], object]) -> None:
        self._path, self._total, self._show = path, total, show
        self._last = time.monotonic()  # which nobody can set, so that no event waits for hours
        self._told, self.done = 0, 0

    def update(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self._show(count)
        now = time.monotonic()
        if now - self._last >= SECONDS:
            self._last = now
            self.tell_progress()

    def tell_progress(self) -> None:
        """Tell what is done, unless that is known."""
        if self._told < self.done:
            self._told = self.done
            _send("progress", self._path, {"done": self.done, "total": self._total})


@contextmanager
def stage(
    name: str,
    total: int | None = None,
    unit: str | None = None,
    show: Callable[[int], object] = lambda count: None,
    **facts: Any,
) -> Iterator[Stage]:
    """The block is a stage, of whose begin, progress and end those who follow are told.

    Args:
        name: among the stages of the one around it.
        total: how many will be done at most; None: nobody knows.
        unit: of what is done; None: nothing is counted.
        show: also called with every count that is done.
        facts: what else is to be told when it begins.
    """
    outer, begun = _path.get(), time.monotonic()
    path = f"{outer}/{name}" if outer else name
    work = Stage(path, total, show)
    counted = {} if unit is None else {"total": total, "unit": unit}

    def end(event: str, **why: str) -> None:
        done = {} if unit is None else {"done": work.done, "total": total}
        _send(event, path, {"seconds": round(time.monotonic() - begun, 3)} | done | why)

    _path.set(path)
    try:
        _send("begin", path, counted | facts)
        yield work
        work.tell_progress()
    except Exception as error:
        end("failed", error=one_line(error))
        raise
    except BaseException:
        end("interrupted")
        raise
    finally:
        _path.set(outer)
    end("done")


def one_line(error: BaseException) -> str:
    """What an error says, with its notes, in a line; torch appends stack traces to its messages."""
    said = (str(error).splitlines() or [repr(error)])[0]
    return "; ".join([said, *getattr(error, "__notes__", ())])


def _send(event: str, path: str, facts: Mapping[str, Any]) -> None:
    for follower in _followers.get():  # a dict each, which is theirs to change
        follower({"event": event, "stage": path, **_plain(facts)})


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return str(value).encode(errors="replace").decode()  # names of files need not be text
