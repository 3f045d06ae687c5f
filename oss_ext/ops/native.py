"""The C++ kernels: the native library ``oss_ext._C``, which registers them when it is loaded.

Importing this file loads the library and never raises. Where the library is missing or does not
load, ``available`` is False, ``why_not`` says why, and the dispatcher falls back to
``oss_ext.ops.reference``.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from oss_ext.ops import schema
from oss_ext.ops.backend import Backend, why_no_card


def _load() -> tuple[ModuleType | None, str | None]:
    """The library, or the reason for having none.

    Order matters: the library links against torch's, so ``import torch`` comes first, and its
    kernels belong to the schemas that ``oss_ext.ops.schema`` defines.
    """
    if importlib.util.find_spec("oss_ext._C") is None:
        return None, "the native library was not built (OSS_NATIVE=0, or `make build` not run yet)"
    try:
        return importlib.import_module("oss_ext._C"), None
    except ImportError as error:
        return None, f"the native library did not load: {error}"


_library, why_not = _load()
available: bool = _library is not None


def build_info() -> dict[str, Any]:
    """What the native library is: an empty dict where ``available`` is False, otherwise

    ``version`` of the package it was built from, ``compiler``, ``torch`` (version of the headers),
    ``cuda`` (bool: holds CUDA kernels), ``cuda_reason`` (why or why not), ``cuda_architectures``
    (list), ``cpu_capabilities`` (list: the instruction sets it was compiled for) and
    ``cpu_capability`` (the one in use on this machine).
    """
    return dict(_library.build_info()) if _library is not None else {}


def describe() -> str:
    """``build_info`` as one line for people."""
    if not available:
        return f"no C++ kernels: {why_not}"
    info = build_info()
    cpu = ", ".join(info["cpu_capabilities"])
    cuda = ", ".join(info["cuda_architectures"]) or "none"
    return (
        f"oss_ext {info['version']}: C++ kernels {cpu} (here {info['cpu_capability']}), "
        f"CUDA kernels {cuda} ({info['cuda_reason']})"
    )


def _why_not(device: torch.device) -> str | None:
    if not available:
        return why_not
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not build_info()["cuda"]:
        return f"this build of the native library has no kernels for {device.type}"
    return why_no_card(device)


# Where the library serves a device, its kernels are the ones that the dispatcher prefers there.
BACKEND = Backend(
    name="native",
    description="C++ kernels of the native library",
    operators={name: getattr(torch.ops.oss, name) for name in schema.SCHEMAS},
    why_not=_why_not,
)
