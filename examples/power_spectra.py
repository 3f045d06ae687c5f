"""A network that someone else trained, from its wheel to a searched schedule and its worth.

21cmPSDenoiser (Breitman et al., MIT licence, 9.1 million parameters) removes sample variance from
power spectra of the 21-cm signal. It is a conditional score model on the VP SDE (beta 0.1 to 20)
that predicts eps and counts time from 0 to 999. Its weights are in its wheel, which pip fetches;
nothing of it is shipped here.

    python examples/power_spectra.py               # teacher, searches, held-out table
    python examples/power_spectra.py --grid edm    # with another of the paper's teachers

The conditions are synthetic: smooth power laws with the anisotropy and the sample variance of a
survey, in the ranges that the network was trained on. What is measured is the distance to the
network's own result, for conditions and noise that the search has not seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import oss_ext as oss
from oss_ext import contest
from oss_ext.evaluate import Score, score_table
from oss_ext.models import GRIDS, teacher_times
from oss_ext.noise import VPContinuousPath
from oss_ext.report import plot_samples, plot_schedules
from oss_ext.runs import file_name

WHEEL = "21cmpsdenoiser==1.0.2"
FILES = ("psdenoiser/model.py", "psdenoiser/denoiser_model.pt", "psdenoiser/constants.npz")
PIVOT = 0.1  # of the power laws, 1/Mpc
OUT = Path("out/power_spectra")
BATCH = 16  # larger ones are slower on a CPU


def fetch(folder: Path) -> Path:
    """The wheel's network, weights and constants in ``folder``, by pip if they are not there."""
    if not all((folder / name).is_file() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("21cm*.whl"))) as wheel:
            wheel.extractall(folder, FILES)
    return folder / "psdenoiser"


def load_network(source: Path) -> nn.Module:
    """The network by its own class: its weight standardisation is not the usual one."""
    spec = importlib.util.spec_from_file_location("psdenoiser_model", source / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.UNet(dim=(32, 16), channels=2, dim_mults=(1, 2, 4, 8), cdn_len=None)
    weights = torch.load(source / "denoiser_model.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    # The other layout of a convolution's numbers takes ten times as long on a CPU.
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def conditions(source: Path, count: int, seed: int) -> Tensor:
    """``[count, 1, 32, 16]`` noisy power spectra, as the network takes them: log10, in [-1, 1]."""
    constants = np.load(source / "constants.npz")
    random = np.random.default_rng(seed)
    k_perp, k_par = constants["kperp"][:, None], constants["kpar"][None, :]
    k = np.hypot(k_perp, k_par)
    modes = np.maximum(constants["Nmodes"], 1)

    def draw(low: float, high: float) -> np.ndarray:
        return random.uniform(low, high, (count, 1, 1))

    level = draw(4, 6) + draw(-3.5, -2.5) * np.log10(k / PIVOT)
    level = level + draw(0, 1.5) * np.log10(1 + (k_par / k) ** 2)
    # The mean over as many modes as a cell of the survey holds.
    level = level + np.log10(random.gamma(modes, size=(count, *modes.shape)) / modes)
    unit = (level - constants["noisy_mean"]) / constants["noisy_std"]
    return torch.from_numpy(2 * unit - 1)[:, None].float()


class Conditioned(nn.Module):
    """The network with one condition per sample.

    A module, so that the model's fingerprint covers weights and conditions, and metrics can look
    at what is inside (``perceptual:network.mid_block2``).
    """

    given: Tensor

    def __init__(self, network: nn.Module, given: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("given", given)

    def forward(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return self.network(x, t.float(), x_cdn=self.given[sample % len(self.given)])


def make_model(network: nn.Module, given: Tensor) -> oss.models.Model:
    """The network, given a condition for every sample."""
    model = oss.models.from_callable(
        Conditioned(network, given),
        shape=(1, 32, 16),
        path=VPContinuousPath(0.1, 20.0, scale=999.0, first=1e-3),
        predicts="eps",
        name="21cmPSDenoiser",
        data_range=2.0,
    )
    return model


def calibration(count: int = 16, folder: str | Path = OUT / "wheel") -> oss.models.Model:
    """The network with the conditions that are searched on; also for ``oss --model``."""
    source = fetch(Path(folder))
    return make_model(load_network(source), conditions(source, count, seed=0))


def unseen(count: int = 64, folder: str | Path = OUT / "wheel") -> oss.models.Model:
    """The network with the conditions that are judged by."""
    source = fetch(Path(folder))
    return make_model(load_network(source), conditions(source, count, seed=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--grid", choices=GRIDS, default="edm")
    parser.add_argument("--methods", nargs="+", choices=contest.METHODS,
                        default=["uniform", "oss-median", "fast", "balanced"])  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()

    wheel = options.out / "wheel"
    batch = min(BATCH, options.samples)
    model = calibration(options.samples, wheel)
    times = teacher_times(model, options.teacher_steps, options.grid)
    start = float(times[-1])
    noise = model.noise(options.samples, seed=0, start=start)
    teacher = oss.teacher(model, noise, times=times, max_batch=batch, progress=True)
    made = contest.make(
        model, teacher, options.steps, options.methods, max_batch=batch, progress=True
    )

    judge = unseen(options.held_out, wheel)
    noise = judge.noise(options.held_out, seed=1, start=start)
    held_out = oss.teacher(judge, noise, times=times, max_batch=batch, progress=True)
    scores = contest.judge(judge, held_out, made.contenders, max_batch=batch, progress=True)
    print(score_table(scores, "uniform {steps}" if "uniform" in options.methods else None))
    schedules = {c.name: c.schedule for c in made.contenders if c.schedule is not None}
    for name, schedule in schedules.items():
        schedule.save(options.out / f"{file_name(name)}.json")
    plot_schedules(schedules, options.out / "schedules.png")
    rows = {"condition": conditions(fetch(wheel), options.held_out, seed=1)}
    rows |= {f"teacher {held_out.steps}": held_out.final}
    rows |= {score.name: score.images for score in scores if isinstance(score, Score)}
    plot_samples(rows, options.out / "samples.png")


if __name__ == "__main__":
    main()
