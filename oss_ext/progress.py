"""The progress bar that long work shows: model evaluations done, left, and the rate."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(description: str, evaluations: int, show: bool) -> tqdm:  # type: ignore[type-arg]
    """A bar over ``evaluations`` model evaluations; silent unless ``show`` and on a terminal."""
    silent = None if show else True  # None lets tqdm ask whether stderr is a terminal
    total = evaluations or None  # 0: nobody knows
    return tqdm(total=total, desc=description, unit="eval", disable=silent, leave=False)
