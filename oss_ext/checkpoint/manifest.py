"""What the run of a checkpoint depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oss_ext.checkpoint.base import CheckpointError
from oss_ext.files import parse_json, read_text, replacing

FORMAT, FORMAT_VERSION = "oss-checkpoint", 1
MANIFEST = "checkpoint.json"


def settings_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the run in ``folder`` depends on, as it was given to ``Checkpoint``.

    Raises:
        CheckpointError: there is none, or none of this version.
    """
    return _read(folder)[0]


def resumed_machine(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the run in ``folder`` was begun on.

    Raises:
        CheckpointError: there is none, or one of other settings, of which it names the first.
    """
    found, machine = _read(folder)
    for name in [*settings, *found]:
        before, now = found.get(name), settings.get(name)
        if before != now:
            raise CheckpointError(
                f"{os.fspath(folder)}: {name} was {before!r} when the run began, got {now!r}"
            )
    return machine


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
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


def write_manifest(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], machine: Mapping[str, Any]
) -> None:
    """Whole or not at all."""
    body = {"format": FORMAT, "format_version": FORMAT_VERSION}
    with replacing(Path(folder) / MANIFEST) as temporary:
        text = json.dumps(body | {"settings": settings, "machine": machine}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
