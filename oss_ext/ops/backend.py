"""What a backend of the operators is: a name, its implementations, and when it cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation of every operator of ``oss_ext.ops.schema``.

    ``operators`` maps an operator's name to a callable with that operator's signature, and
    ``why_not(device)`` says why the backend cannot serve tensors on ``device`` (None: it can).
    """

    name: str
    description: str
    operators: Mapping[str, Callable[..., Any]]
    why_not: Callable[[torch.device], str | None]
