"""Schedulers of diffusers take the steps that were searched, or say that they would not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("diffusers")

from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from oss_ext import Schedule, export
from oss_ext.export import ExportError
from test_export_diffusers import ATTACH, SD, flow_schedule, of_host, run


def whole_vp(solver: str = "euler", orders: tuple[int, ...] = ()) -> Schedule:
    """Four steps between whole timesteps."""
    teacher = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    return replace(of_host(teacher), solver=solver, orders=orders)


@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m", "unipc-2"])
def test_a_schedule_of_another_solver_is_refused(solver: str) -> None:
    schedule = replace(flow_schedule(1), solver=solver)
    scheduler = FlowMatchEulerDiscreteScheduler()
    expected = (
        rf"takes other steps than the '{solver}' ones .*search with solver='euler', .*or {ATTACH}"
    )
    with pytest.raises(ExportError, match=expected):
        run(schedule, scheduler)
    run(schedule, scheduler, force=True)


@pytest.mark.parametrize(("kind", "config", "solver"), [
    (DPMSolverMultistepScheduler, {}, "dpmpp-2m"),
    (HeunDiscreteScheduler, {}, "heun-sigma"),
    (DPMSolverMultistepScheduler, {"solver_type": "heun"}, None),
    (DPMSolverSinglestepScheduler, {}, None),
])  # fmt: skip
def test_hosts_with_solvers_of_their_own_say_which(
    kind: Any, config: dict[str, Any], solver: str | None
) -> None:
    expected = rf"^{kind.__name__} takes other steps than the 'euler' ones that were searched"
    expected += rf"; search with solver='{solver}', which is what it has" if solver else ""
    with pytest.raises(ExportError, match=rf"{expected}; or {ATTACH}$"):
        run(whole_vp(), kind(**SD, **config))


def test_hosts_take_every_step_in_its_usual_order() -> None:
    scheduler = DPMSolverMultistepScheduler(**SD)
    run(whole_vp("dpmpp-2m", (1, 2, 2, 1)), scheduler)
    expected = rf"takes every step of 'dpmpp-2m' in its usual order, .*--fixed-order\); or {ATTACH}"
    with pytest.raises(ExportError, match=expected):
        run(whole_vp("dpmpp-2m", (1, 2, 1, 1)), scheduler)


def test_only_solvers_of_one_evaluation_are_attached() -> None:
    schedule = replace(flow_schedule(1), solver="heun")
    expected = r"^solver: expected one of a single evaluation per step \(euler, .*\), got 'heun'"
    with pytest.raises(ExportError, match=expected):
        export.scheduled(schedule, FlowMatchEulerDiscreteScheduler())
