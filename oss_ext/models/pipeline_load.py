"""A pipeline from a folder (or a hub name) and its prompts from a file: what a command line has."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oss_ext import arguments
from oss_ext.events import one_line
from oss_ext.files import read_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OFFLOADS = ("model", "sequential")
ERRORS = (OSError, TypeError, ValueError, AttributeError, KeyError, ImportError)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a UTF-8 file, one a line; empty lines do not count.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds no prompt.
    """
    try:
        lines = read_text(path).splitlines()
    except ValueError as error:
        raise ValueError(f"prompts: {path}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: expected a prompt a line in {path}, got none")
    return prompts


def import_diffusers() -> Any:
    """The module ``diffusers``; ``ValueError`` with what to install where it is missing."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            f"pipelines need diffusers ({error}); install it with: pip install 'oss_ext[diffusers]'"
        ) from None


def hide_loading_bars() -> None:
    """No progress bars while weights are loaded."""
    for library in ("diffusers", "transformers"):
        try:
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
        except ImportError:
            continue


def load_pipeline(
    folder: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    offload: str | None = None,
    lora: Sequence[str] = (),
    kind: str | None = None,
) -> Any:
    """``from_pretrained(folder)`` with weights in ``dtype`` on ``device``.

    Args:
        folder: a folder that ``save_pretrained`` wrote, or a name on the hub.
        dtype: a name in ``DTYPES``; quantised weights keep their own.
        device: where it runs.
        offload: ``model`` or ``sequential``: keep on ``device`` only what runs (accelerate).
        lora: adapters to load, files or names.
        kind: the pipeline class; None: the one that the folder names.

    Raises:
        ValueError: diffusers is missing, an unknown option, or what diffusers says of the folder.
    """
    diffusers = import_diffusers()
    arguments.one_of("dtype", dtype, DTYPES)
    if offload is not None:
        arguments.one_of("offload", offload, OFFLOADS)
    target = arguments.device("device", device)
    cls = diffusers_class(diffusers, kind, "kind") if kind else diffusers.DiffusionPipeline
    try:
        with warnings.catch_warnings():  # newer versions call it dtype, older ones do not know that
            warnings.simplefilter("ignore", FutureWarning)
            pipe = cls.from_pretrained(folder, torch_dtype=DTYPES[dtype])
    except ERRORS as error:
        raise ValueError(f"pipeline: {folder} cannot be loaded: {_said(error)}") from None
    for adapter in lora:
        try:
            pipe.load_lora_weights(adapter)
        except ERRORS as error:
            raise ValueError(f"lora: {adapter} cannot be loaded: {_said(error)}") from None
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=target)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=target)
        else:
            pipe.to(target)
    except ERRORS as error:
        where = f"offload: {offload!r} on {device}" if offload else f"device: {device}"
        raise ValueError(f"{where} is not possible: {_said(error)}") from None
    return pipe


def _said(error: Exception) -> str:
    """What an error says, and, unless it is of files, what diffusers may miss but does not name."""
    wanted = () if isinstance(error, OSError) else ("accelerate", "peft")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    return one_line(error) + (f" (not installed: {', '.join(missing)})" if missing else "")


def diffusers_class(diffusers: Any, name: Any, argument: str) -> Any:
    """The class of diffusers called ``name``; ``ValueError`` if there is none."""
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None or not hasattr(found, "from_config"):
        raise ValueError(f"{argument}: expected a class of diffusers, got {name!r}")
    return found
