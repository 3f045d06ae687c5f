"""Files of records: what a crash leaves of one is all of its records but the last.

A record is tensors with words about them: magic, length and CRC-32 of a safetensors payload, then
that. One that was left half-written, or altered, ends the file: those before it hold.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from oss_ext.files import parse_json

HEADER = struct.Struct("<8sQI")
MAGIC = b"ossansw1"
WORDS = "words"

Record = tuple[dict[str, str], dict[str, Tensor]]
"""Words and tensors."""


_UNREADABLE = (
    struct.error, ValueError, KeyError, TypeError, AttributeError, SafetensorError
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, continued or read; the message says why."""


class BrokenError(ValueError):
    """There are bytes, but no record."""


def write_record(file: io.FileIO, words: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Append a record at the file's place.

    Raises:
        OSError: there is no room; a part of the record may have been written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # As one: the order of several would be another every time.
    payload = save(held, {WORDS: json.dumps(dict(words), sort_keys=True)})
    _write(file, HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)))
    _write(file, payload)


def at_end(file: io.FileIO) -> bool:
    """Whether there is nothing after the place where ``file`` is, and stays."""
    place = file.tell()
    following = file.read(1)
    file.seek(place)
    return not following


def read_record(file: io.FileIO) -> Record | None:
    """The record at the file's place; None at the end of it.

    Raises:
        BrokenError: there is something else.
    """
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left == 0:
        return None
    try:
        magic, length, checksum = HEADER.unpack(_read(file, min(left, HEADER.size)))
        if magic != MAGIC or length > left - HEADER.size:
            raise ValueError("not a record")
        payload = _read(file, length)
        if zlib.crc32(payload) != checksum:
            raise ValueError("not a record")
        size = struct.unpack_from("<Q", payload)[0]
        words = parse_json(parse_json(payload[8 : 8 + size].decode())["__metadata__"][WORDS])
        if not all(isinstance(word, str) for word in words.values()):
            raise ValueError("not a record")
        return words, load(bytes(payload))
    except _UNREADABLE as error:
        raise BrokenError(str(error)) from None


def _write(file: io.FileIO, data: bytes) -> None:
    """All of ``data``: the system may take a part of it at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _read(file: io.FileIO, count: int) -> bytearray:
    """``count`` bytes, which are there."""
    data = bytearray(count)
    left = memoryview(data)
    while left:
        taken = file.readinto(left)
        if not taken:
            raise ValueError(f"expected {count} bytes, the file is shorter")
        left = left[taken:]
    return data
