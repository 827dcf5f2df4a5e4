"""Train the MLP of a memory: ``python -m deepopt.meta --out runs/meta``.

``log.jsonl`` in that folder holds every generation, and an interrupted search goes on from it. At
the end ``phi.json`` holds the φ that was found, what made it, and its losses on tasks that the
search has not seen; ``progress.png`` shows the way there. Use the φ as
``DeepMomentum(memory=Horizons(time_scales, phi))``. One found with ``--memory mlp`` is for
``EntrywiseMLP(time_scales, phi=phi)``, one with ``"mlp online"`` for
``EntrywiseMLP(time_scales, inner_lr=0.1, phi=phi)``, and one with ``rows`` or ``directions`` for
``deepopt.meta.gains.with_gains(Gains(directions, phi))``.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deepopt.meta.evolution import GAINS, SEARCHED, Evolution, Log
from deepopt.meta.tasks import KINDS, USUAL_KINDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run or resume a search and write its results; returns 0."""
    default = Evolution()
    parser = argparse.ArgumentParser(
        "python -m deepopt.meta",
        description="Train the MLP of a memory, or go on with an interrupted search. The folder "
        "then has log.jsonl with every generation, phi.json with the φ that was found and its "
        "losses on tasks that the search has not seen, and progress.png.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the search")
    parser.add_argument("--generations", type=int, default=150, help="(150)")
    parser.add_argument("--validation", type=int, default=8, help="tasks at the end (8)")
    parser.add_argument(
        "--memory", choices=SEARCHED, default=default.memory, help=f"({default.memory})"
    )
    scales = " ".join(map(str, default.time_scales))
    parser.add_argument(
        "--time-scales",
        type=float,
        nargs="+",
        help=f"retentions of the averages beside the momentum's ({scales}); gains have none",
    )
    parser.add_argument("--units", type=int, help="units of the MLP (the memory's own number)")
    numbers = {
        "population": "candidates of a generation",
        "pool": "different tasks of the search",
        "tasks": "tasks of a generation",
        "seed": "seed of the candidates and of the order of tasks",
    }
    for name, what in numbers.items():
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=default.steps,
        help="shortest and longest training run of a task (100 200)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=USUAL_KINDS,
        help=f"kinds of task to learn from ({' '.join(USUAL_KINDS)}); the validation at the end "
        "takes these three whatever is chosen",
    )
    args = parser.parse_args(argv)
    if args.time_scales and args.memory in GAINS:
        parser.error(f"--time-scales: {args.memory} have none; leave them out")
    if args.generations < 1:
        parser.error(f"--generations: {args.generations} must be at least 1")
    if args.validation < 2:
        parser.error(
            f"--validation: {args.validation} must be at least 2, a stream and a steady one"
        )
    try:
        evolution = Evolution(
            args.memory,
            tuple(args.time_scales or default.time_scales),
            args.units,
            args.population,
            args.pool,
            args.tasks,
            tuple(args.steps),
            tuple(args.kinds),
            args.seed,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        log = Log(args.out / "log.jsonl")
        phi = evolution.run(log, args.generations)
        compared = {"linear": torch.zeros_like(phi), "start": evolution.start(), "trained": phi}
        table = evolution.validate(list(compared.values()), args.validation, log)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    outcome = {
        "command": "python -m deepopt.meta " + shlex.join(sys.argv[1:] if argv is None else argv),
        **dataclasses.asdict(evolution),
        "generations": args.generations,
        "tasks_seen": sorted({seed for x in log.of("generation") for seed in x["tasks"]}),
        "log_sha256": hashlib.sha256(log.path.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "validation": {
            name: [round(x, 5) for x in column]
            for name, column in zip(compared, table.T.tolist(), strict=True)
        },
        "phi": phi.tolist(),
    }
    (args.out / "phi.json").write_text(json.dumps(outcome, indent=1) + "\n")
    picture(log, args.out / "progress.png")
    for kind, rows in (("streams", table[0::2]), ("steady", table[1::2])):
        means = zip(compared, rows.mean(0).tolist(), strict=True)
        print(f"{kind}: " + ", ".join(f"{name} {x:+.4f}" for name, x in means))
    print(f"written: {args.out / 'phi.json'} and progress.png", file=sys.stderr)
    return 0


def picture(log: Log, path: Path) -> None:
    """The values of all candidates by generation, and their median over ten generations."""
    from matplotlib.figure import Figure

    lines = log.of("generation")
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    medians = [torch.tensor(line["values"]).median().item() for line in lines]
    for line in lines:
        axes.plot([line["number"]] * len(line["values"]), line["values"], ".", color="0.8", ms=3)
    window = 10
    smooth = [
        sum(medians[max(0, k - window + 1) : k + 1]) / min(k + 1, window)
        for k in range(len(medians))
    ]
    axes.plot([line["number"] for line in lines], smooth)
    axes.axhline(0, color="0.5", linestyle=":")
    axes.set(xlabel="generation", ylabel="log loss minus the best linear memory's")
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
