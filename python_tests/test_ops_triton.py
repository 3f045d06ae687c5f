"""What only the Triton backend has: an interpreter, tiles, groups of samples, a compiler."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from affine_cases import AffineCase, AffineRunner, AffineTruth
from conftest import SEED
from op_cases import DTYPES, Case, Inputs, Runner, same_bits
from op_truth import Truth
from oss_ext import ops
from oss_ext.ops import backend as cards
from oss_ext.ops import triton_launch as launch
from oss_ext.ops.checks import LOG_FLOOR

HERE = Path(__file__).parent
MATRIX = ["correctness", "rules", "arguments", "triton", "affine", "affine_arguments"]
MATRIX += [pytest.param(name, marks=pytest.mark.slow) for name in ("pieces", "affine_pieces")]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNER = Runner("triton", "cpu")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")


def release(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True
    )


@compiled
@pytest.mark.parametrize("name", MATRIX)
def test_the_interpreted_kernels_pass_the_matrix(name: str) -> None:
    """In a process of its own: triton is interpreted if the variable is set when it is loaded."""
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("Triton 3.6's interpreter takes arrays of one element for numbers")
    if release("triton") == (3, 9):
        pytest.skip("Triton 3.9's interpreter makes numbers of masks that are one truth value")
    result = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
        "-k", "triton-cpu or interpreted", str(HERE / f"test_ops_{name}.py"),
        TRITON_INTERPRET="1", OSS_TEST_SEED=str(SEED),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@compiled
def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, oss_ext; assert 'triton' not in sys.modules"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@compiled
def test_the_backend_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = ops.BACKENDS["triton"].why_not
    assert "TRITON_INTERPRET=1" in (why_not(torch.device("cpu")) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, known in (((7, 5), True), ((8, 0), False), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(cards, "_capability", lambda index, found=capability: found)
        assert ("sm_75" in (why_not(torch.device("cuda")) or "")) == known
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not(torch.device("cuda")) == "triton is not installed"


@compiled
@pytest.mark.skipif(ops.native.build_info().get("cuda", False), reason="native kernels serve CUDA")
def test_cuda_tensors_go_to_the_fastest_backend_that_can_serve() -> None:
    for name in ops.schema.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"oss::{name}", "CUDA")


def everything(inputs: Inputs) -> list[torch.Tensor]:
    chunk = len(inputs.state) // 2 + 1
    return [*RUNNER.dp_step(inputs), *RUNNER.dp_accumulate(inputs, chunk)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
def test_interpreted_tiles_change_no_bit(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    kernels: Any = launch.kernels()
    inputs = RUNNER.draw(Case(18, 1, (45,), mask="rows"), seed)
    expected = everything(inputs)
    for tile in kernels.UNROLLED + kernels.PLAIN:
        monkeypatch.setattr(kernels.pair_sums, "configs", [tile])
        assert_same(everything(inputs), expected)


@interpreted
@pytest.mark.parametrize("elements", [32, 96, 128, 160, 256])
def test_interpreted_rows_that_fill_their_lanes(elements: int, seed: int) -> None:
    """Nothing beyond a row is read, with masks or without."""
    inputs = RUNNER.draw(Case(2, 1, (1,)), seed)
    fields = ("state", "velocity", "teacher")
    wide = {f: getattr(inputs, f).new_full((3, 1, 2 * elements), torch.nan) for f in fields}
    generator = torch.Generator().manual_seed(seed)
    for tensor in wide.values():
        tensor[..., :elements].normal_(generator=generator)
    inputs = dataclasses.replace(inputs, **{f: x[..., :elements] for f, x in wide.items()})
    Truth(inputs).check_step(RUNNER.dp_step(inputs))


@interpreted
@pytest.mark.parametrize("reduce", ["none", "log_mean"])
def test_interpreted_groups_of_samples_change_no_bit(
    reduce: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    inputs = RUNNER.draw(Case(8, 3, (5,), mask="samples", reduce=reduce), seed)
    expected = everything(inputs)
    monkeypatch.setattr(launch, "WORKSPACE", 8 * 2 * 64)
    assert_same(everything(inputs), expected)


@interpreted
def test_interpreted_groups_of_samples_keep_each_winners_order(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With a reduction, costs are computed again for the winners, one order after the other."""
    affine = AffineRunner(RUNNER)
    inputs = affine.draw(AffineCase(5, 3, (5,), reduce="mean", terms=(1, 2)), seed)
    expected = affine.argmin(inputs)
    AffineTruth(inputs).check(expected)
    monkeypatch.setattr(launch, "WORKSPACE", 8)
    assert_same(list(affine.argmin(inputs, 3)), list(expected))


