"""Tensors made in the host's memory, whatever ``torch.set_default_device`` says.

Times, coefficients and rows are there, also where models and their states are not.
"""

from __future__ import annotations

from functools import partial

import torch

arange = partial(torch.arange, device="cpu")
as_tensor = partial(torch.as_tensor, device="cpu")
empty = partial(torch.empty, device="cpu")
full = partial(torch.full, device="cpu")
linspace = partial(torch.linspace, device="cpu")
ones = partial(torch.ones, device="cpu")
randint = partial(torch.randint, device="cpu")
randn = partial(torch.randn, device="cpu")
randperm = partial(torch.randperm, device="cpu")
tensor = partial(torch.tensor, device="cpu")
zeros = partial(torch.zeros, device="cpu")
