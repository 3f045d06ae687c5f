"""The command line with pipelines, hosts and presets."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from cli_cases import TINY, Oss, assert_fails, assert_misused, files
from driver_cases import one_thread  # noqa: F401

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.utils import logging

import pipelines
from oss_ext import Schedule, presets
from oss_ext.models import pipeline_load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with a text encoder, as ``save_pretrained`` writes it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("stable-diffusion")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipelines.stable_diffusion(*pipelines.clip(root)).pipe
        pipe.save_pretrained(root / "pipe")
    return root / "pipe"


@pytest.fixture
def pipeline(folder: Path, tmp_path: Path) -> list[str]:
    """Options that choose the pipeline, with two prompts."""
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    sizes = ["--set=height=16", "--set=width=16", "--set=guidance_scale=3"]
    return [f"--pipeline={folder}", "--prompts=prompts.txt", *sizes, "--quiet"]


def test_a_host_of_whole_timesteps_takes_no_steps_between(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--for=lightx2v", "--off-grid")
    assert_misused(outcome, "--off-grid: lightx2v takes whole timesteps only")


@pytest.mark.parametrize("options", [[], ["--for=comfyui"]])
def test_a_shift_without_a_host_that_has_one_is_refused(oss: Oss, options: list[str]) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--shift=3", *options)
    assert_misused(outcome, "--shift: expected --for a host that shifts")


# --- pipelines ----------------------------------------------------------------------------------


def test_a_pipeline_is_searched_compared_and_sampled(oss: Oss, pipeline: list[str]) -> None:
    search = oss("search", *pipeline, "--samples=3", "--teacher-steps=8", "--steps=2,3")
    assert search.code == 0, search.err
    assert "StableDiffusionPipeline: 3 samples, teacher 8 steps" in search.out
    names = [f"schedules/StableDiffusionPipeline-{k}.json" for k in (2, 3)]
    run = {"schedules.png", "run.json", "arrays.safetensors"}
    assert files() == {*names, *(f"schedules/{name}" for name in run), "prompts.txt"}
    schedule = Schedule.load(names[1])
    assert schedule.path.name == "vp"
    assert all(t == round(t) for t in schedule.timesteps)

    compare = oss("compare", *names, *pipeline, "--samples=3")
    assert compare.code == 0, compare.err
    assert "searched with other weights" not in compare.err
    assert "3 held-out samples" in compare.out

    sample = oss("sample", names[1], *pipeline, "--samples=3", "--out=images.png")
    assert (sample.code, sample.err) == (0, "")
    sample = oss("sample", names[1], *pipeline, "--samples=3", "--out=images")
    assert sample.code == 0, sample.err
    assert files("images") == {"0000.png", "0001.png", "0002.png"}
    assert matplotlib.image.imread("images/0002.png").shape[:2] == (16, 16)
    assert Path("images.png").stat().st_size > 0


def test_only_the_states_of_a_pipeline_can_be_calibrated(oss: Oss, pipeline: list[str]) -> None:
    options = ["--samples=2", "--teacher-steps=6", "--steps=2"]
    assert oss("search", *pipeline, *options, "--amplitude").code == 0
    sample = ("sample", "schedules/StableDiffusionPipeline-2.json", *pipeline, "--samples=2")
    outcome = oss(*sample, "--amplitude", "--out=images.png")
    assert_misused(outcome, "--amplitude: a pipeline that draws a picture takes its own steps")
    outcome = oss(*sample, "--amplitude", "--out=latents.safetensors")
    assert outcome.code == 0, outcome.err


def test_another_scheduler_can_stand_in(oss: Oss, pipeline: list[str]) -> None:
    options = [
        "--samples=2",
        "--teacher-steps=6",
        "--steps=2",
        "--scheduler=EulerDiscreteScheduler",
    ]
    assert oss("search", *pipeline, *options).code == 0
    schedule = Schedule.load("schedules/StableDiffusionPipeline-2.json")
    assert len(schedule.teacher_times) == 7
    assert schedule.teacher_times[0] == 0.0  # DDIM's configuration here ends above it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompts: expected a prompt a line in prompts.txt, got none"),
        (b"\n  \n", "prompts: expected a prompt a line in prompts.txt, got none"),
        (b"caf\xe9", "prompts: prompts.txt: expected UTF-8 text, got byte 0xe9 at position 3"),
    ],
)
def test_a_prompts_file_is_checked(
    oss: Oss, pipeline: list[str], content: bytes, message: str
) -> None:
    Path("prompts.txt").write_bytes(content)
    assert_fails(oss("search", *pipeline), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipeline=nowhere/at/all"], "pipeline: nowhere/at/all cannot be loaded: "),
        (["--scheduler=Nothing"], "scheduler: expected a class of diffusers, got 'Nothing'"),
        (["--scheduler=DDPMScheduler"], "DDPMScheduler adds fresh noise in every step"),
        (["--set=latents=1"], "latents: expected none of it"),
        (["--set=eta=0.5"], "eta: expected 0.0, got 0.5"),
        (["--set=nothing=1"], "StableDiffusionPipeline has no argument 'nothing'"),
        (["--set=height=abc"], "cannot be called with these options: TypeError: "),
        (["--set=guidance_scale=high"], "cannot be called with these options: TypeError: "),
        (["--set=prompt=a cat"], "prompt: expected none beside prompts"),
        (["--lora=nowhere.safetensors"], "lora: nowhere.safetensors cannot be loaded: "),
        (
            ["--scheduler=FlowMatchEulerDiscreteScheduler"],
            "cannot be called with these options: AttributeError: ",
        ),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    oss: Oss, pipeline: list[str], options: list[str], message: str
) -> None:
    assert_fails(oss("search", *pipeline, "--teacher-steps=6", "--steps=2", *options), message)
    assert files() == {"prompts.txt"}


def test_without_diffusers_the_error_says_what_to_install(
    oss: Oss, pipeline: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert_fails(oss("search", *pipeline), "pip install 'oss_ext[diffusers]'")


def test_options_of_pipelines_need_one(oss: Oss) -> None:
    assert_misused(oss("search", *TINY, "--steps=2", "--batch=2"), "batch belongs to --pipeline")


def test_a_schedule_of_a_pipeline_asks_for_it(oss: Oss, found: list[str]) -> None:
    schedule = Schedule.load(found[0])
    body = {**vars(schedule), "model": "FluxPipeline"}
    Schedule(**body).save("flux.json")
    assert_misused(oss("compare", "flux.json"), "'FluxPipeline' is not a bundled one")


# --- hosts --------------------------------------------------------------------------------------


def test_a_search_for_a_host_can_be_exported_to_it(oss: Oss) -> None:
    assert oss("search", *TINY, "--steps=3", "--for=comfyui").code == 0
    outcome = oss("export", "schedules/analytic-3.json", "--to=comfyui")
    assert outcome.code == 0, outcome.err
    schedule = Schedule.load("schedules/analytic-3.json")
    assert [float(v) for v in outcome.out.split(",")] == pytest.approx(schedule.sigmas, rel=1e-8)
    assert "ManualSigmas" in outcome.err
    assert "ends with the final sigma" in outcome.err


def test_a_search_for_whole_timesteps_has_them(oss: Oss) -> None:
    options = ["--steps=3", "--for=lightx2v", "--shift=5"]
    assert oss("search", *TINY, *options).code == 0
    outcome = oss("export", "schedules/analytic-3.json", "--to=lightx2v", "--shift=5")
    body = json.loads(outcome.out)
    u = [step / 1000 for step in body["denoising_step_list"]]
    times = [5 * x / (1 + 4 * x) for x in u]
    schedule = Schedule.load("schedules/analytic-3.json")
    assert times == pytest.approx(schedule.times[:-1], abs=1e-12)


def test_a_pinned_host_and_a_free_start_contradict_each_other(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--for=comfyui", "--start=free")
    assert_misused(outcome, "--start: comfyui needs a pinned start, got free")


def test_a_host_that_cannot_run_a_schedule_is_refused_unless_forced(oss: Oss) -> None:
    assert_fails(oss("export", "preset:flux-oss-10", "--to=comfyui"), "free start")
    outcome = oss("export", "preset:flux-oss-10", "--to=comfyui", "--force", "--out=sigmas.txt")
    assert outcome.code == 0
    assert outcome.out == ""
    assert Path("sigmas.txt").read_text().startswith("0.9968, 0.9886, ")


def test_diffusers_is_given_arguments_for_its_very_scheduler(
    oss: Oss, folder: Path, pipeline: list[str]
) -> None:
    options = ["--samples=2", "--teacher-steps=6", "--steps=2", "--for=diffusers"]
    # Whatever the pipeline's own scheduler cannot be given is said before the search.
    for solver, said in (
        (["--scheduler=HeunDiscreteScheduler"], "HeunDiscreteScheduler takes other steps than the"),
        ([], "DDIMScheduler takes no schedule; use export.attach(schedule, pipe)"),
    ):
        outcome = oss("search", *pipeline, *options, *solver)
        assert outcome.code == 0, outcome.err
        assert f"note: the pipeline's own scheduler cannot be given the schedules: {said}" in (
            outcome.err
        )
    outcome = oss("search", *pipeline, *options, "--scheduler=EulerDiscreteScheduler")
    assert outcome.code == 0, outcome.err
    assert "cannot be given" not in outcome.err
    found = "schedules/StableDiffusionPipeline-2.json"
    # The folder's own scheduler is DDIM, which takes no schedule.
    refused = oss("export", found, "--to=diffusers", f"--scheduler={folder}")
    assert_fails(refused, "DDIMScheduler takes no schedule; use export.attach(schedule, pipe)")
    euler = pipeline_load.import_diffusers().EulerDiscreteScheduler
    euler(**pipelines.SD_BETAS).save_pretrained("euler")
    outcome = oss("export", found, "--to=diffusers", "--scheduler=euler")
    assert outcome.code == 0, outcome.err
    given: dict[str, Any] = json.loads(outcome.out)
    assert given["sigmas"] == pytest.approx(Schedule.load(found).sigmas, rel=1e-6)


def test_a_host_with_a_solver_of_its_own_refuses_what_it_would_not_run(oss: Oss) -> None:
    scheduler = pipeline_load.import_diffusers().HeunDiscreteScheduler(**pipelines.SD_BETAS)
    scheduler.save_pretrained("scheduler")
    preset = presets.load("sd1-ays-10").schedule
    whole = [float(t) for t in preset.path.flow_times(torch.tensor([999.0, 500.0, 20.0]))]
    schedule = replace(preset, times=(preset.teacher_times[-1], *whole[1:], 0.0))
    schedule.save("schedule.json")
    replace(schedule, solver="heun-sigma").save("heun.json")
    outcome = oss("export", "schedule.json", "--to=diffusers", "--scheduler=scheduler")
    assert_fails(outcome, "HeunDiscreteScheduler takes other steps than the 'euler' ones")
    outcome = oss("export", "heun.json", "--to=diffusers", "--scheduler=scheduler")
    assert outcome.code == 0, outcome.err


def test_a_pipelines_folder_is_told_what_its_call_takes(oss: Oss) -> None:
    diffusers = pipeline_load.import_diffusers()
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained("pipe/scheduler")
    arguments = ("export", "preset:wan-oss-20", "--to=diffusers", "--force")
    index = Path("pipe/model_index.json")
    index.write_text('{"_class_name": "FluxPipeline"}')
    outcome = oss(*arguments, "--scheduler=pipe")
    assert list(json.loads(outcome.out)) == ["sigmas"]
    assert "arguments of pipe(...) for FluxPipeline with FlowMatchEulerDiscrete" in outcome.err
    index.write_text('{"_class_name": "WanPipeline"}')
    assert_fails(oss(*arguments, "--scheduler=pipe"), "WanPipeline takes no sigmas; use export.att")
    scheduler = oss(*arguments, "--scheduler=pipe/scheduler")
    assert scheduler.out == outcome.out
    assert "arguments of set_timesteps for FlowMatchEulerDiscreteScheduler" in scheduler.err
    for unknown in ('{"_class_name": ["mine", "Pipe"]}', '{"_class_name": "Mine"}', "[]"):
        index.write_text(unknown)
        assert oss(*arguments, "--scheduler=pipe").out == outcome.out
    index.write_text("{")
    assert_fails(oss(*arguments, "--scheduler=pipe"), "--scheduler: expected a pipeline's pipe/mod")


def test_diffusers_needs_the_scheduler(oss: Oss, found: list[str]) -> None:
    assert_misused(oss("export", found[0], "--to=diffusers"), "--scheduler: expected the folder")
    assert_fails(
        oss("export", found[0], "--to=diffusers", "--scheduler=nowhere"),
        "--scheduler: expected a scheduler in nowhere",
    )


@pytest.mark.parametrize(
    ("option", "other", "said"),
    [
        ("--scheduler=.", "comfyui", "--scheduler: expected --to diffusers beside it, got --to c"),
        ("--mu=0.5", "lightx2v", "--mu: expected --to diffusers beside it, got --to lightx2v"),
        ("--shift=3", "comfyui", "--shift: expected --to lightx2v, sdnext beside it, got --to c"),
        ("--shift=3", "diffusers", "--shift: expected --to lightx2v, sdnext beside it, got --to d"),
    ],
)
def test_an_option_of_another_host_is_refused(
    oss: Oss, found: list[str], option: str, other: str, said: str
) -> None:
    assert_misused(oss("export", found[0], f"--to={other}", option), said)


@pytest.mark.parametrize(
    "config",
    [
        "[1]", '"x"', "{", "{}", '{"_class_name": 5}', "\xff",
        '{"_class_name": "DDIMScheduler", "num_train_timesteps": "x"}',
    ],
)  # fmt: skip
def test_a_folder_of_no_scheduler_is_refused(oss: Oss, found: list[str], config: str) -> None:
    Path("scheduler_config.json").write_text(config, encoding="latin-1")
    outcome = oss("export", found[0], "--to=diffusers", "--scheduler=.")
    assert_fails(outcome, "--scheduler: expected a scheduler in .: ")


# --- presets ------------------------------------------------------------------------------------


def test_presets_are_listed_shown_and_exported_like_files(oss: Oss) -> None:
    listed = oss("presets").out
    assert "preset:flux-oss-10\n" in listed
    shown = oss("show", "preset:sdxl-ays-10", "--plot=ays.png")
    assert "10 steps, ays: not searched" in shown.out
    assert files() == {"ays.png"}
    text = oss("export", "preset:wan-oss-20", "--to=comfyui").out
    assert text.startswith("1, 0.997, ")
    # Published for Euler steps, which Wan's own code does not take.
    assert_fails(oss("export", "preset:wan-oss-20", "--to=wan"), "this host has dpmpp-2m")
    assert_fails(oss("show", "preset:none"), "unknown preset 'none'; known presets: ")


def test_a_preset_is_judged_by_the_teacher_of_the_files_beside_it(
    oss: Oss, found: list[str]
) -> None:
    outcome = oss("compare", *found, "preset:wan-oss-20", *TINY[1:2], "--samples=2", "--quiet")
    assert outcome.code == 1
    assert "steps: expected 1 to 8, got 20" in outcome.err  # uniform spacing of 20 steps in 8
