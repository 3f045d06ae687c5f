"""The model families and what the velocity protocol promises of each."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from driver_cases import (
    Network,
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
    random_times,
)
from oss_ext import models
from oss_ext.models import Model, from_callable
from oss_ext.models.analytic import GaussianMixture
from oss_ext.models.digits import Digits
from oss_ext.models.digits_net import DigitsUNet
from oss_ext.noise import flow_grid, karras_grid

WEIGHTS = resources.files("oss_ext.models") / "weights" / "digits.safetensors"
MULTIPLY_ADDS = 60_000_000  # per sample and forward
FILE_BYTES = 4 * 2**20


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_digits(seed: int, labels: list[int], guidance: float = 1.0) -> Digits:
    """The network with random weights everywhere, also in the layers that start as zero."""
    net = DigitsUNet()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return Digits(net, labels, guidance)


def digits_velocity(model: Model, sample: list[int]) -> Tensor:
    """Rows that differ in ``sample`` only."""
    rows = len(sample)
    x = draw(0, 1, 1, 28, 28, dtype=torch.float32).expand(rows, -1, -1, -1)
    t = torch.full((rows,), 0.6, dtype=torch.float64)
    with torch.no_grad():
        return model(x, t, torch.tensor(sample))


# --- the protocol -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_every_bundled_model_keeps_the_protocol(name: str) -> None:
    model = models.load(name)
    assert model.name == name
    noise = model.noise(2, seed=3)
    assert (noise.shape, noise.dtype) == ((2, *model.shape), model.dtype)
    v = model(noise, torch.tensor([0.9, 0.2], dtype=torch.float64), torch.tensor([1, 0]))
    assert (v.shape, v.dtype) == (noise.shape, model.dtype)
    assert v.isfinite().all()
    assert model.data_range is not None
    assert len(model.times(7)) == 8


@pytest.mark.parametrize("name", models.MODELS)
def test_a_fingerprint_is_the_same_in_every_load(name: str) -> None:
    fingerprint = models.load(name).fingerprint()
    assert fingerprint == models.load(name).fingerprint()
    assert len(fingerprint) == 16
    assert set(fingerprint) <= set("0123456789abcdef")


def test_fingerprints_tell_models_apart() -> None:
    variants = [
        models.load("analytic"),
        models.load("analytic", seed=1),
        models.load("analytic", sd=0.2),
        models.load("analytic", components=7),
        models.load("analytic", shape=[12, 4, 4]),
        random_digits(0, [1, 2]),
        random_digits(1, [1, 2]),
        random_digits(0, [2, 1]),
        random_digits(0, [1, 2], guidance=2.0),
    ]
    assert len({model.fingerprint() for model in variants}) == len(variants)


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = random_digits(0, [1])
    before = model.fingerprint()
    with torch.no_grad():
        model.net.head.bias[0] += 1e-6
    assert model.fingerprint() != before


@pytest.mark.parametrize("name", models.MODELS)
def test_noise_of_a_sample_does_not_depend_on_the_batch(name: str) -> None:
    model = models.load(name)
    noise = model.noise(5, seed=11)
    assert torch.equal(model.noise(2, seed=11), noise[:2])
    assert not torch.equal(model.noise(2, seed=12), noise[:2])
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("batch", [0, -1])
def test_noise_is_for_at_least_one_sample(batch: int) -> None:
    with pytest.raises(ValueError, match=f"^batch: expected at least 1, got {batch}"):
        random_mixture(0).noise(batch)


@pytest.mark.parametrize("batch", [10**14, 10**20])
def test_noise_that_there_is_no_memory_for_is_refused_at_once(batch: int) -> None:
    with pytest.raises(ValueError, match=rf"^batch: expected what there is .*got {batch} samples"):
        random_mixture(0).noise(batch)


@pytest.mark.parametrize("seed", [1.5, -1, None, 2**63])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed: expected "):
        random_mixture(0).noise(1, seed)


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'sdxl'; known models: digits, analytic"):
        models.load("sdxl")


def test_an_unknown_option_lists_the_options() -> None:
    message = "^model 'digits' has no option 'label'; its options: labels, guidance, device"
    with pytest.raises(ValueError, match=message):
        models.load("digits", label=3)


# --- analytic -----------------------------------------------------------------------------------


@each_seed(4)
def test_the_mixtures_velocity_is_that_of_its_density(seed: int) -> None:
    """From the score: ``eps_hat = -t s`` and ``x0_hat = (x + t^2 s) / a`` give ``v``."""
    model = random_mixture(seed)
    rows = 20
    t = 0.05 + 0.9 * torch.rand(rows, generator=torch.Generator().manual_seed(seed)).double()
    x = draw(seed, rows, 6).requires_grad_()
    a = (1 - t)[:, None, None]
    deviation = (a**2 * model.sd**2 + t[:, None, None] ** 2).sqrt()
    component = torch.distributions.Normal(a * model.mu, deviation)
    log_density = component.log_prob(x[:, None]).sum(dim=2).logsumexp(dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    eps = -t[:, None] * score
    x0 = (x + t[:, None] ** 2 * score) / (1 - t[:, None])
    v = model(x.detach().view(rows, *model.shape), t, torch.zeros(rows, dtype=torch.int64))
    torch.testing.assert_close(v.flatten(1), (eps - x0).detach(), rtol=1e-9, atol=1e-9)


def test_at_pure_noise_the_velocity_points_from_the_mean() -> None:
    model = random_mixture(3)
    x = draw(4, 5, *model.shape)
    v = model(x, torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(v, x - model.mu.mean(dim=0).view(model.shape))


def test_one_component_is_a_straight_line_to_its_mean() -> None:
    """With sd -> 0 all samples end at the mean, whatever the noise."""
    mu = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    model = GaussianMixture(mu, sd=1e-9)
    x = draw(0, 4, 3)
    times = random_times(0, 5)
    for i in range(5, 0, -1):
        t = times[i].expand(4)
        x = x + (times[i - 1] - times[i]) * model(x, t, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(x, mu.expand(4, 3), rtol=0, atol=1e-9)


def test_the_mixtures_grid_is_shifted() -> None:
    model = models.load("analytic", shift=3.0)
    torch.testing.assert_close(model.times(2), torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64))


@each_seed(3)
def test_no_noise_is_one_of_the_means(seed: int) -> None:
    """A search on such samples would learn what holds of no others."""
    model = models.load("analytic", seed=seed)
    for own in (seed, 0, 1):
        distance = torch.cdist(model.noise(16, own).flatten(1), model.mu)
        assert distance.min() > math.sqrt(model.mu.shape[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sd": 0}, "^sd: expected a positive number, got 0"),
        ({"sd": math.nan}, "^sd: expected a positive number, got nan"),
        ({"components": 0}, "^components: expected at least 1, got 0"),
    ],
)
def test_bad_options_of_the_mixture_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.load("analytic", **options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("analytic", "shape", 3),
        ("analytic", "shape", [3, 0]),
        ("analytic", "shape", [2.5]),
        ("analytic", "components", "x"),
        ("analytic", "components", 2.5),
        ("analytic", "sd", "x"),
        ("analytic", "seed", 1.5),
        ("analytic", "shift", "x"),
        ("analytic", "shift", 0.0),
        ("analytic", "device", "gpu"),
        ("digits", "labels", [3.0]),
        ("digits", "labels", [True]),
        ("digits", "guidance", "x"),
        ("digits", "guidance", [2, 3]),
        ("digits", "guidance", math.nan),
        ("digits", "device", "gpu"),
    ],
)
def test_options_of_a_wrong_type_are_refused_by_name(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: expected .*, got"):
        models.load(name, **{option: value})


@pytest.mark.parametrize(
    ("mu", "shape", "message"),
    [
        (torch.zeros(3), None, r"^mu: expected floating-point \[components, D\]"),
        (torch.zeros(3, 2, dtype=torch.int64), None, "^mu: expected floating-point"),
        (torch.zeros(3, 4), (3,), r"^shape: expected 4 elements as mu, got \(3,\)"),
    ],
)
def test_a_mixture_needs_means_of_its_shape(mu: Tensor, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(mu, 0.1, shape)


# --- digits -------------------------------------------------------------------------------------


@each_seed(2)
def test_guidance_extrapolates_from_no_label_to_the_label(seed: int) -> None:
    no_label, label, guided = (
        digits_velocity(random_digits(seed, [3], guidance), [0]) for guidance in (0.0, 1.0, 2.5)
    )
    assert not torch.allclose(no_label, label, rtol=1e-2)
    torch.testing.assert_close(guided, no_label + 2.5 * (label - no_label), rtol=1e-3, atol=1e-4)


def test_labels_repeat_cyclically() -> None:
    v = digits_velocity(random_digits(0, [3, 1, 4]), [0, 1, 2, 3, 4, 301])
    torch.testing.assert_close(v[3:], v[[0, 1, 1]])
    for label, row in ((3, 0), (1, 1), (4, 2)):
        torch.testing.assert_close(v[row], digits_velocity(random_digits(0, [label]), [0])[0])
    assert not torch.allclose(v[0], v[1], rtol=1e-2)


def test_the_network_knows_the_time() -> None:
    model, x = (
        random_digits(0, [5]),
        draw(0, 1, 1, 28, 28, dtype=torch.float32).expand(2, -1, -1, -1),
    )
    with torch.no_grad():
        v = model(x, torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([0, 0]))
    assert not torch.allclose(v[0], v[1], rtol=1e-2)


def test_a_forward_stays_within_its_budget() -> None:
    """The counter leaves the attention's products out: about half a million."""
    net, rows = DigitsUNet(), 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(rows, 1, 28, 28), torch.zeros(rows), torch.zeros(rows, dtype=torch.int64))
    multiply_adds = counter.get_total_flops() / 2 / rows
    assert 10_000_000 < multiply_adds < MULTIPLY_ADDS - 1_000_000


