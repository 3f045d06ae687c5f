"""Networks of one's own: one exact flow in every path's and prediction's clothes is one model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SHAPE,
    dp_search,
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext.models import Model, from_callable
from oss_ext.models.analytic import GaussianMixture
from oss_ext.noise import (
    FlowPath,
    Path,
    VEPath,
    VPContinuousPath,
    VPPath,
    ddim_grid,
)

SAMPLES = 3
SIGMA_DATA = 0.6
ZERO_SNR = VPPath(zero_terminal_snr=True)
CLOTHES: dict[str, tuple[Path, str]] = {
    "eps": (VPPath("cosine"), "eps"),
    "eps_linear": (VPPath("linear", 1e-4, 0.02), "eps"),
    "eps_continuous": (VPContinuousPath(scale=999.0), "eps"),
    "x0": (VEPath(), "x0"),
    "v": (VPPath(), "v"),
    "v_zero_snr": (ZERO_SNR, "v"),
    "velocity": (FlowPath(), "velocity"),
    "reverse_velocity": (FlowPath(scale=1000.0, reverse=True), "reverse_velocity"),
    "edm": (VEPath(clock="log"), "edm"),
}
each_clothing = pytest.mark.parametrize("clothes", CLOTHES)


def perfect_network(mixture: GaussianMixture, path: Path, predicts: str) -> Callable[..., Tensor]:
    """The mixture's exact posterior in the model's own coordinates ``x' = alpha x0 + beta eps``."""

    def network(x: Tensor, time: Tensor, sample: Tensor) -> Tensor:
        alpha, beta = path.alpha_beta(path.flow_times(time))
        a, b = alpha[:, None], beta[:, None]
        y = x.flatten(1)
        deviation = (b**2 + SIGMA_DATA**2).sqrt()
        if predicts == "edm":
            y = y * deviation  # the network is given c_in x'
        var = a**2 * mixture.sd**2 + b**2
        distance = (y[:, None] - a[:, :, None] * mixture.mu).square().sum(dim=2)
        mean = (-distance / (2 * var)).softmax(dim=1) @ mixture.mu
        x0 = mean + a * mixture.sd**2 / var * (y - a * mean)
        eps = (y - a * x0) / b
        outputs = {
            "eps": eps,
            "x0": x0,
            "v": (a * eps - b * x0) / (a**2 + b**2).sqrt(),
            "velocity": eps - x0,
            "reverse_velocity": x0 - eps,
            "edm": (x0 - (SIGMA_DATA / deviation) ** 2 * y) * deviation / (b * SIGMA_DATA),
        }
        return outputs[predicts].view_as(x)

    return network


def dressed(mixture: GaussianMixture, clothes: str) -> Model:
    path, predicts = CLOTHES[clothes]
    return from_callable(
        perfect_network(mixture, path, predicts),
        SHAPE,
        path=path,
        predicts=predicts,
        sigma_data=SIGMA_DATA,
        dtype=torch.float64,
        data_range=mixture.data_range,
    )


def common_grid(steps: int = 12) -> Tensor:
    """Times that every path here knows."""
    inner = torch.linspace(0.05, 0.9, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner])


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def teacher_of(model: Model, seed: int) -> oss.Trajectory:
    return oss.teacher(model, draw(seed, SAMPLES, *SHAPE), times=common_grid())


def at(model: Model, x: Tensor, t: float) -> Tensor:
    rows = torch.arange(len(x))
    return model(x, torch.full((len(x),), t, dtype=torch.float64), rows)


# --- the same model in other coordinates --------------------------------------------------------


@each_clothing
@each_seed(2)
def test_the_teacher_is_the_same_in_all_coordinates(clothes: str, seed: int) -> None:
    mixture = random_mixture(seed)
    expected = teacher_of(mixture, seed)
    trajectory = teacher_of(dressed(mixture, clothes), seed)
    assert trajectory.path == CLOTHES[clothes][0]
    torch.testing.assert_close(trajectory.states, expected.states, rtol=0, atol=1e-9)


