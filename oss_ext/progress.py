"""The progress of long work: a bar of what is done, what is left and the rate, and events."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from oss_ext.events import Stage, stage


@contextmanager
def progress_bar(
    description: str, total: int, show: bool, unit: str = "eval", **facts: Any
) -> Iterator[Stage]:
    """A stage of ``total`` model evaluations, or what ``unit`` says; 0: nobody knows how many.

    Its bar is silent unless ``show`` and on a terminal; those who follow are told in any case,
    with what ``facts`` say of it.
    """
    # None lets tqdm ask whether stderr is a terminal; programs without a console have none.
    silent = None if show and sys.stderr is not None else True
    with (
        tqdm(total=total or None, desc=description, unit=unit, disable=silent, leave=False) as bar,
        stage(description, total or None, unit, bar.update, **facts) as work,
    ):
        yield work
