"""What a backend of the operators is: a name, its implementations, and when it cannot serve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation of operators of ``oss_ext.ops.schema``.

    ``operators`` maps an operator's name to a callable with that operator's signature, and
    ``why_not(device)`` says why the backend cannot serve tensors on ``device`` (None: it can, but
    for the operators that are not in ``operators``).
    """

    name: str
    description: str
    operators: Mapping[str, Callable[..., Any]]
    why_not: Callable[[torch.device], str | None]

    def why_not_call(self, op: str, device: torch.device) -> str | None:
        """Why the backend cannot serve this operator on tensors of ``device``."""
        reason = self.why_not(device)
        if reason is None and op not in self.operators:
            return f"it has no {op} for {device.type}"
        return reason


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def too_old(device: torch.device) -> bool:
    """Whether it is a card that no GPU kernels run on: all of them need sm_80 or newer."""
    return (
        device.type == "cuda" and torch.cuda.is_available() and _capability(device.index) < (8, 0)
    )


def why_no_card(device: torch.device) -> str | None:
    """Why GPU kernels cannot run on a CUDA device."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if too_old(device):
        major, minor = _capability(device.index)
        return f"the kernels need a card of sm_80 or newer, this one is sm_{major}{minor}"
    return None
