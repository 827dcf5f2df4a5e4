"""Continues a text with a trained model: ``python -m deepopt.hope.generate --help``."""

import argparse
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepopt._output import outlive_readers
from deepopt.hope import PRETRAINED, Hope, HopeState, Reader
from deepopt.hope.generate import PREFILL, complete
from deepopt.hope.options import check_device
from deepopt.hope.reader import LR, deep_momentum


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deepopt.hope.generate",
        usage="%(prog)s [options]",
        description="Continue a text with a trained Hope. Without --prompt it is a conversation: "
        "the model reads each line and continues it, and remembers all of them.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, default=PRETRAINED, metavar="FOLDER",
                        help="a training run's --out, or what save_pretrained wrote (the model "
                        "that comes with the package)")  # fmt: skip
    parser.add_argument("--prompt", help="the text to continue (asked for, line by line)")
    parser.add_argument("--length", type=int, default=200, help="bytes to add, at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest bytes (all)")
    parser.add_argument("--top-p", type=float, help="draw among those of this probability (all)")
    parser.add_argument("--stop", help="text that ends a continuation (none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--device", default="cpu", help="where to compute (cpu)")
    learning = parser.add_argument_group("learning while reading")
    learning.add_argument("--adapt", action="store_true",
                          help="CMS levels learn from what they read, unsaved")  # fmt: skip
    learning.add_argument("--adapt-chunk", type=int, default=32, metavar="TOKENS",
                          help="bytes between two updates of the fastest level (32)")  # fmt: skip
    learning.add_argument("--adapt-lr", type=float, default=LR, metavar="LR",
                          help=f"learning rate of DeepMomentum ({LR:g})")  # fmt: skip
    return parser


class Session:
    """A model that reads texts one after another, continues them, and may learn from them.

    What the model adds itself is neither remembered nor learned.

    Args:
        model: a model of bytes.
        options: those of `deepopt.hope.generate.stream`, and `length`.
        reader: reads and learns; None for a model that only reads.
    """

    def __init__(self, model: Hope, options: dict[str, Any], reader: Reader | None) -> None:
        self.model, self.options, self.reader = model, options, reader
        self.state: HopeState | None = None
        self.last = b""  # read, but not yet in the state

    def continued(self, text: str) -> Iterator[str]:
        """Read a text, and yield the continuation of all that was read, in pieces."""
        encoded = text.encode(errors="surrogateescape")
        if self.reader is None:
            unread = self.last + encoded
            with torch.no_grad():
                for first in range(0, len(unread[:-1]), PREFILL):
                    part = unread[:-1][first : first + PREFILL]
                    self.state = self.model(self._tokens(part), state=self.state).state
        else:
            unread = encoded
            losses = self.reader.read(self._tokens(unread))
            self.state = self.reader.state
            predicted = losses[~losses.isnan()] / math.log(2)
            if predicted.numel():
                print(
                    f"[read {predicted.numel()} bytes at {predicted.mean().item():.2f} bits per "
                    f"byte; {self.reader.updates} updates so far]",
                    file=sys.stderr,
                )
        self.last = unread[-1:]
        return complete(self.model, self.last, state=self.state, **self.options)

    def _tokens(self, text: bytes) -> Tensor:
        return torch.tensor([list(text)], device=next(self.model.parameters()).device)


def lines() -> Iterator[str]:
    """What the user types, a line at a time, until the end of the input."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line:
            yield line + "\n"


def take_any_text() -> None:
    """Read bytes that are not UTF-8 as they are; print `?` for what the terminal cannot show."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 where it diverged, 2 for wrong input."""
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    stop = arguments.stop
    try:
        check_device(arguments.device)
        if not 0 <= arguments.seed < 2**63:
            raise ValueError(f"seed={arguments.seed}: must lie in 0 ... 2**63 - 1")
        model = Hope.from_pretrained(arguments.checkpoint, arguments.device)
        options: dict[str, Any] = {
            "length": arguments.length,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "stop": stop.encode(errors="surrogateescape") if stop else None,
            "generator": torch.Generator(arguments.device).manual_seed(arguments.seed),
        }
        complete(model, "\n", **options)  # wrong options show before anything is read
        if arguments.prompt == "":
            raise ValueError("prompt is empty: give at least one character, such as '\\n'")
        reader = None
        if arguments.adapt:
            if not 0 <= arguments.adapt_lr < math.inf:
                raise ValueError(f"adapt_lr={arguments.adapt_lr}: must be finite and at least 0")
            optimizer = deep_momentum(arguments.adapt_lr)
            reader = Reader(model, optimizer=optimizer, chunk=arguments.adapt_chunk)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        parser.error(str(error))
    session = Session(model, options, reader)
    try:
        for text in lines() if arguments.prompt is None else [arguments.prompt]:
            if arguments.prompt is not None:
                print(text, end="")
            for piece in session.continued(text):
                print(piece, end="", flush=True)
            print(flush=True)
    except KeyboardInterrupt:
        print()
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    take_any_text()
    outlive_readers()
    sys.exit(main())
