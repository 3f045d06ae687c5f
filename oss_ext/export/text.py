"""Formats that are lines of text: what people paste into their hosts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from oss_ext.export.base import Format, number, numbers, whole_timesteps
from oss_ext.schedule import Schedule


def _listed(convert: Callable[[Schedule], str]) -> Callable[[Schedule, float], str]:
    """A format that has no use for the host's shift."""
    return lambda schedule, shift: convert(schedule)


def _table(schedule: Schedule) -> str:
    """Step, flow time, sigma and timestep, with a header; the last row is where the run ends."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "time", "sigma", "timestep"])
    steps = [*map(number, schedule.timesteps), ""]
    for k, (t, sigma) in enumerate(zip(schedule.times, schedule.sigmas, strict=True)):
        writer.writerow([k, repr(t), repr(sigma), steps[k]])
    return out.getvalue().rstrip("\n")


def _lines(schedule: Schedule) -> str:
    return "\n".join(map(number, schedule.sigmas))


def _lightx2v(schedule: Schedule, shift: float) -> str:
    steps = whole_timesteps(schedule, shift)
    return json.dumps({"denoising_step_list": steps, "sample_shift": shift})


FORMATS = (
    Format(
        "comfyui",
        "ComfyUI: the text of the node ManualSigmas, for SamplerCustom; use the sampler {sampler}",
        _listed(lambda s: numbers(s.sigmas)),
        final_zero=True,
        scales_noise=True,
        samplers={"euler": "euler", "dpmpp-2m": "dpmpp_2m", "ipndm-4": "ipndm"},
    ),
    Format(
        "k-diffusion",
        "k-diffusion and what is built on it: `sigmas` of {sampler}, as a tensor",
        _listed(lambda s: f"torch.tensor([{numbers(s.sigmas)}])"),
        final_zero=True,
        scales_noise=True,
        samplers={"euler": "sample_euler", "dpmpp-2m": "sample_dpmpp_2m"},
    ),
    Format(
        "forge",
        "A1111 and Forge: the text of a custom scheduler (ExtraSchedulers); sampler {sampler}",
        _listed(lambda s: f"[{numbers(s.sigmas)}]"),
        final_zero=True,
        scales_noise=True,
        samplers={"euler": "Euler", "dpmpp-2m": "DPM++ 2M"},
    ),
    Format(
        "sdcpp",
        "stable-diffusion.cpp: command-line argument; --sampling-method {sampler}",
        _listed(lambda s: f'--sigmas "{",".join(map(number, s.sigmas))}"'),
        final_zero=True,
        scales_noise=True,
        samplers={"euler": "euler", "dpmpp-2m": "dpm++2m"},
    ),
    Format(
        "wan",
        "Wan, official code: `sampling_sigmas` of the sample_solver '{sampler}'",
        _listed(lambda s: f"np.array([{numbers(s.sigmas[:-1])}])"),
        final_zero=False,
        whole_timesteps=True,
        flow_only=True,
        samplers={"dpmpp-2m": "dpm++"},
        flow_samplers=("dpmpp-2m",),
    ),
    Format(
        "open-sora",
        "Open-Sora 2: the list of timesteps, 1 to 0",
        _listed(lambda s: f"[{numbers(s.sigmas)}]"),
        final_zero=True,
        flow_only=True,
    ),
    Format(
        "invokeai",
        "InvokeAI, FLUX: the list of timesteps, 1 to 0",
        _listed(lambda s: f"[{numbers(s.sigmas)}]"),
        final_zero=True,
        flow_only=True,
    ),
    Format(
        "lightx2v",
        "LightX2V: denoising_step_list (of 1000), to which it applies sample_shift again",
        _lightx2v,
        final_zero=False,
        whole_timesteps=True,
        flow_only=True,
        shifts=True,
    ),
    Format(
        "sdnext",
        "SD.Next: the option schedulers_timesteps; for flow models with its shift at {shift:g}",
        lambda s, shift: ", ".join(map(str, whole_timesteps(s, shift))),
        final_zero=False,
        unit_noise=True,
        whole_timesteps=True,
        shifts=True,
    ),
    Format("text", "one sigma a line, the final one included", _listed(_lines), final_zero=True),
    Format("csv", "a table of steps, times, sigmas and timesteps", _listed(_table), None),
)