def test_the_bundled_weights_are_small_and_fit_the_network() -> None:
    with resources.as_file(WEIGHTS) as path:
        assert path.stat().st_size <= FILE_BYTES
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    net = DigitsUNet().state_dict()
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in net.items()
    }
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in stored.values())


@pytest.mark.parametrize("labels", [[], [10], [-1], [3, "4"]])
def test_labels_are_digits(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^labels: expected digits from 0 to 9, got \["):
        models.load("digits", labels=labels)


# --- custom -------------------------------------------------------------------------------------


def test_a_callable_becomes_a_model_as_declared() -> None:
    model = from_callable(
        lambda x, t, sample: x * t[:, None].float() + sample[:, None],
        [4],
        name="mine",
        data_range=3.0,
        dtype=torch.bfloat16,
        one_time_per_call=True,
        fixed_batch=8,
    )
    assert (model.name, model.shape, model.data_range) == ("mine", (4,), 3.0)
    assert (model.dtype, model.one_time_per_call, model.fixed_batch) == (torch.bfloat16, True, 8)
    assert model.noise(3).dtype == torch.bfloat16
    v = model(torch.ones(2, 4), torch.tensor([0.5, 0.25]), torch.tensor([0, 7]))
    assert v[:, 0].tolist() == [0.5, 7.25]


def test_the_fingerprint_of_a_module_covers_its_weights() -> None:
    def fingerprint(module: Any, name: str = "mine") -> str:
        return from_callable(module, [6], name=name).fingerprint()

    assert fingerprint(Network(1)) == fingerprint(Network(1))
    assert fingerprint(Network(1)) != fingerprint(Network(2))
    assert fingerprint(Network(1)) != fingerprint(Network(1), "other")


def test_times_of_a_teacher_are_the_models_own_or_those_of_a_grid() -> None:
    model = models.load("analytic", shape=(4,), shift=3.0)
    assert torch.equal(models.teacher_times(model, 9), flow_grid(9, 3.0))
    assert torch.equal(models.teacher_times(model, 9, "edm"), karras_grid(9))
    with pytest.raises(ValueError, match=r"^grid: expected one of .*own.*, got 'none'"):
        models.teacher_times(model, 9, "none")


# --- what a process has set for itself ----------------------------------------------------------


@pytest.mark.parametrize("name", ["analytic", "digits", "lambda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_are_the_same_whatever_the_default_dtype_is(name: str, dtype: torch.dtype) -> None:
    def answers() -> tuple[str, Tensor, Tensor]:
        own = models.from_callable(lambda x, t, sample: 0.5 * x, (3, 2))
        model = own if name == "lambda" else models.load(name)
        x = model.noise(2, 5)
        v = model(x, torch.full((2,), 0.5, dtype=torch.float64), torch.arange(2))
        return model.fingerprint(), x, v

    expected = answers()
    torch.set_default_dtype(dtype)
    try:
        hash_, x, v = answers()
    finally:
        torch.set_default_dtype(torch.float32)
    assert hash_ == expected[0]
    assert torch.equal(x, expected[1])
    assert torch.equal(v, expected[2])
