"""A run's model calls, made by many processes at once.

The first process runs everything: it has the states, chooses, writes. The others have the model
only, and answer the calls that they are given:

    torchrun --nproc-per-node 8 -m -- oss_ext search --pipeline DIR --max-batch 2 ...

Calls are fixed blocks of rows whatever the number of processes, and each is made as a whole by one
of them. So on like machines the result is the same, bit for bit, for any number; it has no sums
over processes whose order could matter. What is sent is a state and a velocity for an evaluation,
through PyTorch's own engine (gloo), in host memory.

There is something to share where a step has several blocks: N x samples / max_batch in a dynamic
programme, samples / max_batch in the teacher. Refinement runs one student after the other; it says
which it may run next (``ahead``), and these are run at the same time.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from oss_ext import arguments, cpu
from oss_ext.events import tell
from oss_ext.files import parse_json
from oss_ext.models.base import AHEAD_BYTES, Model, Request, check_output, dtype_name, hash_of
from oss_ext.models.evaluation import Evaluator, out_of_memory
from oss_ext.models.wrapped import Wrapped
from oss_ext.version import __version__

TOLERANCE = 1e-2
"""How far velocities of two processes may be apart, relative to their root mean square."""

AHEAD_ROUNDS = 64
"""Of calls whose velocities are kept until they are asked for, whatever memory these take."""

WAIT = timedelta(days=7)
"""For the first process to ask: it may have long work of its own. One that dies is noticed at once,
by its connections."""


ALIGNED, LONG = 64, 2**16
"""Bytes: parts of a message begin at multiples of the first; of the second, or more, it is sent in
the background."""

_ASK, _END, _ANSWER, _MEMORY = "ask", "end", "answer", "memory"


class ProcessError(RuntimeError):
    """Another process failed, is gone, or has another model; the message says which and why."""


def processes() -> int:
    """How many this run has, as ``torchrun`` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them; the first is 0."""
    return int(os.environ.get("RANK", "0"))


def choose_device() -> None:
    """``cuda`` is a GPU of this process's own, where it has one; before a model is loaded."""
    if processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def sharing(model: Model) -> Iterator[Model | None]:
    """``model`` with its calls shared, while the block lasts; ``model`` itself in a single process.

        with oss_ext.sharing(model) as shared:
            if shared is not None:
                ...  # teacher, search, compare with `shared`

    In the first process it is entered with such a model. In the others it answers calls until the
    first has left, and is entered with None then. Gradients, and what modules of the network give
    on the way, are always those of the first.

    Args:
        model: the same in every process, each with its own copy of the network.

    Raises:
        ProcessError: in the first process, where another has another model, or velocities that are
            more than ``TOLERANCE`` away, and later in the call that another process failed in or
            did not answer; in the others, where the first is gone.
    """
    arguments.of_type("model", model, Model)
    if processes() == 1:
        yield model
        return
    if not distributed.is_initialized():
        # Kept: a second one would look for the others where they were in the first.
        distributed.init_process_group("gloo", timeout=WAIT)
    group = distributed.new_group(None, WAIT, "gloo")
    others = [_Peer(number, group) for number in range(processes()) if number != rank()]
    try:
        if rank():
            _serve(model, others[0])
            yield None
        else:
            yield from _lead(model, others)
    finally:
        distributed.destroy_process_group(group)


def _lead(model: Model, others: Sequence[_Peer]) -> Iterator[Model]:
    shared = Shared(model, others)
    try:
        shared.compare()
        yield shared
    finally:
        # One that is in the middle of a call is left to notice that this process has gone.
        if all(peer.silent for peer in others):
            for peer in others:
                peer.send(_END)
                peer.finish()


