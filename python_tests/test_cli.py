"""The command line: what it writes and prints, its errors and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cli_cases import TINY, Oss, Outcome, assert_fails, assert_misused, files
from driver_cases import (
    example_schedule,
    one_thread,  # noqa: F401
)
from oss_ext import Schedule, __version__, cli, models, ops, sample, solvers
from oss_ext.runs import Run

RUN_FILES = {"run.json", "arrays.safetensors"}

# --- what it does -------------------------------------------------------------------------------


def test_search_writes_a_schedule_per_budget_and_a_plot(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=3,2", "--start=pinned", "--out=a/b")
    assert (outcome.code, outcome.err) == (0, "")
    assert files("a/b") == {"analytic-2.json", "analytic-3.json", "schedules.png", *RUN_FILES}
    for steps in (2, 3):
        schedule = Schedule.load(f"a/b/analytic-{steps}.json")
        assert (schedule.steps, schedule.samples, schedule.times[0]) == (steps, 3, 1.0)
        assert schedule.objective is not None
        assert schedule.objective.start == "pinned"
    expected = "analytic: 3 samples, teacher 8 steps (euler), balanced, joint, log_mean, pinned"
    assert expected in outcome.out
    assert "wrote 2 schedules and schedules.png to a/b" in outcome.out


@pytest.mark.parametrize("shape", ["shape=3,2,2", "shape=[3,2,2]"])
def test_a_list_of_a_models_option_is_written_either_way(oss: Oss, shape: str) -> None:
    assert oss("search", *TINY, "--steps=2", f"--set={shape}").code == 0


def test_an_instance_search_writes_a_schedule_per_sample(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=2", "--scope=instance")
    assert outcome.code == 0
    assert files("schedules") == {f"analytic-2-{b}.json" for b in range(3)} | {
        "schedules.png",
        *RUN_FILES,
    }
    outcome = oss("search", *TINY, "--steps=2", "--scope=instance", "--aggregate=mean", "--out=m")
    assert outcome.code == 0
    assert files("m") == {"analytic-2.json", "schedules.png", "spread.png", *RUN_FILES}
    schedule = Schedule.load("m/analytic-2.json")
    assert schedule.objective is not None
    assert schedule.objective.aggregate == "mean"


def test_the_same_search_writes_the_same_schedules(oss: Oss, found: list[str]) -> None:
    before = [Path(file).read_bytes() for file in found]
    outcome = oss("search", *TINY, "--steps=2,3")
    assert outcome.code == 0
    assert "note: schedules holds an earlier run; its schedules of the same" in outcome.err
    assert [Path(file).read_bytes() for file in found] == before
    assert oss("search", *TINY, "--steps=2,3", "--seed=1").code == 0
    assert [Path(file).read_bytes() for file in found] != before


def test_sample_writes_a_picture_or_tensors(oss: Oss, found: list[str]) -> None:
    shape = "--set=shape=1,4,4"
    outcome = oss("sample", found[0], shape, "--samples=2", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert Path("samples.png").read_bytes().startswith(b"\x89PNG")
    outcome = oss("sample", found[0], shape, "--samples=2", "--seed=7", "--out=new/x.safetensors")
    assert outcome.code == 0
    assert outcome.out == "wrote 2 samples to new/x.safetensors\n"
    samples = load_file("new/x.safetensors")["samples"]
    model = models.load("analytic", shape=[1, 4, 4])
    expected = sample(model, model.noise(2, 7), Schedule.load(found[0]))
    assert samples.equal(expected)


def test_show_prints_every_schedule_and_plots_them(oss: Oss, found: list[str]) -> None:
    outcome = oss("show", *found, "--plot=plots/both.png")
    assert outcome.code == 0
    assert outcome.out.startswith("2 steps, refined: joint, log_mean, free start")
    assert "\n\n3 steps, refined: joint, log_mean, free start" in outcome.out
    assert outcome.out.endswith("wrote plots/both.png\n")
    assert Path("plots/both.png").read_bytes().startswith(b"\x89PNG")


def test_compare_puts_every_schedule_beside_uniform(oss: Oss, found: list[str]) -> None:
    outcome = oss(
        "compare",
        *reversed(found),
        "--set=shape=1,4,4",
        "--samples=5",
        "--picture=p.png",
        "--quiet",
    )
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    starts = [line.split("  ")[0] for line in lines[2:6]]
    assert starts == ["uniform 2", "analytic-2", "uniform 3", "analytic-3"]
    assert lines[6].startswith("5 held-out samples; PSNR with data range")
    assert lines[-1] == "wrote p.png"
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")


def test_another_model_than_the_schedules_is_noted(oss: Oss, found: list[str]) -> None:
    outcome = oss("sample", found[0], "--set=shape=1,4,4", "--set=seed=5", "--quiet")
    assert outcome.code == 0
    assert outcome.err.startswith("note: searched with other weights or options")


def test_models_lists_names_and_options(oss: Oss) -> None:
    outcome = oss("models")
    assert outcome.code == 0
    for name in models.MODELS:
        assert f"\n{name}: " in "\n" + outcome.out
    assert "--set guidance=...  default 2.0" in outcome.out


def test_solvers_lists_names_titles_and_evaluations(oss: Oss) -> None:
    outcome = oss("solvers")
    assert outcome.code == 0
    for name, solver in solvers.SOLVERS.items():
        assert f"{name}: {solver.title}\n" in outcome.out
    assert "2s: DPM-Solver 2S (Lu et al. 2022a)\n    2 model evaluations per step\n" in outcome.out


def test_a_search_knows_its_teachers_solver(oss: Oss) -> None:
    """And its schedules are judged by such a teacher."""
    outcome = oss("search", *TINY, "--steps=3", "--teacher-solver=heun", "--out=found")
    assert "teacher 8 steps (heun)" in outcome.out
    assert "15 + " in outcome.out  # evaluations per sample: one in the step to the clean end
    schedule = Schedule.load("found/analytic-3.json")
    assert (schedule.teacher_solver, schedule.solver) == ("heun", "euler")
    options = ("--set=shape=1,4,4", "--samples=3", "--quiet")
    judged = oss("compare", "found/analytic-3.json", *options, "--out=run")
    assert judged.code == 0
    assert Run.load("run").teacher_nfe == 15
    made = oss(
        "compare", *TINY, "--methods=uniform", "--teacher-solver=dpm-2s", "--steps=3", "--out=made"
    )
    assert made.code == 0
    assert Run.load("made").teacher_nfe == 14  # no log-SNR at pure noise either


def test_backends_says_which_is_in_use(oss: Oss) -> None:
    outcome = oss("backends")
    assert outcome.code == 0
    assert f"{ops.serving('cpu').name}: " in outcome.out
    assert outcome.out.count("cpu: in use") == 1


@pytest.mark.parametrize(
    "command", ["search", "sample", "show", "compare", "models", "solvers", "backends"]
)
def test_help_lists_the_commands_and_each_has_its_own(oss: Oss, command: str) -> None:
    outcome = oss("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"\n  {command} " in outcome.out
    own = oss(command, "-h")
    assert (own.code, own.err) == (0, "")
    assert f"oss {command} [OPTIONS]" in own.out


def test_the_version_is_the_packages(oss: Oss) -> None:
    assert oss("--version") == Outcome(0, f"oss, version {__version__}\n", "")


# --- what goes wrong ----------------------------------------------------------------------------


def test_an_unknown_model_lists_the_known_ones(oss: Oss) -> None:
    assert_fails(oss("search", "--model=sdxl"), "unknown model 'sdxl'", "digits, analytic")
    assert not Path("schedules").exists()


def test_an_unknown_option_of_a_model_lists_the_options(oss: Oss) -> None:
    outcome = oss("search", "--model=analytic", "--set=size=3")
    assert_fails(outcome, "'analytic' has no option 'size'", "shape, components, sd, seed")


@pytest.mark.parametrize("steps", ["0", "9", "-1", "2,9"])
def test_a_budget_that_the_teacher_has_not_writes_nothing(oss: Oss, steps: str) -> None:
    assert_fails(oss("search", *TINY, f"--steps={steps}"), "steps: expected 1 to 8, got")
    assert files() == set()


def test_a_bad_budget_is_found_before_the_teacher_runs(
    oss: Oss, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was run")

    monkeypatch.setattr(cli.search, "make_teacher", never)
    assert_fails(oss("search", *TINY, "--steps=9"), "steps: expected")


def test_contradicting_options_are_one_line(oss: Oss) -> None:
    search = ("search", *TINY, "--steps=2")
    assert_fails(oss(*search, "--aggregate=mean"), "aggregate: expected none with scope 'joint'")
    assert_fails(oss(*search, "--scope=instance", "--reduce=mean"), "reduce: expected", "'mean'")
    assert files() == set()


@pytest.mark.parametrize("target", ["file/sub", "file/sub/deeper", "link", "link/sub"])
def test_an_unwritable_folder_is_found_before_the_search(oss: Oss, target: str) -> None:
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    why = f"Not a directory: '{target}" if "file" in target else "link to what is not there: 'link'"
    example_schedule(model="analytic").save("s.json")
    # No such model: so nothing but the folder was looked at.
    assert_fails(oss("search", "--model=none", f"--out={target}"), why)
    assert_fails(oss("sample", "s.json", f"--out={target}/x.png"), why)
    assert_fails(oss("compare", "s.json", f"--picture={target}/x.png"), why)
    assert files() == {"file", "s.json"}


@pytest.mark.parametrize("command", ["show", "sample", "compare"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{}", "not a schedule of this package"),
        (b"\xff\xfe", "expected UTF-8 text, got byte 0xff at position 0"),
        (b"oops", "not JSON"),
    ],
)
def test_a_file_that_is_no_schedule_is_named(
    oss: Oss, command: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        Path("mine.json").write_bytes(content)
    assert_fails(oss(command, "mine.json"), "mine.json", message)


def test_a_damaged_schedule_is_not_used(oss: Oss, found: list[str]) -> None:
    text = Path(found[0]).read_text()
    Path(found[0]).write_text(text.replace('"samples": 3', '"samples": 4'))
    assert_fails(oss("sample", found[0]), "analytic-2.json: checksum: ")


def test_samples_that_are_no_images_make_no_picture(oss: Oss) -> None:
    assert oss("search", *TINY, "--set=shape=2,3", "--steps=2").code == 0
    outcome = oss("sample", "schedules/analytic-2.json", "--set=shape=2,3", "--quiet")
    no_image = "expected a model of images [1 or 3, H, W] for a picture, got 'analytic' with"
    assert_misused(outcome, f"--out: {no_image} samples of shape [2, 3]")
    outcome = oss("compare", "schedules/analytic-2.json", "--set=shape=2,3", "--picture=p.png")
    assert_misused(outcome, f"--picture: {no_image}")
    assert not {"samples.png", "p.png"} & files()


@pytest.mark.parametrize(
    "option",
    [
        "guidance=strong",
        "labels=1,11",
        "labels=11",
        "guidance=1,2",
        "device=cuda:99",
    ],
)
def test_a_bad_value_of_a_models_option_is_one_line(oss: Oss, option: str) -> None:
    outcome = oss("search", "--model=digits", f"--set={option}", "--teacher-steps=1", "--steps=2")
    assert_fails(outcome)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serach"], "No such command 'serach'"),
        (["search", "--stpes=3"], "No such option"),
        (["search", "--steps=3,x"], "expected whole numbers separated by commas, got '3,x'"),
        (["search", "--set=labels"], "expected key=value, got 'labels'"),
        (["search", "--scope=all"], "'all' is not one of 'joint', 'instance'"),
        (["search", "--samples=0"], "0 is not in the range x>=1"),
        (["search", "--max-batch=0"], "0 is not in the range x>=1"),
        (["search", "--out=file"], "is a file"),
        (["show"], "Missing argument 'SCHEDULE...'"),
        (["sample"], "Missing argument 'SCHEDULE'"),
        (["sample", "s.json", "--out=x.txt"], "expected a picture, a .safetensors file or a fold"),
        (["show", "s.json", "--plot=x.txt"], "--plot: expected a picture such as x.png, got x.txt"),
        (["compare", "s.json", "--picture=x"], "--picture: expected a picture such as x.png, got "),
        (["compare"], "expected a SCHEDULE or --methods"),
        (["compare", "--methods=uniform,magic"], "expected some of uniform, "),
        (["search", "--quality=quick"], "'quick' is not one of 'dp', 'fast', 'balanced', 'best'"),
        (["compare", "s.json", "other.json"], "different teachers"),
        (["compare", "s.json", "digits.json"], "belong to different models"),
    ],
)
def test_misuse_is_explained(oss: Oss, arguments: list[str], message: str) -> None:
    Path("file").touch()
    example_schedule(model="analytic").save("s.json")
    example_schedule(model="analytic", teacher_solver="heun").save("other.json")
    example_schedule(model="digits").save("digits.json")
    assert_misused(oss(*arguments), message)


# --- as a process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["models"], 0), (["show", "none.json"], 1), (["show"], 2)],
    ids=["done", "failed", "misused"],
)
def test_exit_codes_of_the_process(arguments: list[str], code: int, tmp_path: Path) -> None:
    script = "from oss_ext.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert (result.stderr == "") == (code == 0)


# Says when the search has begun. A process started in the background may ignore Ctrl-C: not here.
INTERRUPTIBLE = """
import signal
from oss_ext import cli
from oss_ext.dp import EulerSteps
step = EulerSteps.step
def announced(*args):
    print("searching", flush=True)
    return step(*args)
