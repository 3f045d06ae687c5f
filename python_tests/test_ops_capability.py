"""The native CPU kernels for every instruction set that this machine has.

The choice is made once per process, so each is tried in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import SEED
from oss_ext.ops import native

HERE = Path(__file__).parent
MATRIX = [
    "test_ops_correctness.py",
    "test_ops_rules.py",
    "test_ops_pieces.py",
    "test_ops_affine.py",
    "test_ops_affine_pieces.py",
]

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.why_not))


def run(capability: str, *command: str) -> subprocess.CompletedProcess[str]:
    choice = {"OSS_CPU_CAPABILITY": capability, "OSS_TEST_SEED": str(SEED)}
    return subprocess.run(
        [sys.executable, *command], env=os.environ | choice, capture_output=True, text=True
    )


@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512"])
def test_every_instruction_set_passes_the_matrix(capability: str) -> None:
    built, in_use = (native.build_info()[k] for k in ("cpu_capabilities", "cpu_capability"))
    if capability not in built:
        pytest.skip(f"{capability} is not for this architecture")
    if capability == in_use:
        pytest.skip(f"{capability} is what the other tests use here")
    machine = torch.backends.cpu.get_cpu_capability()
    if capability != "plain" and not machine.lower().startswith(capability):
        pytest.skip(f"this machine has {machine} at best")
    tests = [str(HERE / name) for name in MATRIX]
    result = run(
        capability, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native-cpu", *tests
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_choice_is_reported() -> None:
    code = "from oss_ext.ops import native; print(native.build_info()['cpu_capability'])"
    assert run("plain", "-c", code).stdout.strip() == "plain"


def test_an_unknown_instruction_set_is_a_clear_error() -> None:
    code = (
        "import torch; from oss_ext import ops; x = torch.zeros(2, 1); "
        "ops.dp_step(x, x, x, torch.arange(2.0, dtype=torch.float64), backend='native')"
    )
    result = run("mmx", "-c", code)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ")
    assert all(word in last for word in ("OSS_CPU_CAPABILITY", "mmx", "plain"))
