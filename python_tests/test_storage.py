"""Trajectories in 16 bits: half the memory, with exact ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oss_ext as oss
from cli_cases import TINY, Oss
from driver_cases import (
    SHAPE,
    each_seed,
    one_thread,  # noqa: F401
    random_network,
)
from oss_ext import Schedule
from oss_ext.baselines import BASELINES, Calibration

FEATURES = oss.metrics.FeatureMetric(lambda x: x.flatten(1) @ torch.ones(6, 2))
HALVES = [torch.float16, torch.bfloat16]
each_half = pytest.mark.parametrize("storage", HALVES, ids=str)


def made(seed: int, storage: torch.dtype | None, **options: Any) -> Any:
    """A model and its teacher; a mixture's samples would tip into another mode for a rounding."""
    model = random_network(seed, torch.float32)
    noise = model.noise(8, seed)
    return model, oss.teacher(model, noise, 24, storage=storage, keep_x0=True, **options)


@each_half
@each_seed(1)
def test_states_are_rounded_and_ends_are_not(storage: torch.dtype, seed: int) -> None:
    (_, plain), (_, half) = made(seed, None), made(seed, storage)
    assert half.states.dtype == half.x0.dtype == storage
    assert half.states.equal(plain.states.to(storage))
    assert half.noise.equal(plain.noise)
    assert half.final.equal(plain.final)
    for t in (0.0, 1.0, float(half.times[5]), 0.37):
        assert half.at(t).dtype == torch.float32
        assert torch.allclose(half.at(t), plain.at(t), atol=0.05)
    assert half.at(0.0).equal(plain.final)
    part = half.first(3)
    assert part.noise.equal(plain.noise[:3])
    assert part.final.equal(plain.final[:3])
    (teacher, *_), (rounded, *_) = plain.held(), half.held()
    assert teacher.bytes == 2 * rounded.bytes


@pytest.mark.parametrize(
    ("quality", "options"),
    [
        ("dp", {}),
        ("dp", {"scope": "instance", "aggregate": "mean"}),
        ("dp", {"solver": "dpmpp-3m"}),
        ("dp", {"solver": "dpm-3s"}),
        ("dp", {"metric": "x0"}),
        ("dp", {"metric": "x0-candidate"}),
        ("dp", {"metric": FEATURES}),
        ("dp", {"beam": 2}),
        ("fast", {}),
        ("balanced", {}),
        ("best", {"solver": "unipc-2"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
@each_half
@each_seed(1)
def test_a_search_is_nearly_as_good(
    storage: torch.dtype, quality: str, options: dict[str, Any], seed: int
) -> None:
    errors = []
    for kept in (None, storage):
        model, trajectory = made(seed, kept)
        found = oss.search(model, trajectory, 4, quality=quality, **options)
        schedule = found.schedule(4)
        assert found.table is None or found.table.cost.dtype == torch.float32
        (score,) = oss.compare(model, made(seed, None)[1], {"": schedule})
        errors.append(score.mse.mean())
        if quality != "dp":  # refinement's is what a student has
            assert schedule.samples is not None
            seen = score.mse[: schedule.samples]
            assert schedule.cost == pytest.approx(float(seen.mean()), rel=1e-3)
        elif kept is not None:
            assert schedule.cost is None
        if "scope" not in options:
            assert found.cost(4) == pytest.approx(schedule.cost or float(errors[-1]), rel=0.2)
    if quality != "dp":
        assert errors[1] < 1.5 * errors[0]


@each_half
@each_seed(1)
def test_the_plan_and_the_baselines_take_it(storage: torch.dtype, seed: int) -> None:
    model, trajectory = made(seed, storage)
    plans = [
        oss.search(model, made(seed, kept, dry_run=True)[1], 4, quality="dp", dry_run=True)
        for kept in (None, storage)
    ]
    teacher = trajectory.states.nbytes
    assert plans[0].memory["host"] - plans[1].memory["host"] > 1.5 * teacher
    for name in BASELINES:
        made_by = BASELINES[name].make(Calibration(model, trajectory, 4), 4)
        assert made_by.steps == 4
    schedule = oss.search(model, trajectory, 4, quality="fast").schedule(4)
    levels = oss.calibrate([trajectory], schedule).amplitude
    assert levels is not None
    plain = oss.calibrate([made(seed, None)[1]], schedule).amplitude
    assert plain is not None
    assert levels.low == pytest.approx(plain.low, abs=0.02)


@pytest.mark.parametrize("storage", [torch.int16, torch.float64, "float16"])
def test_other_types_are_refused(storage: Any) -> None:
    expected = r"^storage: expected one of torch.float32, torch.float16, torch.bfloat16, got"
    with pytest.raises(ValueError, match=expected):
        made(0, storage)


def test_states_beyond_the_range_are_refused() -> None:
    model = oss.models.from_callable(lambda x, t, sample: -1e6 * x.sign(), shape=SHAPE)
    with pytest.raises(ValueError, match=r"^storage: torch.float16 has no room for states of \d"):
        oss.teacher(model, model.noise(2), 4, storage=torch.float16)
    kept = oss.teacher(model, model.noise(2), 4, storage=torch.bfloat16)
    assert bool(kept.states.isfinite().all())


def test_the_command_line_keeps_states_in_16_bits(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=2", "--storage=float16", "--out=half").code == 0
    schedule = Schedule.load("half/analytic-2.json")
    assert oss("verify", "half/analytic-2.json", *TINY[:2]).code == 0
    assert schedule.steps == 2
