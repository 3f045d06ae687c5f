"""A run that can be continued: the model's answers are kept on disk as they are given.

Everything that a teacher, a search or a refinement does follows from the model's answers, in their
order. So these are what a checkpoint holds. A run that was cut off begins again and takes the
answers from the file until there are no more: it ends with the same bits as an uninterrupted one,
wherever it was cut, and what runs knows nothing of it. Evaluations are the cost of a run; the rest
is done again in a small part of the time.

    folder/checkpoint.json    what the run depends on
    folder/answers.bin        records: magic, length and CRC-32 of a safetensors payload, payload

A record that a crash left half-written, or that was altered, ends the file: those before it hold.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from oss_ext.files import parse_json, read_text, replacing
from oss_ext.models.base import Model, Request
from oss_ext.models.evaluation import out_of_memory
from oss_ext.models.wrapped import Wrapped

if sys.platform != "win32":
    import fcntl

FORMAT, FORMAT_VERSION = "oss-checkpoint", 1
MANIFEST, ANSWERS = "checkpoint.json", "answers.bin"
HEADER = struct.Struct("<8sQI")
MAGIC = b"ossansw1"
SYNC_SECONDS = 10.0
"""Records reach the disk at the latest so long after they were written; the process may die at
any time, the machine loses no more than this."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, continued or read; the message says why."""


def settings_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the run in ``folder`` depends on, as it was given to ``Checkpoint``.

    Raises:
        CheckpointError: there is none, or none of this version.
    """
    return _manifest(folder)[0]


def _manifest(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and machine."""
    path = Path(folder) / MANIFEST
    try:
        body = parse_json(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: holds no unfinished run") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this package")
    version, settings = body.get("format_version"), body.get("settings")
    machine = body.get("machine")
    known = version == FORMAT_VERSION
    if not (known and isinstance(settings, dict) and isinstance(machine, dict)):
        raise CheckpointError(
            f"{path}: a checkpoint of version {version!r}, this release reads {FORMAT_VERSION}"
        )
    return settings, machine


