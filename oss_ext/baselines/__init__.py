"""Other ways to choose steps, to compare with. A new one is a file and an entry of BASELINES."""

from __future__ import annotations

from oss_ext.baselines.ays import AYS, ays
from oss_ext.baselines.base import Baseline, Calibration, UnableError
from oss_ext.baselines.ddim import DDIM_LEADING, DDIM_TRAILING, ddim_leading, ddim_trailing
from oss_ext.baselines.dm import DM, dm
from oss_ext.baselines.exponential import EXPONENTIAL, exponential
from oss_ext.baselines.flow_shift import (
    FLOW_SHIFT,
    FLOW_SHIFT_FREE,
    flow_shift,
    flow_shift_free,
)
from oss_ext.baselines.gits import GITS, gits
from oss_ext.baselines.karras import KARRAS, karras
from oss_ext.baselines.ld3 import LD3, ld3
from oss_ext.baselines.logsnr import LOGSNR, logsnr
from oss_ext.baselines.oss import OSS_MEAN, OSS_MEDIAN, oss_mean, oss_median
from oss_ext.baselines.quadratic import QUADRATIC, quadratic
from oss_ext.baselines.time_uniform import TIME_UNIFORM, time_uniform
from oss_ext.baselines.uniform import UNIFORM, uniform

__all__ = [
    "BASELINES",
    "Baseline",
    "Calibration",
    "UnableError",
    "ays",
    "ddim_leading",
    "ddim_trailing",
    "dm",
    "exponential",
    "flow_shift",
    "flow_shift_free",
    "gits",
    "karras",
    "ld3",
    "logsnr",
    "oss_mean",
    "oss_median",
    "quadratic",
    "time_uniform",
    "uniform",
]

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        UNIFORM,
        TIME_UNIFORM,
        DDIM_LEADING,
        DDIM_TRAILING,
        QUADRATIC,
        LOGSNR,
        KARRAS,
        EXPONENTIAL,
        FLOW_SHIFT,
        FLOW_SHIFT_FREE,
        AYS,
        DM,
        GITS,
        OSS_MEDIAN,
        OSS_MEAN,
        LD3,
    )
}
"""Every baseline by name: fixed spacings, published tables, then what looks at the model."""
