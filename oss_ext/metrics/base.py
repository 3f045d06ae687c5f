"""What a metric is: which features of candidates and of the teacher a search compares.

The cost is a mean squared difference of features (paper table 4). Metrics are of two kinds:

- affine: a candidate's features are affine in what its source has, either with the solver's own
  coefficients (the features are elements of the state) or with the source's alone (they do not
  depend on where it goes). One operator finds the least over all candidates of all targets.
- evaluated: a candidate's features are known once the model has been evaluated at it. That is done
  for the few candidates of every target whose states are the nearest.

Whatever is compared, the whole state moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments, cpu

HOWS = ("first", "even", "random")


@dataclass(frozen=True, eq=False)
class Selection:
    """Which elements of a sample are compared, and how much each counts; all alike by default.

    The cost is the weighted mean square ``sum w d^2 / sum w`` over the part selected.

    Attributes:
        channels: how many of ``[C, ...]``.
        frames: how many of ``[C, F, H, W]``.
        how: ``first`` ones, ``even``ly spaced ones, or ``random`` ones, others at every step.
        seed: of the random ones, 0 or more.
        weights: of a sample's elements, of a shape that broadcasts to its own; any real dtype,
            finite, none below zero, one above. A mask is bool. What weighs nothing is never read.

    Raises:
        ValueError: an attribute that is not as it says here.
    """

    channels: int | None = None
    frames: int | None = None
    how: str = "first"
    seed: int = 0
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        arguments.one_of("how", self.how, HOWS)
        for name in ("channels", "frames"):
            if getattr(self, name) is not None:
                arguments.whole_number(name, getattr(self, name))
        # With the step's share in it, it must be one that torch takes.
        arguments.whole_number("seed", self.seed, least=0, most=2**48)
        if self.how != "first" and self.channels is None and self.frames is None:
            raise ValueError(f"how: expected channels or frames beside {self.how!r}, got neither")
        if self.weights is not None:
            _check_weights(self.weights)

    def __str__(self) -> str:
        """What is left out or weighed, as a metric's name says it; empty for all alike."""
        counts = {"channels": self.channels, "frames": self.frames}
        parts = [f"{self.how} {count} {name}" for name, count in counts.items() if count]
        parts += ["weighted"] if self.weights is not None else []
        return f"[{', '.join(parts)}]" if parts else ""

    def of(self, tensor: Tensor, step: int) -> Tensor:
        """What is compared of ``tensor`` ``[T, B, *dims]`` at step ``step``.

        Returns:
            Without weights the part selected: a view, unless random. With weights the K elements of
            it that weigh something, ``[T, B, K]``, each times ``sqrt(K w / sum w)``: the mean
            square of a difference is then the weighted one.

        Raises:
            ValueError: more channels or frames than there are, or frames of what has none; weights
                of another shape, or none above zero in the part selected.
        """
        part = self._part(tensor, step)
        if self.weights is None:
            return part
        dims = tensor.shape[2:]
        try:
            weights = self.weights.detach().expand(dims)
        except RuntimeError:
            raise ValueError(
                f"weights: expected a shape that broadcasts to {tuple(dims)}, got "
                f"{tuple(self.weights.shape)}"
            ) from None
        flat = self._part(weights[None, None], step).flatten().double().cpu()
        kept = flat.nonzero().flatten()
        if not len(kept):
            raise ValueError(f"weights: expected one above zero in what step {step} compares")
        # By the largest first: neither their sum nor a share of it leaves the range of float64.
        share = flat[kept] / flat.max()
        scale = (len(kept) * share / share.sum()).sqrt()
        elements = part.flatten(2).index_select(2, kept.to(part.device))
        return elements * scale.to(elements)

    def _part(self, tensor: Tensor, step: int) -> Tensor:
        """The channels and frames of ``tensor`` ``[T, B, *dims]``."""
        for dim, name, count in ((2, "channels", self.channels), (3, "frames", self.frames)):
            if count is None:
                continue
            least = 3 if name == "channels" else 6
            there = tensor.shape[dim] if tensor.dim() >= least else 0
            if count > there:
                raise ValueError(f"{name}: expected at most {there}, got {count}")
            if self.how == "first":
                tensor = tensor.narrow(dim, 0, count)
            elif self.how == "even":
                # From the first on, at the largest distance at which as many fit.
                stride = (there - 1) // (count - 1) if count > 1 else there
                every = tensor.unfold(dim, 1, stride).squeeze(-1)
                tensor = every.narrow(dim, 0, count)
            else:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step + dim)
                chosen = cpu.randperm(there, generator=generator)[:count].sort().values
                tensor = tensor.index_select(dim, chosen.to(tensor.device))
        return tensor


