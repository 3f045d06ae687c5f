"""``--log FILE``: what a command does, for other programs and for later, as JSON lines."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from oss_ext.cli.base import PathTo, command_line
from oss_ext.events import Event, following, stage
from oss_ext.metrics import Metric
from oss_ext.sharing import rank
from oss_ext.version import __version__


class _Log:
    """Events, each a line of ``path`` as soon as it happens.

    Raises:
        UsageError: ``path`` cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what was written outlives the process.
            self._file = io.FileIO(path, "a")
        except OSError as error:
            raise click.UsageError(f"--log: cannot write {path}: {error.strerror}") from None
        self._path, self._begun = path, time.monotonic()

    def write(self, event: Event) -> None:
        """Append ``event`` with the time; where there is no room, say so and end the log."""
        if self._file.closed:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        when = {"time": now, "at": round(time.monotonic() - self._begun, 3)}
        line = json.dumps(when | event).encode() + b"\n"
        place = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            # What is not written can be missed; the run cannot.
            with contextlib.suppress(OSError):
                self._file.truncate(place)  # no half of a line
            self.close()
            click.echo(f"warning: --log: {self._path} ends here: {error.strerror}", err=True)

    def close(self) -> None:
        self._file.close()


def log_option(command: Callable[..., None]) -> Callable[..., None]:
    """``--log FILE``: the whole command is a stage, which its log tells of from end to end."""

    @click.option(
        "--log", type=PathTo(dir_okay=False), metavar="FILE",
        help="Append what happens to FILE as it does, one JSON object a line.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(*args: Any, log: Path | None, **rest: Any) -> None:
        if log is None or rank():  # the first of several processes writes
            return command(*args, **rest)
        ctx = click.get_current_context()
        settings = {p.opts[0].lstrip("-"): ctx.params[p.name] for p in ctx.command.params if p.name}
        settings |= {name: m.name for name, m in settings.items() if isinstance(m, Metric)}
        run = stage(
            f"oss {ctx.info_name}", command=command_line(), oss_ext=__version__, settings=settings
        )
        with contextlib.closing(_Log(log)) as file, following(file.write), run:
            command(*args, **rest)

    return wrapped
