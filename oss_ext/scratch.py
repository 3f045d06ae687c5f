"""Arrays as large as a trajectory: in memory, or in files that the system pages in and out."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Folder = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Held:
    """What a stage of a search holds at its peak, as those who allocate it say beforehand.

    Attributes:
        what: what it is.
        bytes: of it.
        folder: of the files that it is in; None: in memory.
        device: whose memory that is; None: that of the trajectory.
    """

    what: str
    bytes: int
    folder: Folder = None
    device: torch.device | None = None


def check(folder: Folder, device: torch.device) -> None:
    """``ValueError`` unless arrays on ``device`` can be in ``folder``."""
    if folder is not None and device.type != "cpu":
        raise ValueError(f"scratch: expected noise on the CPU (noise.cpu()), got it on {device}")


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, folder: Folder) -> Tensor:
    """An array of undefined values; with ``folder``, in a file there that has no name.

    The file goes with the array, and with the process, however that ends.

    Raises:
        OSError: there is no such folder, or not as much room in it.
    """
    if folder is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # A disk that is full says so now; later it could only kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(tuple(shape))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} for {size} bytes", str(folder)) from None
