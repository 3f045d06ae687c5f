"""A teacher's run: the frozen trajectory that students are compared with."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, arrays, cpu
from oss_ext import scratch as scratch_files
from oss_ext.files import parse_json
from oss_ext.models.base import Model, hash_of
from oss_ext.noise import Path, check_grid, path_from_dict
from oss_ext.schedule import Schedule
from oss_ext.scratch import Held

FORMAT, FORMAT_VERSION = "oss-trajectory", "1"
_FACTS: dict[str, type] = {
    "model": str, "model_hash": str, "solver": str, "data_range": float, "block": int, "nfe": int,
    "seconds": float,
}  # fmt: skip
_ENDS = ("final", "noise")


def in_order(values: Sequence[float], top: int) -> tuple[int, ...]:
    """The nearest whole rows to ``values``, moved apart where they do not descend strictly from at
    most ``top`` to at least 1; there must be room."""
    rows = [min(max(round(value), 1), top) for value in values]
    for k in range(len(rows) - 1, -1, -1):  # room for those below
        rows[k] = max(rows[k], rows[k + 1] + 1 if k + 1 < len(rows) else 1)
    for k in range(len(rows)):  # and for those above
        rows[k] = min(rows[k], rows[k - 1] - 1 if k else top)
    return tuple(rows)


def noise_hash(noise: Tensor) -> str:
    """Fingerprint of the first sample of ``noise`` ``[B, *dims]``, of its first elements.

    Samples of a seed are drawn one after the other, so the first one tells seeds apart. Rounded, so
    that what another machine draws in the last bit changes nothing.
    """
    values = noise[0].flatten()[:64].double().tolist()
    return hash_of([round(16 * value) for value in values])


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States of a teacher run, index 0 the clean end.

    Attributes:
        times: ``[N+1]`` float64 on the CPU, strictly increasing.
        timesteps: ``[N]`` float64, what the network is told at ``times[1:]``.
        states: ``[N+1, B, *dims]``; ``states[N]`` is the initial noise.
        x0: the clean sample that the model saw in each of them, ``x - t v``, if that was kept;
            the final state at row 0.
        model, model_hash, solver: what made it, by name and fingerprint.
        path: the model's noise path.
        data_range: R of the PSNR: the model's, or the range of the final states.
        block: rows per model call.
        nfe: model evaluations per sample.
        seconds: wall time.
        scratch: folder of the files that arrays as large as ``states``, those of students, are in;
            None: in memory.
        outline: whether it was not run: every state is the noise, in the memory of that alone.
        ends: ``final`` and ``noise``, where ``states`` are in 16 bits and these are not.
        on_disk: whether ``states`` are those in a file that was loaded, and no memory.
    """

    times: Tensor
    timesteps: Tensor
    states: Tensor
    model: str
    model_hash: str
    path: Path
    solver: str
    data_range: float
    block: int
    nfe: int
    seconds: float
    x0: Tensor | None = None
    scratch: scratch_files.Folder = None
    outline: bool = False
    ends: tuple[Tensor, Tensor] | None = None
    on_disk: bool = False

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def samples(self) -> int:
        return self.states.shape[1]

    @property
    def final(self) -> Tensor:
        """The clean samples ``[B, *dims]``."""
        return self.states[0] if self.ends is None else self.ends[0]

    @property
    def noise(self) -> Tensor:
        """The initial states ``[B, *dims]``."""
        return self.states[-1] if self.ends is None else self.ends[1]

    def at(self, t: float) -> Tensor:
        """The states ``[B, *dims]`` at flow time t; beyond the ends those at the end.

        Between rows they are taken to be linear in flow time, as Euler steps have it.
        """
        times = self.times.tolist()
        row = min(bisect_left(times, t), self.steps)
        if row == 0 or times[row] <= t:
            return self._row(row)
        weight = (t - times[row - 1]) / (times[row] - times[row - 1])
        return torch.lerp(self._row(row - 1), self._row(row), weight)

    def _row(self, row: int) -> Tensor:
        """``[B, *dims]`` in the type of the ends."""
        if row in (0, self.steps):
            return self.noise if row else self.final
        return self.states[row].to(self.noise.dtype)

    def first(self, samples: int) -> Trajectory:
        """The same run of the first ``samples`` samples alone; views."""
        x0 = None if self.x0 is None else self.x0[:, :samples]
        ends = None if self.ends is None else (self.ends[0][:samples], self.ends[1][:samples])
        return replace(self, states=self.states[:, :samples], x0=x0, ends=ends)

    def held(self) -> list[Held]:
        """What it holds, as long as it lasts."""
        held = {"teacher": self.states, "x0": self.x0}
        there = [Held(name, x.nbytes, self.scratch) for name, x in held.items()
                 if x is not None and not self.on_disk]  # fmt: skip
        one = self.noise.nbytes
        return [*there, Held("noise", one), *[Held("final", one)] * (self.ends is not None)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, from which ``load`` makes the trajectory again.

        Raises:
            OSError: there is no room; a file that was there before is untouched.
            ValueError: the outline of a dry run.
        """
        if self.outline:
            raise ValueError("trajectory: expected one that was run, got that of a dry run")
        tensors = {"times": self.times, "timesteps": self.timesteps, "states": self.states}
        tensors |= {} if self.x0 is None else {"x0": self.x0}
        tensors |= {} if self.ends is None else dict(zip(_ENDS, self.ends, strict=True))
        facts = {name: getattr(self, name) for name in _FACTS} | {"path": self.path.to_dict()}
        words = {"format": FORMAT, "format_version": FORMAT_VERSION, FORMAT: json.dumps(facts)}
        arrays.save(path, tensors, words)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        scratch: scratch_files.Folder = None,
    ) -> Trajectory:
        """The trajectory in a file that ``save`` wrote.

        On the CPU its states stay there, and are read when they are used.

        Args:
            path: of the file.
            device: of the states, and of students that are searched with them.
            scratch: as of ``teacher``, for the states of students.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no trajectory of this version, or the device is not there; the
                message names what is wrong.
        """
        device = arguments.device("device", device)
        scratch_files.check(scratch, device)
        try:
            words, tensors = arrays.load(path)
            if words.get("format") != FORMAT or words.get("format_version") != FORMAT_VERSION:
                raise ValueError("not a trajectory of this release")
            facts = parse_json(words[FORMAT])
            own = {name: facts[name] for name in _FACTS} | {"path": path_from_dict(facts["path"])}
            made = cls(
                **own,
                times=check_grid(tensors["times"].clone()),
                timesteps=tensors["timesteps"].clone(),
                states=tensors["states"].to(device),
                x0=tensors["x0"].to(device) if "x0" in tensors else None,
                ends=_two(tensors[name].to(device) for name in _ENDS)
                if "noise" in tensors
                else None,
                scratch=scratch,
                on_disk=device.type == "cpu",
            )
            made._check()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: holds no trajectory: {error}") from None
        return made

    def _check(self) -> None:
        """``ValueError`` where what came from a file does not fit together."""
        for name, kind in _FACTS.items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise ValueError(f"{name}: expected {kind.__name__}, got {value!r:.100}")
        rows, states = len(self.times), self.states
        known = states.dim() >= 3 and len(states) == rows and states.numel() > 0
        others = [(self.x0, states.shape)] if self.x0 is not None else []
        others += [(end, states.shape[1:]) for end in self.ends or ()]
        if (
            not known
            or self.timesteps.shape != (rows - 1,)
            or any(x.shape != shape for x, shape in others)
        ):
            raise ValueError(f"states: expected {rows} rows of samples, got {tuple(states.shape)}")
        for array in (states, self.x0, *(self.ends or ())):
            if array is not None and not array.is_floating_point():
                raise ValueError(f"states: expected floating-point numbers, got {array.dtype}")
        for name, state in (("final", self.final), ("noise", self.noise)):
            if not bool(state.isfinite().all()):
                raise ValueError(f"{name}: expected finite states, got NaN or inf")

    def check_model(self, model: Model, *, outline: bool = False) -> None:
        """``ValueError`` unless ``model`` is the one that made this trajectory.

        Nor may it be an outline, unless ``outline``.
        """
        if self.outline and not outline:
            raise ValueError("trajectory: expected one that was run, got that of a dry run")
        if model.fingerprint() != self.model_hash:
            raise ValueError(
                f"model: expected the teacher's, {self.model!r} with hash {self.model_hash}, "
                f"got {model.name!r} with hash {model.fingerprint()}"
            )

    def thinned(self, stride: int) -> tuple[Trajectory, tuple[int, ...]]:
        """The same run seen at every ``stride``-th row and at the initial noise.

        Returns:
            The trajectory of those rows, views of this one's where ``stride`` divides N, and the
            rows of this one that they are: 0, stride, 2 stride, ... and N.

        Raises:
            ValueError: ``stride`` not within 1 to N.
        """
        stride = arguments.whole_number("stride", stride, most=self.steps)
        rows = (*range(0, self.steps, stride), self.steps)
        even = self.steps % stride == 0
        kept: slice | list[int] = slice(None, None, stride) if even else list(rows)
        steps = slice(stride - 1, None, stride) if even else [row - 1 for row in rows[1:]]
        seen = replace(
            self,
            times=self.times[kept],
            timesteps=self.timesteps[steps],
            states=self.states[kept],
            x0=None if self.x0 is None else self.x0[kept],
        )
        return seen, rows

    def schedule(self, indices: Sequence[int], **attributes: Any) -> Schedule:
        """A schedule over this trajectory's grid; ``attributes`` as ``Schedule`` has them."""
        return Schedule.from_indices(indices, self.times.tolist(), **self._origin(), **attributes)

    def schedule_at(self, times: Sequence[float], **attributes: Any) -> Schedule:
        """A schedule of descending flow times, on the grid or between its rows.

        It has ``indices`` only where every time is one of the grid.
        """
        grid = self.times.tolist()
        rows = {t: row for row, t in enumerate(grid)}
        if all(t in rows for t in times):
            return self.schedule([rows[t] for t in times], **attributes)
        return Schedule(
            times=tuple(times),
            teacher_times=tuple(grid),
            indices=None,
            **self._origin(),
            **attributes,
        )

    def nearest_rows(self, times: Sequence[float]) -> tuple[int, ...]:
        """The rows nearest to descending ``times``, kept apart; the last is the clean end."""
        wanted = cpu.tensor(times[:-1], dtype=torch.float64)
        rows = (self.times[:, None] - wanted).abs().argmin(dim=0).tolist()
        return (*in_order(rows, self.steps), 0)

    def _origin(self) -> dict[str, Any]:
        """What a schedule says of the teacher it was made with."""
        return {
            "teacher_timesteps": tuple(self.timesteps.tolist()),
            "noise_hash": noise_hash(self.noise),
            "model": self.model,
            "model_hash": self.model_hash,
            "path": self.path,
            "teacher_solver": self.solver,
        }


def _two(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Both, or None where there are none."""
    found = tuple(tensors)
    return (found[0], found[1]) if found else None
