"""Published schedules: what they say, and that they behave like one's own."""

from __future__ import annotations

import pytest
import torch

from oss_ext import Schedule, export, presets
from oss_ext.noise import FlowPath, VPPath, flow_grid
from oss_ext.report import schedule_table

STEPS = {
    "flux-oss-10": 10,
    "wan-oss-20": 20,
    "chroma-oss-40": 40,
    "sd1-ays-10": 10,
    "sdxl-ays-10": 10,
    "svd-ays-10": 10,
}


def test_the_presets_are_those_that_are_documented() -> None:
    assert presets.names() == list(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_a_preset_is_a_schedule_like_any_other(name: str, tmp_path: object) -> None:
    preset = presets.load(name)
    schedule = preset.schedule
    assert schedule.steps == STEPS[name]
    assert (schedule.times[-1], schedule.sigmas[-1]) == (0.0, 0.0)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert f"{STEPS[name]} steps, {schedule.method}" in schedule_table(schedule)
    assert export.to(schedule, "csv").count("\n") == STEPS[name] + 1
    assert preset.source
    assert preset.about


def test_the_flux_table_lies_on_its_teachers_grid() -> None:
    """The published values are the rounded times of these rows, but for the last: 0.001 is 0."""
    rows = [198, 193, 189, 185, 180, 170, 155, 121, 56, 22, 0]
    times = flow_grid(200, mu=1.15)[rows].round(decimals=4)
    published = torch.tensor(presets.load("flux-oss-10").schedule.times, dtype=torch.float64)
    torch.testing.assert_close(published, times, atol=1e-12, rtol=0)


def test_the_wan_table_lies_on_the_whole_timesteps_of_its_teachers_grid() -> None:
    grid = (1000 * flow_grid(200, shift=5.0)).floor()
    published = 1000 * torch.tensor(presets.load("wan-oss-20").schedule.times, dtype=torch.float64)
    assert set(published.round().tolist()) <= set(grid.tolist())


@pytest.mark.parametrize("name", ["sd1-ays-10", "sdxl-ays-10"])
def test_the_ays_tables_start_at_the_last_timestep_of_stable_diffusion(name: str) -> None:
    schedule = presets.load(name).schedule
    assert isinstance(schedule.path, VPPath)
    assert schedule.timesteps[0] == pytest.approx(999, abs=1e-6)
    assert not schedule.starts_below
    assert schedule.sigmas[1] < 14.6146412293 == pytest.approx(schedule.sigmas[0], rel=1e-9)


def test_the_flow_tables_start_where_they_say() -> None:
    starts = {name: presets.load(name).schedule for name in presets.names()}
    flow = {name: s for name, s in starts.items() if isinstance(s.path, FlowPath)}
    assert {name: s.starts_below for name, s in flow.items()} == {
        "flux-oss-10": True,
        "wan-oss-20": False,
        "chroma-oss-40": True,
    }


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'sdxl'; known presets: flux-oss-10, "):
        presets.load("sdxl")
