"""What the inner loop of a CUDA kernel issues, from its machine code: its arithmetic and the rest.

A multiprocessor issues at most one instruction of a warp per scheduler and cycle, so that a loop
that is bound by arithmetic runs at no more than the share of floating-point instructions in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

FLOATING = re.compile(r"^(@!?U?P\w+ +)?[FD](FMA|ADD|MUL)\b")
LINE = re.compile(
    r"^arch = (?P<arch>\S+)|Function : (?P<name>\S+)"
    r"|^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<what>[^;]+);"
)
BRANCH = re.compile(r"\bBRA\b.*\b0x(?P<to>[0-9a-f]+)")


class Loop(NamedTuple):
    arithmetic: int
    instructions: int


def find_disassembler() -> str | None:
    """cuobjdump, of a CUDA toolkit or of triton's package."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def inner_loop(code: list[tuple[int, str]]) -> Loop | None:
    """Of the loops without a loop in them, the one with the most arithmetic."""
    # After the last EXIT is what was moved out of the way: its branches back are no loops.
    ends = [k for k, (_, what) in enumerate(code) if what == "EXIT"]
    code = code[: ends[-1]] if ends else code
    index = {at: k for k, (at, _) in enumerate(code)}
    spans = []
    for k, (_, what) in enumerate(code):
        back = BRANCH.search(what)
        start = None if back is None else index.get(int(back["to"], 16))
        if start is not None and start < k:
            spans.append((start, k + 1))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    return max((count(code[start:end]) for start, end in inner), default=None)


def count(code: list[tuple[int, str]]) -> Loop:
    """Without the blocks that copy what is less than 16 bytes: only the last elements need them."""
    heads = {int(to["to"], 16) for _, what in code if (to := BRANCH.search(what)) is not None}
    arithmetic = instructions = 0
    block: list[str] = []
    for k, (_, what) in enumerate(code):
        block.append(what)
        ends = k + 1 == len(code) or code[k + 1][0] in heads or BRANCH.search(what) is not None
        if not ends:
            continue
        if not any(".ZFILL" in each for each in block):
            arithmetic += sum(FLOATING.match(each) is not None for each in block)
            instructions += len(block)
        block = []
    return Loop(arithmetic, instructions)


def inner_loops(disassembler: str, objects: list[Path]) -> dict[tuple[str, str], Loop]:
    """By (linker's name of a kernel, architecture)."""
    found: dict[tuple[str, str], Loop] = {}
    for path in objects:
        command = [disassembler, "--dump-sass", str(path)]
        dump = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout
        arch, code, codes = "", [], {}
        for line in dump.splitlines():
            match = LINE.search(line)
            if match is None:
                continue
            if match["arch"]:
                arch = match["arch"]
            elif match["name"]:
                code = codes[match["name"], arch] = []
            else:
                code.append((int(match["at"], 16), match["what"].strip()))
        for key, code in codes.items():
            loop = inner_loop(code)
            if loop is not None:
                found[key] = loop
    return found
