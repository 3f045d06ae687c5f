"""A run folder: what was searched and judged, with what came out, as data for a page or a program.

``run.json`` holds everything in words and numbers, ``arrays.safetensors`` the tensors, and
``schedules/`` every schedule as a file of its own, to be used elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from oss_ext.events import tell
from oss_ext.files import parse_json, read_text, replacing
from oss_ext.schedule import Schedule, ScheduleError

FORMAT = "oss-run"
FORMAT_VERSION = 1
RUN, ARRAYS, SCHEDULES = "run.json", "arrays.safetensors", "schedules"


class RunError(ValueError):
    """A folder that holds no valid run; the message says which and why."""


@dataclass(frozen=True)
class Contender:
    """A way to choose steps and what came of it.

    Attributes:
        name: unique within the run, as tables and plots show it, e.g. ``uniform 10``.
        method: name of the baseline, or ``fast``, ``balanced``, ``best``, ``dp``, ``file``.
        steps: the budget.
        schedule: None where the method was unable.
        seconds: wall time of finding it, the teacher not included.
        note: why there is no schedule, or a remark.
        file: where in the run folder its schedule is, never outside of it; by its name if empty.
        amplitude: whether it was judged with amplitude calibration.

    Raises:
        RunError: naming the attribute that is not as it says here.
    """

    name: str
    method: str
    steps: int
    schedule: Schedule | None
    seconds: float = 0.0
    note: str = ""
    file: str = ""
    amplitude: bool = False

    def __post_init__(self) -> None:
        if not self.file and self.schedule is not None:
            object.__setattr__(self, "file", f"{SCHEDULES}/{file_name(self.name)}.json")
        _check_kinds(self, {"name": str, "method": str, "steps": int, "seconds": float,
                            "note": str, "file": str, "amplitude": bool})  # fmt: skip
        inside = PureWindowsPath(self.file)  # which knows both kinds of slashes
        if inside.anchor or ".." in inside.parts:
            raise RunError(f"file: expected a path within the run folder, got {self.file!r:.200}")


@dataclass(frozen=True, eq=False)
class Run:
    """What a search or a comparison did.

    Attributes:
        command: that makes it again.
        created: when it ended, ISO 8601 with the offset from UTC.
        machine: device, threads, versions, ... in words.
        model: its name, as in its schedules.
        data_range: R of the PSNR.
        teacher_steps, teacher_nfe, teacher_seconds: of the calibration teacher.
        calibration, held_out: numbers of samples; 0 held out where nothing was judged.
        peak_bytes: peak memory of the process or of the GPU's allocator.
        contenders: what was compared, in the order of tables.
        mse: ``[contenders, held_out]`` float64, final errors; NaN where a method was unable. None
            where nothing was judged.
        along: by contender, ``[steps]`` float64: the geometric mean over the held-out samples of
            the mean squared distance to the teacher after every step.
        quantiles: by contender whose schedule has an amplitude, ``[2, steps + 1, 2]`` float64: of
            its states and the teacher's, as ``Score`` has them.
        images: by contender, and ``teacher``: final states ``[shown, *dims]`` of the same noise.
        table: ``[M, N + 1]`` float64, cost of the joint dynamic programme after k steps at a row
            (geometric mean over the samples), inf where there is none; None without one.
        spread: by number of steps, int64 ``[calibration, steps + 1]``: the rows that every
            sample's own search takes.

    Raises:
        RunError: naming the attribute that is not as it says here.
    """

    command: str
    created: str
    machine: dict[str, str]
    model: str
    data_range: float
    teacher_steps: int
    teacher_nfe: int
    teacher_seconds: float
    calibration: int
    held_out: int
    peak_bytes: int
    contenders: tuple[Contender, ...]
    mse: Tensor | None = None
    along: dict[str, Tensor] = field(default_factory=dict)
    quantiles: dict[str, Tensor] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    table: Tensor | None = None
    spread: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kinds(self, _PLAIN)
        if not all(type(fact) is str for fact in self.machine.values()):
            raise RunError(f"machine: expected words, got {self.machine!r:.200}")
        names = [c.name for c in self.contenders]
        if len(set(names)) < len(names):
            raise RunError(f"contenders: expected a name for each, got {names!r:.200}")
        files = [c.file for c in self.contenders if c.schedule is not None]
        if len(set(files)) < len(files):
            raise RunError(f"contenders: expected a file for each schedule, got {files!r:.200}")
        _check_shape("mse", self.mse, len(self.contenders), self.held_out)
        _check_shape("table", self.table, None, None)
        for name, values in self.along.items():
            _check_shape(f"along/{name}", values, None)
        for name, values in self.quantiles.items():
            _check_shape(f"quantiles/{name}", values, 2, None, 2)
        for steps, rows in self.spread.items():
            _check_shape(f"spread/{steps}", rows, self.calibration, steps + 1, dtype=torch.int64)
        for name, values in self.images.items():
            if values.dim() < 2 or not values.is_floating_point():
                raise RunError(f"images/{name}: expected [shown, *dims], got {_is(values)}")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; what else is in it stays."""
        folder = Path(folder)
        files = [c.file for c in self.contenders if c.schedule is not None]
        contenders = []
        for contender in self.contenders:
            entry = {f.name: getattr(contender, f.name) for f in fields(contender)}
            del entry["schedule"]
            if contender.schedule is not None:
                (folder / contender.file).parent.mkdir(parents=True, exist_ok=True)
                contender.schedule.save(folder / contender.file)
            contenders.append(entry)
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _PLAIN}
        arrays = {f"along/{name}": value for name, value in self.along.items()}
        arrays |= {f"quantiles/{name}": value for name, value in self.quantiles.items()}
        arrays |= {f"images/{name}": value for name, value in self.images.items()}
        arrays |= {f"spread/{steps}": value for steps, value in self.spread.items()}
        arrays |= {"mse": self.mse} if self.mse is not None else {}
        arrays |= {"table": self.table} if self.table is not None else {}
        with replacing(folder / ARRAYS) as temporary:
            tensors = {name: value.cpu().contiguous() for name, value in arrays.items()}
            temporary.write_bytes(save(tensors))  # save_file hides its file from other users
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **plain}
        # Written last: a folder with a run.json is whole.
        with replacing(folder / RUN) as temporary:
            text = json.dumps(body | {"contenders": contenders}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        tell("wrote", files=[str(folder / name) for name in (*files, ARRAYS, RUN)])

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Run:
        """Read a folder that ``save`` wrote.

        Raises:
            OSError: a file cannot be read.
            RunError: the folder holds no valid run of this version.
        """
        folder = Path(folder)
        body = _read_json(folder / RUN)
        try:
            contenders = tuple(_contender(folder, entry) for entry in body["contenders"])
            arrays = load_file(folder / ARRAYS)
            run = cls(
                **{name: body[name] for name in _PLAIN},
                contenders=contenders,
                mse=arrays.get("mse"),
                along=_under("along/", arrays),
                quantiles=_under("quantiles/", arrays),
                images=_under("images/", arrays),
                table=arrays.get("table"),
                spread={int(name): value for name, value in _under("spread/", arrays).items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{folder / RUN}: missing or of the wrong kind: {error}") from None
        except (SafetensorError, ScheduleError, ValueError) as error:
            raise RunError(f"{folder}: {error}") from None
        return run


_PLAIN: dict[str, type] = {
    "command": str, "created": str, "machine": dict, "model": str, "data_range": float,
    "teacher_steps": int, "teacher_nfe": int, "teacher_seconds": float, "calibration": int,
    "held_out": int, "peak_bytes": int,
}  # fmt: skip


_EXPECTED = {
    str: "a string", dict: "an object", bool: "true or false", int: "a whole number >= 0",
    float: "a number >= 0",
}  # fmt: skip


def _check_kinds(owner: Contender | Run, kinds: dict[str, type]) -> None:
    """Words are words, and numbers are finite and not below 0."""
    for name, kind in kinds.items():
        value = getattr(owner, name)
        right = type(value) is kind or (kind is float and type(value) is int)
        if kind in (int, float):
            right = right and 0 <= value <= sys.float_info.max
        if not right:
            raise RunError(f"{name}: expected {_EXPECTED[kind]}, got {value!r:.200}")


def _check_shape(
    name: str, values: Tensor | None, *shape: int | None, dtype: torch.dtype = torch.float64
) -> None:
    """``values`` are absent or of this shape, None being any size."""
    if values is None:
        return
    fits = len(shape) == values.dim() and all(
        size in (None, got) for size, got in zip(shape, values.shape, strict=True)
    )
    if not fits or values.dtype != dtype:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise RunError(f"{name}: expected {dtype} [{sizes}], got {_is(values)}")


def _is(values: Tensor) -> str:
    return f"{values.dtype} {list(values.shape)}"


def contender_name(method: str, steps: int | str) -> str:
    """What a method's schedule of so many steps is called."""
    return f"{method} {steps}"


def file_name(name: str) -> str:
    """The name of a contender or a model as one for a file, without its ending."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "schedule"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = parse_json(read_text(path))
    except ValueError as error:
        raise RunError(f"{path}: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise RunError(f"{path}: not a run of this package")
    if body.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{path}: a run of version {body.get('format_version')!r:.100}, this release reads "
            f"{FORMAT_VERSION}"
        )
    return body


def _contender(folder: Path, entry: dict[str, Any]) -> Contender:
    contender = Contender(**entry, schedule=None)  # says that the file is one to be read
    file = contender.file
    return replace(contender, schedule=Schedule.load(folder / file)) if file else contender


def _under(prefix: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)
    }
