"""Files of tensors in the safetensors layout, for those that memory has no second time.

The layout is the length of a header, that as JSON, and raw data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oss_ext.files import replacing

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"
}  # fmt: skip


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], words: Mapping[str, str]
) -> None:
    """Write floating-point tensors a row at a time, so that nothing of their size is there twice.

    Raises:
        OSError: there is no room; a file that was there before is untouched.
    """
    # As the layout wants it: the widest first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, object] = {"__metadata__": dict(words)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            for row in tensor:
                flat = row.detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The words and tensors of a safetensors file, which are read when they are used.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
