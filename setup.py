"""Builds the optional compiled operators from the sources in csrc/cpu and csrc/cuda.

The Triton kernels in csrc/triton are Python and installed as they are, as deepopt.ops.triton.

The environment variable DEEPOPT_EXT decides:

auto  (default) build what this machine can; say in one line what was left out, plain torch serves
0     build none
1     build all for which there are sources, and fail where one does not build

torch must be importable at build time: ``pip install --no-build-isolation``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

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


def left_out(what: str, error: BaseException) -> None:
    """Say in one line what is not built, and why."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    print(f"deepopt: {what} not built, plain torch serves instead ({reason})", file=sys.stderr)


def compiled(mode: str) -> dict[str, Any]:
    """Return setup()'s arguments for the compiled operators: none where there is nothing to do."""
    if mode == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:
        if mode == "1":
            raise SystemExit(
                f"deepopt: DEEPOPT_EXT=1 needs torch, which does not import here ({error}); "
                "install torch first and use pip install --no-build-isolation"
            ) from error
        left_out("compiled operators", error)
        return {}

    extensions: list[Extension] = []
    if cpu := sources("cpu", ".cpp"):
        extensions.append(
            cpp_extension.CppExtension(
                "deepopt._C_cpu", cpu, extra_compile_args={"cxx": CXX_FLAGS}, py_limited_api=True
            )
        )
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    cuda = sources("cuda", ".cu") + sources("cuda", ".cpp")
    if torch.version.cuda and nvcc and cuda:
        if chosen := architectures(nvcc):
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", chosen)
        extensions.append(
            cpp_extension.CUDAExtension(
                "deepopt._C_cuda",
                cuda,
                extra_compile_args={"cxx": CUDA_CXX_FLAGS, "nvcc": NVCC_FLAGS},
                py_limited_api=True,
            )
        )
    if not extensions:
        return {}

    class Build(cpp_extension.BuildExtension):
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
            self.extensions = built

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["deepopt*"]), "deepopt.ops.triton"],
        package_dir={"deepopt.ops.triton": "csrc/triton"},
        **compiled(extension_mode()),
    )
