"""The build's choices, what the native library says of itself, and life without it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

import oss_ext
from oss_ext.ops import native, schema

ROOT = Path(__file__).resolve().parents[1]

needs_native = pytest.mark.skipif(not native.available, reason=str(native.why_not))


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oss_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_package_has_one_version() -> None:
    assert version("oss_ext") == oss_ext.__version__


@needs_native
def test_build_info_says_what_was_built() -> None:
    info = native.build_info()
    assert info["version"] == oss_ext.__version__, "the native library is stale: make build"
    assert info["compiler"]
    assert info["torch"].startswith("2.")
    assert info["cuda_reason"].startswith("OSS_CUDA=")
    kinds = {"80-real", "90a-real", "100-real", "80-virtual", "100-virtual"}
    assert set(info["cuda_architectures"]) == (kinds if info["cuda"] else set())
    assert info["cpu_capabilities"][0] == "plain"
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capability"] in native.describe()


@needs_native
@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_the_native_library_serves_every_operator_on_the_cpu(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"oss::{op}", "CPU")


@needs_native
def test_the_native_library_holds_no_path_of_the_build_machine() -> None:
    spec = importlib.util.find_spec("oss_ext._C")
    assert spec is not None
    assert spec.origin is not None
    assert str(ROOT).encode() not in Path(spec.origin).read_bytes()


@needs_native
def test_the_instruction_sets_share_no_inline_function() -> None:
    """The linker keeps one copy of such a function, and could give everybody the AVX-512 one."""
    objects = sorted(
        (ROOT / "build").glob(f"native-{sys.implementation.cache_tag}/**/kernels.cpp.o")
    )
    if not objects:
        pytest.skip("the objects of the build are not here")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        weak = [line for line in symbols if line.split()[1] in "uVvWw"]
        assert symbols
        assert not weak, f"{path}: {weak}"


# A library that is missing, and one that is there but cannot be loaded.
MISSING = "sys.modules['oss_ext._C'] = None"
BROKEN = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == 'oss_ext._C':
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise ImportError('undefined symbol: aoti_torch_x')
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("preparation", "reason"),
    [(MISSING, "was not built"), (BROKEN, "did not load: undefined symbol: aoti_torch_x")],
)
def test_without_the_library_the_reference_serves(preparation: str, reason: str) -> None:
    script = f"""
import importlib.machinery, sys
{preparation}
import torch, oss_ext
from oss_ext.ops import native
assert not native.available and native.build_info() == {{}}
x = torch.randn(3, 1, 2)
print(torch.ops.oss.dp_step(x, x, x, torch.arange(3, dtype=torch.float64))[2].shape)
print(native.why_not)
"""
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("torch.Size([3, 1])")
    assert reason in result.stdout


@pytest.mark.parametrize(
    ("setting", "nvcc", "torch_cuda", "chosen", "reason"),
    [
        ("auto", "/cuda/bin/nvcc", True, True, "OSS_CUDA=auto, nvcc found"),
        ("auto", "/cuda/bin/nvcc", False, False, "OSS_CUDA=auto, this torch has no CUDA"),
        ("auto", None, True, False, "OSS_CUDA=auto, no nvcc found"),
        ("1", "/cuda/bin/nvcc", False, True, "OSS_CUDA=1, nvcc found"),
        ("0", "/cuda/bin/nvcc", True, False, "OSS_CUDA=0"),
    ],
)
def test_the_choice_of_cuda_has_a_reason(
    setup_py: ModuleType,
    setting: str,
    nvcc: str | None,
    torch_cuda: bool,
    chosen: bool,
    reason: str,
) -> None:
    choice, why = setup_py.choose_cuda(setting, nvcc, torch_cuda)
    assert choice == chosen
    assert why.startswith(reason)


def test_torch_is_asked_for_cuda_without_importing_it(setup_py: ModuleType) -> None:
    assert setup_py.torch_has_cuda() == (torch.version.cuda is not None)


def test_insisting_on_cuda_without_a_toolchain_says_what_to_do(setup_py: ModuleType) -> None:
    with pytest.raises(SystemExit, match="OSS_CUDA=1 but no CUDA compiler was found"):
        setup_py.choose_cuda("1", None, True)


def test_nvcc_is_looked_for_where_the_user_says_first(setup_py: ModuleType, tmp_path: Path) -> None:
    for folder in ("path", "home/bin"):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    own, on_path, at_home = tmp_path / "own", tmp_path / "path/nvcc", tmp_path / "home/bin/nvcc"
    own.touch(mode=0o755)
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "empty")}
    assert setup_py.find_nvcc(environ) == str(at_home)
    environ["PATH"] = str(tmp_path / "path")
    assert setup_py.find_nvcc(environ) == str(on_path)
    environ["CUDACXX"] = str(own)
    assert setup_py.find_nvcc(environ) == str(own)
    nowhere = {"CUDA_HOME": str(tmp_path / "empty"), "PATH": str(tmp_path / "empty")}
    assert setup_py.find_nvcc(nowhere) is None


@pytest.mark.parametrize(
    ("name", "command"), [("OSS_NATIVE", "--version"), ("OSS_CUDA", "build_ext")]
)
def test_an_unknown_setting_ends_the_build_with_one_line(name: str, command: str) -> None:
    result = run_python("setup.py", "-q", command, **{name: "perhaps"})
    assert result.returncode != 0
    assert f"oss_ext: {name}='perhaps' is not one of" in result.stderr
    assert "Traceback" not in result.stderr
