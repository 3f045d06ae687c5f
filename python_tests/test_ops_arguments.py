"""Bad arguments raise ``RuntimeError`` that names the argument, alike from every backend."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import Case, Runner, arguments, same_bits
from oss_ext import ops
from oss_ext.ops import native, schema

N, B, DIMS = 6, 2, (3, 5)
CASE = Case(N, B, DIMS, mask="samples")
Change = Callable[[Any], Any]


def set_at(index: int | tuple[int, int], value: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


# Argument, what is wrong with it, how to spoil a good one.
SPOILT: list[tuple[str, str, Change]] = [
    ("state", "integers", lambda x: x.long()),
    ("state", "complex numbers", lambda x: x.to(torch.complex64)),
    ("state", "no samples axis", lambda x: x[:, 0, 0, 0]),
    ("velocity", "a row too few", lambda x: x[1:]),
    ("velocity", "a sample too few", lambda x: x[:, :1]),
    ("velocity", "other dims", lambda x: x.mT),
    ("velocity", "other rank", lambda x: x.flatten(2)),
    ("velocity", "wider than state", lambda x: x.double()),
    ("velocity", "integers", lambda x: x.long()),
    ("velocity", "other device", lambda x: x.to("meta")),
    ("teacher", "a row too few", lambda x: x[1:]),
    ("teacher", "other dims", lambda x: x.mT),
    ("teacher", "other rank", lambda x: x[..., None]),
    ("teacher", "16-bit beside float32", lambda x: x.bfloat16()),
    ("teacher", "other device", lambda x: x.to("meta")),
    ("times", "float32", lambda x: x.float()),
    ("times", "a row too few", lambda x: x[1:]),
    ("times", "a column", lambda x: x[:, None]),
    ("times", "other device", lambda x: x.to("meta")),
    ("times", "decreasing", lambda x: x.flip(0)),
    ("times", "a repeated time", lambda x: set_at(3, float(x[2]))(x)),
    ("times", "NaN at the start", set_at(0, torch.nan)),
    ("times", "NaN inside", set_at(3, torch.nan)),
    ("times", "inf at the end", set_at(N, torch.inf)),
    ("source_mask", "integers", lambda x: x.long()),
    ("source_mask", "a row too few", lambda x: x[1:]),
    ("source_mask", "samples only", lambda x: x[0]),
    ("source_mask", "one column for two samples", lambda x: x[:, :1]),
    ("source_mask", "rank 3", lambda x: x[..., None]),
    ("source_mask", "other device", lambda x: x.to("meta")),
    ("reduce", "an unknown name", lambda x: "median"),
    ("reduce", "empty", lambda x: ""),
    ("parent", "int32", lambda x: x.int()),
    ("parent", "one axis", lambda x: x[:, 0]),
    ("parent", "a row too few", lambda x: x[1:]),
    ("parent", "three columns for two samples", lambda x: x[:, [0, 1, 1]]),
    ("parent", "other device", lambda x: x.to("meta")),
    ("parent", "below -1", set_at((2, 1), -2)),
    ("parent", "the target itself", set_at((2, 1), 2)),
    ("parent", "past the last row", set_at((2, 1), N + 1)),
    ("cost", "float32", lambda x: x.float()),
    ("cost", "no samples axis", lambda x: x[..., 0]),
    ("cost", "not square", lambda x: x[1:]),
    ("cost", "N = 0", lambda x: x[:1, :1]),
    ("cost", "B = 0", lambda x: x[..., :0]),
    ("velocity_chunk", "no source", lambda x: x[:0]),
    ("velocity_chunk", "a sample too few", lambda x: x[:, :1]),
    ("velocity_chunk", "other rank", lambda x: x.flatten(2)),
    ("velocity_chunk", "no axis", lambda x: x[0, 0, 0, 0]),
    ("velocity_chunk", "wider than state", lambda x: x.double()),
    ("velocity_chunk", "other device", lambda x: x.to("meta")),
    ("first_source", "row 0", lambda x: 0),
    ("first_source", "negative", lambda x: -1),
    ("first_source", "past the last row", lambda x: 2),
    ("best_cost", "float32", lambda x: x.float()),
    ("best_cost", "a sample too few", lambda x: x[:, :1]),
    ("best_cost", "one memory for all rows", lambda x: x[:1].expand_as(x)),
    ("best_cost", "other device", lambda x: x.to("meta")),
    ("best_parent", "int32", lambda x: x.int()),
    ("best_parent", "a sample too few", lambda x: x[:, :1]),
    ("best_parent", "one memory for all rows", lambda x: x[:1].expand_as(x)),
    ("best_parent", "other device", lambda x: x.to("meta")),
    ("best_order", "int32", lambda x: x.int()),
    ("best_order", "a sample too few", lambda x: x[:, :1]),
    ("best_order", "one memory for all rows", lambda x: x[:1].expand_as(x)),
    ("best_order", "other device", lambda x: x.to("meta")),
    ("basis", "no tensor", lambda x: []),
    ("basis", "seven tensors", lambda x: x[:1] * 7),
    ("basis", "integers", lambda x: [x[0].long(), x[1]]),
    ("basis", "no samples axis", lambda x: [x[0], x[1][:, 0, 0, 0]]),
    ("basis", "no row", lambda x: [x[0], x[1][:0]]),
    ("basis", "a sample too few", lambda x: [x[0], x[1][:, :1]]),
    ("basis", "other dims", lambda x: [x[0], x[1].mT]),
    ("basis", "a narrow first", lambda x: [x[0].bfloat16(), x[1]]),
    ("basis", "a wide second", lambda x: [x[0], x[1].double()]),
    ("basis", "other device", lambda x: [x[0], x[1].to("meta")]),
    ("index", "int32", lambda x: x.int()),
    ("index", "a term too few", lambda x: x[1:]),
    ("index", "nothing", lambda x: x[:, :0]),
    ("index", "a sample too few", lambda x: x[..., :1]),
    ("index", "two axes", lambda x: x[0]),
    ("index", "past the last row", lambda x: torch.full_like(x, N + 1)),
    ("index", "below -1", lambda x: torch.full_like(x, -2)),
    ("index", "other device", lambda x: x.to("meta")),
    ("coefficients", "float32", lambda x: x.float()),
    ("coefficients", "an axis too few", lambda x: x[0]),
    ("coefficients", "a row too few", lambda x: x[..., 1:, :]),
    ("coefficients", "inf", lambda x: torch.full_like(x, torch.inf)),
    ("coefficients", "other device", lambda x: x.to("meta")),
    ("terms", "no order", lambda x: []),
    ("terms", "five orders", lambda x: [1] * 5),
    ("terms", "no term", lambda x: [0]),
    ("terms", "more than there are", lambda x: [3]),
    ("target", "integers", lambda x: x.long()),
    ("target", "no samples axis", lambda x: x[:, 0, 0, 0]),
    ("target", "N = 0", lambda x: x[:1]),
]


VALUES = {
    "times": {"decreasing", "a repeated time", "NaN at the start", "NaN inside", "inf at the end"},
    "parent": {"below -1", "the target itself", "past the last row"},
    "index": {"below -1", "past the last row"},
    "coefficients": {"inf"},
}
"""What of ``SPOILT`` can only be seen in memory."""


def takes(op: str, argument: str) -> bool:
    return re.search(rf"\b{argument}\b", schema.SCHEMAS[op].split("->")[0]) is not None


@pytest.mark.parametrize(
    ("op", "argument", "what", "change"),
    [
        pytest.param(op, argument, what, change, id=f"{op}-{argument}: {what}")
        for argument, what, change in SPOILT
        for op in schema.SCHEMAS
        if takes(op, argument)
    ],
)
def test_a_bad_argument_is_named(
    backend: Runner, op: str, argument: str, what: str, change: Change, seed: int
) -> None:
    backend.needs(op)
    if what in VALUES.get(argument, ()):
        backend.needs_values()
    given = arguments(op, backend.draw(CASE, seed))
    given[argument] = change(given[argument])
    with pytest.raises(RuntimeError, match=rf"^{op}: {argument}\b.*, got "):
        getattr(ops, op)(**given, backend=backend.name)


@pytest.mark.parametrize("op", ["dp_step", "dp_cost", "dp_advance", "dp_accumulate_"])
@pytest.mark.parametrize("empty", ["N", "B", "D"])
def test_empty_inputs_are_refused(backend: Runner, op: str, empty: str, seed: int) -> None:
    given = arguments(op, backend.draw(CASE, seed))
    cut = {"N": (slice(0, 1),), "B": (slice(None), slice(0, 0)), "D": (..., slice(0, 0))}[empty]
    for name, value in given.items():
        if name == "velocity_chunk" and empty == "N":
            continue  # a chunk of one source beside a state that has none
        if name in ("state", "velocity", "velocity_chunk", "teacher"):
            given[name] = value[cut]
        elif isinstance(value, Tensor) and (empty == "N" or (empty == "B" and value.dim() == 2)):
            given[name] = value[cut]
    with pytest.raises(RuntimeError, match=rf"^{op}: state\b.*, got "):
        getattr(ops, op)(**given, backend=backend.name)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("velocity", [torch.bfloat16, torch.float16, torch.float32])
def test_only_a_float32_state_takes_another_velocity(
    backend: Runner, state: torch.dtype, velocity: torch.dtype, seed: int
) -> None:
    inputs = backend.draw(Case(N, B, DIMS, state, velocity), seed)
    if state == velocity:
        backend.dp_step(inputs)
        return
    with pytest.raises(RuntimeError, match=r"^dp_step: velocity\b.*, got "):
        backend.dp_step(inputs)


@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
def test_a_reduction_keeps_one_parent_per_row(backend: Runner, reduce: str, seed: int) -> None:
    given = arguments("dp_accumulate_", backend.draw(CASE, seed)) | {"reduce": reduce}
    with pytest.raises(RuntimeError, match=r"^dp_accumulate_: best_parent\b.*, got "):
        ops.dp_accumulate_(**given, backend=backend.name)


@pytest.mark.parametrize("second", [1, 2, 4], ids=["from the start", "overlapping", "again"])
def test_chunks_out_of_order_are_refused(backend: Runner, second: int, seed: int) -> None:
    backend.needs_values()
    inputs = backend.draw(Case(N, B, DIMS), seed)
    given = arguments("dp_accumulate_", inputs)

    def accumulate(first: int) -> None:
        given.update(first_source=first, velocity_chunk=inputs.velocity[first : first + 3])
        ops.dp_accumulate_(**given, backend=backend.name)

    accumulate(4)
    with pytest.raises(RuntimeError, match=r"^dp_accumulate_: .*first_source"):
        accumulate(second)


def test_a_state_whose_rows_share_memory_is_not_updated_in_place(
    backend: Runner, seed: int
) -> None:
    given = arguments("dp_accumulate_", backend.draw(CASE, seed))
    given["state"] = given["state"][-1:].expand_as(given["state"])
    with pytest.raises(RuntimeError, match=r"^dp_accumulate_: state\b.*, got "):
        ops.dp_accumulate_(**given, backend=backend.name)


def test_a_refused_chunk_changes_nothing(backend: Runner, seed: int) -> None:
    backend.needs_values()
    given = arguments("dp_accumulate_", backend.draw(CASE, seed))
    written = [given[name] for name in ("state", "best_cost", "best_parent")]
    before = [tensor.clone() for tensor in written]
    given["times"] = given["times"].flip(0)
    with pytest.raises(RuntimeError, match="times"):
        ops.dp_accumulate_(**given, backend=backend.name)
    assert all(same_bits(a, b) for a, b in zip(written, before, strict=True))


def test_more_memory_than_there_is_is_named_with_what_takes_less(backend: Runner) -> None:
    if backend.name != "native":
        pytest.skip("torch's own error")
    rows, elements = (4097, 2**33) if backend.device == "cpu" else (1001, 2**30)
    state = torch.zeros((), device=backend.device).expand(rows, 1, elements)
    times = torch.linspace(0, 1, rows, dtype=torch.float64, device=backend.device)
    parent = torch.full((rows, 1), -1, device=backend.device)
    message = rf"could not allocate {4 * rows * elements} bytes.*dp_accumulate_ works in place"
    with pytest.raises(RuntimeError, match=message):
        ops.dp_advance(state, state, times, parent, backend="native")


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_an_unknown_backend_is_answered_with_the_known_ones(op: str, seed: int) -> None:
    given = arguments(op, Runner("reference", "cpu").draw(CASE, seed))
    with pytest.raises(RuntimeError, match=rf"^{op}: backend\b.*{'.*'.join(ops.BACKENDS)}.*abacus"):
        getattr(ops, op)(**given, backend="abacus")


def test_a_backend_says_why_it_cannot_serve(seed: int) -> None:
    inputs = Runner("reference", "cpu").draw(CASE, seed).to("meta")
    reason = ops.BACKENDS["native"].why_not(torch.device("meta"))
    assert reason
    with pytest.raises(RuntimeError, match=rf"^dp_step: backend\b.*native.*{re.escape(reason)}"):
        Runner("native", "meta").dp_step(inputs)


def test_a_card_too_old_for_kernels_is_served_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    inputs = Runner("reference", "cpu").draw(CASE, seed)
    called: list[str] = []
    for name, operator in ops.reference.BACKEND.operators.items():
        spy = lambda *args, name=name, of=operator, **options: (  # noqa: E731
            called.append(name), of(*args, **options)
        )[1]  # fmt: skip
        monkeypatch.setitem(ops.reference.BACKEND.operators, name, spy)
    for old in (False, True):
        monkeypatch.setattr(ops, "too_old", lambda device, old=old: old)
        for name in ops.schema.SCHEMAS:
            given = arguments(name, inputs)
            called.clear()
            getattr(ops, name)(**given)
            assert called == [name] * old


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_none_in_place_of_an_argument_is_named(backend: Runner, op: str, seed: int) -> None:
    given = arguments(op, backend.draw(CASE, seed))
    for name in given.keys() - {"source_mask", "reduce"}:
        with pytest.raises(RuntimeError, match=f"^{op}: {name}: expected .*, got None$"):
            getattr(ops, op)(**given | {name: None}, backend=backend.name)


@pytest.mark.skipif(not native.available, reason=str(native.why_not))
@pytest.mark.parametrize("op", [name for name in schema.SCHEMAS if name != "dp_select"])
def test_kernels_name_none_in_place_of_a_tensor(op: str, seed: int) -> None:
    """torch takes it for one; where it is the only tensor there is no device to run on."""
    given = arguments(op, Runner("reference", "cpu").draw(CASE, seed))
    for name in [name for name, value in given.items() if isinstance(value, torch.Tensor)]:
        if name != "source_mask":  # which may be missing
            with pytest.raises(RuntimeError, match=f"^{op}: {name} must be a tensor, got none"):
                getattr(torch.ops.oss, op)(**given | {name: None})
