"""``python -m benchmarks NAME``: each name is a module with a ``main`` of its own."""

import sys

from benchmarks import fig4, swap
from benchmarks.hope import command as hope
from benchmarks.speed import command as speed

BENCHMARKS = {"fig4": fig4, "hope": hope, "speed": speed, "swap": swap}


def main() -> int:
    names = "\n".join(f"  {n}: {(m.__doc__ or '').splitlines()[0]}" for n, m in BENCHMARKS.items())
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print(f"usage: python -m benchmarks NAME [options]\n\n{names}", file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return BENCHMARKS[sys.argv[1]].main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
