"""Drives CMakeLists.txt, the one build of the native library ``oss_ext._C``.

Two environment variables steer it:

``OSS_NATIVE``  ``1`` (default) builds the native library; ``0`` leaves it out, for a package in
                pure Python that also installs where the library cannot be built.
``OSS_CUDA``    ``auto`` (default) builds the CUDA kernels where torch has CUDA and nvcc is
                found, and says what it chose; ``1`` insists on them; ``0`` leaves them out.

``CXX``, ``CUDACXX``, ``CUDA_HOME`` and ``CMAKE_BUILD_PARALLEL_LEVEL`` mean what they always do.
Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"oss_ext: {message}")


def read_switch(environ: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    """An environment variable with few values, of which the first of ``allowed`` is the default."""
    value = environ.get(name) or allowed[0]
    if value not in allowed:
        raise BuildError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return value


def choose_cuda(setting: str, compiler: str | None, torch_cuda: bool) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why, from ``OSS_CUDA``, nvcc and what torch has."""
    if setting == "0":
        return False, "OSS_CUDA=0"
    if setting == "auto" and not torch_cuda:
        return False, "OSS_CUDA=auto, this torch has no CUDA (OSS_CUDA=1 builds them anyway)"
    if compiler is not None:
        return True, f"OSS_CUDA={setting}, nvcc found"
    if setting == "1":
        raise BuildError(
            "OSS_CUDA=1 but no CUDA compiler was found: put nvcc on PATH, or set CUDACXX or "
            "CUDA_HOME, or build without CUDA kernels by OSS_CUDA=0"
        )
    return False, "OSS_CUDA=auto, no nvcc found"


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The CUDA compiler, looked for where the user says before where it usually is."""
    home = environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc"]
    found = (shutil.which(c, path=environ.get("PATH")) for c in candidates if c)
    return next((path for path in found if path), None)


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, without the seconds of importing it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    return run_path(f"{spec.submodule_search_locations[0]}/version.py").get("cuda") is not None


def find_tool(name: str) -> str:
    """A build tool, from this environment (even if it is not activated) before the system."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise BuildError(
            f"{name} was not found: `pip install {name}`, or OSS_NATIVE=0 for pure Python"
        )
    return tool


class CMakeBuild(build_ext):
    """Builds the extension by CMake and ninja, straight to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform != "linux":
            raise BuildError(
                f"the native library builds on Linux, not on {sys.platform}: set OSS_NATIVE=0"
            )
        nvcc = find_nvcc(os.environ)
        setting = read_switch(os.environ, "OSS_CUDA", ["auto", "0", "1"])
        cuda, reason = choose_cuda(setting, nvcc, torch_has_cuda())

        # Not self.build_temp, which is new for each editable install: an edit then compiles alone.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake = find_tool("cmake")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DOSS_CUDA={'ON' if cuda else 'OFF'}",
            f"-DOSS_CUDA_REASON={reason}",
        ]
        environ = {**os.environ, "CUDACXX": nvcc} if nvcc else os.environ
        try:
            subprocess.run(configure, check=True, env=environ)
            subprocess.run([cmake, "--build", build], check=True)
        except subprocess.CalledProcessError as error:
            raise BuildError("the native library did not build; the reason is above") from error


if __name__ == "__main__":
    native = read_switch(os.environ, "OSS_NATIVE", ["1", "0"]) == "1"
    setup(
        ext_modules=[Extension("oss_ext._C", sources=[])] if native else [],
        cmdclass={"build_ext": CMakeBuild},
    )
