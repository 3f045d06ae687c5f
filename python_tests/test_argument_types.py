"""Arguments of the wrong kind: an error that names them, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import oss_ext as oss

MODEL = oss.models.load("analytic")
NOISE = MODEL.noise(2)
TEACHER = oss.teacher(MODEL, NOISE, steps=4)
SCHEDULE = TEACHER.schedule([4, 2, 0])
NETWORK: Any = torch.nn.Linear(2, 2)
NONE: Any = None

MODELS: dict[str, Callable[[], object]] = {
    "teacher": lambda: oss.teacher(NETWORK, NOISE),
    "sample": lambda: oss.sample(NETWORK, NOISE, SCHEDULE),
    "search": lambda: oss.search(NETWORK, TEACHER, 2),
    "search_groups": lambda: oss.search_groups(NETWORK, NOISE, 2),
    "estimate_groups": lambda: oss.estimate_groups(NETWORK, NOISE, 2),
    "compare": lambda: oss.compare(NETWORK, TEACHER, {"": SCHEDULE}),
    "verify": lambda: oss.verify(NETWORK, SCHEDULE),
    "refine": lambda: oss.refine(NETWORK, TEACHER, SCHEDULE),
    "exhaustive": lambda: oss.exhaustive(NETWORK, TEACHER, 2),
    "sharing": lambda: oss.sharing(NETWORK).__enter__(),
}
OTHERS: dict[str, tuple[str, Callable[[], object]]] = {
    "sample": ("schedule: expected a Schedule", lambda: oss.sample(MODEL, NOISE, NONE)),
    "search": ("trajectory: expected a Trajectory", lambda: oss.search(MODEL, NONE, 2)),
    "search_groups": ("noise: expected a Tensor", lambda: oss.search_groups(MODEL, NONE, 2)),
    "compare": ("held_out: expected a Trajectory", lambda: oss.compare(MODEL, NONE, {})),
    "compare all": ("schedules: expected a Mapping", lambda: oss.compare(MODEL, TEACHER, NONE)),
    "compare one": (
        "schedules['a']: expected a Schedule", lambda: oss.compare(MODEL, TEACHER, {"a": NONE})
    ),
    "verify": ("schedule: expected a Schedule", lambda: oss.verify(MODEL, NONE)),
    "refine": ("trajectory: expected a Trajectory", lambda: oss.refine(MODEL, NONE, SCHEDULE)),
    "refine from": ("starts: expected a Schedule", lambda: oss.refine(MODEL, TEACHER, NONE)),
    "refine from all": ("starts: expected a Schedule", lambda: oss.refine(MODEL, TEACHER, [NONE])),
    "exhaustive": ("trajectory: expected a Trajectory", lambda: oss.exhaustive(MODEL, NONE, 2)),
    "calibrate": ("schedule: expected a Schedule", lambda: oss.calibrate(TEACHER, NONE)),
    "calibrate by": ("teacher: expected a Trajectory", lambda: oss.calibrate(NONE, SCHEDULE)),
    "calibrate by all": (
        "teacher: expected a Trajectory", lambda: oss.calibrate([TEACHER, NONE], SCHEDULE)
    ),
    "export": ("schedule: expected a Schedule", lambda: oss.export.to(NONE, "text")),
    "export.attach": ("schedule: expected a Schedule", lambda: oss.export.attach(NONE, NONE)),
    "export.arguments": ("schedule: expected a Schedule", lambda: oss.export.arguments(NONE, NONE)),
    "models.load": ("name: expected a str", lambda: oss.models.load(NONE)),
}  # fmt: skip


@pytest.mark.parametrize("call", MODELS.values(), ids=MODELS)
def test_a_network_that_is_no_model_yet(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a Model \(.*from_callable.*got Linear"):
        call()


@pytest.mark.parametrize(("told", "call"), OTHERS.values(), ids=OTHERS)
def test_another_kind_of_argument(told: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}, got NoneType$"):
        call()


def test_searches_in_groups_have_one_scope() -> None:
    with pytest.raises(ValueError, match="scope: expected one of"):
        oss.search_groups(MODEL, NOISE, 2, scope="joint")
    with pytest.raises(ValueError, match="scope: expected one of"):
        oss.estimate_groups(MODEL, NOISE, 2, scope="joint")
    with pytest.raises(ValueError, match="dry_run: expected none here; estimate_groups"):
        oss.search_groups(MODEL, NOISE, 2, dry_run=True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((0, [2]), "teacher_steps: expected at least 1, got 0"),
        ((8, [9]), "steps: expected 1 to 8, got 9"),
        ((8, "9"), "steps: expected a whole number, 1 to 8, got '9'"),
        ((8, NONE), "steps: expected a whole number, 1 to 8, got None"),
        ((8, []), "steps: expected one whole number or more"),
    ],
)
def test_a_plan_is_of_steps_that_the_teacher_has(given: tuple[Any, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}"):
        oss.plan("fast", *given)


def test_a_metric_may_be_named_in_a_plan() -> None:
    assert oss.plan("dp", 8, [2], metric="x0") == oss.plan("dp", 8, 2, metric=oss.metrics.get("x0"))


@pytest.mark.parametrize("bad", [NONE, 3, "net"])
def test_a_network_is_something_to_call(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^network: expected a network\(x, t, sample\), got"):
        oss.models.from_callable(bad, (3,))
    with pytest.raises(ValueError, match=r"^scheduler: \w+ is not known"):
        oss.export.arguments(SCHEDULE, bad)
