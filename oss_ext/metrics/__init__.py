"""Metrics by name: what a search compares with the teacher (paper table 4)."""

from __future__ import annotations

from collections.abc import Callable

from oss_ext import arguments
from oss_ext.metrics.base import AffineMetric, EvaluatedMetric, Metric, Selection, Sources
from oss_ext.metrics.data import CandidateDataMetric, DataMetric
from oss_ext.metrics.feature import FeatureMetric
from oss_ext.metrics.perceptual import PerceptualMetric
from oss_ext.metrics.state import XT, StateMetric

__all__ = [
    "METRICS", "OF_MODULES", "XT", "AffineMetric", "CandidateDataMetric", "DataMetric",
    "EvaluatedMetric", "FeatureMetric", "Metric", "PerceptualMetric", "Selection", "Sources",
    "StateMetric", "get",
]  # fmt: skip

METRICS: dict[str, Callable[[], Metric]] = {
    "xt": StateMetric,
    "x0": DataMetric,
    "x0-candidate": CandidateDataMetric,
}
"""Those that need nothing but their name."""

OF_MODULES: dict[str, Callable[[str], Metric]] = {"perceptual": PerceptualMetric}
"""Those that are called ``NAME:MODULE``, with a module of the network."""


def get(metric: str | Metric) -> Metric:
    """The metric itself, or the one called so; ``ValueError`` lists the known names."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        name, _, module = metric.partition(":")
        if name in OF_MODULES and module:
            return OF_MODULES[name](module)
    known = (*METRICS, *(f"{name}:MODULE" for name in OF_MODULES))
    return METRICS[arguments.one_of("metric", metric, known)]()
