"""The table of a comparison: every figure in its place, and never more than 80 columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from driver_cases import example_schedule
from oss_ext.evaluate import Score, Unable, score_table
from oss_ext.schedule import Schedule
from oss_ext.statistics import bootstrap, paired


def score(
    name: str,
    mse: Sequence[float],
    data_range: float = 2.0,
    steps: int = 5,
    search_nfe: int = 0,
    frechet: float | None = None,
) -> Score:
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    schedule = Schedule.from_indices(
        range(steps, -1, -1), times, model="m", model_hash="h", search_nfe=search_nfe
    )
    return Score(
        name=name,
        schedule=schedule,
        mse=torch.tensor(mse, dtype=torch.float64),
        data_range=data_range,
        images=torch.zeros(len(mse), 1),
        along=torch.zeros(steps, dtype=torch.float64),
        seconds=0.1,
        frechet=frechet,
    )


def spread(samples: int, seed: int, scale: float = 1e-3) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(samples, generator=generator).double().exp()).tolist()


def test_no_scores_make_no_table() -> None:
    with pytest.raises(ValueError, match=r"^scores: expected at least one"):
        score_table([])


def test_the_table_holds_every_figure() -> None:
    rows = [
        score("uniform 5", [0.01, 0.0001]),
        score("a longer name", [1e-4, 1e-4], steps=10, search_nfe=1234),
    ]
    lines = score_table(rows).splitlines()
    low, high = bootstrap(rows[0].mse, "psnr_of_mean", 2.0) or (0, 0)
    assert lines[0].split() == ["PSNR", "of", "mean", "worst", "search"]
    assert lines[1].split() == ["schedule", "steps", "mean", "error", "PSNR", "decile", "evals"]
    interval = f"28.99±{(high - low) / 2:.2f}"
    assert lines[2].split() == ["uniform", "5", "5", interval, "36.02", "26.02", "0"]
    figures = ["10", "46.02±0.00", "46.02", "46.02", "1234"]
    assert lines[3].split() == ["a", "longer", "name", *figures]
    assert lines[4] == "2 held-out samples; PSNR with data range 2, in dB"
    assert lines[5] == "worst decile: PSNR of the mean error of the worst 1"
    assert lines[6].startswith("search evals: model evaluations per calibration sample")
    assert lines[7] == "±: half of the 95 % interval, from 10000 resamples of the samples"
    assert len(lines) == 8
    assert {len(line) for line in lines[1:4]} == {len(lines[1])}  # columns end below each other


def test_the_worst_decile_says_how_many_it_is() -> None:
    assert "of the worst 4\n" in score_table([score("s", spread(31, 0))])


def test_against_adds_the_paired_difference() -> None:
    base = score("base", spread(20, 0))
    better = score("better", [x / 10 * (1 + 0.1 * (i % 2)) for i, x in enumerate(base.mse)])
    lines = score_table([better, base], against="base").splitlines()
    gain = paired(better.mse, base.mse)
    assert gain.interval is not None
    half = (gain.interval[1].psnr_of_mean - gain.interval[0].psnr_of_mean) / 2
    assert lines[0].split()[-1] == "paired"
    assert lines[1].split()[-1] == "difference"
    assert lines[2].split()[-1] == f"{gain.value.psnr_of_mean:+.2f}±{half:.2f}"
    assert lines[3].split()[-1] == "-"
    assert lines[-1] == "paired difference: PSNR of the mean error above that of base"


def test_an_unknown_baseline_is_refused() -> None:
    scores = [score("a", [0.1]), Unable("b", 5, "why")]
    with pytest.raises(ValueError, match=r"^against: expected one of 'a', got 'b'"):
        score_table(scores, against="b")
    with pytest.raises(ValueError, match=r"^against: expected one of none: no schedule"):
        score_table(scores[1:], against="b")


@pytest.mark.parametrize("other", [score("b", [0.1, 0.2]), score("b", [0.1], data_range=1.0)])
def test_scores_of_several_comparisons_are_refused(other: Score) -> None:
    with pytest.raises(ValueError, match=r"^scores: expected those of one comparison"):
        score_table([score("a", [0.1]), other])


def test_one_sample_has_no_interval() -> None:
    scores = [score("a", [0.01]), score("b", [0.04])]
    text = score_table(scores, against="a")
    assert "±" not in text
    assert text.splitlines()[2].split() == ["a", "5", "26.02", "26.02", "26.02", "0", "-"]
    assert text.splitlines()[3].split()[-1] == "-6.02"
    assert "no intervals: they need two samples or more" in text


def test_exact_copies_are_infinitely_good_and_never_nan() -> None:
    copies, one = [0.0] * 5, [0.0, 0.0, 0.0, 0.0, 0.1]
    scores = [score("copies", copies), score("again", copies), score("one", one)]
    rows = [line.split() for line in score_table(scores, against="copies").splitlines()[2:5]]
    assert rows[0][2:] == ["inf", "inf", "inf", "0", "-"]
    assert rows[1][2:] == ["inf", "inf", "inf", "0", "+0.00±0.00"]
    assert rows[2][2:4] == ["23.01±inf", "inf"]  # a third of the resamples miss the one
    assert rows[2][-1] == "-inf"
    for against in ("copies", "again", "one"):
        assert "nan" not in score_table(scores, against=against)


def test_an_unable_method_says_why_below_its_own_reason() -> None:
    reason = "needs a noise path whose sigma is finite at the start, and this one's is not there"
    lines = score_table([score("uniform 5", [0.1, 0.2]), Unable("steep", 12, reason)]).splitlines()
    first = lines[3]
    assert first.startswith("steep         12  needs a noise path")
    indent = first.index("needs")
    wrapped = [first, *itertools.takewhile(lambda line: line.startswith(" " * indent), lines[4:])]
    assert len(wrapped) == 2
    assert " ".join(line[indent:] for line in wrapped) == reason
    assert len(max(wrapped, key=len)) <= 80


def test_a_table_of_the_unable_alone_has_no_figures() -> None:
    lines = score_table([Unable("steep", 12, "cannot"), Unable("silent", 3, "")]).splitlines()
    assert lines[2:] == ["steep        12  cannot", "silent        3"]


NAMES = ("s", "uniform 5", "a name of 24 characters!", "x" * 25, "a name " * 20)


@pytest.mark.parametrize("samples", [1, 2, 12])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e30])
@pytest.mark.parametrize("frechet", [None, 1.23456e-5])
def test_no_line_is_wider_than_80_columns(
    samples: int, scale: float, frechet: float | None
) -> None:
    for steps, search_nfe in ((5, 0), (10, 999_999), (1000, 10**9)):
        scores: list[Score | Unable] = [
            score(name, spread(samples, k, scale), 2.0, steps, search_nfe, frechet)
            for k, name in enumerate(NAMES)
        ]
        scores.append(Unable("a method that is unable " * 4, steps, "wants/more" * 30))
        for against in (None, NAMES[0], NAMES[-1]):
            lines = score_table(scores, against).splitlines()
            assert max(map(len, lines)) <= 80
            assert "nan" not in "".join(lines)


def test_a_name_of_24_characters_is_whole_and_a_longer_one_is_cut() -> None:
    name = "a name of 24 characters!"
    scores = [score("base", spread(64, 0), search_nfe=123_456)]
    scores += [score(n, spread(64, 1, 1e-4), steps=100) for n in (name, name * 2)]
    lines = score_table(scores, against="base").splitlines()
    assert lines[3].startswith(name + " ")
    assert re.match(re.escape(name) + r"a?…  ", lines[4])
    alone = score_table(scores[2:]).splitlines()
    assert alone[2].startswith("a name of 24 characters!a name")


def test_frechet_has_a_column_once_anyone_has_it() -> None:
    scores = [score("a", [0.1, 0.2], frechet=0.01234), score("b", [0.1, 0.3])]
    lines = score_table(scores).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["Frechet", "0.0123", "-"]
    assert "Frechet" not in score_table(scores[1:])


def test_the_same_scores_make_the_same_table() -> None:
    scores = [score("a", spread(30, 0)), score("b", spread(30, 1))]
    text = score_table(scores, against="a")
    torch.rand(3)  # the global generator has no part in it
    assert score_table(scores, against="a") == text


def test_search_evals_are_the_schedules() -> None:
    s = replace(score("s", [0.1]), schedule=example_schedule(search_nfe=47))
    assert score_table([s]).splitlines()[2].split()[-1] == "47"