@each_clothing
@each_seed(1)
def test_the_search_finds_the_same_in_all_coordinates(clothes: str, seed: int) -> None:
    mixture = random_mixture(seed)
    model = dressed(mixture, clothes)
    expected = dp_search(mixture, teacher_of(mixture, seed), [1, 2, 3, 4])
    result = dp_search(model, teacher_of(model, seed), [1, 2, 3, 4])
    for steps in (1, 2, 3, 4):
        assert result.schedule(steps).indices == expected.schedule(steps).indices
        assert result.cost(steps) == pytest.approx(expected.cost(steps), rel=1e-6)


@pytest.mark.parametrize("clothes", ["eps", "eps_linear", "eps_continuous", "v", "x0"])
@each_seed(2)
def test_euler_in_flow_coordinates_is_ddim_in_the_models_own(clothes: str, seed: int) -> None:
    """``x'_s = alpha_s x0_hat + beta_s eps_hat`` (Song et al. 2021, eq. 12 with sigma = 0)."""
    mixture, (path, predicts) = random_mixture(seed), CLOTHES[clothes]
    trajectory = teacher_of(dressed(mixture, clothes), seed)
    network, times = perfect_network(mixture, path, predicts), trajectory.times
    alphas, betas = path.alpha_beta(times)
    state = trajectory.noise * (alphas[-1] + betas[-1])
    for i in range(len(times) - 1, 0, -1):
        a, b = alphas[i], betas[i]
        clock = path.model_times(times[i]).expand(SAMPLES)
        output = network(state, clock, torch.arange(SAMPLES))
        if predicts == "eps":
            x0, eps = (state - b * output) / a, output
        elif predicts == "x0":
            x0, eps = output, (state - a * output) / b
        else:  # Salimans and Ho 2022, appendix D
            x0, eps = a * state - b * output, b * state + a * output
        state = alphas[i - 1] * x0 + betas[i - 1] * eps
        expected = trajectory.states[i - 1] * (alphas[i - 1] + betas[i - 1])
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(
    ("predicts", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
@each_seed(1)
def test_diffusers_ddim_gives_the_same_samples(
    predicts: str, theirs: str, spacing: str, seed: int
) -> None:
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=theirs,
        timestep_spacing=spacing,
        steps_offset=1,
        clip_sample=False,
    )
    scheduler.set_timesteps(10)
    path, mixture = VPPath(), random_mixture(seed)
    network = perfect_network(mixture, path, predicts)
    model = from_callable(network, SHAPE, path=path, predicts=predicts, dtype=torch.float64)
    grid = ddim_grid(path, 10, spacing, offset=1)
    samples = 16
    noise = model.noise(samples, seed=1, start=float(grid[-1]))
    # The host starts from unscaled noise and counts whole timesteps.
    state = from_callable(network, SHAPE, dtype=torch.float64).noise(samples, seed=1)
    for timestep in scheduler.timesteps:
        output = network(state, timestep.double().expand(samples), torch.arange(samples))
        state = scheduler.step(output, timestep, state).prev_sample
    errors = (oss.teacher(model, noise, times=grid).final - state).abs().flatten(1).amax(dim=1)
    # The median: the host's float32 grows without bound in a sample between two components.
    assert float(errors.median()) < 1e-5


@each_clothing
def test_a_network_is_given_its_own_state_and_time(clothes: str) -> None:
    path, predicts = CLOTHES[clothes]
    given: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(*inputs: Tensor) -> Tensor:
        given.append(inputs)
        return torch.zeros_like(inputs[0])

    model = from_callable(network, SHAPE, path=path, predicts=predicts, sigma_data=SIGMA_DATA)
    x, t = draw(0, 2, *SHAPE).float(), torch.tensor([0.3, 0.7], dtype=torch.float64)
    model(x, t, torch.tensor([5, 1]))
    ((inputs, time, sample),) = given
    alpha, beta = path.alpha_beta(t)
    scale = alpha + beta
    if predicts == "edm":
        scale = scale / (beta**2 + SIGMA_DATA**2).sqrt()
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, (x * scale[:, None, None]).float())
    assert torch.equal(time, path.model_times(t))
    assert (time.dtype, sample.tolist()) == (torch.float64, [5, 1])


