"""The fingerprint of functions: what they refer to tells models apart, and nothing else does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oss_ext import models

SCALE = 0.5


def fingerprint(network: Any, **options: Any) -> str:
    return models.from_callable(network, shape=(4,), **options).fingerprint()


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def enclosing(net: nn.Module, guidance: float = 1.0, mode: str = "a") -> Callable[..., Tensor]:
    def network(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return net(x) * guidance + len(mode)

    return network


def with_default(scale: float) -> Callable[..., Tensor]:
    return lambda x, t, sample, by=scale: x * by


def by_helper(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return helper(x)


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def scaled(x: Tensor, t: Tensor, sample: Tensor, by: float = 1.0) -> Tensor:
    return x * by


class Object:
    def __init__(self, net: nn.Module, scale: float) -> None:
        self.net, self.scale, self.calls = net, scale, 0

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * self.scale

    def method(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return self(x, t, sample)


KINDS: dict[str, Callable[[int], Any]] = {
    "weights enclosed": lambda k: enclosing(linear(k)),
    "a number enclosed": lambda k: enclosing(linear(0), guidance=float(k)),
    "a string enclosed": lambda k: enclosing(linear(0), mode="ab"[k]),
    "a number in the code": lambda k: (
        lambda x, t, sample: x * 0.3, lambda x, t, sample: x * 0.9
    )[k],
    "a default": lambda k: with_default(k + 0.5),
    "a keyword of partial": lambda k: functools.partial(scaled, by=k + 0.5),
    "decorated": lambda k: torch.no_grad()(enclosing(linear(k))),
    "weights of an object": lambda k: Object(linear(k), 1.0),
    "a number of an object": lambda k: Object(linear(0), k + 0.5),
    "weights behind a method": lambda k: Object(linear(k), 1.0).method,
    "a module's own method": lambda k: linear(k).forward,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_function_refers_to_tells_models_apart(kind: str) -> None:
    one, same, other = (fingerprint(KINDS[kind](k)) for k in (0, 0, 1))
    assert one == same
    assert one != other


def test_globals_of_functions_that_it_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(by_helper)
    assert fingerprint(by_helper) == before
    monkeypatch.setattr(f"{__name__}.SCALE", 0.25)
    assert fingerprint(by_helper) != before


def test_the_unconditional_network_counts() -> None:
    one, other = (
        fingerprint(scaled, unconditional=enclosing(linear(k)), guidance=2.0) for k in (0, 1)
    )
    assert one != other


def test_weights_that_change_are_seen_and_counters_are_not() -> None:
    net = linear(0)
    network = Object(net, 1.0)
    model = models.from_callable(network, shape=(4,))
    before = model.fingerprint()
    model(torch.zeros(2, 4), torch.full((2,), 0.5).double(), torch.arange(2))
    assert network.calls == 1
    assert model.fingerprint() == before
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert model.fingerprint() != before


def test_a_function_that_calls_itself_or_one_of_later_is_no_trouble() -> None:
    def itself(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return itself(x[:1], t, sample) if len(x) > 1 else later(x)

    assert fingerprint(itself) == fingerprint(itself)

    def later(x: Tensor) -> Tensor:
        return x