def _check_weights(weights: object) -> None:
    """``ValueError`` unless ``weights`` are a tensor of finite values from 0 on, not all 0."""
    got: object = type(weights).__name__
    if isinstance(weights, Tensor) and weights.is_complex():
        got = f"Tensor of {weights.dtype}"
    elif isinstance(weights, Tensor):
        values = weights.detach().double()
        if not bool(values.isfinite().all()):
            got = "NaN or inf"
        elif bool((values < 0).any()):
            got = f"{float(values.min()):g}"
        elif bool((values > 0).any()):
            return
        else:
            got = f"none in a tensor of shape {tuple(weights.shape)}"
    raise ValueError(
        f"weights: expected a tensor of finite values from 0 on and one above 0, got {got}"
    )


WHOLE = Selection()


def check_selection(selection: object) -> None:
    """``ValueError`` unless it is a ``Selection``."""
    if not isinstance(selection, Selection):
        raise ValueError(f"selection: expected a Selection, got {selection!r:.100}")


@dataclass(frozen=True, eq=False)
class Sources:
    """What the sources of a step have, rows 0 to N of every tensor.

    Attributes:
        basis: state, velocity and earlier outputs; only the first two are in row order.
        times: ``[N+1]`` float64.
        live: bool ``[N+1, B]``: other rows may hold anything.
        step: its number, from 1.
    """

    basis: list[Tensor]
    times: Tensor
    live: Tensor
    step: int


class Metric(ABC):
    """Features of candidates and of the teacher.

    Attributes:
        needs_x0: whether the teacher must have kept its ``x0``.
        evaluated: whether the model is evaluated at candidates.
    """

    needs_x0 = False
    evaluated = False

    @property
    @abstractmethod
    def name(self) -> str:
        """As an objective says it."""


class AffineMetric(Metric):
    """Features that are affine in what a source has."""

    @property
    def varies(self) -> bool:
        """Whether other features are compared at every step."""
        return False

    @abstractmethod
    def sources(self, given: Sources) -> tuple[list[Tensor], Tensor | None]:
        """Tensors ``[N+1, B, *features]`` that a candidate's features are a combination of.

        And its coefficients: ``[terms, N+1]`` float64 by source, or None: the tensors are parts of
        ``given.basis``, and the solver's coefficients hold.
        """

    @abstractmethod
    def targets(self, states: Tensor, x0: Tensor | None, step: int) -> Tensor:
        """The teacher's features ``[N+1, B, *features]``, of ``states`` and ``x0`` alike."""


class EvaluatedMetric(Metric):
    """Features of a candidate that take an evaluation of the model there.

    The teacher's own are made in the same way. At the clean end, where models are not evaluated,
    the states themselves are compared.

    Attributes:
        selection: what of the states finds the few candidates, and what of the features counts.
        module: name of the module whose output an evaluation is to keep; None: of none.
    """

    evaluated = True
    selection: Selection = WHOLE
    module: str | None

    @abstractmethod
    def features(self, state: Tensor, velocity: Tensor, t: Tensor, hidden: Tensor | None) -> Tensor:
        """Of the model evaluated at ``state`` and ``t``.

        Args:
            state, velocity: ``[R, *dims]``.
            t: ``[R]`` float64.
            hidden: what ``module`` gave there, ``[R, F]``; None without one.

        Returns:
            ``[R, *features]``.
        """