# --- guidance and learned variance --------------------------------------------------------------


def with_label(x: Tensor, time: Tensor, sample: Tensor) -> Tensor:
    return torch.sin(x) + time.view(-1, 1, 1) / 500 + sample.view(-1, 1, 1)


def without_label(x: Tensor, time: Tensor, sample: Tensor) -> Tensor:
    return torch.cos(2 * x) - time.view(-1, 1, 1) / 500


def guided(predicts: str, **options: Any) -> Model:
    return from_callable(
        with_label, SHAPE, path=VPPath(), predicts=predicts, dtype=torch.float64, **options
    )


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1, 7.5])
def test_guidance_extrapolates_the_output_from_no_label(guidance: float) -> None:
    path, x, rows = VPPath(), draw(0, SAMPLES, *SHAPE), torch.arange(SAMPLES)
    t = torch.full((SAMPLES,), 0.4, dtype=torch.float64)
    alpha, beta = (float(value) for value in path.alpha_beta(t[0]))
    state, time = x * (alpha + beta), path.model_times(t)
    null, label = without_label(state, time, rows), with_label(state, time, rows)
    eps = null + guidance * (label - null)
    expected = eps - (state - beta * eps) / alpha
    model = guided("eps", unconditional=without_label, guidance=guidance)
    torch.testing.assert_close(at(model, x, 0.4), expected, rtol=1e-12, atol=1e-12)


def test_without_guidance_the_unconditional_network_does_not_count() -> None:
    x = draw(1, SAMPLES, *SHAPE)
    model = guided("v", unconditional=without_label)
    torch.testing.assert_close(at(model, x, 0.4), at(guided("v"), x, 0.4), rtol=1e-12, atol=1e-12)


def test_guidance_needs_the_unconditional_network() -> None:
    message = "^guidance: expected 1 without `unconditional`, got 2.5"
    with pytest.raises(ValueError, match=message):
        guided("eps", guidance=2.5)


