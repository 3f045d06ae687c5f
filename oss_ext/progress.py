"""The progress bar that long work shows: what is done, what is left, and the rate."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(description: str, total: int, show: bool, unit: str = "eval") -> tqdm:  # type: ignore[type-arg]
    """A bar over ``total`` model evaluations, or what ``unit`` says; 0: nobody knows how many.

    Silent unless ``show`` and on a terminal.
    """
    silent = None if show else True  # None lets tqdm ask whether stderr is a terminal
    return tqdm(total=total or None, desc=description, unit=unit, disable=silent, leave=False)