@interpreted
@pytest.mark.parametrize("splits", [1, 2])
def test_interpreted_splits_of_several_blocks_agree(
    splits: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(launch, "MAX_SPLITS", splits)
    inputs = RUNNER.draw(Case(1, 1, (1500,)), seed)
    wide = {
        name: getattr(inputs, name).repeat(1, 1, 3) for name in ("state", "velocity", "teacher")
    }
    inputs = dataclasses.replace(inputs, **wide)
    Truth(inputs).check_step(RUNNER.dp_step(inputs))


# Ahead of time: what a kernel's arguments are for a given kind of call.
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


def arguments(kernel: str, state: str, velocity: str, dims: int) -> dict[str, Any]:
    """Types of all arguments, and the values of those that are known to the compiler."""
    strides = ("i64",) * (2 + dims) if dims > 1 else ("i64", "i64", 1)
    common = {"sizes": ("i32",) * dims, "first": "i32", "splits": "i32", "elements": "i32"}
    pair, triple = ("i32", "i32"), ("i32", "i32", "i32")
    cells = {"count": "i32", "width": "i32", "CELLS": launch.CELLS}
    return {
        "pair_sums": common | {f"b{r}": None for r in range(6)} | {
            "sums": "*fp64", "b0": state, "b1": velocity, "basis_strides": (strides, strides),
            "basis_rows": pair, "target": state, "target_strides": strides, "times": "*fp64",
            "index": None, "index_strides": None, "coefficients": None,
            "coefficients_strides": None, "live": "*i1", "live_strides": pair, "wanted": None,
            "stop": "i32", "EVEN": False,
        },
        "join": common | cells | {
            "cost": "*fp64", "sums": "*fp64", "live": "*i1",
            "cost_strides": triple, "live_strides": pair,
        },
        "add_terms": cells | {
            "objective": "*fp64", "cost": "*fp64", "cost_strides": triple, "samples": "i32",
            "LOG": True, "FLOOR": LOG_FLOOR,
        },
        "select": {
            "score": "*fp64", "parent": "*i64", "best_order": "*i64", "cost": "*fp64",
            "score_strides": pair, "parent_strides": pair, "order_strides": pair,
            "cost_strides": triple, "order": "i32", "first": "i32", "count": "i32",
            "rows": "i32", "SOURCES": 32, "TARGETS": 32,
        },
        "advance": common | {
            "state": state, "velocity": velocity, "times": "*fp64", "next_state": state,
            "parent": "*i64", "next_strides": strides, "state_strides": strides,
            "velocity_strides": strides, "parent_strides": pair, "rows": "i32", "run": "i32",
            "IN_PLACE": True, "ELEMENTS": launch.ELEMENTS,
        },
        "combine": {
            "out": state, "out_strides": strides, "basis": (state, *[velocity] * 5),
            "basis_strides": (strides,) * 6, "index": "*i64", "index_strides": triple,
            "coefficients": "*fp64", "coefficients_strides": triple, "sizes": ("i32",) * dims,
            "elements": "i32", "ELEMENTS": launch.ELEMENTS,
        },
    }[kernel]  # fmt: skip


def affine_arguments(terms: int, state: str, velocity: str, dims: int) -> dict[str, Any]:
    """Those of ``pair_sums`` for candidates of so many terms."""
    given = arguments("pair_sums", state, velocity, dims)
    basis = {f"b{r}": velocity for r in range(1, terms)} | {f"b{r}": None for r in range(terms, 6)}
    return given | basis | {
        "basis_strides": (given["target_strides"],) * terms, "basis_rows": ("i32",) * terms,
        "times": None, "index": "*i64", "index_strides": ("i32",) * 3, "coefficients": "*fp64",
        "coefficients_strides": ("i64",) * 4, "wanted": "*i64",
    }  # fmt: skip


def jitted(kernel: str) -> Any:
    """The kernel without its autotuner."""
    import triton

    function: Any = getattr(launch.kernels(), kernel)
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    return function


@compiled
def test_aligned_rows_are_compiled_as_any_others() -> None:
    """Or Triton would give a thread neighbouring elements, and lanes to targets."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = jitted("pair_sums")
    cuda = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(function.signature, function.params, cuda)
    aligned = torch.empty(64, 64)
    assert aligned.data_ptr() % 16 == 0
    given = dict.fromkeys(function.arg_names, 1) | {f"b{r}": aligned for r in range(6)}
    _, kinds, _ = bind(**given | {"target": aligned, "sums": aligned})
    seen = {name: kind[1] for name, kind in zip(function.arg_names, kinds, strict=True)}
    assert seen["sums"] == "D"  # what Triton calls divisible
    assert not any(seen[name] for name in ("b0", "b1", "b2", "b3", "b4", "b5", "target"))


def spilled(
    kernel: str, given: dict[str, Any], architecture: int, folder: Path, config: Any = None
) -> int:
    """Bytes of stack and local memory that a kernel takes when compiled for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": 4}
    if config is not None:
        options = {"num_warps": config.num_warps, "maxnreg": config.maxnreg}
    function = jitted(kernel)
    constants: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, *at: int) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(part, *at, k) for k, part in enumerate(value))
        if isinstance(value, str):
            return value
        constants[at] = value
        return "constexpr"

    signature = {name: kind(given[name], place) for place, name in enumerate(function.arg_names)}
    built = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False} | options,
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    print(f"{kernel} sm_{architecture}: {found}")
    return found["STACK"] + found["LOCAL"]


