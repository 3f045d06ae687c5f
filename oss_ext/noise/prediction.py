"""What networks predict, as the flow velocity ``v = eps - x0``, and back.

Every prediction gives ``v`` as a combination of the state ``x' = alpha x0 + beta eps`` and the
network's output, ``v = a x' + b output``; the coefficients are made in float64.

| prediction | output | ``x0_hat`` or ``eps_hat`` |
|---|---|---|
| velocity | ``eps - x0`` | |
| reverse_velocity | ``x0 - eps`` | |
| eps | ``eps`` | ``x0_hat = (x' - beta eps) / alpha`` |
| x0 | ``x0`` | ``eps_hat = (x' - alpha x0) / beta`` |
| v | ``(alpha eps - beta x0) / norm``, ``norm = sqrt(alpha^2 + beta^2)`` | no division by either |
| edm | ``F`` of ``x0_hat = c_skip x' + c_out F``, ``alpha = 1`` | Karras et al. 2022, table 1 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oss_ext import arguments

Coefficients = tuple[Tensor, Tensor]


def _velocity(alpha: Tensor, beta: Tensor, sigma_data: float) -> Coefficients:
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _reverse_velocity(alpha: Tensor, beta: Tensor, sigma_data: float) -> Coefficients:
    return torch.zeros_like(alpha), -torch.ones_like(alpha)


def _eps(alpha: Tensor, beta: Tensor, sigma_data: float) -> Coefficients:
    return -1 / alpha, (alpha + beta) / alpha


def _x0(alpha: Tensor, beta: Tensor, sigma_data: float) -> Coefficients:
    return 1 / beta, -(alpha + beta) / beta


def _v(alpha: Tensor, beta: Tensor, sigma_data: float) -> Coefficients:
    square = alpha**2 + beta**2
    return (beta - alpha) / square, (alpha + beta) / square.sqrt()


def _edm(alpha: Tensor, beta: Tensor, sigma_data: float) -> Coefficients:
    # c_skip and c_out put into the coefficients of x0, where beta cancels.
    total = beta**2 + sigma_data**2
    return (beta - sigma_data**2) / total, -(1 + beta) * sigma_data / total.sqrt()


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], Coefficients]] = {
    "velocity": _velocity,
    "reverse_velocity": _reverse_velocity,
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "edm": _edm,
}
"""The coefficients ``(a, b)`` of every prediction by name, from alpha, beta and sigma_data."""


def coefficients(
    predicts: str, alpha: Tensor, beta: Tensor, sigma_data: float = 0.5
) -> Coefficients:
    """``(a, b)`` of ``v = a x' + b output``.

    Args:
        predicts: a name in ``PREDICTIONS``.
        alpha, beta: of the state, any shape, float64.
        sigma_data: standard deviation of the data, for ``edm``.

    Raises:
        ValueError: an unknown prediction; ``eps`` where alpha is 0, or ``x0`` where beta is 0:
            the output says nothing of the velocity there.
    """
    arguments.one_of("predicts", predicts, PREDICTIONS)
    if predicts == "eps" and bool((alpha == 0).any()):
        raise ValueError(
            "predicts: 'eps' gives no velocity at pure noise (alpha = 0); use a path that ends "
            "before it, or a network that predicts v or x0"
        )
    if predicts == "x0" and bool((beta == 0).any()):
        raise ValueError("predicts: 'x0' gives no velocity at the clean end (beta = 0)")
    arguments.number("sigma_data", sigma_data, positive=True)
    return PREDICTIONS[predicts](alpha, beta, sigma_data)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [R] shaped to multiply ``like`` [R, *dims], in its dtype and on its device."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))


def velocity_of(
    predicts: str,
    output: Tensor,
    state: Tensor,
    alpha: Tensor,
    beta: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """The velocity ``[R, *dims]`` that a network's ``output`` stands for.

    Args:
        predicts, alpha, beta, sigma_data: see ``coefficients``; alpha and beta ``[R]``.
        output: ``[R, *dims]``.
        state: ``x' = alpha x0 + beta eps``, ``[R, *dims]``; the arithmetic is in its dtype.
    """
    of_state, of_output = coefficients(predicts, alpha, beta, sigma_data)
    return _rows(of_state, state) * state + _rows(of_output, state) * output.to(state.dtype)


def output_of(
    predicts: str,
    velocity: Tensor,
    state: Tensor,
    alpha: Tensor,
    beta: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """The inverse of ``velocity_of``: what a network of this prediction would have put out."""
    of_state, of_output = coefficients(predicts, alpha, beta, sigma_data)
    return (velocity - _rows(of_state, state) * state) / _rows(of_output, state)
