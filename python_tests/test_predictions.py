"""What networks predict, as a velocity and back: every prediction against its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from driver_cases import each_seed
from oss_ext.noise import PREDICTIONS, output_of, velocity_of
from oss_ext.noise.prediction import coefficients

ROWS = 40
SIGMA_DATA = 0.7
DIMS = [(), (3,), (2, 3, 4)]
each_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


@dataclass(frozen=True)
class Case:
    """Clean samples, their noise and the path's ``alpha`` and ``beta`` in every row."""

    x0: Tensor
    eps: Tensor
    alpha: Tensor
    beta: Tensor
    a: Tensor
    b: Tensor

    @property
    def state(self) -> Tensor:
        return self.a * self.x0 + self.b * self.eps


def random_case(predicts: str, seed: int, dims: tuple[int, ...] = (2, 3)) -> Case:
    """alpha and beta from 1e-3 to 1, not on any one path; EDM has alpha = 1 and beta to 100."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def levels(most: float) -> Tensor:
        u = torch.rand(ROWS, generator=generator, dtype=torch.float64)
        u[0], u[1] = 0, 1
        return 1e-3 * (most / 1e-3) ** u

    edm = predicts == "edm"
    alpha = torch.ones(ROWS, dtype=torch.float64) if edm else levels(1).flip(0)
    beta = levels(100 if edm else 1)
    rows = (-1, *[1] * len(dims))
    return Case(draw(ROWS, *dims), draw(ROWS, *dims), alpha, beta, alpha.view(rows),
                beta.view(rows))  # fmt: skip


def definition(predicts: str, case: Case) -> Tensor:
    """The output of a perfect network."""
    x0, eps, a, b = case.x0, case.eps, case.a, case.b
    if predicts == "edm":  # x0 = c_skip x' + c_out F, Karras et al. 2022, table 1
        c_skip = SIGMA_DATA**2 / (b**2 + SIGMA_DATA**2)
        c_out = b * SIGMA_DATA / (b**2 + SIGMA_DATA**2).sqrt()
        return (x0 - c_skip * case.state) / c_out
    return {
        "velocity": eps - x0,
        "reverse_velocity": x0 - eps,
        "eps": eps,
        "x0": x0,
        "v": (a * eps - b * x0) / (a**2 + b**2).sqrt(),
    }[predicts]


def amplification(predicts: str, case: Case) -> Tensor:
    """By how much the definition's division makes rounding errors of ``x'`` and output grow."""
    if predicts == "eps":
        return (1 + case.a + case.b) / case.a
    if predicts in ("x0", "edm"):
        return (1 + case.a + case.b) / case.b
    return 1 / torch.hypot(case.a, case.b)  # v; 1 or more otherwise


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor, float]:
    return case.state, case.alpha, case.beta, SIGMA_DATA


@each_prediction
@pytest.mark.parametrize("dims", DIMS, ids=str)
@each_seed(2)
def test_a_perfect_output_gives_the_true_velocity(
    predicts: str, dims: tuple[int, ...], seed: int
) -> None:
    """To 1e-12 of the terms' size, times what dividing by alpha or beta costs any formula."""
    case = random_case(predicts, seed, dims)
    output = definition(predicts, case)
    error = velocity_of(predicts, output, *arguments(case)) - (case.eps - case.x0)
    size = case.x0.abs() + case.eps.abs() + output.abs()
    size = size * amplification(predicts, case).clamp(min=1)
    assert bool((error.abs() <= 1e-12 * size).all())


