"""What a module inside a model's network gives while the model is evaluated."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from oss_ext.models.base import Model

MOST_NAMES = 8
"""That an error lists."""


def find_module(model: Model, name: str) -> nn.Module:
    """The module called so in ``model.networks()``.

    Raises:
        ValueError: a model without torch modules, or no such module; lists the nearest names.
    """
    known = {
        at: module
        for prefix, network in model.networks().items()
        for at, module in network.named_modules(prefix=prefix)
        if at
    }
    if not known:
        raise ValueError(
            f"metric: expected a model of torch modules for the module {name!r}, got "
            f"{model.name!r}, which shows none"
        )
    if name not in known:
        outer = [at for at in known if "." not in at]
        near = difflib.get_close_matches(name, known, n=MOST_NAMES) or outer[:MOST_NAMES]
        raise ValueError(
            f"metric: expected a module of {model.name!r} such as {', '.join(near)}, got {name!r}"
        )
    return known[name]


class Hidden:
    """Keeps the outputs of a module of ``model`` while it is entered.

    Where the module is called several times in an evaluation of the model, or with several times as
    many rows, as with guidance, a row's features are all of these. The rows come first in a tensor;
    several times as many are taken to be all of them, one time after the other. Of a tuple or list
    all tensors count: blocks of transformers give those of the picture and of the text, in an order
    that differs from one family to the next.

    Args:
        model: of torch modules.
        name: of the module, see ``find_module``.

    Raises:
        ValueError: as ``find_module``; in ``take``, a module that was not called or gave something
            else than features of the rows.
    """

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name, self._module = model, name, find_module(model, name)
        self._outputs: list[Any] = []

    def __enter__(self) -> Hidden:
        self._outputs.clear()
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._model.setting_up:
            parts = output if isinstance(output, tuple | list) else [output]
            # What comes after may write into it.
            kept = [part.detach().clone() for part in parts if isinstance(part, Tensor)]
            self._outputs += kept or [output]

    def take(self, rows: int) -> Tensor:
        """Features ``[rows, F]`` of the evaluation just made; float64 as such, else float32."""
        outputs = self._outputs[:]
        self._outputs.clear()
        if not outputs:
            raise ValueError(
                f"metric: expected module {self._name!r} to be called when {self._model.name!r} is "
                "evaluated, it was not"
            )
        parts = [part for output in outputs for part in self._check(output, rows).split(rows)]
        features = torch.cat([part.reshape(rows, -1) for part in parts], dim=1)
        return features if features.dtype == torch.float64 else features.float()

    def _check(self, output: Any, rows: int) -> Tensor:
        """``output``, a tensor of ``rows`` rows or of several times as many."""
        if not isinstance(output, Tensor):
            got = type(output).__name__
        elif not output.dim() or not output.numel() or len(output) % rows:
            got = f"shape {tuple(output.shape)}"
        elif not output.is_floating_point():
            got = str(output.dtype)
        else:
            return output
        raise ValueError(
            f"metric: expected module {self._name!r} to give a floating-point tensor with features "
            f"of {rows} rows, or of a multiple, got {got}"
        )
