"""Facts about the machine and the process that figures are printed with."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from oss_ext import ops
from oss_ext.ops import native
from oss_ext.version import __version__


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def configuration(device: str = "cpu") -> dict[str, Any]:
    """Device, versions and settings."""
    built = native.build_info()
    if device == "cuda":
        facts: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "compute capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "CUDA of torch": torch.version.cuda,
            "CUDA kernels": built.get("cuda_reason", native.why_not),
        }
    else:
        facts = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction set": built.get("cpu_capability", native.why_not),
            "compiler": built.get("compiler"),
        }
    return facts | {
        "backend": ops.serving(device).name,
        "oss_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
