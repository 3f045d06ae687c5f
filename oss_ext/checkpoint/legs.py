"""Files of legs: what a run goes on from without the answers that led there."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from oss_ext.checkpoint.base import BrokenError, read_record, write_record
from oss_ext.files import parse_json, replacing, sync_folder
from oss_ext.models.base import Kept

_COUNTS, _OF = "counts", "of"


def write_leg(path: Path, words: Mapping[str, str], kept: Kept) -> None:
    """A record of ``words``, then one for every tensor; on disk when it returns.

    So nothing larger than a tensor is there twice.

    Raises:
        OSError: there is no room; a file that was there before is untouched.
    """
    counts = json.dumps({name: len(tensors) for name, tensors in kept.items()})
    with replacing(path) as temporary, io.FileIO(temporary, "r+") as file:
        write_record(file, {**words, _COUNTS: counts}, {})
        for name, tensors in kept.items():
            for tensor in tensors:
                write_record(file, {_OF: name}, {name: tensor})
        os.fsync(file)
    sync_folder(path.parent)


def read_leg(path: Path) -> tuple[dict[str, str], Mapping[str, LegTensors]] | None:
    """The words, and by name the tensors; None where there is no such file.

    Raises:
        BrokenError: it is not as it was written.
    """
    try:
        file = io.FileIO(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BrokenError(str(error)) from None
    with file:
        first = read_record(file)
        if first is None:
            raise BrokenError("an empty file")
        words, places = first[0], {}
        try:
            for name, count in parse_json(words.pop(_COUNTS)).items():
                places[name] = [_skip(file, name) for _ in range(count)]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise BrokenError(str(error)) from None
        if read_record(file) is not None:
            raise BrokenError("more than was written")
    return words, {name: LegTensors(path, name, found) for name, found in places.items()}


class LegTensors:
    """Those of a name, read from the file one after the other whenever they are gone through."""

    def __init__(self, path: Path, name: str, places: list[int]) -> None:
        self._path, self._name, self._places = path, name, places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        with io.FileIO(self._path) as file:
            for place in self._places:
                file.seek(place)
                record = read_record(file)
                assert record is not None
                yield record[1][self._name]


def _skip(file: io.FileIO, name: str) -> int:
    """The place of the record that is next, which has to be a tensor called ``name``."""
    place, record = file.tell(), read_record(file)
    if record is None or record[0].get(_OF) != name or list(record[1]) != [name]:
        raise BrokenError(f"expected a record of {name!r}")
    return place
