"""Builds the extensions in place for this card: ``python -m benchmarks.gpu.build``."""

import os
import subprocess
import sys
import time

import torch


def main() -> int:
    # In a rehearsal nothing: what the installation has built must not be built over.
    rehearsed = os.environ.get("DEEPOPT_REHEARSE") == "1"
    environment = dict(os.environ, DEEPOPT_EXT="0" if rehearsed else "1")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    begun = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, env=environment)
    print(f"build: {time.monotonic() - begun:.0f} s, exit {done.returncode}", flush=True)
    if done.returncode:
        return done.returncode
    return subprocess.run([sys.executable, "-m", "deepopt.ops"]).returncode


if __name__ == "__main__":
    sys.exit(main())
