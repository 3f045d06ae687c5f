"""The velocity protocol: what every model family offers to the search.

A model answers ``model(x [R, *dims], t [R], sample [R] int64) -> v [R, *dims]``: the flow velocity
``v = eps - x0`` at flow-coordinate states ``x`` and flow times ``t`` (float64). ``sample`` names
the item of the model's conditioning that each row belongs to, because rows are masked, chunked
and padded on their way; a shorter list of conditioning repeats cyclically.
"""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from oss_ext import arguments, cpu, words
from oss_ext.machine import free_memory
from oss_ext.noise import FLOW, Path

T = TypeVar("T")

MOST_SEED = 2**63 - 1
"""That torch's generators take as it is."""

AHEAD_BYTES = 2**29
"""Of velocities that are made before they are asked for."""

Request = tuple[Tensor, Tensor, Tensor]
"""``x``, ``t`` and ``sample`` of a call."""


Kept = Mapping[str, Sequence[Tensor] | Tensor]
"""Tensors by name: lists of them, or one that is kept a row after the other."""


There = Mapping[str, Iterable[Tensor]]
"""The same as it comes back, read when it is gone through."""


def to_kept(text: str) -> list[Tensor]:
    """A text as what is kept."""
    return [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)]


def to_text(kept: Iterable[Tensor]) -> str:
    """The text that ``to_kept`` was given."""
    (characters,) = kept
    return bytes(characters.tolist()).decode()


class Leg:
    """A part of a run that can be gone on with; here, where nothing is kept, from its beginning.

    Attributes:
        there: what ``reached`` was given last when the run was cut off, by name; empty: nothing.
    """

    def __init__(self, there: There | None = None) -> None:
        self.there = there or {}

    def take(self, how: Callable[[There], T]) -> T:
        """``how(there)``, which raises a checkpoint's own error where that is not what it takes."""
        return how(self.there)

    def pays(self, size: int) -> bool:
        """Whether to call ``reached`` now with ``size`` bytes, where the leg has not ended yet."""
        return False

    def reached(self, kept: Kept) -> None:
        """From ``kept``, and what was before the leg, the run can go on as from here."""


