"""Schedules as text: what each host is given, to the letter, and what it would not run."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from driver_cases import each_seed, random_times
from noise_cases import EXAMPLES, times_on
from oss_ext import Schedule, export
from oss_ext.export import FORMATS, ExportError, whole_grid
from oss_ext.export.base import number
from oss_ext.noise import FlowPath, Path, VEPath, VPPath

FLOW = FlowPath(1000.0)
SD = VPPath()


def make(times: list[float], path: Path = FLOW, *, free: bool = False) -> Schedule:
    """A schedule off the teacher's grid; ``free``: the teacher starts above it."""
    first = path.span[1] if free else times[0]
    assert not free or first > times[0]
    return Schedule(
        times=tuple(times), teacher_times=(0.0, first), indices=None, model="m", model_hash="h",
        path=path,
    )  # fmt: skip


HAND_MADE = make([1.0, 0.8125, 0.375, 0.1, 0.0])


def run_by(name: str, schedule: Schedule = HAND_MADE) -> Schedule:
    """``schedule``, of a solver that the host has."""
    return replace(schedule, solver=FORMATS[name].solvers(schedule.path)[0])


FREE = make([0.9, 0.5, 0.0], free=True)
VP = make([*SD.flow_times(torch.tensor([980.0, 500.0, 20.0])).tolist(), 0.0], SD)
FLOW_ONLY = [name for name, form in FORMATS.items() if form.flow_only]
SCALES = [name for name, form in FORMATS.items() if form.scales_noise]

