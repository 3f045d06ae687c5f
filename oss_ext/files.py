"""Files: written whole or not at all, and read with nothing taken for granted."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26
"""Of a file of text; ours have some kilobytes."""

MOST_NESTED = 16
"""Lists and objects within one another in JSON; ours have three."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` when the block ends well.

    After an error or an interruption the old file, if any, is untouched and nothing else is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    # Not tempfile's: those are for the owner's eyes only, whatever the umask allows others.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # an interruption may come right after the move
        raise


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """What was renamed or removed in ``folder`` is so on disk, where the system can say that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, without the mark that some editors begin it with.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has more than ``MOST_BYTES``, which are not read, or is no text.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES >> 20} MiB, got more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"expected UTF-8 text, got byte {byte:#04x} at position {error.start}"
        ) from None


def parse_json(text: str) -> Any:
    """What JSON text says, whoever wrote it.

    Stricter than ``json``, so that what is read can be written, shown and compared: names once
    each, finite numbers, whole ones of 64 bits at most, strings that are Unicode, and no more than
    ``MOST_NESTED`` levels.

    Raises:
        ValueError: the text is something else.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_number,
        )
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"expected a name once, got it again among {list(values)!r:.100}")
    return values


def _whole_number(digits: str) -> int:
    # The length first: Python's own limit can be lifted, and time is quadratic in it.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"expected a whole number of 64 bits, got {digits:.40}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {digits:.40}")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        outer = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [inner for values in outer for inner in values]
    if any(isinstance(v, dict | list) for v in level):
        raise ValueError(f"expected at most {MOST_NESTED} levels, got more")
