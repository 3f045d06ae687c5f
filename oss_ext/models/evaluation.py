"""Model calls in fixed blocks: counted, checked, and the same bits wherever they are made.

A row's bits depend on the batch it is evaluated in. So every call of a run has the same number of
rows: the last block of a request is filled up by repeating its last row. Teacher, search and
replay then see equal velocities for equal states. Only where a call runs out of memory are there
fewer rows from then on.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from oss_ext import arguments, cpu
from oss_ext.events import tell
from oss_ext.models.base import Kept, Leg, Model, Request, T, There, check_output
from oss_ext.scratch import Held


class NonFiniteError(ValueError):
    """A model returned NaN or inf where the result depends on it."""


class Evaluator:
    """Evaluates a model at rows of a state table.

    Args:
        model: the velocity model.
        samples: B, the number of samples of the run.
        max_batch: rows per call; None takes B. A model's ``slots`` or ``fixed_batch`` go before it,
            and it is no more than its ``most_rows``.
        on_progress: called with the number of rows done after every call.

    Attributes:
        block: rows per call; halved, with a warning, where one runs out of memory.
        nfe: model evaluations so far, in rows asked for (filling is not counted).
        first_bad: sample to the first ``t`` at which it came back with NaN or inf.
    """

    def __init__(
        self,
        model: Model,
        samples: int,
        max_batch: int | None = None,
        on_progress: Callable[[int], object] = lambda rows: None,
    ) -> None:
        if max_batch is not None:
            max_batch = arguments.whole_number("max_batch", max_batch)
        self.model = model
        wanted = max_batch or samples
        fits = min(wanted, model.most_rows or wanted)
        self.block = model.slots or model.fixed_batch or fits
        self.nfe = 0
        self.first_bad: dict[int, float] = {}
        self._on_progress = on_progress

    def held(self, dtype: torch.dtype) -> list[Held]:
        """What a call for states of ``dtype`` holds beside what the model takes within."""
        elements = self.block * torch.Size(self.model.shape).numel()
        own = 2 * self.model.dtype.itemsize  # what the model is given, and its answer
        other = 0 if dtype == self.model.dtype else dtype.itemsize
        return [Held("model call", elements * (own + other), device=self.model.device)]

    def fill(
        self,
        out: Tensor,
        states: Tensor,
        times: Tensor,
        rows: Tensor,
        samples: Tensor | None = None,
        then: Callable[[Tensor, Tensor], object] = lambda rows, places: None,
        looks_inside: bool = False,
    ) -> None:
        """Write ``out[i, b] = v(states[i, b], times[i])`` for every ``(i, b)`` in ``rows``.

        Args:
            out: ``[T, B, *dims]``; other rows are left alone.
            states: ``[T, B, *dims]``, on the model's device or the CPU.
            times: ``[T]`` float64 on the CPU.
            rows: ``[R, 2]`` int64 on the CPU.
            samples: ``[B]`` int64 on the CPU, which of the run's samples each column is; None: the
                column's own number.
            then: called after every model call with those of ``rows`` that it was made for, and
                their places among the rows of the call.
            looks_inside: ``then`` takes what a module gave in the call. So calls are made one at a
                time, in this process, and one that runs out of memory is not made again: what it
                left could not be told from what the next one gives.
        """
        samples = cpu.arange(states.shape[1]) if samples is None else samples
        at_once = 1 if looks_inside else self.model.at_once
        blocks = deque(self._blocks(rows, samples))
        while blocks:
            asked = [self._request(block, states, times, samples)
                     for block in islice(blocks, at_once)]  # fmt: skip
            answers = self.model.answers([request for _, request in asked])
            for place, (x, _, _) in asked:
                try:
                    with torch.no_grad():
                        v = next(answers)
                except (MemoryError, RuntimeError) as error:
                    if looks_inside or not (out_of_memory(error) and self._halve()):
                        raise
                    blocks = deque(self._blocks(torch.cat([*blocks]), samples))
                    break
                check_output(self.model.name, v, x, "velocity")
                block = blocks.popleft()
                self._take(block, self._rows(v, place), out, times, samples)
                then(block, place)
                self._on_progress(len(block))

    def at(self, x: Tensor, t: float, samples: Tensor | None = None) -> Tensor:
        """``v(x, t)`` for one state per sample, ``[B, *dims]``, at one time.

        Args:
            x: ``[B, *dims]``.
            t: flow time.
            samples: which of the run's samples the rows are; None: the first B.

        Raises:
            NonFiniteError: the model returned NaN or inf, naming time and sample.
        """
        rows = torch.stack([cpu.zeros(len(x), dtype=torch.int64), cpu.arange(len(x))], dim=1)
        out = torch.empty_like(x)[None]
        before, self.first_bad = self.first_bad, {}
        self.fill(out, x[None], cpu.tensor([t], dtype=torch.float64), rows, samples)
        bad = self.describe_bad()
        self.first_bad = {**before, **self.first_bad, **before}  # the first of a sample stays
        if bad:
            raise NonFiniteError(bad)
        return out[0]

    def ahead(self, asked: Sequence[tuple[Tensor, float, Tensor]]) -> list[Tensor] | None:
        """What ``at`` will give for some of its arguments, made at the same time and not counted.

        None where the model makes no calls at once, or they are not a call each.
        """
        requests, places = [], []
        for x, t, samples in asked:
            rows = torch.stack([cpu.zeros(len(x), dtype=torch.int64), cpu.arange(len(x))], 1)
            block, *more = self._blocks(rows, samples)
            if more:
                return None
            times = cpu.tensor([t], dtype=torch.float64)
            place, request = self._request(block, x[None], times, samples)
            requests.append(request)
            places.append(place)
        with torch.no_grad():
            answers = self.model.ahead(requests)
        if answers is None:
            return None
        return [self._rows(v, place).to(x)
                for v, place, (x, _, _) in zip(answers, places, asked, strict=True)]  # fmt: skip

    def leg(self) -> Leg:
        """A leg of the run; what this evaluator has counted is kept, and set, with the rest."""
        return _Counted(self, self.model.leg())

    def counted(self) -> dict[str, Tensor]:
        """What ``go_on`` takes."""
        bad = cpu.tensor(list(self.first_bad.items()), dtype=torch.float64)
        bad = bad.reshape(len(self.first_bad), 2)
        return {_COUNTS: cpu.tensor([self.nfe, self.block]), _BAD: bad}

    def go_on(self, there: There) -> None:
        """From what ``counted`` said."""
        nfe, block = map(int, there[_COUNTS])
        if nfe < self.nfe or block < 1:
            raise ValueError(f"expected evaluations and rows of a call, got {nfe} and {block}")
        if block < self.block:
            self._take_fewer(block)
        self.first_bad = {int(sample): float(t) for sample, t in there[_BAD]}
        self._on_progress(nfe - self.nfe)
        self.nfe = nfe

    def _halve(self) -> bool:
        """Half as many rows per call, in this run and in the model's next; False if there cannot
        be fewer."""
        if self.model.slots or self.model.fixed_batch or self.block == 1:
            return False
        self._take_fewer(self.block // 2)
        return True

    def _take_fewer(self, rows: int) -> None:
        before, self.block = self.block, rows
        self.model.most_rows = rows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = (
            f"model {self.model.name!r} ran out of memory with {before} rows in a call; there are "
            f"{rows} from here on, which changes results in near-ties"
        )
        tell("note", text=text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)

    def describe_bad(self, sample: int | None = None) -> str:
        """What ``first_bad`` says of ``sample``, or of the first there is; empty if nothing."""
        if sample is None:
            sample = next(iter(self.first_bad), -1)
        if sample not in self.first_bad:
            return ""
        t = self.first_bad[sample]
        return f"model {self.model.name!r} returned NaN or inf at t = {t:.6g} for sample {sample}"

    def _blocks(self, rows: Tensor, samples: Tensor) -> Iterator[Tensor]:
        """``rows`` in the groups that one call each may serve."""
        slots = self.model.slots
        if not len(rows):
            return  # nothing asked for is no call, not one of filling alone
        if slots:
            keys = torch.stack([rows[:, 0], samples[rows[:, 1]] // slots], dim=1)
        elif self.model.one_time_per_call:
            keys = rows[:, :1]
        else:
            yield from rows.split(self.block)
            return
        unique, group = keys.unique(dim=0, return_inverse=True)
        for g in range(len(unique)):
            yield from rows[group == g].split(self.block)

    def _request(
        self, block: Tensor, states: Tensor, times: Tensor, samples: Tensor
    ) -> tuple[Tensor, Request]:
        """The place of every row of ``block`` in a call, and the call."""
        place, taken, sample = self._arrange(block, samples)
        row, column = taken.to(states.device).unbind(1)
        device = self.model.device  # the states may be in the host's memory
        x = states[row, column].to(device, self.model.dtype)
        return place, (x, times[taken[:, 0]].to(device), sample.to(device))

    def _take(self, block: Tensor, v: Tensor, out: Tensor, times: Tensor, samples: Tensor) -> None:
        """``v``, the velocities of ``block``, to ``out``; counted, NaN and inf noted."""
        for at in _not_finite(v):
            i, b = block[at].tolist()
            self.first_bad.setdefault(int(samples[b]), float(times[i]))
        row, column = block.to(out.device).unbind(1)
        out[row, column] = v.to(out)
        self.nfe += len(block)

    def _rows(self, v: Tensor, place: Tensor) -> Tensor:
        """Those of a call's answer that are at ``place``, as ``_arrange`` has it."""
        if not self.model.slots:
            return v[: len(place)]
        return v[place.to(v.device)]

    def _arrange(self, block: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where in a full call the rows of ``block`` go.

        Returns:
            The place of every row of ``block``; the row whose state stands at every place, and
            the sample it is evaluated for, ``[self.block, 2]`` and ``[self.block]``.
        """
        if not self.model.slots:
            taken = torch.cat([block, block[-1:].expand(self.block - len(block), 2)])
            return cpu.arange(len(block)), taken, samples[taken[:, 1]]
        place = samples[block[:, 1]] % self.block
        taken = block[:1].repeat(self.block, 1)
        taken[place] = block
        first = int(samples[block[0, 1]]) // self.block * self.block
        return place, taken, cpu.arange(first, first + self.block)


_COUNTS, _BAD = "counts", "bad"


class _Counted(Leg):
    """A leg with what an evaluator has counted."""

    def __init__(self, evaluator: Evaluator, leg: Leg) -> None:
        super().__init__(leg.there)
        self._evaluator, self._leg = evaluator, leg
        if self.there:
            leg.take(evaluator.go_on)

    def take(self, how: Callable[[There], T]) -> T:
        return self._leg.take(how)

    def pays(self, size: int) -> bool:
        return self._leg.pays(size)

    def reached(self, kept: Kept) -> None:
        self._leg.reached({**kept, **self._evaluator.counted()})


def _not_finite(v: Tensor) -> list[int]:
    """Rows with NaN or inf."""
    # A sum that is finite has finite terms only. It reads once and makes nothing of its size, where
    # the exact question takes ten times as long and several times the memory.
    total = v.flatten(1).sum(dim=1, dtype=torch.promote_types(v.dtype, torch.float32))
    if bool(total.isfinite().all()):
        return []
    rows: list[int] = (~v.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return rows


def out_of_memory(error: Exception) -> bool:
    """Also of the CPU's allocator, which says so in words only."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: " in str(error)
