"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TINY = ("--model=analytic", "--set=shape=1,4,4", "--samples=3", "--teacher-steps=8", "--quiet")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Oss = Callable[..., Outcome]


def files(folder: Path | str = ".") -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def assert_fails(outcome: Outcome, *parts: str) -> None:
    """One line on stderr, no traceback, exit code 1."""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert all(part in outcome.err for part in parts), outcome.err
    assert outcome.code == 1


def assert_misused(outcome: Outcome, *parts: str) -> None:
    assert all(part in outcome.err for part in parts), outcome.err
    assert outcome.out == ""
    assert outcome.code == 2
