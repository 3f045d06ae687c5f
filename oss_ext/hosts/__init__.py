"""What diffusers schedulers mean, and objects that stand in for them."""

from oss_ext.hosts.base import Host
from oss_ext.hosts.reading import STATES, STOCHASTIC, UnknownScheduler, read_host
from oss_ext.hosts.stand_in import (
    StandIn,
    StepOutput,
    check_step,
    original_of,
    scheduler_of,
    stand_in,
)

__all__ = [
    "STATES",
    "STOCHASTIC",
    "Host",
    "StandIn",
    "StepOutput",
    "UnknownScheduler",
    "check_step",
    "original_of",
    "read_host",
    "scheduler_of",
    "stand_in",
]
