"""A failure, a hang and a crash, for the rehearsal: ``python -m benchmarks.gpu.planted HOW``."""

import os
import signal
import sys
import time


def main(how: str) -> None:
    if how == "failure":
        raise AssertionError("planted: 1 is not 2")
    if how == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    main(sys.argv[1])
