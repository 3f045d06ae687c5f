"""Noise paths of every kind, and times on them, that the tests of paths and grids share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oss_ext.noise import FlowPath, Path, VEPath, VPContinuousPath, VPPath

VP_PATHS: dict[str, VPPath] = {
    "scaled_linear": VPPath(),
    "linear": VPPath("linear", 1e-4, 0.02),
    "cosine": VPPath("cosine"),
    "zero_terminal_snr": VPPath(zero_terminal_snr=True),
    "few_timesteps": VPPath("linear", 0.01, 0.3, train_steps=40),
    "alphas_cumprod": VPPath(alphas_cumprod=[0.98 * 0.93**k for k in range(50)]),
}
EXAMPLES: dict[str, Path] = {
    "flow": FlowPath(),
    "flow_scaled": FlowPath(scale=1000.0),
    "flow_reverse": FlowPath(scale=1000.0, reverse=True),
    **VP_PATHS,
    "vp_continuous": VPContinuousPath(),
    "vp_continuous_999": VPContinuousPath(0.2, 15.0, scale=999.0, first=1e-3),
    "ve": VEPath(),
    "ve_log": VEPath(0.01, 300.0, clock="log"),
}
each_path = pytest.mark.parametrize("path", EXAMPLES.values(), ids=EXAMPLES.keys())
each_vp_path = pytest.mark.parametrize("path", VP_PATHS.values(), ids=VP_PATHS.keys())


def times_on(path: Path, seed: int, count: int = 200) -> Tensor:
    """Random flow times that the path's network knows, ascending, both ends included.

    Between the last noisy timestep and pure noise there is nothing to interpolate: none are there.
    """
    first, last = path.span
    if last == 1 and isinstance(path, VPPath):
        last = float(path.knots[-2])
    generator = torch.Generator().manual_seed(seed)
    inner = torch.rand(count, generator=generator, dtype=torch.float64)
    ends = torch.tensor([first, last, path.span[1]], dtype=torch.float64)
    return torch.cat([first + (last - first) * inner, ends]).unique()