class Model(abc.ABC):
    """A velocity model and what the driver must know about it.

    Attributes:
        name: registry name, stored with schedules.
        shape: dims of one sample.
        data_range: R in ``PSNR = 10 log10(R^2 / MSE)``, e.g. 2 for images in [-1, 1]; None means
            the range of the teacher's final states (latents).
        dtype, device: of the states the model takes and returns.
        path: the model's own noise path.
        one_time_per_call: all rows of a call must share one ``t``.
        fixed_batch: the only number of rows a call may have, None for any.
        most_rows: of a call, as far as memory is known to go; None: nothing is known.
        slots: every call has this many rows, at one time, of the samples ``k slots, k slots + 1,
            ...``: the rows of a call are tied to items of the conditioning. None: no such tie.
        at_once: calls that are answered at the same time, and so best asked for together.
    """

    made_by = "oss_ext.models.from_callable or from_pipeline"

    name: str
    shape: tuple[int, ...]
    data_range: float | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    path: Path = FLOW
    one_time_per_call: bool = False
    fixed_batch: int | None = None
    most_rows: int | None = None
    slots: int | None = None
    at_once: int = 1

    @abc.abstractmethod
    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        """Velocity ``[R, *dims]`` at states ``x`` [R, *dims], times ``t`` [R], ``sample`` [R]."""

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """The velocities of several calls, in their order."""
        for request in requests:
            yield self(*request)

    def ahead(self, requests: Sequence[Request]) -> Sequence[Tensor] | None:
        """The velocities of calls that may be asked for later, made at once; None: not made.

        So those who know some of what they will ask for need not wait for one call after another.
        """
        return None

    def leg(self) -> Leg:
        """Begin a leg of the run, one within or after the other, that calls ``reached`` at its end.

        A checkpoint then keeps that in place of the answers that led there.
        """
        return Leg()

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of what decides the velocities, as far as the model can see it: weights, guidance,
        and of pipelines the conditioning."""

    @property
    def setting_up(self) -> bool:
        """Whether networks are called for the model's own sake just now, at no one's request."""
        return False

    def networks(self) -> Mapping[str, nn.Module]:
        """The torch modules that it evaluates, by the first part of the names of theirs; or none.

        The empty name stands for a network whose modules are called as they are in it.
        """
        return {}

    def enclosed(self) -> Sequence[nn.Module]:
        """Torch modules that it evaluates through functions of its own, and ``networks`` lacks."""
        return ()

    def times(self, steps: int) -> Tensor:
        """The model's own teacher grid, ``[steps + 1]`` float64 ascending flow times."""
        return self.path.grid(steps)

    def timesteps(self, times: Tensor) -> Tensor:
        """What the network is told at flow times ``times``, float64."""
        return self.path.model_times(times)

    def noise(self, batch: int, seed: int = 0, *, start: float | None = None) -> Tensor:
        """Initial states ``[batch, *shape]`` in flow coordinates.

        Standard normal noise, scaled as hosts of the model's path scale it. Samples are drawn one
        after the other on the CPU, so that sample ``b`` of a seed is the same whatever the batch
        and the device.

        Args:
            batch: how many.
            seed: whole number from 0 to ``MOST_SEED``.
            start: flow time of the states, the last of the teacher grid; None: that of the
                path's own grids.

        Raises:
            ValueError: bad arguments, or more samples than there is memory for.
        """
        batch = arguments.whole_number("batch", batch)
        seed = arguments.whole_number("seed", seed, least=0, most=MOST_SEED)
        needed, free = 2 * 4 * batch * math.prod(self.shape), free_memory(torch.device("cpu"))
        if free is not None and needed > free:  # the rows, and all of them
            raise ValueError(
                f"batch: expected what there is memory for, {words.size(free)}, got {batch} "
                f"samples whose noise takes {words.size(needed)}"
            )
        generator = torch.Generator("cpu").manual_seed(seed)
        rows = [  # alike whatever the process's defaults are
            cpu.randn(self.shape, generator=generator, dtype=torch.float32) for _ in range(batch)
        ]
        scale = self.path.noise_scale(self.path.span[1] if start is None else start)
        return (scale * torch.stack(rows)).to(device=self.device, dtype=self.dtype)

    def check_noise(self, noise: Tensor) -> None:
        """``noise`` is ``[B, *shape]``, finite and floating; else ``ValueError`` says how not."""
        dims = ", ".join(["B", *map(str, self.shape)])
        got: object = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        if not isinstance(noise, Tensor) or noise.dim() == 0 or noise.shape[1:] != self.shape:
            raise ValueError(f"noise: expected [{dims}] with B >= 1, got {got}")
        if noise.numel() == 0:
            raise ValueError(f"noise: expected [{dims}] with B >= 1, got {got}")
        if not noise.is_floating_point():
            raise ValueError(f"noise: expected a floating-point tensor, got {noise.dtype}")
        if noise.device.type not in ("cpu", self.device.type):
            known = str(self.device) + " or cpu" * (self.device.type != "cpu")
            raise ValueError(f"noise: expected a tensor on {known}, got {noise.device}")
        bad = ~noise.isfinite().flatten(1).all(dim=1)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"noise: expected finite values, got NaN or inf in sample {at}")


def check_output(name: str, output: object, like: Tensor, what: str, hint: str = "") -> None:
    """``ValueError`` unless ``output`` is a floating-point tensor of the shape of ``like``."""
    if not isinstance(output, Tensor):
        got = type(output).__name__
    elif output.shape != like.shape or not output.is_floating_point():
        got = f"{output.dtype} {tuple(output.shape)}"
    else:
        return
    raise ValueError(
        f"model {name!r} returned {got}, expected a floating-point {what} of its input's shape "
        f"{tuple(like.shape)}{hint}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As an attribute of torch is called, e.g. ``float32``."""
    return str(dtype).removeprefix("torch.")


def hash_of(parts: Iterable[object]) -> str:
    """16 hex digits over tensors (their bytes) and anything else (its ``repr``), in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            digest.update(flat.numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]
