"""Builds the optional compiled operators from the sources in csrc/cpu and csrc/cuda.

The Triton kernels in csrc/triton are Python and installed as they are, as deepopt.ops.triton.

The environment variable DEEPOPT_EXT decides:

auto  (default) build what this machine can; say in one line what was left out, plain torch serves
0     build none
1     build all for which there are sources, and fail where one does not build

torch is needed to build them. An isolated build (plain ``pip install .``) takes the torch of the
environment that it installs into; without one it yields the package in plain torch, tagged "any".
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # pip checks it in isolated builds alone
    raise SystemExit(
        f"deepopt: the build needs setuptools 77 or later, found {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
# torch's stable ABI of 2.10: one binary serves every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Without the two -fno flags gcc keeps errno and traps for sqrt and does not vectorise it. With
# contraction the bits of a result would depend on how the compiler happened to vectorise it.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    STABLE_ABI,
]
CUDA_CXX_FLAGS = [*CXX_FLAGS, "-DUSE_CUDA"]
# As on the CPU, only what a rule writes as fma is one: both then give the same bits. It costs
# nothing where memory is the limit, and the MLP's arithmetic is written in fma.
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false"]
ARCHITECTURES = ("8.0", "9.0", "10.0")


def extension_mode() -> str:
    """Return DEEPOPT_EXT after checking it."""
    mode = os.environ.get("DEEPOPT_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"deepopt: DEEPOPT_EXT must be auto, 0 or 1, got {mode!r}")
    return mode


def sources(folder: str, suffix: str) -> list[str]:
    """Return the sources in csrc/``folder``, relative to the root as setuptools wants them."""
    paths = (ROOT / "csrc" / folder).glob(f"*{suffix}")
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def architectures(nvcc: str) -> str | None:
    """Return TORCH_CUDA_ARCH_LIST's default: what the toolkit has of ours, and PTX for the rest."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = listed.stdout.split()
    ours = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
    return ";".join(ours) + "+PTX" if ours else None


def find_torch() -> ModuleType:
    """Import torch; where the build is isolated from it, from the environment to install into."""
    try:
        import torch
    except ImportError:
        for kind in ("purelib", "platlib"):
            site.addsitedir(sysconfig.get_path(kind))  # behind what the build has of its own
        import torch
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise ImportError(f"torch {torch.__version__} is older than 2.10")
    return torch


def left_out(what: str, error: BaseException) -> None:
    """Say what is not built, why, and what to do about it."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    lines = [
        f"{what} not built, plain torch serves instead ({reason})",
        "THIS INSTALLATION IS SLOWER than one with the compiled operators. To have them, install",
        "torch 2.10 or later and a C++ compiler, and then install this package again, by adding",
        "--no-build-isolation --no-deps --force-reinstall to the command of this installation.",
        "DEEPOPT_EXT=1 makes an installation without them fail, DEEPOPT_EXT=0 builds none.",
    ]
    print("", *(f"deepopt: {line}" for line in lines), "", sep="\n", file=sys.stderr)


class Build(build):
    """Starts from an empty folder: what an earlier build left would go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """A wheel tagged by what has been built, not by what was tried."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def compiled(mode: str) -> dict[str, Any]:
    """Return setup()'s arguments for the compiled operators: none where there is nothing to do."""
    if mode == "0":
        return {}
    try:
        torch = find_torch()
        from torch.utils import cpp_extension
    except Exception as error:
        if mode == "1":
            raise SystemExit(
                f"deepopt: DEEPOPT_EXT=1 needs torch, which does not import here ({error}); "
                "install torch 2.10 or later first, and use pip install --no-build-isolation"
            ) from error
        left_out("compiled operators", error)
        return {}

    # No path of this machine goes into what is built, so that it is the same from every folder.
    home = Path(str(torch.__file__)).parent
    here = [f"-ffile-prefix-map={ROOT}=deepopt", f"-ffile-prefix-map={home}=torch"]
    # The debug information that Python's own flags ask for is ten times the code.
    debug = "-g" in os.environ.get("CFLAGS", "") or sys.platform != "linux"
    link = [] if debug else ["-Wl,--strip-debug"]
    extensions: list[Extension] = []
    if cpu := sources("cpu", ".cpp"):
        extensions.append(
            cpp_extension.CppExtension(
                "deepopt._C_cpu",
                cpu,
                extra_compile_args={"cxx": CXX_FLAGS + here},
                extra_link_args=link,
                py_limited_api=True,
            )
        )
    elif mode == "1":
        raise SystemExit(
            "deepopt: DEEPOPT_EXT=1, but csrc/cpu has no sources; take a whole checkout or source "
            "distribution"
        )
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{cuda_home}/bin" if cuda_home else None)
    cuda = sources("cuda", ".cu") + sources("cuda", ".cpp")
    if torch.version.cuda and nvcc and cuda:
        if chosen := architectures(nvcc):
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", chosen)
        extensions.append(
            cpp_extension.CUDAExtension(
                "deepopt._C_cuda",
                cuda,
                extra_compile_args={"cxx": CUDA_CXX_FLAGS + here, "nvcc": NVCC_FLAGS},
                extra_link_args=link,
                py_limited_api=True,
            )
        )
    if not extensions:
        return {}

    class BuildExtensions(cpp_extension.BuildExtension):
        """Builds one extension after the other, so that each can fail alone."""

        extensions: list[Extension]

        def build_extensions(self) -> None:
            built = []
            for extension in list(self.extensions):
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as error:
                    if mode == "1":
                        raise
                    left_out(extension.name, error)
                else:
                    built.append(extension)
            self.extensions = self.distribution.ext_modules = built

    return {
        "ext_modules": extensions,
        "cmdclass": {"build": Build, "bdist_wheel": Wheel, "build_ext": BuildExtensions},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["deepopt*"]), "deepopt.ops.triton"],
        package_dir={"deepopt.ops.triton": "csrc/triton"},
        **{"cmdclass": {"build": Build}, **compiled(extension_mode())},
    )
