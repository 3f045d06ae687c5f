"""Answers as they are kept, and what they were given to."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from oss_ext.checkpoint.base import Record
from oss_ext.models.base import dtype_name

NARROW = (torch.bfloat16, torch.float16)
"""What float32 is kept in, where that loses nothing: networks often run in 16 bits."""

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
_ANSWER, _DTYPE, _REQUEST = "answer", "dtype", "request"


def record_of(request: int, answer: Tensor | None) -> Record:
    """The record of ``answer``, or of there having been no memory for it."""
    words = {_REQUEST: f"{request:08x}"}
    if answer is None:
        return words, {}
    return words | {_DTYPE: dtype_name(answer.dtype)}, {_ANSWER: _narrow(answer.detach())}


def answer_in(record: Record) -> tuple[int, Tensor | None]:
    """Request and answer of a record; ``ValueError`` or ``KeyError`` where it is of neither."""
    words, tensors = record
    request = int(words[_REQUEST], 16)
    if _ANSWER not in tensors:
        return request, None
    return request, tensors[_ANSWER].to(_DTYPES[words[_DTYPE]])


def _narrow(answer: Tensor) -> Tensor:
    """``answer`` in the fewest bytes that lose nothing."""
    if answer.dtype != torch.float32:
        return answer
    for part in (answer.flatten()[:4096], answer):  # most are seen by a part not to fit
        found = [narrow for narrow in (part.to(dtype) for dtype in NARROW)
                 if narrow.float().view(torch.int32).equal(part.view(torch.int32))]  # fmt: skip
        if not found:
            return answer
    return found[0]


def identity(*tensors: Tensor) -> int:
    """CRC-32 of shapes, types and bytes."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(repr((tensor.dtype, tuple(tensor.shape))).encode(), value)
        flat = tensor.detach().cpu().contiguous().flatten()
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value
