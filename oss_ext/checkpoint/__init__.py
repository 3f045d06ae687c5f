"""A run that can be continued: the model's answers are kept on disk as they are given.

Everything that a teacher, a search or a refinement does follows from the model's answers, in their
order. So these are what a checkpoint holds. A run that was cut off begins again and takes the
answers from the file until there are no more: it ends with the same bits as an uninterrupted one,
wherever it was cut, and what runs need know nothing of it. Evaluations are the cost of a run; the
rest is done again in a small part of the time.

What runs may say, though, where one of its legs has got to (``Model.leg``). Then that is kept in
place of the answers that led there, and the checkpoint is no larger than a few trajectories.

    folder/checkpoint.json    what the run depends on
    folder/answers.bin        records of answers
    folder/leg-N.bin          records of what the N-th leg has reached

A record that a crash left half-written, or that was altered, ends the file: those before it hold.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from oss_ext.checkpoint.answers import answer_in, identity, record_of
from oss_ext.checkpoint.base import (
    HEADER,
    MAGIC,
    BrokenError,
    CheckpointError,
    at_end,
    read_record,
    write_record,
)
from oss_ext.checkpoint.legs import LegTensors, read_leg, write_leg
from oss_ext.checkpoint.manifest import MANIFEST, resumed_machine, settings_of, write_manifest
from oss_ext.events import tell
from oss_ext.models.base import Kept, Leg, Model, Request, T, There
from oss_ext.models.evaluation import out_of_memory
from oss_ext.models.wrapped import Wrapped

if sys.platform != "win32":
    import fcntl

__all__ = ["ANSWERS", "HEADER", "MAGIC", "MANIFEST", "Checkpoint", "CheckpointError", "settings_of"]

ANSWERS = "answers.bin"
SYNC_SECONDS = 10.0
"""Records reach the disk at the latest so long after they were written; the process may die at
any time, the machine loses no more than this."""

LEAST_BYTES = 2**26
"""Of answers that are worth to be replaced before a leg has ended."""

_AFTER = "after"
_WORDS = ("legs", "written", "answers")
"""What a leg's file says of the run at that time: legs begun, files written, answers given."""


