"""Install each given wheel into a fresh environment and use it from outside the source tree.

    python python_tests/try_wheel.py dist/*.whl

The environment borrows torch and the other dependencies from the one that runs this script, so
that a try takes seconds; the package itself comes from the wheel alone.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

# Runs in the fresh environment: the kernels of the wheel against the definition in plain torch.
SMOKE = """
import sys
from pathlib import Path

import torch

import oss_ext
from oss_ext import ops
from oss_ext.ops import native

package = Path(oss_ext.__file__).parent
assert package.is_relative_to(sys.prefix), f"imported from {package}, not from the wheel"
assert (package / "py.typed").exists()
assert list(package.glob("models/weights/*.safetensors")), "no weights in the wheel"
assert {path.suffix for path in package.glob("report/page.*")} == {".html", ".css", ".js"}
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("oss::dp_step", "CPU")
assert native.available == has_kernel == (sys.argv[1] == "native"), native.describe()

torch.manual_seed(0)
state, velocity, teacher = torch.randn(3, 12, 2, 1000).unbind()
times = torch.linspace(0, 1, 12, dtype=torch.float64)
_, cost, parent = torch.ops.oss.dp_step(state, velocity, teacher, times)
_, expected, best = ops.dp_step(state, velocity, teacher, times, backend="reference")
torch.testing.assert_close(cost, expected, rtol=1e-5, atol=0.0)
assert torch.equal(parent, best)
print(native.describe())
"""


def try_wheel(wheel: Path) -> None:
    kind = "pure" if wheel.name.endswith("-none-any.whl") else "native"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder) / "bin" / "python"

        def run(*command: str | Path, capture_output: bool = False) -> None:
            subprocess.run(command, check=True, cwd="/", timeout=120, capture_output=capture_output)

        # Before the borrowing below, which would show pip the source tree's own installation.
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        run(*pip, "install", "-q", "--no-deps", "--no-index", wheel.resolve())
        site = Path(sysconfig.get_path("purelib", vars={"base": folder}))
        # Python does not follow the .pth files of a folder that it knows from a .pth file, so an
        # editable installation over there stays invisible.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        print(f"{wheel.name}: ", end="", flush=True)
        run(python, "-c", SMOKE, kind)
        run(python.with_name("oss"), "--help", capture_output=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            try_wheel(Path(name))
        except subprocess.CalledProcessError:
            sys.exit(f"{name} failed, see above")
