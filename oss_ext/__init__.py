"""Optimal few-step sampling schedules for diffusion and flow-matching models, without retraining.

import oss_ext as oss

model = oss.models.load("digits")
teacher = oss.teacher(model, model.noise(16, seed=0), steps=200)
result = oss.search(model, teacher, steps=[5, 10])
images = oss.sample(model, model.noise(8, seed=1), result.schedule(10))
"""

from oss_ext import baselines, contest, export, metrics, models, noise, ops, solvers
from oss_ext.calibrate import calibrate
from oss_ext.checkpoint import Checkpoint, CheckpointError
from oss_ext.estimate import Estimate
from oss_ext.evaluate import compare
from oss_ext.events import following
from oss_ext.groups import estimate_groups, search_groups
from oss_ext.plan import plan
from oss_ext.refine import Refinement, exhaustive, refine
from oss_ext.result import SearchResult
from oss_ext.sampling import sample
from oss_ext.schedule import Schedule, ScheduleError
from oss_ext.search import search
from oss_ext.sharing import ProcessError, sharing
from oss_ext.teacher import teacher
from oss_ext.trajectory import Trajectory
from oss_ext.verify import verify
from oss_ext.version import __version__

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Estimate",
    "ProcessError",
    "Refinement",
    "Schedule",
    "ScheduleError",
    "SearchResult",
    "Trajectory",
    "__version__",
    "baselines",
    "calibrate",
    "compare",
    "contest",
    "estimate_groups",
    "exhaustive",
    "export",
    "following",
    "metrics",
    "models",
    "noise",
    "ops",
    "plan",
    "refine",
    "sample",
    "search",
    "search_groups",
    "sharing",
    "solvers",
    "teacher",
    "verify",
]
