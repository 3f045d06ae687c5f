"""Models and teachers on every kind of path, that the tests of baselines share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import SHAPE, random_case
from noise_cases import EXAMPLES
from oss_ext.baselines import Calibration
from oss_ext.models import Model, from_callable
from oss_ext.noise import Path

KINDS = ("flow_reverse", "scaled_linear", "zero_terminal_snr", "vp_continuous_999", "ve")
each_kind = pytest.mark.parametrize("path", [EXAMPLES[kind] for kind in KINDS], ids=KINDS)


def model_on(path: Path) -> Model:
    """A smooth velocity that depends on its state and, whatever the clock, on the time."""

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        clock = (t.abs() + 0.1).log()[:, None, None].to(x.dtype)
        return (0.3 * clock + x).sin() + 0.5 * x.roll(1, dims=2).tanh()

    return from_callable(velocity, SHAPE, path=path, dtype=torch.float64)


def teacher_on(path: Path, steps: int = 12, samples: int = 3) -> oss.Trajectory:
    model = model_on(path)
    return oss.teacher(model, model.noise(samples), steps)


def calibration_on(path: Path, most: int = 4) -> Calibration:
    return Calibration(model_on(path), teacher_on(path), most)


def random_calibration(seed: int, most: int = 4, **case: int) -> Calibration:
    """A random network and its teacher on an uneven grid."""
    return Calibration(*random_case("network", seed, **case), most)
