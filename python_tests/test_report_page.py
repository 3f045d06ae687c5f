"""The page of a run: whole, safe to open, and true to what was measured."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import matplotlib.image
import numpy as np
import pytest
import torch

from cli_cases import Oss, assert_fails, assert_misused, files
from oss_ext import Schedule, export
from oss_ext.noise import VEPath, VPPath
from oss_ext.report import PARTS, page, write_report
from oss_ext.report.chart import EDGE, Axis
from oss_ext.runs import Run
from page_cases import Page
from run_cases import HELD_OUT, random_run

ALL = [part.name for part in PARTS]
VE = VEPath()
KINDS: dict[str, dict[str, Any]] = {
    "grey": {},
    "colour": {"shape": (3, 300, 200)},
    "video": {"shape": (3, 9, 8, 12)},
    "latents": {"shape": (16, 8, 8)},
    "vectors": {"shape": (6,)},
    "one budget": {"budgets": (4,)},
    "two samples": {"held_out": 2},
    "VP": {"path": VPPath("scaled_linear"), "grid": VPPath("scaled_linear").grid(12).tolist()},
    "VE": {"path": VE, "grid": VE.grid(12).tolist()},
    "no judging": {"mse": None, "along": {}, "quantiles": {}, "images": {}, "held_out": 0},
}
KINDS["bare"] = KINDS["no judging"] | {"table": None, "spread": {}}
HOSTILE = '<script>alert(1)</script><img src=//evil.example/x onerror="alert(2)">\'"&amp;$\\frac{$x'


def parsed(run: Run) -> Page:
    return Page(page(run))


def code_blocks(found: Page) -> dict[str, str]:
    """Every text that can be copied, by what it is; of the schedule that comes first."""
    blocks: dict[str, str] = {}
    for element in found.all("pre"):
        blocks.setdefault(element["aria-label"], element.text)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_well_formed_and_needs_nothing_else(kind: str, seed: int) -> None:
    found = parsed(random_run(seed, **KINDS[kind]))
    names = [e["id"] for e in found.elements if "id" in e.attributes]
    assert len(set(names)) == len(names)
    for element in found.elements:
        for name, value in element.attributes.items():
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("data:image/png;base64,") or value[1:] in names, value
            elif name in ("for", "aria-labelledby"):
                assert value in names
            assert not name.startswith("on")
            if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                assert re.fullmatch(r"-?[\d.]+(%|e-?\d+)?", str(value)), f"{element.tag} {value}"
        if element.tag in ("img", "image"):
            assert element.attributes.get("alt") or element.attributes.get("aria-hidden")
    source = page(random_run(seed, **KINDS[kind]))
    assert not re.search(r"https?://|url\(|@import|[\"'(]//", source)


def test_only_the_scripts_of_the_page_itself_may_run(seed: int) -> None:
    found = parsed(random_run(seed))
    (script,) = found.all("script")
    (policy,) = [e["content"] for e in found.all("meta") if "http-equiv" in e.attributes]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith(f"script-src 'sha256-{digest}'")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, set()),
        ({"table": None}, {"table"}),
        ({"along": {}}, {"along"}),
        ({"quantiles": {}}, {"amplitude"}),
        ({"images": {}}, {"samples"}),
        ({"table": torch.full((3, 13), torch.inf, dtype=torch.float64)}, {"table"}),
        ({"contenders": (), "mse": None, "along": {}, "images": {}},
         {"comparison", "samples", "schedules", "along", "amplitude", "use"}),
    ],
)  # fmt: skip
def test_parts_without_data_are_left_out(
    changes: dict[str, Any], missing: set[str], seed: int
) -> None:
    found = parsed(random_run(seed, **changes))
    assert found.sections == [name for name in ALL if name not in missing]
    links = [e["href"] for e in found.all("a")]
    assert links == [f"#{name}" for name in found.sections]


def test_what_users_wrote_is_text(seed: int, tmp_path: Path) -> None:
    run = random_run(seed, named=lambda text: f"{text} {HOSTILE}")
    write_report(run, tmp_path)  # pictures too: no name is a formula
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(found.all("script")) == 1
    assert not any("onerror" in e.attributes for e in found.elements)
    assert found.all("h1")[0].text == f"model {HOSTILE}"
    for name in ALL:
        if name != "overview":
            assert f"dp 3 {HOSTILE}" in found.section(name)
    for text in ("device", "a machine", "2025-01-02 03:04:05", "oss compare --model model"):
        assert text in found.section("overview")
    assert f"needs more steps {HOSTILE}" in found.section("comparison")


def test_half_a_character_in_a_name_is_no_obstacle(seed: int, tmp_path: Path) -> None:
    write_report(random_run(seed, model="m\ud800", **KINDS["bare"]), tmp_path)
    assert "<h1>m?</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_table_says_what_was_measured_and_why_not(seed: int) -> None:
    run = random_run(seed)
    found = parsed(run)
    assert run.mse is not None
    head, *rows = found.rows()
    assert re.findall(r"Method|Steps|PSNR of|interval|Median|decile|Evaluations|Seconds", head)
    assert len(rows) == len(run.contenders)
    for row, c, mse in zip(rows, run.contenders, run.mse, strict=True):
        assert row.startswith(c.name)
        if c.schedule is None:
            assert row == f"{c.name}{c.steps}unable: needs more steps"
            continue
        each = 10 * np.log10(4 / mse.numpy())
        for value in (10 * np.log10(4 / float(mse.mean())), each.mean(), np.median(each)):
            assert f"{value:.2f}" in row
        assert f"{c.seconds:.1f}" in row
    best = found.all("strong", "comparison")
    assert len(best) == 2  # one per budget
    for e, k in zip(best, (3, 5), strict=True):
        group = [m for m, c in zip(run.mse, run.contenders, strict=True) if c.steps == k]
        least = min(float(m.mean()) for m in group if not m.isnan().any())
        assert e.text == f"{10 * np.log10(4 / least):.2f} (best of its budget)"


def test_without_judging_there_is_a_table_of_costs(seed: int) -> None:
    found = parsed(random_run(seed, **KINDS["no judging"]))
    assert "PSNR" not in found.section("comparison")
    assert found.rows()[4] == "dp 33998.1"
    assert found.of_class("tile") == []


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_errors_that_are_no_numbers_do_not_end_the_page(value: float, seed: int) -> None:
    run = random_run(seed)
    assert run.mse is not None
    broken = run.mse.clone()
    broken[0] = value
    along = {name: torch.full_like(errors, value) for name, errors in run.along.items()}
    found = parsed(random_run(seed, mse=broken, along=along))
    assert "along" not in found.sections
    assert found.rows()[1].startswith("uniform 3")


def test_a_step_of_the_teachers_own_is_no_point_of_a_curve(seed: int) -> None:
    run = random_run(seed)
    name = run.contenders[0].name
    exact = run.along[name].clone()
    exact[0] = 1e-15
    rounded = page(replace(run, along=run.along | {name: exact.clone()}))
    exact[0] = 0
    none = page(replace(run, along=run.along | {name: exact}))
    assert rounded == none != page(run)


def test_pictures_are_the_samples(seed: int) -> None:
    run = random_run(seed, (3, 5, 7))
    found = parsed(run)
    shown = {e["alt"]: e["src"] for e in found.all("img", "samples")}
    assert len(shown) == 2 * len(run.images)
    for name, states in run.images.items():
        data = base64.b64decode(shown[f"{name}, sample 1"].partition(",")[2])
        read = matplotlib.image.imread(io.BytesIO(data))[..., :3]
        expected = (states[1].permute(1, 2, 0).numpy() + 1) / 2
        np.testing.assert_allclose(read, expected, atol=0.5 / 255 + 1e-6)


def test_large_pictures_are_reduced_and_videos_are_frames(seed: int) -> None:
    large = parsed(random_run(seed, (1, 512, 300))).all("img", "samples")[0]
    data = base64.b64decode(large["src"].partition(",")[2])
    assert matplotlib.image.imread(io.BytesIO(data)).shape[:2] == (256, 150)
    video = parsed(random_run(seed, (1, 9, 8, 8)))
    names = [e["alt"] for e in video.all("img", "samples") if e["alt"].startswith("teacher")]
    assert names == [f"teacher, sample {b}, frame {f}" for b in (0, 1) for f in (0, 4, 8)]


@pytest.mark.parametrize("shape", [(6,), (16, 8, 8), (16, 5, 8, 8)])
def test_samples_that_are_no_pictures_are_one_line(shape: tuple[int, ...], seed: int) -> None:
    found = parsed(random_run(seed, shape))
    said = found.section("samples")
    assert said.startswith(f"SamplesSamples of shape {list(shape)} cannot be shown: pictures")
    assert found.all("img", "samples") == []


def test_the_heat_map_shows_the_searched_paths(seed: int) -> None:
    run = random_run(seed)
    found = parsed(run)
    titles = [e.text for e in found.all("title", "table")]
    for c in run.contenders:
        indices = None if c.schedule is None or c.method != "dp" else c.schedule.indices
        expected = [f"{c.name}, step {k}: row {row}" for k, row in enumerate(indices or ())]
        assert [title for title in titles if title.startswith(c.name + ",")] == expected


def test_schedules_are_shown_in_every_coordinate(seed: int) -> None:
    flow, ve = parsed(random_run(seed)), parsed(random_run(seed, **KINDS["VE"]))
    assert (len(flow.of_class("on-sigma")), len(ve.of_class("on-sigma"))) == (0, 2)
    assert len(flow.of_class("on-t")) == len(flow.of_class("on-snr")) == 2
    bands = len(flow.of_class("band", "schedules"))
    assert bands == 2 * (4 + 6)  # two axes; a band for every time of 3 and 5 steps


def test_an_axis_has_room_for_what_is_infinite() -> None:
    plain = Axis("t", 1.0, 0.0)
    assert [plain.at(v) for v in (1.0, 0.25, 0.0)] == [0, 75, 100]
    sigma = Axis("sigma", 100.0, 0.01, log=True, ends=("inf", "0"))
    assert [sigma.at(v) for v in (torch.inf, 100, 1, 0.01, 0)] == pytest.approx(
        [0, EDGE, 50, 100 - EDGE, 100]
    )
    assert sigma.ticks()[-2:] == [(0.0, "inf"), (100.0, "0")]
    assert [text for _, text in Axis("row", 12.5, -0.5, whole=True).ticks()] == [
        "0", "3", "6", "9", "12",
    ]  # fmt: skip
    assert Axis("one", 2.0, 2.0).at(2.0) == 50


@pytest.mark.parametrize("kind", ["grey", "VP"])
def test_what_is_copied_is_what_hosts_take(kind: str, seed: int) -> None:
    run = random_run(seed, **KINDS[kind])
    assert run.mse is not None
    found = parsed(run)
    order = run.mse.mean(dim=1).nan_to_num(nan=torch.inf)
    best = run.contenders[int(order.argmin())]
    assert best.schedule is not None
    assert found.all("summary")[0].text.startswith(best.name)
    blocks = code_blocks(found)
    said = [e.text for tag in ("p", "pre") for e in found.all(tag, "use")]
    assert Schedule.from_json(blocks["schedule as JSON"]) == best.schedule
    assert blocks["command of this run"] == run.command
    for host in export.FORMATS:
        try:
            expected = export.to(best.schedule, host)
        except export.ExportError as error:
            expected = f"Refused: {error}"
        assert expected in said, host
    assert "export.attach(schedule, pipe)" in blocks["Python for diffusers"]


def test_commands_and_snippets_name_the_file_whatever_it_is_called(seed: int) -> None:
    run = random_run(seed)
    odd = 'my "best" $(net); it\'s.json'
    named = tuple(replace(c, file=f"{n} {odd}") for n, c in enumerate(run.contenders))
    blocks = [
        e.text for e in parsed(replace(run, contenders=named)).all("pre", "use")
        if odd.split()[0] in e.text
    ]  # fmt: skip
    commands = [shlex.split(text) for text in blocks if text.startswith("oss export")]
    snippets = [ast.parse(text) for text in blocks if text.startswith("import oss_ext")]
    files = {c.file for c in named if c.schedule is not None}
    assert {command[2] for command in commands} == files
    assert {command[3] for command in commands} == {"--to"}
    strings = (n.value for tree in snippets for n in ast.walk(tree) if isinstance(n, ast.Constant))
    assert {s for s in strings if isinstance(s, str) and s.endswith(".json")} == files


def test_colours_can_be_read() -> None:
    style = (Path(export.__file__).parents[1] / "report/page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]

    def luminance(color: str) -> float:
        values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for block in (light, dark):
        colors = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for ink in ("ink", "muted", "dp", "fast", "balanced", "best", "rival"):
            for ground in ("page", "raised", "sunken"):
                low, high = sorted(luminance(colors[name]) for name in (ink, ground))
                assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} on {ground}: {colors}"


# --- the command --------------------------------------------------------------------------------


def test_report_writes_a_page_and_pictures(
    oss: Oss, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", opened.append)
    run = random_run(seed)
    run.save("run")
    before = files("run")
    outcome = oss("report", "run")
    assert (outcome.code, outcome.err) == (0, "")
    pictures = {f"{name}.png" for name in ("samples", "schedules", "along", "amplitude", "table")}
    new = {"report.html", *pictures}
    assert files("run") - before == new
    assert set(outcome.out.splitlines()) == {f"wrote run/{name}" for name in new}
    # Saved and read back, a run has the same page.
    assert Path("run/report.html").read_text(encoding="utf-8") == page(run)
    assert opened == []
    assert oss("report", "run", "--open").code == 0
    assert opened == [Path("run/report.html").absolute().as_uri()]


def test_a_folder_that_holds_no_run_is_named(oss: Oss, seed: int) -> None:
    Path("empty").mkdir()
    for folder in ("empty", "missing"):
        message = f"{folder}: expected the folder of a run, found no run.json in it"
        assert_fails(oss("report", folder), message)
    random_run(seed, **KINDS["bare"]).save("later")
    body = json.loads(Path("later/run.json").read_text())
    Path("later/run.json").write_text(json.dumps(body | {"format_version": 99}))
    assert_fails(oss("report", "later"), "a run of version 99, this release reads 1")
    Path("later/run.json").write_text("{}")
    assert_fails(oss("report", "later"), "not a run of this package")
    assert_misused(oss("report"), "Missing argument 'RUN'")


def test_a_page_that_cannot_be_written_is_one_line(oss: Oss, seed: int) -> None:
    random_run(seed, held_out=HELD_OUT).save("run")
    Path("run/report.html").mkdir()
    assert_fails(oss("report", "run"), "Is a directory", "report.html")
    assert not [name for name in files("run") if "/" not in name and name.startswith(".")]
