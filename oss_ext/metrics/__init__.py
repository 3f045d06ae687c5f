"""Metrics by name: what a search compares with the teacher (paper table 4)."""

from __future__ import annotations

from collections.abc import Callable

from oss_ext import arguments
from oss_ext.metrics.base import Metric, Selection, Sources
from oss_ext.metrics.data import DataMetric
from oss_ext.metrics.feature import FeatureMetric
from oss_ext.metrics.state import XT, StateMetric

__all__ = [
    "METRICS", "XT", "DataMetric", "FeatureMetric", "Metric", "Selection", "Sources", "StateMetric",
    "get",
]  # fmt: skip

METRICS: dict[str, Callable[[], Metric]] = {"xt": StateMetric, "x0": DataMetric}
"""Those that need nothing but their name."""


def get(metric: str | Metric) -> Metric:
    """The metric itself, or the one called so; ``ValueError`` lists the known names."""
    if isinstance(metric, Metric):
        return metric
    return METRICS[arguments.one_of("metric", metric, tuple(METRICS))]()
