"""``python -m benchmarks NAME``: each name is a module with a ``main`` of its own."""

import sys

from benchmarks import fig4, mlp_memory
from benchmarks.hope import command as hope
from benchmarks.hope import speed as hope_speed
from benchmarks.quality import command as quality
from benchmarks.speed import command as speed
from benchmarks.streams import command as streams
from deepopt._files import DamagedFile
from deepopt._output import outlive_readers

BENCHMARKS = {
    "fig4": fig4, "hope": hope, "hope-speed": hope_speed, "mlp-memory": mlp_memory,
    "quality": quality, "speed": speed, "streams": streams,
}  # fmt: skip


def main() -> int:
    about = {name: (module.__doc__ or "").partition("\n")[0] for name, module in BENCHMARKS.items()}
    names = "\n".join(f"  {name}: {line}" for name, line in about.items())
    usage = f"usage: python -m benchmarks NAME [options]\n\n{names}"
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print(usage, file=sys.stderr)
        return 2
    try:
        return BENCHMARKS[sys.argv[1]].main(sys.argv[2:])
    except DamagedFile as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
