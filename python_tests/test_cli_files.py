"""Models that a user's own file makes: ``--model FILE.py:FUNCTION``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cli_cases import Oss, assert_fails, assert_misused, files
from driver_cases import one_thread  # noqa: F401
from oss_ext.cli.base import KeyValue
from oss_ext.schedule import Schedule

NETWORK = '''
import torch

class Network(torch.nn.Module):
    """The velocity towards the weighted origin."""

    def __init__(self, rate):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(rate))

    def forward(self, x, t, sample):
        return x * self.rate / (0.2 + t.view(-1, 1, 1, 1))
'''
MODEL = """
from dataclasses import dataclass

import oss_ext
from network import Network

@dataclass
class Settings:
    rate: float = 0.7

def diffusion(beta_end=0.012):
    path = oss_ext.noise.VPPath(beta_end=beta_end)
    net = Network(0.7).requires_grad_(False)
    return oss_ext.models.from_callable(net, (1, 4, 4), path=path, predicts="eps", name="mine")

def pure():
    path = oss_ext.noise.VPPath(zero_terminal_snr=True)
    net = Network(0.7).requires_grad_(False)
    return oss_ext.models.from_callable(net, (1, 4, 4), path=path, predicts="v", name="pure")

def make(rate=0.7):
    net = Network(Settings(rate).rate).requires_grad_(False)
    return oss_ext.models.from_callable(net, (1, 4, 4), name="mine", data_range=2.0)

def number():
    return 3
