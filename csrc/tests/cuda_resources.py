"""Compiles the CUDA kernels for every architecture and lists what each needs of a multiprocessor:
registers, and of the cost kernels the share of arithmetic in what their inner loop issues.

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

from cuda_loops import find_disassembler, inner_loops  # noqa: E402

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


def show(title: str, table: dict[str, dict[str, str]], architectures: list[str]) -> None:
    header = {a: a for a in architectures}
    rows = {title: header, **{name: table[name] for name in sorted(table)}}
    name_width = max(map(len, rows))
    widths = {a: max(len(row.get(a, "-")) for row in rows.values()) for a in architectures}
    for name, row in rows.items():
        cells = [row.get(a, "-").rjust(widths[a]) for a in architectures]
        print(name.ljust(name_width), *cells, sep="  ")


def show_loops(architectures: list[str]) -> None:
    """Of the kernels that are bound by arithmetic, where they copy rows as they are."""
    disassembler = find_disassembler()
    if disassembler is None:
        print("no cuobjdump here: inner loops were not counted")
        return
    table: dict[str, dict[str, str]] = {}
    objects = sorted((ROOT / "build" / "cuda").rglob("*.cu.o"))
    for (name, arch), (arithmetic, issued) in inner_loops(disassembler, objects).items():
        shown = readable(name)
        if shown.startswith("cost_kernel<") and ", true, " in shown:
            share = f"{arithmetic}/{issued} = {arithmetic / issued:.0%}"
            table.setdefault(shown, {})[arch] = share
    print()
    show("arithmetic in the inner loop of", table, architectures)


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
    show("registers of", table, architectures)
    show_loops(architectures)
    missing = [name for name, registers in table.items() if len(registers) < len(architectures)]
    if spilling or missing:
        sys.exit("\n".join(["FAILED", *spilling, *(f"{n}: not for every arch" for n in missing)]))
    print(f"{len(table)} kernels, no spills and no stack")


if __name__ == "__main__":
    main()