@each_prediction
@pytest.mark.parametrize("dims", DIMS, ids=str)
@each_seed(2)
def test_the_output_can_be_had_from_the_velocity(
    predicts: str, dims: tuple[int, ...], seed: int
) -> None:
    case = random_case(predicts, seed, dims)
    output = torch.randn(case.x0.shape, generator=torch.Generator().manual_seed(seed)).double()
    velocity = velocity_of(predicts, output, *arguments(case))
    again = output_of(predicts, velocity, *arguments(case))
    size = case.x0.abs() + case.eps.abs() + output.abs()
    size = size * amplification(predicts, case).clamp(min=1)
    assert bool(((again - output).abs() <= 1e-12 * size).all())
    # A perfect output comes back from the true velocity, too.
    perfect = output_of(predicts, case.eps - case.x0, *arguments(case))
    torch.testing.assert_close(perfect, definition(predicts, case), rtol=1e-8, atol=1e-8)


@each_prediction
def test_a_row_has_its_own_coefficients_and_no_others(predicts: str) -> None:
    case = random_case(predicts, 0)
    output = definition(predicts, case)
    together = velocity_of(predicts, output, *arguments(case))
    for row in (0, 7, ROWS - 1):
        part = slice(row, row + 1)
        alone = velocity_of(
            predicts, output[part], case.state[part], case.alpha[part], case.beta[part], SIGMA_DATA
        )
        torch.testing.assert_close(alone, together[part], rtol=1e-14, atol=1e-14)


@each_prediction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_is_in_the_states_dtype(predicts: str, dtype: torch.dtype) -> None:
    case = random_case(predicts, 0)
    state, output = case.state.to(dtype), definition(predicts, case)
    velocity = velocity_of(predicts, output, state, case.alpha, case.beta, SIGMA_DATA)
    assert velocity.dtype == dtype
    assert output_of(predicts, velocity, state, case.alpha, case.beta).dtype == dtype


@each_prediction
def test_coefficients_are_float64_of_the_shape_of_alpha(predicts: str) -> None:
    alpha, beta = torch.full((2, 3), 0.6).double(), torch.full((2, 3), 0.8).double()
    for values in coefficients(predicts, alpha, beta):
        assert (values.shape, values.dtype) == ((2, 3), torch.float64)


@each_prediction
def test_only_edm_depends_on_the_data(predicts: str) -> None:
    alpha, beta = torch.ones(1).double(), torch.full((1,), 0.3).double()
    one, other = (coefficients(predicts, alpha, beta, data) for data in (0.5, 1.5))
    assert (one == other) == (predicts != "edm")


# --- what gives no velocity ---------------------------------------------------------------------


@each_prediction
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.0)])
def test_an_end_gives_a_velocity_or_is_refused(predicts: str, alpha: float, beta: float) -> None:
    alphas, betas = (torch.tensor([0.6, value]).double() for value in (alpha, beta))
    refused = {
        "eps": (alpha == 0, r"'eps' gives no velocity at pure noise \(alpha = 0\)"),
        "x0": (beta == 0, r"'x0' gives no velocity at the clean end \(beta = 0\)"),
    }.get(predicts, (False, ""))
    values = torch.ones(2, 3).double()
    if refused[0]:
        for function in (velocity_of, output_of):
            with pytest.raises(ValueError, match=f"^predicts: {refused[1]}"):
                function(predicts, values, values, alphas, betas)
    else:
        assert bool(velocity_of(predicts, values, values, alphas, betas).isfinite().all())


def test_a_refusal_of_eps_says_what_to_use_instead() -> None:
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    with pytest.raises(ValueError, match="or a network that predicts v or x0"):
        coefficients("eps", zero, one)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "", None])
def test_an_unknown_prediction_lists_the_known_ones(predicts: Any) -> None:
    known = "velocity, reverse_velocity, eps, x0, v, edm"
    one = torch.ones(1).double()
    with pytest.raises(ValueError, match=f"^predicts: expected one of {known}, got "):
        coefficients(predicts, one, one)


@pytest.mark.parametrize("sigma_data", [0, -0.5, math.nan, "0.5", None])
def test_the_deviation_of_the_data_is_positive(sigma_data: Any) -> None:
    one = torch.ones(1).double()
    with pytest.raises(ValueError, match=r"^sigma_data: expected a positive number, got "):
        coefficients("edm", one, one, sigma_data)