"""
TINY = ("--samples=3", "--teacher-steps=8", "--quiet")


@pytest.fixture(autouse=True)
def own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``nets/mine.py`` and what it imports, and an interpreter that has seen neither."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/network.py").write_text(NETWORK)
    (tmp_path / "nets/mine.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "network", raising=False)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_network_of_ones_own_is_searched_judged_and_sampled(
    oss: Oss, tmp_path: Path, absolute: bool
) -> None:
    model = f"--model={tmp_path if absolute else '.'}/nets/mine.py:make"
    outcome = oss("search", model, *TINY, "--steps=2,3")
    assert outcome.code == 0, outcome.err
    assert {"schedules/mine-2.json", "schedules/mine-3.json"} <= files()
    found = Schedule.load("schedules/mine-2.json")
    assert (found.model, found.steps) == ("mine", 2)
    outcome = oss("compare", "schedules/mine-2.json", model, "--samples=4", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert "mine-2" in outcome.out
    outcome = oss("sample", "schedules/mine-3.json", model, "--out=x.safetensors", "--quiet")
    assert outcome.code == 0, outcome.err
    outcome = oss("compare", model, "--methods=uniform,fast", "--steps=2", *TINY)
    assert (outcome.code, outcome.err) == (0, "")


def test_options_of_the_function_change_the_network(oss: Oss) -> None:
    assert oss("search", "--model=nets/mine.py:make", *TINY, "--steps=2").code == 0
    other = ("--model=nets/mine.py:make", "--set=rate=0.9", "--samples=3", "--quiet")
    outcome = oss("compare", "schedules/mine-2.json", *other)
    assert outcome.code == 0
    assert "searched with other weights" in outcome.err
    assert_fails(oss("search", other[0], "--set=speed=1"), "no option 'speed'", "options: rate")


def test_a_schedule_of_another_path_is_refused(oss: Oss) -> None:
    other = "--model=nets/mine.py:diffusion"
    assert oss("search", "--model=nets/mine.py:make", *TINY, "--steps=2").code == 0
    for command, *options in (["compare", "--samples=3"], ["sample", "--out=x.safetensors"]):
        outcome = oss(command, "schedules/mine-2.json", other, *options, "--quiet")
        assert_misused(outcome, "the schedule is of the path FlowPath(", "'mine' has VPPath(")
    assert oss("search", other, *TINY, "--steps=2").code == 0
    fewer = (other, "--set=beta_end=0.015", "--quiet", "--out=x.safetensors")
    outcome = oss("sample", "schedules/mine-2.json", *fewer)
    assert_misused(outcome, "the schedule is of the path VPPath(")
    assert oss("sample", "schedules/mine-2.json", *fewer, "--force").code == 0


@pytest.mark.parametrize(
    ("function", "host", "message"),
    [
        ("diffusion", "wan", "wan: expected a schedule of a flow model, got one of a vp path"),
        ("diffusion", "lightx2v", "lightx2v: expected a schedule of a flow model"),
        ("pure", "comfyui", "comfyui: the schedule starts at pure noise, where sigma is infinite"),
    ],
)
def test_a_host_without_such_models_is_refused_before_the_search(
    oss: Oss, function: str, host: str, message: str
) -> None:
    model = f"--model=nets/mine.py:{function}"
    assert_fails(oss("search", model, *TINY, "--steps=2", f"--for={host}"), message)
    assert not Path("schedules").exists()


def test_a_table_holds_pure_noise(oss: Oss) -> None:
    assert (
        oss("search", "--model=nets/mine.py:pure", *TINY, "--steps=2", "--start=pinned").code == 0
    )
    outcome = oss("export", "schedules/pure-2.json", "--to=csv")
    assert outcome.code == 0, outcome.err
    assert "inf" in outcome.out
    assert_fails(oss("export", "schedules/pure-2.json", "--to=comfyui"), "sigma is infinite")


def test_a_schedule_of_it_asks_for_it(oss: Oss) -> None:
    assert oss("search", "--model=nets/mine.py:make", *TINY, "--steps=2").code == 0
    outcome = oss("compare", "schedules/mine-2.json")
    assert_misused(outcome, "'mine' is not a bundled one", "--model FILE.py:FUNCTION")
    outcome = oss("compare", "schedules/mine-2.json", "--model=digits")
    assert_misused(outcome, "searched for mine, got digits")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nets/none.py:make", ("no such file", "nets/none.py")),
        ("nets/mine.py", ("expected nets/mine.py:FUNCTION, one of diffusion, pure, make, number",)),
        ("nets/mine.py:mak", ("one of diffusion, pure, make, number, got 'nets/mine.py:mak'",)),
        ("nets/mine.py:Network", ("one of diffusion, pure, make, number",)),
        ("nets/mine.py:number", ("expected", "to return a Model", "got int")),
        ("mine", ("unknown model 'mine'", "digits, analytic, and FILE.py:FUNCTION")),
    ],
)
def test_what_makes_no_model_is_a_clear_error(oss: Oss, name: str, parts: tuple[str, ...]) -> None:
    assert_fails(oss("search", f"--model={name}", *TINY, "--steps=2"), *parts)
    assert not Path("schedules").exists()


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "def make(:", "SyntaxError: "),
        (2, "def make():\n    return {}['weights']", "KeyError: 'weights'"),
        (3, "def make():\n    x = 1\n    return x + 'a'", "TypeError: unsupported operand"),
        (1, "import no_such_package_at_all", "ModuleNotFoundError: No module named"),
        (None, "def make(weights): ...", "TypeError: make() missing 1 required"),
    ],
)
def test_an_error_in_the_file_says_where(
    oss: Oss, line: int | None, text: str, message: str
) -> None:
    Path("nets/broken.py").write_text(text)
    where = "nets/broken.py" + ("" if line is None else f", line {line}")
    outcome = oss("search", "--model=nets/broken.py:make", *TINY, "--steps=2")
    assert_fails(outcome, f"model: {where}: {message}")


def test_a_function_may_take_any_option(oss: Oss) -> None:
    Path("nets/any.py").write_text(
        "import mine\ndef make(**options):\n    return mine.make(**options)\n"
    )
    assert oss("search", "--model=nets/any.py:make", "--set=rate=0.5", *TINY, "--steps=2").code == 0


def test_a_network_that_fails_says_what_it_was_given(oss: Oss) -> None:
    Path("nets/double.py").write_text(
        "import oss_ext, torch\nlayer = torch.nn.Linear(5, 4)\ndef make():\n"
        "    def net(x, t, sample):\n        return layer(torch.cat([x, t[:, None]], 1))\n"
        "    return oss_ext.models.from_callable(net, (4,))\n"
    )
    outcome = oss("search", "--model=nets/double.py:make", *TINY, "--steps=2")
    given = "torch.float32 (3, 4), torch.float64 (3,), torch.int64 (3,)"
    assert_fails(outcome, "must have the same dtype", f"in 'custom', which was given {given}")


def test_a_file_may_be_called_like_a_package(oss: Oss) -> None:
    Path("nets/mine.py").rename("nets/torch.py")
    assert oss("search", "--model=nets/torch.py:make", *TINY, "--steps=2").code == 0


def test_a_pipeline_and_a_model_exclude_each_other(oss: Oss) -> None:
    outcome = oss("search", "--model=digits", "--pipeline=here", "--quiet")
    assert_misused(outcome, "--model: expected none beside --pipeline")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("negative_prompt=bad, ugly", "bad, ugly"),
        ('negative_prompt=["bad", "ugly, blurred"]', ["bad", "ugly, blurred"]),
        ("prompt_2=a cat, sitting", "a cat, sitting"),
        ("labels=3,1,4", [3, 1, 4]),
        ("name=a,b", ["a", "b"]),
        ("height=1024", 1024),
    ],
)
def test_values_with_commas_are_lists_unless_they_are_prompts(text: str, value: Any) -> None:
    assert KeyValue().convert(text, None, None) == (text.partition("=")[0], value)


def test_the_teachers_steps_are_no_argument_of_the_pipelines_call(oss: Oss) -> None:
    outcome = oss("search", "--pipeline=here", "--set=num_inference_steps=30", "--quiet")
    assert_misused(outcome, "--set: expected no num_inference_steps; --teacher-steps")


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "--out="),
        ("search", "--resume="),
        ("compare", "--methods=uniform", "--steps=2", "--picture="),
        ("sample", "preset:flux-oss-10", "--out="),
        ("export", "preset:flux-oss-10", "--to=text", "--out="),
        ("report", ""),
    ],
)
def test_a_path_is_not_empty(oss: Oss, arguments: tuple[str, ...]) -> None:
    before = files()
    assert_misused(oss(*arguments), ": expected a path, got an empty one")
    assert files() == before


def test_a_model_has_a_name(oss: Oss) -> None:
    assert_fails(oss("search", "--model=", "--quiet"), "unknown model ''")