TEXTS = {
    "comfyui": "1, 0.8125, 0.375, 0.1, 0",
    "k-diffusion": "torch.tensor([1, 0.8125, 0.375, 0.1, 0])",
    "forge": "[1, 0.8125, 0.375, 0.1, 0]",
    "sdcpp": '--sigmas "1,0.8125,0.375,0.1,0"',
    "wan": "np.array([1, 0.8125, 0.375, 0.1])",
    "open-sora": "[1, 0.8125, 0.375, 0.1, 0]",
    "invokeai": "[1, 0.8125, 0.375, 0.1, 0]",
    "lightx2v": '{"denoising_step_list": [1000, 812, 375, 100], "sample_shift": 1.0}',
    "sdnext": "1000, 812, 375, 100",
    "text": "1\n0.8125\n0.375\n0.1\n0",
    "csv": "step,time,sigma,timestep\n0,1.0,1.0,1000\n1,0.8125,0.8125,812.5\n2,0.375,0.375,375\n"
    "3,0.1,0.1,100\n4,0.0,0.0,",
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def numbers_in(text: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(text)]


# --- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_written_to_the_letter(name: str) -> None:
    assert export.to(run_by(name), name) == TEXTS[name]


STEPS = ["lightx2v", "sdnext"]  # written as timesteps
LISTS = [name for name in FORMATS if name not in ("csv", *STEPS)]


@pytest.mark.parametrize("name", LISTS)
@each_seed(2)
def test_sigmas_come_back_as_the_same_float32(name: str, seed: int) -> None:
    schedule = run_by(name, make(random_times(seed, 9).flip(0).float().tolist()))
    got = numbers_in(export.to(schedule, name))
    assert FORMATS[name].final_zero is not None
    wanted = schedule.sigmas if FORMATS[name].final_zero else schedule.sigmas[:-1]
    assert torch.equal(torch.tensor(got), torch.tensor(wanted))
    assert (0.0 in got) == FORMATS[name].final_zero


@pytest.mark.parametrize("name", [name for name in LISTS if not FORMATS[name].flow_only])
@pytest.mark.parametrize("path", ["scaled_linear", "cosine", "ve", "vp_continuous_999"])
@each_seed(1)
def test_sigmas_of_other_paths_come_back_too(name: str, path: str, seed: int) -> None:
    times = times_on(EXAMPLES[path], seed, 6).flip(0).tolist()
    schedule = make([*times, 0.0] if times[-1] > 0 else times, EXAMPLES[path])
    got = numbers_in(export.to(schedule, name, force=True))  # wherever it starts
    assert got == pytest.approx(schedule.sigmas, rel=1e-7)  # half a float32


@each_seed(1)
def test_any_number_comes_back_as_the_same_float32(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5000, generator=generator, dtype=torch.float64)
    texts = [number(value) for value in values.tolist()]
    assert torch.equal(torch.tensor(list(map(float, texts))).float(), values.float())


@each_seed(1)
def test_a_table_has_every_digit(seed: int) -> None:
    schedule = make(random_times(seed, 7).flip(0).tolist())
    rows = list(csv.DictReader(io.StringIO(export.to(schedule, "csv"))))
    assert tuple(float(row["time"]) for row in rows) == schedule.times
    assert tuple(float(row["sigma"]) for row in rows) == schedule.sigmas
    told = [float(row["timestep"]) for row in rows[:-1]]
    assert torch.equal(torch.tensor(told), torch.tensor(schedule.timesteps))
    assert rows[-1]["timestep"] == ""
    assert [int(row["step"]) for row in rows] == list(range(8))


def test_python_hosts_can_run_what_they_are_given() -> None:
    scope = {"torch": torch, "np": np}
    assert eval(export.to(HAND_MADE, "k-diffusion"), scope).dtype == torch.float32
    assert eval(export.to(run_by("wan"), "wan"), scope).tolist() == [1, 0.8125, 0.375, 0.1]
    assert json.loads(export.to(HAND_MADE, "forge")) == list(HAND_MADE.sigmas)


def test_a_part_of_a_schedule_ends_where_it_ends() -> None:
    """The final value is the end of the last step, whatever it is."""
    first, _ = HAND_MADE.split(at=0.5)
    assert export.to(first, "comfyui") == "1, 0.8125, 0.375"
    for name in ("wan", *STEPS):  # which end at 0
        with pytest.raises(
            ExportError, match=f"^{name}: this host ends every run at 0, but the .*375"
        ):
            export.to(run_by(name, first), name)


# --- whole timesteps ----------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@each_seed(2)
def test_lightx2v_makes_the_schedule_of_its_list(shift: float, seed: int) -> None:
    """``sigma = shift u / (1 + (shift - 1) u)`` with ``u = step / 1000``, as LightX2V has it."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randperm(1000, generator=generator)[:4].sort(descending=True).values + 1
    u = steps.double() / 1000
    sigmas = shift * u / (1 + (shift - 1) * u)
    given = json.loads(export.to(make([*sigmas.tolist(), 0.0]), "lightx2v", shift=shift))
    assert given == {"denoising_step_list": steps.tolist(), "sample_shift": shift}
    assert all(type(step) is int for step in given["denoising_step_list"])


def test_lightx2vs_own_list_comes_out_of_its_own_schedule() -> None:
    """Four steps of Wan 2.1's distilled models, at their shift."""
    u = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    sigmas = (5 * u / (1 + 4 * u)).tolist()
    assert sigmas[1:] == pytest.approx([0.9375, 0.8333333, 0.625])
    text = export.to(make([*sigmas, 0.0]), "lightx2v", shift=5)
    assert json.loads(text) == {"denoising_step_list": [1000, 750, 500, 250], "sample_shift": 5}


def test_whole_timesteps_of_a_vp_path_are_its_own() -> None:
    assert export.to(VP, "sdnext") == "980, 500, 20"


@pytest.mark.parametrize(("name", "shift"), [("sdnext", 1.0), ("lightx2v", 1.0), ("lightx2v", 5)])
def test_steps_that_fall_on_the_same_whole_timestep_are_refused(name: str, shift: float) -> None:
    close = make([0.9, 0.50001, 0.49999, 0.0], free=True)
    with pytest.raises(
        ExportError, match=r"^timesteps: expected 3 different whole numbers above 0"
    ):
        export.to(close, name, shift=shift)
    with pytest.raises(ExportError, match=r"^timesteps: expected 3 different"):  # no way to go on
        export.to(close, name, shift=shift, force=True)


@pytest.mark.parametrize("name", ["sdnext", "lightx2v"])
def test_a_step_that_falls_on_the_clean_end_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match=r"^timesteps: "):
        export.to(make([1.0, 0.5, 0.0004, 0.0]), name)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf, "5", None])
