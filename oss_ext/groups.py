"""A search over more samples than fit at once, a group of them at a time (paper: OSS-ave)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, cpu, dp
from oss_ext.estimate import Estimate
from oss_ext.models.base import Model, Request, There
from oss_ext.models.evaluation import NonFiniteError
from oss_ext.models.wrapped import Wrapped
from oss_ext.progress import progress_bar
from oss_ext.result import SearchResult
from oss_ext.scratch import Held
from oss_ext.search import search
from oss_ext.teacher import teacher
from oss_ext.trajectory import Trajectory

GROUP = 16
"""Samples at a time, unless it is said."""


def in_groups(model: Model, noise: Tensor, group: int) -> Iterator[tuple[Part, Tensor]]:
    """``noise`` ``[B, *dims]`` in groups of samples, each with the model as it is for them.

    Raises:
        ValueError: bad arguments; a group that parts what the model evaluates together.
    """
    arguments.whole_number("group", group)
    model.check_noise(noise)
    if model.slots and group % model.slots:
        raise ValueError(
            f"group: expected a multiple of {model.slots}, which the model evaluates together, "
            f"got {group}"
        )
    for start in range(0, len(noise), group):
        yield Part(model, start), noise[start : start + group]


@arguments.takes(model=Model, noise=Tensor)
def search_groups(
    model: Model,
    noise: Tensor,
    steps: int | Sequence[int],
    *,
    group: int = GROUP,
    teach: Callable[[Model, Tensor], Trajectory] = teacher,
    progress: bool = False,
    **options: Any,
) -> SearchResult:
    """``search(scope="instance")`` over any number of samples in the memory of a group of them.

    Schedules of samples do not depend on one another, so each group has its teacher made, is
    searched, and leaves only its table behind. The paper averages the schedules of 512 samples.

    Args:
        model: the velocity model.
        noise: initial states ``[B, *dims]``.
        steps: a budget or several.
        group: samples at a time; the last group may have fewer.
        teach: makes the teacher of a group, e.g. ``functools.partial(oss_ext.teacher, steps=100)``.
        progress: show a progress bar, over samples.
        options: those of ``search``, among them ``aggregate``; ``scope`` is ``instance``.

    Returns:
        The result as of one search. Its ``trajectory`` is the first group's.

    Raises:
        ValueError: bad arguments; a group that parts what the model evaluates together.
        NonFiniteError: no finite path is left; the message names time and sample.
    """
    arguments.one_of("scope", options.pop("scope", "instance"), ("instance",))
    if options.pop("dry_run", False):
        raise ValueError("dry_run: expected none here; estimate_groups says what it takes")
    begin, samples = time.perf_counter(), len(noise)
    first: SearchResult | None = None
    tables: list[dp.Table] = []
    nfe, seconds, taught_here, peak = 0, 0.0, 0.0, 0
    with progress_bar("samples", samples, progress, unit="sample") as bar:
        for part, states in in_groups(model, noise, group):
            leg = part.leg()
            if leg.there and tables:
                table, taken, taught = leg.take(functools.partial(_there, tables[0], len(states)))
                tables.append(table)
                nfe, seconds = max(nfe, int(taken)), seconds + taught
                bar.update(len(states))
                continue
            try:
                trajectory = teach(part, states)
                found = search(part, trajectory, steps, scope="instance", **options)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}, counted from sample {part.first}") from error
            assert found.table is not None
            tables.append(found.table)
            nfe, seconds = max(nfe, found.nfe), seconds + trajectory.seconds
            taught_here += trajectory.seconds
            peak = found.peak_bytes
            if first is None:
                first = found  # with its teacher, so that the answers which made this are kept
            else:
                figures = cpu.tensor([found.nfe, trajectory.seconds], dtype=torch.float64)
                leg.reached({**found.table.kept(), "figures": figures})
            del found, trajectory  # before the next one is made
            bar.update(len(states))
    assert first is not None
    return replace(
        first,
        trajectory=replace(first.trajectory, seconds=seconds),
        samples=samples,
        table=_joined(tables),
        nfe=nfe,
        # The teachers of groups that an earlier process has searched took none of this one's time,
        # nor did the first one, if it was resumed.
        seconds=max(0.0, time.perf_counter() - begin - taught_here),
        peak_bytes=max(first.peak_bytes, peak),
    )


@arguments.takes(model=Model, noise=Tensor)
def estimate_groups(
    model: Model,
    noise: Tensor,
    steps: int | Sequence[int],
    *,
    group: int = GROUP,
    teach: Callable[..., Trajectory] = teacher,
    **options: Any,
) -> Estimate:
    """What ``search_groups`` will take, from a few calls of the model; arguments as there.

    Raises:
        ValueError: as ``search_groups``.
        NonFiniteError: the model returned NaN or inf; the message names time and sample.
    """
    arguments.one_of("scope", options.pop("scope", "instance"), ("instance",))
    part, states = next(in_groups(model, noise, group))
    outline = teach(part, states, dry_run=True)
    found = search(part, outline, steps, scope="instance", dry_run=True, **options)
    times = len(noise) / len(states)
    # The first group's teacher is kept for the result.
    first = [Held("first group's teacher", held.bytes, held.folder)
             for held in outline.held() if held.what != "noise"] if times > 1 else []  # fmt: skip
    rest = Held("noise", noise.nbytes - states.nbytes)
    stages = tuple(
        replace(s, held=(*s.held, *first, rest), seconds=times * s.seconds) for s in found.stages
    )
    return replace(found, samples=len(noise), stages=stages, table=int(times * found.table))


def _there(first: dp.Table, samples: int, kept: There) -> tuple[dp.Table, float, float]:
    """The table of a group of so many samples, beside the first group's; evaluations of its search
    and seconds of its teacher."""
    taken, taught = map(float, kept["figures"])
    shape = (first.steps, first.cost.shape[1], samples)
    return dp.Table.there(kept, shape, joint=False), taken, taught


def _joined(tables: Sequence[dp.Table]) -> dp.Table:
    """One table of all their samples."""
    orders = [table.order for table in tables if table.order is not None]
    return dp.Table(
        torch.cat([table.cost for table in tables], dim=2),
        torch.cat([table.parent for table in tables], dim=2),
        torch.cat(orders, dim=2) if orders else None,
    )


class Part(Wrapped):
    """``model``, whose first sample is sample ``first`` of the whole."""

    def __init__(self, model: Model, first: int) -> None:
        super().__init__(model)
        self.first = first

    @property
    def most_rows(self) -> int | None:
        """The whole's, so that the next group knows what there was memory for."""
        return self._model.most_rows

    @most_rows.setter
    def most_rows(self, rows: int | None) -> None:
        self._model.most_rows = rows

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        return super().answers([*map(self._of_whole, requests)])

    def ahead(self, requests: Sequence[Request]) -> Sequence[Tensor] | None:
        return super().ahead([*map(self._of_whole, requests)])

    def _of_whole(self, request: Request) -> Request:
        x, t, sample = request
        return x, t, sample + self.first
