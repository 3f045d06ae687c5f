"""The tools that prove and count the GPU kernels, where they need no GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the source tree outside the package."""
    folder, name = request.param
    if not (ROOT / folder / f"{name}.py").exists():
        pytest.skip("not in a source tree")
    monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module(name)


loops = pytest.mark.parametrize("tool", [("csrc/tests", "cuda_loops")], indirect=True)
checks = pytest.mark.parametrize("tool", [("bench", "gpu_check")], indirect=True)


def listing(*lines: str) -> list[tuple[int, str]]:
    return [(16 * k, line) for k, line in enumerate(lines)]


@loops
def test_the_inner_loop_is_the_one_with_the_arithmetic(tool: ModuleType) -> None:
    code = listing(
        "MOV R1, R2",
        "FADD R1, R1, R2",  # 0x10: the outer loop
        "LDS R3, [R4]",  # 0x20: an inner one
        "@P1 FFMA R1, R3, R3, R1",
        "DMUL R6, R6, R6",
        "@!P0 BRA 0x20",
        "FADD R1, R1, R2",
        "FADD R1, R1, R2",
        "ISETP.GE.AND P2, PT, R1, R2, PT",  # 0x80: another one, without any
        "@P2 BRA 0x80",
        "@P3 BRA 0x10",
        "EXIT",
        "FADD R9, R9, R9",  # moved out of the way: it returns into the outer loop
        "BRA 0x60",
        "BRA 0xe0",
    )
    assert tool.inner_loop(code) == (2, 4)
    assert tool.inner_loop(listing("MOV R1, R2", "@P0 BRA 0x20", "EXIT")) is None


@loops
def test_copies_of_the_last_elements_are_not_counted(tool: ModuleType) -> None:
    code = listing(
        "BAR.SYNC 0x0",  # 0x00: the loop
        "@P1 BRA 0x40",
        "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64]",
        "BRA 0x70",
        "IADD3 R7, R7, R8, RZ",  # 0x40: instead, for the last stage
        "LDGSTS.E.BYPASS.128.ZFILL [R2], desc[UR4][R6.64], P0",
        "IADD3 R7, R7, R8, RZ",
        "FFMA R1, R3, R3, R1",  # 0x70
        "@P3 BRA 0x0",
        "EXIT",
    )
    assert tool.inner_loop(code) == (1, 6)


def job(tool: ModuleType, code: str, kind: str = "kind", seconds: int = 60) -> object:
    return tool.Job("a job", [sys.executable, "-c", code], seconds, kind)


@checks
@pytest.mark.parametrize(
    ("codes", "good"),
    [
        (["print('1 passed')"], True),
        (["print('1 passed')", "raise SystemExit(5)"], True),  # pytest's: no tests there
        (["print('1 passed')", "print('1 skipped')"], True),
        (["print('1 skipped')"], False),
        (["raise SystemExit(5)"], False),
        (["print('1 passed')", "print('told'); raise SystemExit(1)"], False),
    ],
)
def test_proofs_side_by_side(
    codes: list[str],
    good: bool,
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool.side_by_side([job(tool, code) for code in codes], tmp_path / "logs") == good
    assert ("told" in capsys.readouterr().out) == any("told" in code for code in codes)


@checks
def test_a_proof_that_hangs_is_ended(tool: ModuleType, tmp_path: Path) -> None:
    hangs = "import time; print('1 passed', flush=True); time.sleep(60)"
    assert not tool.side_by_side([job(tool, hangs, seconds=1)], tmp_path / "logs")


@checks
def test_every_kind_of_proof_must_have_been_run(tool: ModuleType, tmp_path: Path) -> None:
    jobs = [job(tool, "print('1 passed')"), job(tool, "raise SystemExit(5)", "another")]
    assert not tool.side_by_side(jobs, tmp_path / "logs")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("tool", [("bench", "bench_dp_step")], indirect=True)
def test_an_alternative_that_fails_leaves_the_others_their_figures(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*tensors: object) -> None:
        raise RuntimeError("no compiler here\nat all")

    methods = {tool.OURS: tool.fused(), "broken": broken}
    monkeypatch.setattr(tool, "methods_for", lambda *arguments: dict(methods))
    size = tool.Size(4, 64)
    inputs = tool.trajectory(size, "cpu")
    figures, failed = tool.measure(size, inputs, torch.float32, 1, lambda: 1e9, False)
    assert [(f.method, f.right_parents) for f in figures] == [(tool.OURS, 1.0)]
    assert failed == ["- broken failed at (4, 64), torch.float32: no compiler here"]
    monkeypatch.setitem(methods, tool.OURS, broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        tool.measure(size, inputs, torch.float32, 1, lambda: 1e9, False)