class Checkpoint:
    """The answers of a run in ``folder``, which is made when there is a first one.

    Args:
        folder: of the checkpoint alone.
        settings: everything that the run's result depends on, as JSON has it.
        machine: what it depends on in near-ties only: device, versions, threads.
        resume: continue the run in ``folder``.

    Attributes:
        taken: answers that came from the file.
        kept: answers in the file.
        notes: what is to be said of a result of both runs: another machine, a broken file.

    Raises:
        CheckpointError: ``resume`` without a checkpoint, or with one of other settings, which the
            message names; without it, a checkpoint that is there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        machine: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.taken, self.kept = Path(folder), 0, 0
        self.notes: list[str] = []
        self._settings, self._machine = (
            json.loads(json.dumps(dict(given))) for given in (settings, machine or {})
        )
        self._file: io.FileIO | None = None
        self._replaying, self._synced = resume, time.monotonic()
        if resume:
            begun, there = _manifest(folder)
            self._check(begun)
            self._file = self._open(os.O_RDWR)
            self.notes += [
                f"{name} was {there.get(name)!r:.100} when the run began, and is {now!r:.100}: the "
                "result may differ in near-ties"
                for name, now in self._machine.items()
                if now != there.get(name)
            ]
        elif (self.folder / MANIFEST).exists():
            raise CheckpointError(
                f"{self.folder}: holds an unfinished run; resume it, or remove that folder"
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def recorded(self, model: Model) -> Model:
        """``model``, whose answers are kept here, or taken from here where they are."""
        return _Recorded(model, self)

    def close(self) -> None:
        """Everything on disk, and the folder free for another process."""
        if self._file is not None:
            os.fsync(self._file)
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """What a run that has ended does."""
        if self._file is not None:
            self.close()
            shutil.rmtree(self.folder)

    def answer(self, request: int) -> Tensor | None:
        """The next answer of the file, if it was given to ``request``; None if there is none.

        Raises:
            OutOfMemoryError: the model ran out of memory there.
        """
        if not self._replaying:
            return None
        assert self._file is not None
        place = self._file.tell()
        found = self._read(place)
        if found is not None and found[0] == request:
            self.taken, self.kept = self.taken + 1, self.kept + 1
            if found[1] is None:
                raise torch.OutOfMemoryError("out of memory, as when it was asked before")
            return found[1]
        if found is not None:
            self.notes.append(
                f"the run took another course than before after {self.taken} model calls; those "
                "after them were made again, and the result may differ in near-ties"
            )
        self._replaying = False
        self._file.seek(place)
        self._file.truncate()
        return None

    def keep(self, request: int, answer: Tensor | None) -> None:
        """Append an answer, or that there was no memory for it; returns when the system has it.

        Raises:
            CheckpointError: there is no room, or another process has the folder; what was kept
                before holds.
        """
        if self._file is None:
            self._begin()
        assert self._file is not None
        answers = {} if answer is None else {"answer": answer.cpu().contiguous()}
        payload = save(answers, {"request": f"{request:08x}"})
        place = self._file.tell()
        try:
            _write(self._file, HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)))
            _write(self._file, payload)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except BaseException as error:
            self._file.seek(place)
            self._file.truncate()
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{self.folder}: cannot keep an answer of {len(payload)} bytes: "
                    f"{error.strerror}; the {self.kept} before it are kept"
                ) from None
            raise
        self.kept += 1

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open(os.O_RDWR | os.O_CREAT)
        if (self.folder / MANIFEST).exists():
            raise CheckpointError(f"{self.folder}: another process has begun a run here")
        self._file.truncate(0)
        body = {"format": FORMAT, "format_version": FORMAT_VERSION}
        body |= {"settings": self._settings, "machine": self._machine}
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    def _open(self, flags: int) -> io.FileIO:
        """The file, for this process alone, and unbuffered: what was written outlives it."""
        try:
            file = io.FileIO(os.open(self.folder / ANSWERS, flags, 0o666), "r+")
        except OSError as error:
            raise CheckpointError(f"{self.folder / ANSWERS}: {error.strerror}") from None
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise CheckpointError(
                    f"{self.folder}: another process runs in this folder"
                ) from None
        return file

    def _check(self, found: Mapping[str, Any]) -> None:
        """``CheckpointError`` names the first setting that is another."""
        for name in [*self._settings, *found]:
            before, now = found.get(name), self._settings.get(name)
            if before != now:
                raise CheckpointError(
                    f"{self.folder}: {name} was {before!r} when the run began, got {now!r}"
                )

    def _read(self, place: int) -> tuple[int, Tensor | None] | None:
        """Request and answer of the record at ``place``; None at the end, or where it is broken."""
        assert self._file is not None
        left = os.fstat(self._file.fileno()).st_size - place
        if left == 0:
            return None
        try:
            magic, length, checksum = HEADER.unpack(_read(self._file, min(left, HEADER.size)))
            if magic != MAGIC or length > left - HEADER.size:
                raise ValueError("not a record")
            payload = _read(self._file, length)
            if zlib.crc32(payload) != checksum:
                raise ValueError("not a record")
            size = struct.unpack_from("<Q", payload)[0]
            header = parse_json(payload[8 : 8 + size].decode())
            return int(header["__metadata__"]["request"], 16), load(bytes(payload)).get("answer")
        except (struct.error, ValueError, KeyError, TypeError, SafetensorError):
            self.notes.append(
                f"the record after {self.taken} model calls is broken, as a crash leaves it; it "
                "and those after it were made again"
            )
            return None


class _Recorded(Wrapped):
    """A model whose calls go through a checkpoint."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        super().__init__(model)
        self._checkpoint = checkpoint

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        taken = 0
        for request in requests:
            answer = self._checkpoint.answer(_identity(*request))
            if answer is None:
                break
            taken += 1
            yield answer.to(request[0].device)
        asked = requests[taken:]
        answers = self._model.answers(asked)
        for request in asked:
            try:
                answer = next(answers)
            except (MemoryError, RuntimeError) as error:
                if out_of_memory(error):  # fewer rows are asked for then, and will be again
                    self._checkpoint.keep(_identity(*request), None)
                raise
            if isinstance(answer, Tensor):  # if not, whoever asked says so
                self._checkpoint.keep(_identity(*request), answer)
            yield answer


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


def _identity(*tensors: Tensor) -> int:
    """CRC-32 of shapes, types and bytes."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(repr((tensor.dtype, tuple(tensor.shape))).encode(), value)
        flat = tensor.detach().cpu().contiguous().flatten()
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value
