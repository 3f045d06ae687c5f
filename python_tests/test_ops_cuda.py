"""What only a GPU can show: graphs, streams, memory, and the errors of that device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from affine_cases import AffineCase, AffineInputs, AffineRunner, assert_same, chosen, new_best
from op_cases import REDUCTIONS, Case, Inputs, Runner, arguments, same_bits
from op_truth import Truth
from oss_ext import ops

GPU_BACKENDS = [name for name in ops.BACKENDS if name != "reference"]
MIB = 2**20
Result = TypeVar("Result")


@pytest.fixture(params=GPU_BACKENDS)
def gpu(request: pytest.FixtureRequest) -> Runner:
    """Every kernel backend, on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = ops.BACKENDS[request.param].why_not(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return Runner(request.param, "cuda")


@pytest.fixture
def affine_gpu(gpu: Runner) -> AffineRunner:
    """Those that have the operators on candidates of any affine form."""
    gpu.needs("dp_argmin_")
    return AffineRunner(gpu)


def argmin(affine: AffineRunner, inputs: AffineInputs, best: tuple[Tensor, ...]) -> None:
    ops.dp_argmin_(
        inputs.basis, inputs.index, inputs.coefficients, inputs.terms, 1, inputs.target, *best,
        source_mask=inputs.source_mask, reduce=inputs.reduce, backend=affine.runner.name,
    )  # fmt: skip


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def requested(call: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes that a call has asked for at its peak, its outputs among them; and what it returns.

    Not those that the allocator gave: it hands out large blocks that are up to 1 MiB larger.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    outputs = call()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, outputs


def copy_into(inputs: Inputs, others: Inputs) -> None:
    for name in ("state", "velocity", "teacher", "times"):
        getattr(inputs, name).copy_(getattr(others, name))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_captured_graph_replays_with_other_inputs(gpu: Runner, reduce: str, seed: int) -> None:
    case = Case(40, 2, (3, 50), reduce=reduce)
    inputs, others = gpu.draw(case, seed), gpu.draw(case, seed + 1)
    given = arguments("dp_step", inputs)
    call = lambda: ops.dp_step(**given, backend=gpu.name)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles and loads what a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    copy_into(inputs, others)
    expected = call()
    for out in captured:
        out.fill_(-2)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_captured_argmin_replays_with_other_inputs(
    affine_gpu: AffineRunner, reduce: str, seed: int
) -> None:
    case = AffineCase(40, 2, (3, 50), reduce=reduce)
    inputs, others = affine_gpu.draw(case, seed), affine_gpu.draw(case, seed + 1)
    expected = affine_gpu.argmin(others)  # compiles and loads what a capture must not
    picked = chosen(others, expected)
    combined = affine_gpu.combine(others, *picked)
    best = new_best(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        argmin(affine_gpu, inputs, best)
        captured = ops.dp_combine(inputs.basis, *picked, backend=affine_gpu.runner.name)
    for to, other in zip(
        [*inputs.basis, inputs.index, inputs.coefficients, inputs.target, *best],
        [*others.basis, others.index, others.coefficients, others.target, *new_best(others)],
        strict=True,
    ):
        to.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(best, expected)
    assert same_bits(captured, combined)


@pytest.mark.parametrize(
    ("dtype", "elements"),
    [
        (torch.float32, 4096),
        (torch.bfloat16, 4096),
        (torch.float64, 4096),
        (torch.float32, 2**16 + 1),  # rows of any alignment
        (torch.float32, 2**19),  # sums are flushed on the way
    ],
)
def test_blocks_that_go_through_many_stages_agree_with_the_truth(
    gpu: Runner, dtype: torch.dtype, elements: int, seed: int
) -> None:
    """As large searches do, with tiles in which every warp has pairs."""
    inputs = gpu.draw(Case(200, 1, (elements,), dtype=dtype), seed)
    truth = Truth(inputs)
    truth.check_step(gpu.dp_step(inputs))
    truth.check_costs(gpu.dp_cost(inputs))


def test_two_streams_at_once_give_equal_results(gpu: Runner, seed: int) -> None:
    inputs = [gpu.draw(Case(60, 3, (1000,)), seed + k) for k in range(2)]
    expected = [gpu.dp_step(one) for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for one, stream, results in zip(inputs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.dp_step(**arguments("dp_step", one), backend=gpu.name))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        assert all(same(result, right) for result in results)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("steps", "samples"), [(200, 1), (200, 64), (1000, 1)])
def test_the_workspace_is_bounded(
    gpu: Runner, steps: int, samples: int, reduce: str, seed: int
) -> None:
    inputs = gpu.draw(Case(steps, samples, (4096,), reduce=reduce), seed)
    gpu.dp_step(inputs)
    given = arguments("dp_step", inputs)
    peak, outputs = requested(lambda: ops.dp_step(**given, backend=gpu.name))
    kept = sum(out.nbytes for out in outputs)
    assert peak - kept <= (16 if steps <= 200 else 32) * MIB


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_workspace_of_an_argmin_is_bounded(
    affine_gpu: AffineRunner, reduce: str, seed: int
) -> None:
    case = AffineCase(200, 4, (64,), reduce=reduce, terms=(2, 1, 2, 2), shared=True, holes=False)
    inputs = affine_gpu.draw(case, seed)
    affine_gpu.argmin(inputs)
    best = new_best(inputs)
    assert requested(lambda: argmin(affine_gpu, inputs, best))[0] <= 16 * MIB


def test_no_argmin_waits_for_the_device(affine_gpu: AffineRunner, seed: int) -> None:
    inputs = affine_gpu.draw(AffineCase(20, 2, (64,), mask="rows"), seed)
    best = affine_gpu.argmin(inputs)
    picked = chosen(inputs, best)
    affine_gpu.combine(inputs, *picked)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        argmin(affine_gpu, inputs, best)
        ops.dp_combine(inputs.basis, *picked, backend=affine_gpu.runner.name)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_no_call_waits_for_the_device(gpu: Runner, seed: int) -> None:
    inputs = gpu.draw(Case(20, 2, (64,), mask="rows"), seed)
    given = arguments("dp_step", inputs)
    ops.dp_step(**given, backend=gpu.name)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op in ("dp_step", "dp_cost", "dp_accumulate_"):
            getattr(ops, op)(**arguments(op, inputs) if op != "dp_step" else given,
                             backend=gpu.name)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_more_steps_than_the_kernels_hold_are_refused(gpu: Runner) -> None:
    if gpu.name != "native":
        pytest.skip("it has no such limit")
    state = torch.zeros(1026, 1, 2, device="cuda")
    times = torch.linspace(0, 1, 1026, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match=r"at most .*1024.*got .*1025"):
        ops.dp_step(state, state, state, times, backend=gpu.name)


@pytest.mark.parametrize("moved", ["velocity", "teacher", "times", "source_mask"])
def test_tensors_on_two_devices_are_refused(gpu: Runner, moved: str, seed: int) -> None:
    given = arguments("dp_step", gpu.draw(Case(5, 2, (3,), mask="rows"), seed))
    given[moved] = given[moved].cpu()
    with pytest.raises(RuntimeError, match=rf"^dp_step: {moved}\b.*, got .*cpu"):
        ops.dp_step(**given, backend=gpu.name)


def test_a_backend_that_cannot_serve_the_cpu_says_why(gpu: Runner) -> None:
    if gpu.name == "native":
        pytest.skip("it has kernels for the CPU too")
    state, times = torch.zeros(3, 1, 2), torch.linspace(0, 1, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=rf"backend: expected one that can serve.*{gpu.name}"):
        ops.dp_step(state, state, state, times, backend=gpu.name)
