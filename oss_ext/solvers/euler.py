"""Euler in flow coordinates, which is DDIM and DPM-Solver-1 in the model's own."""

from __future__ import annotations

import torch
from torch import Tensor


class Euler:
    """``x + (t_next - t) v``; the difference is taken in float64 and rounded once."""

    name = "euler"

    def step(
        self, history: None, x: Tensor, velocity: Tensor, t: float, t_next: float
    ) -> tuple[Tensor, None]:
        return torch.add(x, velocity, alpha=t_next - t), None