class Checkpoint:
    """The answers of a run in ``folder``, which is made when there is a first one.

    Args:
        folder: of the checkpoint alone.
        settings: everything that the run's result depends on, as JSON has it.
        machine: what it depends on in near-ties only: device, versions, threads.
        resume: continue the run in ``folder``.

    Attributes:
        taken: answers that did not have to be given again, in the files or behind legs there.
        kept: answers given so far.
        replaying: whether answers are being taken from the file, as far as is known.
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
        self.replaying, self._synced = resume, time.monotonic()
        # Legs that have begun, and files of them that were written: answers say after how many they
        # were kept, so that those which a file has replaced are known.
        self._legs, self._written = 0, 0
        self._gone = False
        if resume:
            there = resumed_machine(folder, self._settings)
            self._file = self._open(os.O_RDWR)
            self.notes += [
                f"{name} was {there.get(name)!r:.100} when the run began, and is {now!r:.100}: the "
                "result may differ in near-ties"
                for name, now in self._machine.items()
                if now != there.get(name)
            ]
        elif self.is_there():
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
            try:
                os.fsync(self._file)
            except OSError:
                if self.is_there():
                    raise
            self._file.close()
            self._file = None

    def is_there(self) -> bool:
        """Whether a run can go on from the folder."""
        return os.path.exists(self.folder / MANIFEST)  # also False where the disk is gone

    def remove(self) -> None:
        """What a run that has ended does."""
        if self._file is not None:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=self._gone)

    def answer(self, request: int) -> Tensor | None:
        """The next answer of the file, if it was given to ``request``; None if there is none.

        Raises:
            OutOfMemoryError: the model ran out of memory there.
        """
        if not self.replaying:
            return None
        assert self._file is not None
        place = self._file.tell()
        found = self._next()
        if found is not None and found[1] is None and at_end(self._file):
            found = None  # what the run ended by; there may be memory now
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
        self.replaying = False
        self._file.seek(place)
        self._file.truncate()
        self._forget_legs(self._legs)
        return None

    def keep(self, request: int, answer: Tensor | None) -> None:
        """Append an answer, or that there was no memory for it; returns when the system has it.

        Raises:
            CheckpointError: there is no room, or another process has the folder; what was kept
                before holds.
        """
        if self._gone:
            return
        if self._file is None:
            self._begin()
        assert self._file is not None
        words, tensors = record_of(request, answer)
        place = self._file.tell()
        try:
            write_record(self._file, words | {_AFTER: str(self._written)}, tensors)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except BaseException as error:
            if isinstance(error, OSError) and self._is_gone():
                return
            self._file.seek(place)
            self._file.truncate()
            if isinstance(error, OSError):
                what = "an answer" if answer is None else f"an answer of {answer.nbytes} bytes"
                raise self._no_room(what, error) from None
            raise
        self.kept += 1

    def leg(self) -> Leg:
        """The next leg of the run."""
        self._legs += 1
        number, begin = self._legs, self._place()
        there: Mapping[str, LegTensors] = {}
        try:
            found = read_leg(self._path(number)) if self.replaying else None
            if found is not None:
                legs, written, kept = (int(found[0][name]) for name in _WORDS)
                self._legs, self._written, self.taken, self.kept = legs, written, kept, kept
                there = found[1]
        except (BrokenError, KeyError, ValueError):
            self.notes.append(
                f"what was kept of part {number} of the run is broken; the part was made again"
            )
        return _Leg(self, number, begin, there)

    def pays(self, begin: int, size: int) -> bool:
        """Whether to write ``size`` bytes in place of the answers since ``begin``."""
        return self._place() - begin >= max(LEAST_BYTES, size // 2)

    def reached(self, number: int, begin: int, kept: Kept) -> None:
        """Keep what leg ``number`` has reached, in place of the answers since ``begin``.

        Raises:
            CheckpointError: there is no room; what was kept before holds.
        """
        if self._file is None or self._gone:  # in the first case nothing was asked yet
            return
        here = self._file.tell()
        if self.replaying and self._next() is not None:  # it was not kept here before
            self._file.seek(here)
            return
        words = dict(zip(_WORDS, map(str, (self._legs, self._written + 1, self.kept)), strict=True))
        try:
            write_leg(self._path(number), words, kept)
        except OSError as error:
            if self._is_gone():
                return
            raise self._no_room(f"part {number} of the run", error) from None
        self._written += 1
        self._file.seek(begin)
        self._file.truncate()
        self._forget_legs(number)

    def foreign(self, number: int) -> CheckpointError:
        """What to say where a file is whole, but of something else."""
        return CheckpointError(f"{self._path(number)}: not what this run keeps there; remove it")

    def _place(self) -> int:
        return 0 if self._file is None else self._file.tell()

    def _path(self, leg: int) -> Path:
        return self.folder / f"leg-{leg}.bin"

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open(os.O_RDWR | os.O_CREAT)
        if self.is_there():
            raise CheckpointError(f"{self.folder}: another process has begun a run here")
        self._file.truncate(0)
        self._forget_legs(0)
        write_manifest(self.folder, self._settings, self._machine)

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
        for path in self.folder.glob(".leg-*"):  # that a process was writing when it was killed
            path.unlink()
        return file

    def _next(self) -> tuple[int, Tensor | None] | None:
        """Request and answer of the record that is next; None at the end of those that hold."""
        assert self._file is not None
        try:
            record = read_record(self._file)
            if record is None or record[0][_AFTER] != str(self._written):
                return None  # in the second case a leg's file has taken its place
            return answer_in(record)
        except (BrokenError, KeyError, ValueError):
            self.notes.append(
                f"the record after {self.taken} model calls is broken, as a crash leaves it; it "
                "and those after it were made again"
            )
            return None

    def _forget_legs(self, last: int) -> None:
        """Remove the files of legs after ``last``, which are part of it or were never reached."""
        for path in self.folder.glob("leg-*.bin"):
            number = path.stem.removeprefix("leg-")
            if number.isdecimal() and int(number) > last:
                path.unlink()

    def _is_gone(self) -> bool:
        """Whether there is nothing any more that could be gone on from; then the run goes on."""
        if not self.is_there():
            text = f"{self.folder} is gone: nothing is kept from here on"
            self.notes.append(text)
            tell("note", text=text)
            self._gone, self.replaying = True, False
        return self._gone

    def _no_room(self, what: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: cannot keep {what}: {error.strerror}; the {self.kept} model calls "
            "before it are kept"
        )


class _Leg(Leg):
    """A leg that a checkpoint keeps."""

    def __init__(
        self, checkpoint: Checkpoint, number: int, begin: int, there: Mapping[str, LegTensors]
    ) -> None:
        super().__init__(there)
        self._checkpoint, self._number, self._begin = checkpoint, number, begin

    def take(self, how: Callable[[There], T]) -> T:
        try:
            return how(self.there)
        except (
            ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError
        ) as error:  # fmt: skip
            if out_of_memory(error):  # which says nothing of what is there
                raise
            raise self._checkpoint.foreign(self._number) from error

    def pays(self, size: int) -> bool:
        return self._checkpoint.pays(self._begin, size)

    def reached(self, kept: Kept) -> None:
        self._checkpoint.reached(self._number, self._begin, kept)


class _Recorded(Wrapped):
    """A model whose calls go through a checkpoint, but for those that gradients are wanted of."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        super().__init__(model)
        self._checkpoint = checkpoint

    def leg(self) -> Leg:
        return self._checkpoint.leg()

    def ahead(self, requests: Sequence[Request]) -> Sequence[Tensor] | None:
        """Not kept: they are when they are asked for, always in the same order."""
        return None if self._checkpoint.replaying else super().ahead(requests)

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        if any(tensor.requires_grad for request in requests for tensor in request):
            yield from self._model.answers(requests)
            return
        taken = 0
        for request in requests:
            answer = self._checkpoint.answer(identity(*request))
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
                    self._checkpoint.keep(identity(*request), None)
                raise
            if isinstance(answer, Tensor):  # if not, whoever asked says so
                self._checkpoint.keep(identity(*request), answer)
            yield answer
