"""The network behind the bundled ``digits`` model: a small class-conditional U-Net.

``DigitsUNet`` predicts the flow-matching velocity ``v = eps - x0`` of 28 x 28 digits in [-1, 1].
It works on 2 x 2 patches at two resolutions (14, 7), one residual block each on the way down and
up around self-attention at 7 x 7. Patches rather than a 28 x 28 level, and skips that are added
rather than concatenated, because convolutions with few channels run at half speed on a CPU:
about 50 M multiply-adds in under 2 ms on one core. ``examples/train_digits.py`` trains it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 10
NULL_LABEL = NUM_CLASSES  # the extra embedding row that stands for "no label" in guidance


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features of ``1000 t``; ``t`` [R] in [0, 1] -> [R, dim]."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10_000.0) * steps / half)
    angles = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_(layer: nn.Module) -> None:
    """Zero a layer, so that the residual branch it ends starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, scaled and shifted by the embedding between the two."""

    def __init__(self, channels: int, embed: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(embed, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        zero_(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        zero_(self.out)

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(rows, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(rows, channels, height, width))


class DigitsUNet(nn.Module):
    """Velocity network: ``forward(x [R,1,28,28], t [R], label [R] int64) -> v [R,1,28,28]``."""

    def __init__(self, widths: tuple[int, int] = (56, 112), embed: int = 256) -> None:
        super().__init__()
        c1, c2 = widths
        self.embed = nn.Sequential(nn.Linear(64, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label = nn.Embedding(NUM_CLASSES + 1, embed)
        self.stem = nn.Conv2d(4, c1, 3, padding=1)
        self.down1 = ResBlock(c1, embed)
        self.to2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c2, embed)
        self.attention = Attention(c2, heads=4)
        self.mid2 = ResBlock(c2, embed)
        self.from2 = nn.Conv2d(c2, c1, 1)
        self.up1 = ResBlock(c1, embed)
        self.norm = nn.GroupNorm(8, c1)
        self.head = nn.Conv2d(c1, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        emb = F.silu(self.embed(timestep_embedding(t, 64)) + self.label(label))
        patches = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        h1 = self.down1(self.stem(patches), emb)
        h2 = self.mid2(self.attention(self.mid1(self.to2(h1), emb)), emb)
        h1 = self.up1(h1 + F.interpolate(self.from2(h2), scale_factor=2.0), emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h1))), 2)
