"""Builds the CUDA kernels, proves them on this machine's GPU and measures them, in one go.

    python bench/gpu_check.py [--only proofs|bench]

Needs torch with CUDA, nvcc, cmake, ninja, pybind11, pytest, pytest-xdist and hypothesis in this
Python, beside what the package itself needs, and changes nothing but the source tree (the library
in oss_ext/, build/, bench/results/). Tests run side by side, because most of their time goes to
Triton's compiler. Ends with 0 if all is well, with 1 if anything failed, and with 2 where there is
no GPU: then nothing was checked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "python_tests"
LOGS = ROOT / "build" / "gpu_check"
BACKENDS = ("triton", "native", "reference")  # whose tests take longest first
# A few small cases of every kernel, for the tools that slow a program down a hundredfold; and the
# smallest that make blocks wait for one stage after the other.
SMALL = (
    "native-cuda and (test_step_is_cost_select_advance or test_step_is_the_accumulation_of_chunks"
    " or test_chunks_add_up_to_one_call or test_the_combination_is_the_candidate)"
    " or native and test_blocks_that_go_through_many_stages and 4096"
)
NO_TESTS = 5  # pytest's code for a file without any of those that were asked for
SHOWN = 3000  # characters of the log of a job that failed
started: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Job:
    """A command, for ``seconds`` at most; ``kind`` groups those of which some must have run."""

    what: str
    command: Sequence[str | Path]
    seconds: int
    kind: str = ""
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, log: Path | None = None) -> str:
        """How it ended: "ok", "no tests" or what went wrong. Prints to ``log`` if that is given."""
        settings = {**os.environ, "PYTHONPATH": str(ROOT), **self.environ}
        out = None if log is None else log.open("w")
        errors = None if out is None else subprocess.STDOUT
        try:
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=settings, stdout=out, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            started.append(process)
            code = process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return f"FAILED: more than {self.seconds} s"
        finally:
            if out is not None:
                out.close()
        if code == NO_TESTS and self.kind:
            return "no tests"
        return "ok" if code == 0 else f"FAILED with {code}"


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started: a tool, and the program that it looks into."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alone(job: Job) -> bool:
    """Runs a job while nothing else runs, and says what it was and how long it took."""
    print(f"== {job.what}", flush=True)
    start = time.monotonic()
    ended = job.run()
    print(f"-- {job.what}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
    return ended == "ok"


def side_by_side(jobs: Sequence[Job], logs: Path) -> bool:
    """Runs jobs, as many at a time as there are cores; shows the end of the log of those that
    failed, of others its last line. Whether all went well, and something of every kind was run."""
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)

    def run(numbered: tuple[int, Job]) -> tuple[Job, str]:
        number, job = numbered
        log = logs / f"{number}.txt"
        start = time.monotonic()
        ended = job.run(log)
        text = log.read_text().strip()
        if ended == "ok" and re.search(r"\b\d+ passed", text) is None:
            ended = "nothing passed"  # all were skipped
        shown = text[-SHOWN:] if ended.startswith("FAILED") else text.rpartition("\n")[2]
        print(f"-- {job.what}: {ended}, {time.monotonic() - start:.0f} s: {shown}", flush=True)
        return job, ended

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        ended = list(pool.map(run, enumerate(jobs)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    idle = {job.kind for job in jobs} - {job.kind for job, how in ended if how == "ok"}
    failed = [f"{job.what}: {how}" for job, how in ended if how.startswith("FAILED")]
    failed += [f"{kind}: FAILED: nothing of it was run to a good end" for kind in idle]
    print(
        f"== {len(failed)} of {len(jobs)} proofs failed; logs are in {logs}", *failed, sep="\n-- "
    )
    return not failed


def proofs(sanitizer: Sequence[str]) -> list[Job]:
    """The operators' tests of every backend, the searches', and kernels under the sanitizer."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "not slow", "-k"]
    files = sorted(TESTS.glob("test_ops_*.py"))
    one_thread = {"OMP_NUM_THREADS": "1"}
    names = [f"{name}-cuda" for name in BACKENDS]
    jobs = []
    if sanitizer:
        small = [*pytest, SMALL, *files]
        # A block each, or a bad address would be within the large ones that torch's allocator has.
        blocks = one_thread | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            command = [*sanitizer, "--tool", tool, "--error-exitcode", "9", *small]
            jobs.append(Job(f"compute-sanitizer {tool}", command, 450, tool, blocks))
    for name in names:
        # Triton's compiler runs once for every few tests.
        shared = ["-n", "2"] if name == "triton-cuda" else []
        jobs += [
            Job(f"{name}, {file.name}", [*pytest, name, *shared, file], 450, name, one_thread)
            for file in files
        ]
    searches = [TESTS / f"test_{name}.py" for name in ("search_devices", "host_memory")]
    others = f"cuda and not ({' or '.join(names)})"
    jobs.append(Job("only on a GPU", [*pytest, others, *files], 450, "others", one_thread))
    jobs.append(Job("searches on the GPU", [*pytest, "cuda", *searches], 450, "searches"))
    return jobs


def working_sanitizer() -> list[str]:
    """compute-sanitizer, kept to the kernels of this library where it can be; empty where it is not
    installed or cannot look into a program."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not here: memcheck and racecheck were not run")
        return []
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    options = ("--kernel-name", "--kernel-regex", "--filter")  # as its releases have called it
    ours = next(([option, "kernel_substring=oss"] for option in options if option in known), [])
    program = "import torch; torch.ones(8, device='cuda').sum().item()"
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / "compute-sanitizer.txt"
    for tool in ([sanitizer, *ours], [sanitizer]):
        command = [*tool, "--error-exitcode", "9", sys.executable, "-c", program]
        ended = Job("compute-sanitizer", command, 60).run(log)
        if ended == "ok":
            return tool
    print("compute-sanitizer cannot look into a program of torch's alone here: memcheck and "
          f"racecheck were not run. {ended}: {log.read_text().strip()[-500:]}")  # fmt: skip
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["proofs", "bench"], help="prove, or measure, not both")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: nothing was built, checked or measured")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version}")

    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if not alone(Job("build", build, 240, environ={"OSS_CUDA": "1"})):
        return 1
    good = []
    if options.only != "bench":
        good.append(side_by_side(proofs(working_sanitizer()), LOGS))
    if options.only != "proofs":
        bench = [sys.executable, "bench/bench_dp_step.py", "--device", "cuda", "--save"]
        good.append(alone(Job("bench", bench, 480)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        for process in started:
            end(process)
