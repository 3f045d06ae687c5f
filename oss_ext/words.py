"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, e.g. ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1000 else f"{count:.0f} GiB"


def span(seconds: float) -> str:
    """Seconds, e.g. ``12 ms`` or ``3 min``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.3g} h"
