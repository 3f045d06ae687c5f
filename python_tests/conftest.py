"""Fixtures of the test suite: fresh random inputs, and every backend of the operators."""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from affine_cases import AffineRunner
from cli_cases import TINY, Oss, Outcome
from op_cases import Runner
from oss_ext import cli, ops

SEED = int(os.environ.get("OSS_TEST_SEED") or time.time_ns() % 2**32)
os.environ["OSS_TEST_SEED"] = str(SEED)  # the processes of one run share it
# Property tests draw afresh in every run and print what draws a failure again. Our fixtures are the
# same for every example.
settings.register_profile(
    "ours", max_examples=50, deadline=None, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("ours")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Shells start what runs in the background so, and every process would have it from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_report_header() -> str:
    return f"random inputs: OSS_TEST_SEED={SEED} draws them again"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, new in every run; a failing test shows the line printed here."""
    print(f"OSS_TEST_SEED={SEED}")
    return SEED ^ zlib.crc32(request.node.name.encode())


PAIRS = [(name, device) for device in DEVICES for name in ops.BACKENDS]
if os.environ.get("TRITON_INTERPRET") != "1":
    # test_ops_triton.py starts a run with that variable set.
    PAIRS.remove(("triton", "cpu"))


@pytest.fixture(params=PAIRS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> Runner:
    """Every backend on every device that it can serve here."""
    name, device = request.param
    reason = ops.BACKENDS[name].why_not(torch.device(device))
    if reason is not None:
        pytest.skip(f"{name} on {device}: {reason}")
    return Runner(name, device)


@pytest.fixture
def affine(backend: Runner) -> AffineRunner:
    """Every backend that has the operators on candidates of any affine form."""
    backend.needs("dp_argmin_")
    return AffineRunner(backend)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def oss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Oss:
    """``oss`` with arguments, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["oss", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def found(oss: Oss) -> list[str]:
    """Files of searched 2- and 3-step schedules."""
    assert oss("search", *TINY, "--steps=2,3").code == 0
    return ["schedules/analytic-2.json", "schedules/analytic-3.json"]
