"""Compiles the CUDA kernels for every architecture and lists what each needs of a multiprocessor.

    python csrc/tests/cuda_resources.py

Needs nvcc and no GPU. Ends with 1 if a kernel spills registers or has a stack frame, and with 0,
saying so, where there is no nvcc.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from setup import find_nvcc, find_tool  # noqa: E402

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(nvcc: str) -> str:
    """The compiler's log of a build from nothing."""
    build = ROOT / "build" / "cuda"
    configure = [
        *(find_tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *("-DOSS_CUDA=ON", "-DOSS_CUDA_RESOURCES=ON"),
    ]
    environ = {**os.environ, "CUDACXX": nvcc}
    subprocess.run(configure, check=True, env=environ, stdout=subprocess.DEVNULL)
    command = [find_tool("cmake"), "--build", str(build), "--clean-first"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def readable(name: str) -> str:
    """``cost_kernel<float, float, true>`` from the linker's name."""
    done = subprocess.run(["c++filt", name], text=True, stdout=subprocess.PIPE, check=True)
    return re.sub(r"oss::cuda::|^void |\(.*$", "", done.stdout.strip())


def main() -> None:
    nvcc = find_nvcc(os.environ)
    if nvcc is None:
        print("no nvcc here: the CUDA kernels were not compiled")
        return
    kernels = [match.groupdict() for match in KERNEL.finditer(compile_kernels(nvcc))]
    if not kernels:
        sys.exit("no kernel was found in the compiler's log")
    architectures = sorted({k["arch"] for k in kernels})
    table: dict[str, dict[str, str]] = {}
    spilling = []
    for k in kernels:
        spilled = int(k["stack"]) + int(k["stores"]) + int(k["loads"])
        name = readable(k["name"])
        table.setdefault(name, {})[k["arch"]] = k["registers"] + ("!" if spilled else "")
        if spilled:
            spilling.append(f"{name} for {k['arch']}: {k['stack']} bytes of stack")
    width = max(map(len, table))
    print(f"{'registers of':{width}}  {'  '.join(architectures)}")
    for name, registers in sorted(table.items()):
        cells = [f"{registers.get(arch, '-'):>{len(arch)}}" for arch in architectures]
        print(f"{name:{width}}  {'  '.join(cells)}")
    missing = [name for name, registers in table.items() if len(registers) < len(architectures)]
    if spilling or missing:
        sys.exit("\n".join(["FAILED", *spilling, *(f"{n}: not for every arch" for n in missing)]))
    print(f"{len(table)} kernels, no spills and no stack")


if __name__ == "__main__":
    main()
