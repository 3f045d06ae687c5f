"""What a module inside a network gives while a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oss_ext as oss
from driver_cases import dp_search, each_seed, one_thread  # noqa: F401
from oss_ext.models import Model, from_callable
from oss_ext.models.hidden import Hidden, find_module

SHAPE = (6,)


class Net(nn.Module):
    """A network of one middle layer, ``after`` which something may happen to what that gave."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda h: h) -> None:
        super().__init__()
        self.middle, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.after = after

    def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        h = self.middle(x)
        self.after(h)
        return h.tanh()


def evaluate(model: Model, name: str, rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The states, and what the module gave there."""
    x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), Hidden(model, name) as hidden:
        model(x, torch.full((rows,), 0.5, dtype=torch.float64), torch.arange(rows))
        return x, hidden.take(rows)


@each_seed(2)
def test_a_module_is_heard_in_its_own_rows(seed: int) -> None:
    net = Net()
    x, got = evaluate(from_callable(net, SHAPE), "middle", seed=seed)
    assert torch.equal(got, net.middle(x))


def test_what_comes_after_does_not_change_what_was_heard() -> None:
    net = Net(after=lambda h: h.zero_())
    x, got = evaluate(from_callable(net, SHAPE), "middle")
    assert torch.equal(got, net.middle(x))


def test_nothing_is_heard_before_and_after() -> None:
    net = Net()
    model = from_callable(net, SHAPE)
    hidden = Hidden(model, "middle")
    x, t = torch.zeros(2, *SHAPE), torch.ones(2, dtype=torch.float64)
    model(x, t, torch.arange(2))
    with hidden:
        pass
    model(x, t, torch.arange(2))
    assert not net.middle._forward_hooks
    with pytest.raises(ValueError, match="to be called"):
        hidden.take(2)


def test_the_hook_is_taken_off_where_the_model_fails() -> None:
    def fail(h: Tensor) -> None:
        raise RuntimeError("broken")

    net = Net(after=fail)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(from_callable(net, SHAPE), "middle")
    assert not net.middle._forward_hooks


def test_guidance_in_two_calls_gives_the_features_of_both() -> None:
    net = Net()
    model = from_callable(
        net, SHAPE, unconditional=lambda x, t, sample: net(-x, t, sample), guidance=2.0
    )
    x, got = evaluate(model, "middle")
    assert torch.equal(got, torch.cat([net.middle(x), net.middle(-x)], dim=1))


def test_guidance_in_one_call_gives_the_features_of_both() -> None:
    class Twice(Net):
        def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
            conditional, null = self.middle(torch.cat([x, -x])).chunk(2)
            return 2 * conditional - null

    net = Twice()
    x, got = evaluate(from_callable(net, SHAPE), "middle")
    torch.testing.assert_close(got, torch.cat([net.middle(x), net.middle(-x)], dim=1))


@pytest.mark.parametrize("kind", [tuple, list])
def test_every_tensor_of_several_outputs_is_heard(kind: Callable[[Any], Any]) -> None:
    """Blocks give the text's features before the picture's or after them, or None for them."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return kind([x, None, 2 * x[:, :2], (x,)])

    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
            first, _, second, _ = self.block(x)
            heard = torch.cat([first, second], dim=1)
            first.zero_()
            return heard[:, 2:]

    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    _, got = evaluate(from_callable(Outer(), SHAPE), "block")
    assert torch.equal(got, torch.cat([x, 2 * x[:, :2]], dim=1))


def test_another_network_for_guidance_is_named_by_what_it_is() -> None:
    net, other = Net(), Net()
    model = from_callable(net, SHAPE, unconditional=other, guidance=2.0)
    x, got = evaluate(model, "unconditional.middle")
    assert torch.equal(got, other.middle(x))
    _, whole = evaluate(model, "unconditional")
    assert torch.equal(whole, other.middle(x).tanh())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_features_are_float32_or_better(dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0].to(dtype)  # one feature of every row

    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cast = Cast()
            self.after = self.cast

    x, got = evaluate(from_callable(Outer(), SHAPE), "cast")
    assert got.shape == (len(x), 1)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_bundled_digits_are_heard_with_both_halves_of_guidance() -> None:
    for guidance, times in ((1.0, 1), (2.0, 2)):
        model = oss.models.load("digits", guidance=guidance)
        x, t = model.noise(3), torch.full((3,), 0.4, dtype=torch.float64)
        with torch.no_grad(), Hidden(model, "mid2") as hidden:
            model(x, t, torch.arange(3))
            assert hidden.take(3).shape == (3, times * 112 * 7 * 7)


# --- bad input ------------------------------------------------------------------------------------


def test_an_unknown_name_lists_its_neighbours_or_the_outermost() -> None:
    model = from_callable(Net(), SHAPE, name="mine")
    message = r"^metric: expected a module of 'mine' such as middle, got 'midle'"
    with pytest.raises(ValueError, match=message):
        find_module(model, "midle")
    with pytest.raises(ValueError, match=r"such as middle, unused, got 'transformer_blocks.3'"):
        find_module(model, "transformer_blocks.3")


def test_a_model_without_modules_says_so() -> None:
    model = from_callable(lambda x, t, sample: x, SHAPE)
    with pytest.raises(ValueError, match=r"^metric: expected a model of torch modules .* 'custom'"):
        find_module(model, "middle")


def test_a_module_that_is_not_called_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^metric: expected module 'unused' to be called"):
        evaluate(from_callable(Net(), SHAPE), "unused")


class Odd(nn.Module):
    """Gives what it is told to."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda x: (None, (x, x)), "tuple"),
        (lambda x: [], "list"),
        (lambda x: (x, x[:3]), r"shape \(3, 6\)"),
        (lambda x: None, "NoneType"),
        (lambda x: x[:3], r"shape \(3, 6\)"),
        (lambda x: x[:0], r"shape \(0, 6\)"),
        (lambda x: x[:, :0], r"shape \(4, 0\)"),
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: x.long(), "torch.int64"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
    ],
)
def test_outputs_that_are_no_features_are_refused(make: Any, got: str) -> None:
    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd(make)
            self.after = self.odd

    with pytest.raises(ValueError, match=rf"^metric: expected module 'odd' to give .* got {got}"):
        evaluate(from_callable(Outer(), SHAPE), "odd")


def test_features_that_change_their_number_are_refused() -> None:
    """A module that is called once more at some times."""

    class Late(Net):
        def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
            if bool((t < 0.4).any()):
                self.middle(x)
            return self.middle(x)

    model = from_callable(Late(), SHAPE, one_time_per_call=True)
    with torch.no_grad():
        trajectory = oss.teacher(model, model.noise(2), 8)
    message = r"^metric: expected features of shape \(\d+,\) as before, got \(\d+,\)"
    with pytest.raises(ValueError, match=message):
        dp_search(model, trajectory, 3, metric="perceptual:middle")
