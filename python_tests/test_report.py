"""What a person looks at: the schedule as text, and pictures that are pictures."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from driver_cases import example_schedule
from oss_ext.report import is_image, plot_samples, plot_schedules, schedule_table
from oss_ext.schedule import Objective


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_a_table_has_a_line_per_time() -> None:
    lines = schedule_table(example_schedule()).splitlines()
    assert lines[0] == "3 steps, oss: instance, median, pinned start, metric xt"
    assert lines[1] == (
        "model example (0123456789abcdef), path flow, solver euler; teacher 5 steps of euler"
    )
    assert lines[2] == (
        "searched on 3 samples with 47 evaluations each; mean squared error there: 3.0000e-01"
    )
    assert lines[3].split() == ["step", "teacher", "row", "time", "sigma", "stepsize"]
    assert [line.split() for line in lines[4:]] == [
        ["0", "5", "1.000000", "1.000000", "0.600000"],
        ["1", "3", "0.400000", "0.400000", "0.300000"],
        ["2", "1", "0.100000", "0.100000", "0.100000"],
        ["3", "0", "0.000000", "0.000000"],
    ]


def test_a_table_claims_no_search_that_was_not_made() -> None:
    schedule = example_schedule(objective=None, cost=None, samples=0, method="uniform")
    table = schedule_table(schedule)
    assert table.startswith("3 steps, uniform: not searched\n")
    assert "searched on" not in table


def test_a_table_names_the_reduction_or_says_that_the_cost_is_unknown() -> None:
    joint = example_schedule(objective=Objective("joint", "mean"), cost=None)
    lines = schedule_table(joint).splitlines()
    assert lines[0] == "3 steps, oss: joint, mean, free start, metric xt"
    assert lines[2].endswith("mean squared error there: not measured")


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_plot_of_schedules_grows_with_their_number(count: int, tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    plot_schedules({f"schedule {k}": example_schedule() for k in range(count)}, file)
    width, height = png_size(file)
    assert 900 < width < 1600
    assert 150 < height < 300 + 80 * count


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (12, 3, 8, 8), (1, 1, 5, 9)])
def test_a_picture_holds_a_row_per_entry(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = torch.rand(shape) * 4 - 2  # also values outside [-1, 1]
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    plot_samples({"teacher": images}, one)
    plot_samples({"teacher": images, "uniform": images, "OSS": images}, three)
    assert png_size(one)[0] > 100
    assert png_size(three)[1] > 2 * png_size(one)[1]


def test_a_picture_shows_a_limited_number_of_samples(tmp_path: Path) -> None:
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    plot_samples({"row": torch.zeros(3, 1, 8, 8)}, few, columns=3)
    plot_samples({"row": torch.zeros(100, 1, 8, 8)}, many, columns=3)
    assert png_size(few) == png_size(many)


def test_what_is_shown_depends_on_the_samples(tmp_path: Path) -> None:
    black, white, clipped = (tmp_path / f"{name}.png" for name in ("black", "white", "clipped"))
    for file, value in ((black, -1.0), (white, 1.0), (clipped, 9.0)):
        plot_samples({"row": torch.full((2, 1, 8, 8), value)}, file)
    assert black.read_bytes() != white.read_bytes()
    assert clipped.read_bytes() == white.read_bytes()


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 28), (4, 2, 8, 8), (1, 4, 3, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    assert not is_image(shape[1:])
    with pytest.raises(ValueError, match=r"^uniform: expected images \[B, 1 or 3, H, W\], got \("):
        plot_samples(
            {"teacher": torch.zeros(1, 1, 8, 8), "uniform": torch.zeros(shape)},
            tmp_path / "picture.png",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plot", [plot_schedules, plot_samples])
def test_a_picture_that_cannot_be_written_is_an_os_error(
    plot: Callable[..., None], tmp_path: Path
) -> None:
    content = example_schedule() if plot is plot_schedules else torch.zeros(1, 1, 8, 8)
    with pytest.raises(OSError, match="missing"):
        plot({"row": content}, tmp_path / "missing" / "picture.png")


def test_an_interrupted_picture_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(figure: Figure, target: object, **options: object) -> None:
        if isinstance(target, str | os.PathLike):
            Path(target).write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_schedules({"row": example_schedule()}, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