def test_a_shift_is_a_positive_number(shift: Any) -> None:
    with pytest.raises(ValueError, match=r"^shift: expected a positive number, got"):
        export.to(HAND_MADE, "lightx2v", shift=shift)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {*STEPS}))
def test_a_shift_is_refused_for_a_host_that_applies_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"^shift: expected 1 for {name} and a flow path, .*got 3"):
        export.to(run_by(name), name, shift=3.0)


def test_sdnext_shifts_on_flow_paths_alone() -> None:
    """diffusers' flow schedulers shift the timesteps that they are given as well."""
    steps = [int(step) for step in export.to(HAND_MADE, "sdnext", shift=3.0).split(", ")]
    assert steps == json.loads(export.to(HAND_MADE, "lightx2v", shift=3.0))["denoising_step_list"]
    with pytest.raises(ValueError, match=r"^shift: expected 1 for sdnext and a vp path, .*got 3"):
        export.to(VP, "sdnext", shift=3.0)


def test_diffusers_flow_scheduler_makes_the_schedule_of_sdnexts_steps() -> None:
    kind = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler
    grid = whole_grid(torch.linspace(0, 1, 31, dtype=torch.float64), FLOW, 3.0)
    schedule = make([*grid[[30, 21, 8, 3]].tolist(), 0.0])
    scheduler = kind(shift=3.0)
    steps = [int(step) for step in export.to(schedule, "sdnext", shift=3.0).split(", ")]
    scheduler.set_timesteps(timesteps=steps)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(schedule.sigmas).double())


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_whole_grid_is_of_a_positive_shift(shift: float) -> None:
    with pytest.raises(ValueError, match=r"^shift: expected a positive number, got"):
        whole_grid(torch.linspace(0, 1, 31, dtype=torch.float64), FLOW, shift)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_search_on_a_whole_grid_is_exported_exactly(shift: float) -> None:
    grid = whole_grid(torch.linspace(0, 1, 31, dtype=torch.float64), FLOW, shift)
    schedule = make([*grid[[30, 21, 8, 3]].tolist(), 0.0])
    u = torch.tensor(
        json.loads(export.to(schedule, "lightx2v", shift=shift))["denoising_step_list"]
    )
    u = u.double() / 1000
    sigmas = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(sigmas, torch.tensor(schedule.sigmas[:-1], dtype=torch.float64))


# --- hosts that would run something else --------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_free_start_is_refused_by_hosts_that_scale_their_noise(name: str) -> None:
    assert FREE.starts_below
    if name in SCALES:
        expected = rf"^{name}: this host scales its noise .*starts at 0.9 .*start='pinned'"
        with pytest.raises(ExportError, match=expected):
            export.to(FREE, name)
    text = export.to(FREE, name, force=True)
    assert text == export.to(make(list(FREE.times)), name, force=True)


def test_comfyui_and_its_kin_scale_their_noise() -> None:
    assert set(SCALES) == {"comfyui", "k-diffusion", "forge", "sdcpp"}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(
    ("path", "first", "less"),
    [(FLOW, 0.9876, "1.3%"), (FLOW, 0.9968, None), (SD, 14.6, None), (SD, 12.0, None),
     (SD, 4.0, "3.1%"), (VEPath(), 0.5, None)],
)  # fmt: skip
def test_a_teacher_of_more_noise_is_refused_by_hosts_that_scale_theirs(
    name: str, path: Path, first: float, less: str | None
) -> None:
    """They start from ``t`` times the noise; VP paths have ``hypot(t, 1 - t)``, flow paths 1."""
    time = first if path is FLOW else first / (1 + first)
    schedule = make([time, 0.2, 0.0], path)
    if less is None:
        assert export.to(schedule, name)
        return
    with pytest.raises(ExportError, match=f"^{name}: this host scales its noise .* {less} less"):
        export.to(schedule, name)


