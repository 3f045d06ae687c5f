"""The bundled model: class-conditional handwritten digits with classifier-free guidance.

``v = v_null + guidance (v_label - v_null)``; the two network outputs of a guided row are made in
one forward of twice the rows. Data in [-1, 1], 28 x 28, one channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from oss_ext import arguments
from oss_ext.models.base import Model, hash_of
from oss_ext.models.digits_net import NULL_LABEL, NUM_CLASSES, DigitsUNet


class Digits(Model):
    """The digits network with a list of labels and a guidance scale; see ``load``."""

    name = "digits"
    shape = (1, 28, 28)
    data_range = 2.0

    def __init__(self, net: DigitsUNet, labels: Sequence[int], guidance: float) -> None:
        valid = isinstance(labels, Sequence) and len(labels) > 0
        if not valid or any(type(n) is not int or n not in range(NUM_CLASSES) for n in labels):
            raise ValueError(f"labels: expected digits from 0 to 9, got {labels!r}")
        self.net = net.eval().requires_grad_(False)
        self.device = net.stem.weight.device
        self.labels = torch.tensor(list(labels), device=self.device)
        self.guidance = arguments.number("guidance", guidance)

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        label = self.labels[sample % len(self.labels)]
        if self.guidance == 1.0:
            return self.net(x, t, label)
        both = torch.cat([label, torch.full_like(label, NULL_LABEL)])
        v_label, v_null = self.net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_null + self.guidance * (v_label - v_null)

    def networks(self) -> dict[str, nn.Module]:
        return {"": self.net}

    def fingerprint(self) -> str:
        weights = self.net.state_dict()
        return hash_of([*weights.values(), self.labels.tolist(), self.guidance])


def load(
    labels: Sequence[int] | int = tuple(range(10)), guidance: float = 2.0, device: str = "cpu"
) -> Digits:
    """Handwritten digits, the bundled network: sample b draws labels[b % len(labels)].

    Args:
        labels: digits from 0 to 9.
        guidance: classifier-free guidance scale; 1 is the conditional model alone.
        device: where the network runs, in float32.
    """
    labels = [labels] if isinstance(labels, int) else labels  # `--set labels=3` has no comma
    file = resources.files("oss_ext.models") / "weights" / "digits.safetensors"
    with torch.device("cpu"):
        net = DigitsUNet().float()  # whatever the process's defaults are
    weights = load_safetensors(file.read_bytes())
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    # Channels-last convolutions are the faster ones on a CPU.
    net = net.to(arguments.device("device", device)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Digits(net, labels, guidance)