def doubled(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With a variance in the second half of the channels."""
    return lambda *inputs: torch.cat([network(*inputs), torch.full_like(inputs[0], 99.0)], dim=1)


def test_of_a_learned_variance_the_first_half_of_the_channels_counts() -> None:
    x, options = draw(2, SAMPLES, *SHAPE), {"path": VPPath(), "predicts": "eps"}
    options |= {"dtype": torch.float64, "guidance": 3.0}
    plain = from_callable(with_label, SHAPE, unconditional=without_label, **options)
    learned = from_callable(
        doubled(with_label),
        SHAPE,
        unconditional=doubled(without_label),
        learned_variance=True,
        **options,
    )
    assert torch.equal(at(learned, x, 0.4), at(plain, x, 0.4))


@pytest.mark.parametrize(
    ("options", "network"),
    [
        ({}, doubled(with_label)),
        ({"unconditional": doubled(without_label), "guidance": 2.0}, with_label),
    ],
)
def test_twice_the_channels_hint_at_a_learned_variance(
    options: dict[str, Any], network: Callable[..., Tensor]
) -> None:
    model = from_callable(network, SHAPE, name="mine", dtype=torch.float64, **options)
    message = r"^model 'mine' returned torch.float64 \(3, 4, 3\), .*; learned_variance=True takes"
    with pytest.raises(ValueError, match=message):
        at(model, draw(3, SAMPLES, *SHAPE), 0.4)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: x[:, :1], r"torch.float64 \(3, 1, 3\)"),
        (lambda x: x.flatten(1), r"torch.float64 \(3, 6\)"),
        (lambda x: x[:, 0, 0], r"torch.float64 \(3,\)"),
        (lambda x: x.long(), r"torch.int64 \(3, 2, 3\)"),
        (lambda x: (x,), "tuple"),
        (lambda x: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_an_output_of_another_kind_is_refused(
    output: Callable[[Tensor], Any], got: str, learned_variance: bool
) -> None:
    model = from_callable(
        lambda x, t, sample: output(x), SHAPE, learned_variance=learned_variance, name="mine"
    )
    with pytest.raises(
        ValueError, match=f"^model 'mine' returned {got}, expected a float"
    ) as error:
        at(model, draw(4, SAMPLES, *SHAPE), 0.4)
    assert "learned_variance" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": 5}, "^name: expected a name for files, without slashes, got 5"),
        ({"name": ""}, "^name: expected a name for files"),
        ({"name": "../up"}, "^name: expected a name for files"),
        ({"shape": 4}, "^shape: expected the dims of a sample, whole numbers, got 4"),
        ({"shape": ()}, "^shape: expected the dims of a sample"),
        ({"shape": (3, 0)}, "^shape: expected at least 1, got 0"),
        ({"shape": (3, 2.0)}, "^shape: expected a whole number, at least 1, got 2.0"),
        ({"dtype": "float32"}, "^dtype: expected a floating-point torch.dtype, got 'float32'"),
        ({"dtype": torch.int32}, "^dtype: expected a floating-point torch.dtype, got torch.int32"),
        ({"device": "vga"}, "^device: expected a device of this machine, got .vga."),
        ({"fixed_batch": 0}, "^fixed_batch: expected"),
        ({"fixed_batch": -2}, "^fixed_batch: expected"),
        ({"data_range": 0}, "^data_range: expected a positive number"),
        ({"data_range": math.nan}, "^data_range: expected a positive number"),
        ({"path": "vp"}, "^path: expected a path of oss_ext.noise, got 'vp'"),
        ({"path": VPPath}, "^path: expected a path of oss_ext.noise, got <class"),
        ({"predicts": "noise"}, "^predicts: expected one of velocity, .*, edm, got 'noise'"),
        ({"predicts": "edm"}, r"^predicts: 'edm' belongs to a VEPath, got FlowPath\("),
        ({"predicts": "edm", "path": VPPath()}, r"^predicts: 'edm' belongs to .*, got VPPath\("),
        ({"sigma_data": 0}, "^sigma_data: expected a positive number, got 0"),
        ({"sigma_data": "1"}, "^sigma_data: expected a positive number, got '1'"),
        ({"guidance": math.nan}, "^guidance: expected a finite number, got nan"),
        ({"guidance": "3"}, "^guidance: expected a finite number, got '3'"),
    ],
)
def test_what_fits_no_network_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_callable(with_label, **{"shape": SHAPE} | options)


def in_place(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return x.mul_(0.5)


def in_place_of_time(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    return x * t.div_(1000).view(-1, 1).to(x.dtype)


def with_one_buffer(factor: float, buffer: Tensor) -> Any:
    return lambda x, t, sample: torch.mul(x, factor, out=buffer[: len(x)])


@pytest.mark.parametrize("habit", ["in place", "in place of time", "one buffer"])
def test_guidance_is_that_of_networks_without_habits(habit: str) -> None:
    buffer = torch.empty(3, 4)
    network, unconditional, plain = {
        "in place": (in_place, lambda x, t, sample: x * 0.2, (0.5, 0.2)),
        "in place of time": (in_place_of_time, in_place_of_time, None),
        "one buffer": (with_one_buffer(0.5, buffer), with_one_buffer(0.2, buffer), (0.5, 0.2)),
    }[habit]
    model = from_callable(
        network, (4,), path=FlowPath(scale=1000.0), unconditional=unconditional, guidance=3.0
    )
    x, t, sample = draw(1, 3, 4), torch.tensor([0.5, 0.2, 0.9]), torch.arange(3)
    given = x.clone(), t.clone()
    # The same network without and with its condition: guidance changes nothing.
    factors = t[:, None] if plain is None else plain[1] + 3 * (plain[0] - plain[1])
    torch.testing.assert_close(model(x, t, sample), x * factors)
    assert torch.equal(x, given[0])
    assert torch.equal(t, given[1])