def test_a_free_start_on_a_vp_path_is_refused_by_sdnext() -> None:
    assert export.to(make(list(VP.times), SD), "sdnext") == "980, 500, 20"
    with pytest.raises(ExportError, match=r"^sdnext: .*start='pinned'"):
        export.to(make(list(VP.times), SD, free=True), "sdnext")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("path", ["scaled_linear", "ve"])
def test_other_paths_are_refused_by_flow_hosts(name: str, path: str) -> None:
    times = times_on(EXAMPLES[path], 3, 4).flip(0).tolist()
    schedule = make([*times, 0.0], EXAMPLES[path])
    if name in FLOW_ONLY:
        expected = (
            rf"^{name}: expected a schedule of a flow model, got one of a {schedule.path.name}"
        )
        with pytest.raises(ExportError, match=expected):
            export.to(schedule, name)
    elif not FORMATS[name].whole_timesteps:
        assert export.to(schedule, name, force=name in SCALES)  # wherever it starts


def test_wan_and_its_kin_are_flow_hosts() -> None:
    assert set(FLOW_ONLY) == {"wan", "open-sora", "invokeai", "lightx2v"}


def test_a_path_without_timesteps_is_refused_where_they_are_wanted() -> None:
    times = [sigma / (1 + sigma) for sigma in (80.0, 20.0, 5.0)]
    with pytest.raises(ExportError, match=r"^timesteps: .*, got a ve path"):
        export.to(make([*times, 0.0], VEPath()), "sdnext")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"csv"}))
def test_an_infinite_sigma_is_refused(name: str) -> None:
    path = VPPath(zero_terminal_snr=True)
    schedule = make([1.0, 0.5, 0.0], path)
    assert schedule.sigmas[0] == math.inf
    with pytest.raises(ExportError, match=rf"^{name}: "):
        export.to(schedule, name)
    assert export.to(make([0.99, 0.5, 0.0], path), name, force=True)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["comfy", "", "CSV", "diffusers"])
def test_an_unknown_format_lists_the_known_ones(name: str) -> None:
    expected = rf"^unknown format '{name}'; known formats: {', '.join(FORMATS)}$"
    with pytest.raises(ExportError, match=expected):
        export.to(HAND_MADE, name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_what_takes_it(name: str) -> None:
    form = export.get(name)
    assert form.name == name
    assert form.host
    needs = export.needs(name, FLOW)
    assert (needs.pinned, needs.whole_timesteps) == (form.scales_noise, form.whole_timesteps)


@pytest.mark.parametrize(
    ("path", "pinned", "whole"), [(FLOW, False, False), (SD, True, True), (VEPath(), True, False)]
)
def test_what_diffusers_needs_depends_on_the_path(path: Path, pinned: bool, whole: bool) -> None:
    needs = export.needs("diffusers", path)
    assert (needs.pinned, needs.whole_timesteps) == (pinned, whole)


# --- whole grids --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 200, 3000])
@pytest.mark.parametrize("path", [FLOW, SD, VPPath("cosine")])
def test_a_whole_grid_has_whole_timesteps_only(path: Path, steps: int) -> None:
    first, last = path.span
    times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    grid = whole_grid(times, path)
    told = path.model_times(grid[1:])
    torch.testing.assert_close(told, told.round(), rtol=0, atol=1e-6)
    assert len(set(told.round().tolist())) == len(told)
    assert len(grid) == min(steps + 1, len(grid))
    assert float(grid[-1]) == pytest.approx(last, rel=1e-12)
    assert float((path.model_times(times[1:])[-1] - told[-1]).abs()) <= 0.5