class Shared(Wrapped):
    """A model whose calls are shared with the other processes."""

    def __init__(self, model: Model, others: Sequence[_Peer]) -> None:
        super().__init__(model)
        self._others = others
        self.at_once = 1 + len(others)
        self._made: dict[str, Tensor] = {}  # ahead, by the hash of the call

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        """One call alone is made here, with its gradients."""
        return self._model(x, t, sample)

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        made = [self._made.pop(hash_of(r), None) if self._made else None for r in requests]
        rest = self._rounds([r for r, v in zip(requests, made, strict=True) if v is None])
        for v in made:
            yield next(rest) if v is None else v

    def ahead(self, requests: Sequence[Request]) -> Sequence[Tensor] | None:
        names = [hash_of(request) for request in requests]
        missing = {n: r for n, r in zip(names, requests, strict=True) if n not in self._made}
        try:
            # A model may give every answer in the memory of the one before.
            velocities = [v.clone() for v in self._rounds([*missing.values()])]
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return None  # it will be the same where they are asked for, or not
        self._made |= zip(missing, velocities, strict=True)
        found = [self._made[name] for name in names]
        one = max((v.nbytes for v in found), default=1)
        most = max(AHEAD_BYTES // one, AHEAD_ROUNDS * self.at_once, len(found))
        while len(self._made) > most:  # what nobody came to ask for
            del self._made[next(iter(self._made))]
        return found

    def _rounds(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for start in range(0, len(requests), self.at_once):
            yield from self._round(requests[start : start + self.at_once])

    def _round(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """One call for each of the processes, or fewer."""
        asked = list(zip(self._others, requests[1:], strict=False))
        for peer, (x, t, sample) in asked:
            peer.send(_ASK, x=x, t=t, sample=sample)
        try:
            own = [self._model(*request) for request in requests[:1]]
        finally:  # whatever happens here, no answer is left for the next round
            heard = [peer.receive() for peer, _ in asked]
        yield from own
        for (peer, (x, _, _)), (kind, answer) in zip(asked, heard, strict=True):
            if kind == _MEMORY:
                raise torch.OutOfMemoryError(f"process {peer.number}: out of memory")
            if kind != _ANSWER:
                raise ProcessError(f"process {peer.number}: {kind}")
            yield answer["v"].to(x.device)

    def compare(self) -> None:
        """Ask whether all have the model of this process, by its name, hash and a velocity."""
        identity, own = _identity(self._model), _probe(self._model)
        scale = own.square().mean().sqrt()
        for kind, found, peer in [(*peer.receive(), peer) for peer in self._others]:
            if kind != identity:
                raise ProcessError(
                    f"process {peer.number}: expected {identity}, as the first process has it, "
                    f"got {kind}"
                )
            apart = float((found["v"] - own).square().mean().sqrt() / scale)
            if not apart <= TOLERANCE:
                raise ProcessError(
                    f"process {peer.number}: expected the velocities of the first process within "
                    f"{TOLERANCE:.0%} of their root mean square, got {apart:.2%}"
                )
            if not found["v"].equal(own):
                text = (
                    f"process {peer.number} gives velocities {apart:.1e} away from those of the "
                    "first, relative to their root mean square: the result may differ in "
                    "near-ties from that of one process"
                )
                tell("note", text=text)
                warnings.warn(text, RuntimeWarning, stacklevel=5)  # the `with`


def _serve(model: Model, first: _Peer) -> None:
    """Answer ``first`` until it is done."""
    try:
        first.send(_identity(model), v=_probe(model))
    except (ValueError, RuntimeError) as error:
        first.send(f"{type(error).__name__}: {error}")
    while True:
        kind, request = first.receive()
        if kind == _END:
            return
        try:
            x, t, sample = (request[name].to(model.device) for name in ("x", "t", "sample"))
            with torch.no_grad():
                v = model(x, t, sample)
            check_output(model.name, v, x, "velocity")
            first.send(_ANSWER, v=v)
        except (ValueError, TypeError, MemoryError, RuntimeError) as error:
            first.send(_MEMORY if out_of_memory(error) else f"{type(error).__name__}: {error}")


def _identity(model: Model) -> str:
    return f"model {model.name!r} with hash {model.fingerprint()}, oss_ext {__version__}"


def _probe(model: Model) -> Tensor:
    """Velocities at the first time of a run, float64 on the CPU."""
    rows, t = model.slots or model.fixed_batch or 1, float(model.times(2)[-1])
    return Evaluator(model, rows).at(model.noise(rows, start=t), t).double().cpu()


class _Peer:
    """The connection to a process: messages of a kind, or an error's text, with tensors.

    A message is its length, and then in one piece the length of a header, the header and the
    tensors as they are. A long one goes on its way while this process does something else; for a
    short one it would take longer to be woken.

    Attributes:
        number: its rank.
        silent: whether it owes nothing.
    """

    def __init__(self, number: int, group: Any) -> None:
        self.number, self.silent = number, False
        self._group = group
        self._sending: list[tuple[Any, Tensor]] = []  # and what has to stay until it is sent

    def send(self, kind: str, **tensors: Tensor) -> None:
        shapes = {name: [dtype_name(x.dtype), *x.shape] for name, x in tensors.items()}
        text = json.dumps([kind, shapes]).encode()
        text += b" " * (-len(text) % ALIGNED)
        parts = [cpu.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8)]
        parts += [tensor.detach() for tensor in tensors.values()]
        sizes = [_room(part) for part in parts]
        message = cpu.empty(sum(sizes), dtype=torch.uint8)
        for part, place in zip(parts, message.split(sizes), strict=True):
            place[: part.nbytes].view(part.dtype).view(part.shape).copy_(part)
        self.finish()
        for piece in (cpu.tensor([len(message)]), message):
            work = self._move(distributed.isend, piece, self.number, group=self._group)
            self._sending.append((work, piece))
        if len(message) < LONG:
            self.finish()
        self.silent = False

    def receive(self) -> tuple[str, dict[str, Tensor]]:
        size = cpu.zeros(1, dtype=torch.int64)
        self._move(distributed.recv, size, self.number, group=self._group)
        message = cpu.empty(int(size), dtype=torch.uint8)
        self._move(distributed.recv, message, self.number, group=self._group)
        self.silent = True
        begin = ALIGNED + int(message[:8].view(torch.int64))
        kind, shapes = parse_json(message[ALIGNED:begin].numpy().tobytes().decode())
        tensors = {}
        for name, (dtype, *shape) in shapes.items():
            there = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            own = message[begin : begin + there.nbytes]
            tensors[name] = own.view(there.dtype).view(shape)
            begin += _room(there)
        return kind, tensors

    def finish(self) -> None:
        """Wait until all is sent."""
        while self._sending:
            work, _ = self._sending.pop(0)
            self._move(work.wait)

    def _move(self, how: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return how(*arguments, **options)
        except RuntimeError as error:
            raise ProcessError(f"process {self.number} is gone") from error


def _room(tensor: Tensor) -> int:
    """Bytes of a message that it takes."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED
