"""Hidden features of the denoiser itself (the paper's perceptual metric)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oss_ext.metrics.base import EvaluatedMetric


@dataclass(frozen=True)
class PerceptualMetric(EvaluatedMetric):
    """``h(z[j], t[j]) - h(x[j], t[j])``, h what a module gives while the model is evaluated there.

    The teacher's features are kept for all its rows, ``[N+1, B, F]``: a module in the middle of the
    network, where it is narrowest, costs the least. Of several outputs all tensors count.

    Attributes:
        module: its name, as torch has it: ``mid2`` of the bundled digits, ``unet.mid_block`` of a
            pipeline.

    Raises:
        ValueError: no name.
    """

    module: str

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or not self.module:
            raise ValueError(f"module: expected the name of a module, got {self.module!r}")

    @property
    def name(self) -> str:
        return f"perceptual:{self.module}"

    def features(self, state: Tensor, velocity: Tensor, t: Tensor, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        return hidden
