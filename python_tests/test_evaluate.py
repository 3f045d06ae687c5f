"""Held-out comparison: errors and decibels against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import oss_ext as oss
from driver_cases import each_family, each_seed, random_case
from oss_ext.evaluate import Score, psnr, score_table


def score(name: str, mse: list[float], data_range: float = 2.0, steps: int = 5) -> Score:
    tensor = torch.tensor(mse, dtype=torch.float64)
    return Score(name, steps, tensor, data_range, torch.zeros(len(mse), 1))


@pytest.mark.parametrize(
    ("mse", "data_range", "decibels"),
    [(0.01, 1.0, 20.0), (0.01, 2.0, 26.0206), (4.0, 2.0, 0.0), (1e-6, 1.0, 60.0)],
)
def test_psnr_by_hand(mse: float, data_range: float, decibels: float) -> None:
    assert psnr(mse, data_range) == pytest.approx(decibels, abs=1e-4)


def test_no_error_is_infinitely_good() -> None:
    assert psnr(0.0, 2.0) == math.inf


@pytest.mark.parametrize("data_range", [0.0, -1.0, math.nan])
def test_a_psnr_needs_a_range(data_range: float) -> None:
    with pytest.raises(ValueError, match=r"^data_range: expected a positive number, got "):
        psnr(0.01, data_range)


def test_no_scores_make_no_table() -> None:
    with pytest.raises(ValueError, match=r"^scores: expected at least one"):
        score_table([])


def test_the_two_averages_differ() -> None:
    s = score("s", [0.01, 0.0001], data_range=1.0)
    assert s.psnr_of_mean == pytest.approx(-10 * math.log10(0.00505))
    assert s.mean_psnr == pytest.approx((20 + 40) / 2)


@each_family
@each_seed(2)
def test_compare_measures_the_distance_to_the_teacher(family: str, seed: int) -> None:
    model, held_out = random_case(family, seed)
    schedules = {"three": held_out.schedule([9, 6, 2, 0]), "one": held_out.schedule([9, 0])}
    scores = oss.compare(model, held_out, schedules)
    assert [(s.name, s.steps) for s in scores] == [("three", 3), ("one", 1)]
    for s, schedule in zip(scores, schedules.values(), strict=True):
        images = oss.sample(model, held_out.noise, schedule)
        assert torch.equal(s.images, images)
        expected = [float(((images[b] - held_out.final[b]) ** 2).mean()) for b in range(3)]
        assert s.mse.tolist() == pytest.approx(expected, rel=1e-12)
        assert s.data_range == held_out.data_range


def test_the_teachers_own_steps_have_no_error() -> None:
    model, held_out = random_case("mixture", 1, dtype=torch.float32)
    everything = held_out.schedule(range(held_out.steps, -1, -1))
    (s,) = oss.compare(model, held_out, {"teacher": everything})
    assert s.mse.tolist() == [0.0, 0.0, 0.0]
    assert (s.psnr_of_mean, s.mean_psnr) == (math.inf, math.inf)


def test_another_model_than_the_teachers_is_refused() -> None:
    _, held_out = random_case("mixture", 1)
    other, _ = random_case("mixture", 2)
    with pytest.raises(ValueError, match=r"^model: expected the teacher's"):
        oss.compare(other, held_out, {"one": held_out.schedule([9, 0])})


def test_the_table_holds_every_figure() -> None:
    rows = [score("uniform 5", [0.01, 0.0001]), score("a longer name", [1e-4, 1e-4], steps=10)]
    lines = score_table(rows).splitlines()
    assert lines[0].split() == ["schedule", "steps", "PSNR", "of", "mean", "error", "mean", "PSNR"]
    assert lines[1].split() == ["uniform", "5", "5", "28.99", "dB", "36.02", "dB"]
    assert lines[2].split() == ["a", "longer", "name", "10", "46.02", "dB", "46.02", "dB"]
    assert lines[3] == "2 held-out samples; PSNR with data range 2"
    assert len(lines) == 4
    # Columns stand below each other.
    assert lines[1].index(" dB") == lines[2].index(" dB")