EulerSteps.step = announced
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""


def test_ctrl_c_ends_with_130_and_leaves_no_file(tmp_path: Path) -> None:
    long = (
        "--model=analytic",
        "--quality=dp",
        "--teacher-steps=400",
        "--steps=400",
        "--samples=16",
        "--quiet",
        "--no-checkpoint",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "search", *long],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "searching\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert err.strip() == "interrupted"
    assert process.returncode == 130
    assert files(tmp_path) == set()


def test_search_takes_a_solver_and_a_metric(oss: Oss) -> None:
    outcome = oss(
        "search", *TINY, "--steps=3", "--quality=dp", "--solver=dpmpp-2m", "--fixed-order",
        "--metric=x0",
    )  # fmt: skip
    assert outcome.code == 0
    schedule = Schedule.load("schedules/analytic-3.json")
    assert schedule.solver == "dpmpp-2m"
    assert len(schedule.orders) == 3
    assert schedule.objective is not None
    assert schedule.objective.metric == "x0"
    # Uniform steps beside it are taken by its solver too.
    assert oss("compare", "schedules/analytic-3.json", "--samples=3", "--out=run").code == 0
    assert {c.schedule.solver for c in Run.load("run").contenders if c.schedule} == {"dpmpp-2m"}


def test_methods_are_made_with_a_solver(oss: Oss) -> None:
    outcome = oss("compare", *TINY[:2], "--methods=uniform,dp", "--steps=3", "--teacher-steps=8",
                  "--calibration=3", "--samples=3", "--solver=heun", "--out=run")  # fmt: skip
    assert outcome.code == 0
    assert {c.schedule.solver for c in Run.load("run").contenders if c.schedule} == {"heun"}


def test_a_host_takes_its_own_steps(oss: Oss) -> None:
    outcome = oss("search", *TINY, "--steps=3", "--for=comfyui", "--solver=heun")
    assert_misused(outcome, "--solver: expected one that comfyui has for a flow path (euler), got")