def tiles(given: dict[str, Any]) -> list[Any]:
    """Those that are tried for some arguments of ``pair_sums``."""
    dtype = next(dtype for dtype, name in TYPES.items() if name == given["target"])
    target = torch.empty(0, dtype=dtype)
    chosen: list[Any] = launch.kernels().tiles(None, given | {"target": target})
    return chosen


def call(state: torch.dtype, velocity: torch.dtype, dims: int) -> tuple[str, str, int]:
    return TYPES[state], TYPES[velocity], dims


USUAL = call(torch.float32, torch.float32, 1)
CALLS = [
    pytest.param(USUAL, id="float32"),
    *(
        pytest.param(call(*dtypes, dims), id=f"{dtypes} {dims} dims", marks=pytest.mark.slow)
        for dtypes in DTYPES
        for dims in (1, 3)
        if call(*dtypes, dims) != USUAL
    ),
]


@compiled
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("given", CALLS)
def test_compiled_kernels_keep_to_their_registers(
    given: tuple[str, str, int], architecture: int, tmp_path: Path
) -> None:
    """No GPU is needed to compile."""
    for config in tiles(arguments("pair_sums", *given)):
        for wanted, even in ((None, False), ("*i64", False), (None, True)):
            choice = {"wanted": wanted, "EVEN": even}
            tile = arguments("pair_sums", *given) | config.kwargs | choice
            assert not spilled("pair_sums", tile, architecture, tmp_path, config), tile
    for kernel in ("join", "add_terms", "select", "advance", "combine"):
        assert not spilled(kernel, arguments(kernel, *given), architecture, tmp_path), kernel


@compiled
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    "terms", [3, 6, *(pytest.param(terms, marks=pytest.mark.slow) for terms in (1, 2, 4, 5))]
)
@pytest.mark.parametrize("given", CALLS)
def test_compiled_kernels_keep_any_terms_in_their_registers(
    given: tuple[str, str, int], terms: int, architecture: int, tmp_path: Path
) -> None:
    whole = affine_arguments(terms, *given)
    for config in tiles(whole)[: 1 if given == USUAL else None]:
        tile = whole | config.kwargs
        assert not spilled("pair_sums", tile, architecture, tmp_path, config), tile
