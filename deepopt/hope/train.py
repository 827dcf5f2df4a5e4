"""Trains Hope on bytes: ``python -m deepopt.hope.train --help``.

``deepopt.hope.trainer`` has the training loop, and says what a run writes.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from deepopt._output import outlive_readers
from deepopt.hope import HopeConfig
from deepopt.hope.optimizers import has_memory, optimizer_class
from deepopt.hope.options import add_options
from deepopt.hope.trainer import TrainConfig, Trainer, TrainResult, plot

DIVERGED = 16.0
"""Bits per byte on held-out text: twice those of a model that has learned nothing."""
# Sent by Ctrl-C, by schedulers and containers that end a job, and by a terminal that closes.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are those of the configurations."""
    parser = argparse.ArgumentParser(
        prog="python -m deepopt.hope.train",
        usage="%(prog)s [options]",
        description="Train Hope, the model of Nested Learning, on bytes.",
        allow_abbrev=False,
    )
    defaults = TrainConfig(out=Path("runs/hope"))
    add_options(parser, defaults, leave_out={"model"})
    parser.add_argument("--compare", metavar="NAME", help="train with this optimizer as well")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (torch's choice)")
    sizes = parser.add_argument_group("model", "see deepopt.hope.HopeConfig")
    add_options(sizes, defaults.model, leave_out={"vocab_size"})  # tokens are bytes
    return parser


def configurations(arguments: argparse.Namespace) -> list[TrainConfig]:
    """Return the run that the command line asks for, or with --compare both."""
    values = vars(arguments)
    sizes = {f.name: values[f.name] for f in dataclasses.fields(HopeConfig) if f.name in values}
    options = {f.name: values[f.name] for f in dataclasses.fields(TrainConfig) if f.name in values}
    config = TrainConfig(**options, model=HopeConfig(**sizes))
    if arguments.compare is None:
        return [config]
    names = [optimizer_class(name).__name__ for name in (config.optimizer, arguments.compare)]
    if names[0] == names[1]:
        raise ValueError(f"compare={names[1]} is the optimizer of the run itself; name another one")
    configs = []
    for name in names:
        out = config.out / name.lower()
        # The memory goes to the first of the two that has one. If neither has, the run's own
        # optimizer refuses it.
        owner = next(filter(has_memory, names), names[0])
        memory = config.memory if name == owner else None
        # A run that had not begun when the comparison was interrupted begins now.
        resume = config.resume and (out / "checkpoint.safetensors").exists()
        configs.append(
            dataclasses.replace(config, optimizer=name, memory=memory, out=out, resume=resume)
        )
    return configs


class Interrupt(threading.Event):
    """Set by the first signal that ends a run.

    Attributes:
        signal: its number.
    """

    signal: int = signal.SIGINT


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Turn the first signal into an event, so that no step is cut in two; the second one acts."""
    stop = Interrupt()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # An ignored signal stays ignored, as under nohup. SIGINT is an exception: shells ignore it for
    # every job in the background.
    for number in [n for n, handler in before.items() if handler is signal.SIG_IGN]:
        if number != signal.SIGINT:
            del before[number]

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def on_signal(number: int, _: object) -> None:
        put_back()
        stop.signal = number
        stop.set()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        put_back()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    It is 0, 1 where the run failed or diverged, 2 for wrong input, and 128 plus the number of the
    signal that interrupted it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        most = 4 * (os.cpu_count() or 1)
        if not 1 <= arguments.threads <= most:
            parser.error(f"threads={arguments.threads}: must be from 1 to {most}")
        torch.set_num_threads(arguments.threads)
    try:
        trainers = [Trainer(config) for config in configurations(arguments)]
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))

    again = [argument for argument in argv if argument not in ("--resume", "--overwrite")]
    how_to_resume = f"go on with: {parser.prog} {shlex.join([*again, '--resume'])}"
    print(f"{trainers[0].corpus}\n{trainers[0].size}", flush=True)
    code = 0
    try:
        with interrupts() as stop:
            for trainer in trainers:
                result = trainer.run(stop)
                report(trainer, result)
                if result.val_bits_per_byte > DIVERGED:
                    print(
                        f"diverged: start anew with a smaller lr than {trainer.config.lr}",
                        file=sys.stderr,
                    )
                    code = 1
        if arguments.compare is not None:
            path = arguments.out / "comparison.png"
            runs = {t.trajectory["optimizer"]: t.config.out / "metrics.jsonl" for t in trainers}
            plot(path, runs)
            print(f"both runs: {path}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; {how_to_resume}", file=sys.stderr)
        return 128 + stop.signal
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        saved = any((t.config.out / "checkpoint.safetensors").is_file() for t in trainers)
        kept = f"; the last checkpoint is kept: make room and {how_to_resume}" if saved else ""
        print(f"stopped: cannot write to {arguments.out}: {error}{kept}", file=sys.stderr)
        return 1
    return code


def report(trainer: Trainer, result: TrainResult) -> None:
    """Print the outcome of a run."""
    print(
        f"{trainer.trajectory['optimizer']}: {result.val_bits_per_byte:.4f} bits per byte on "
        f"held-out text after {trainer.step:,} steps; {result.parameters:,} parameters, "
        f"{result.state_floats_per_parameter:.2f} floats of optimizer state per parameter; "
        f"written to {trainer.config.out}"
    )


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
