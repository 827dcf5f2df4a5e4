"""The training loop of Hope, and the configuration of a run.

A run is a function of its configuration and its data. If it is interrupted, even killed,
``resume`` continues it bit for bit from its last checkpoint. While it runs it writes metrics.jsonl
and checkpoint.safetensors into ``out``. At its end it adds loss.png and, for a `Hope`, samples.txt,
the model (config.json and model.safetensors, for ``Hope.from_pretrained(out)``) and training.json,
which says what made the model. A run that is stopped by ``stop`` saves the model too.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepopt._files import write_atomically
from deepopt.data import Corpus, evaluation_batches, load_corpus, sample_batch, stdlib_corpus
from deepopt.hope import Hope, HopeConfig, generate
from deepopt.hope.optimizers import (
    build_optimizers,
    clipped,
    lr_factor,
    optimizer_class,
    prepare,
)
from deepopt.hope.options import about, check_device, command_line, documented
from deepopt.memory import BUILT_IN
from deepopt.optim.base import MemoryOptimizer

try:
    from deepopt.hope import files
    from deepopt.hope.report import Progress, keep_lines, plot
except ImportError as missing:
    raise ImportError(
        f"training needs {missing.name}: pip install matplotlib safetensors tqdm, "
        "which are deepopt's extra 'hope'"
    ) from missing

OUTPUTS = ("checkpoint.safetensors", "metrics.jsonl", "samples.txt", "loss.png",
           "config.json", "model.safetensors", "training.json")  # fmt: skip
ASIDE = {"out", "data", "eval_every", "eval_windows", "save_every", "device", "resume", "overwrite",
         "quiet", "model"}  # fmt: skip
"""Fields of `TrainConfig` that `trajectory` leaves out. Most do not change what is trained. `data`
and `model` do: `trajectory` has the digest of the data and every field of the model instead."""


@documented
@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    out: Path = field(metadata=about("directory for everything the run writes"))
    data: Path | None = field(
        default=None,
        metadata=about(
            "text file or directory", default="the Python standard library's sources", type=Path
        ),
    )
    optimizer: str = field(
        default="DeepMomentum",
        metadata=about(
            "a class of deepopt or torch.optim", "Upper and lower case make no difference."
        ),
    )
    memory: str | None = field(
        default=None,
        metadata=about(
            f"DeepMomentum's memory: {', '.join(BUILT_IN)}", default="its default", type=str
        ),
    )
    lr: float = field(
        default=4e-3,
        metadata=about(
            "peak of the learning rate, on AdamW's scale",
            "`deepopt.hope.optimizers.LR_SCALES` has the scales of the other optimizers.",
        ),
    )
    weight_decay: float = field(
        default=0.1,
        metadata=about(
            "weight decay of all parameters",
            "It is decoupled in AdamW, Muon and deepopt's optimizers.",
        ),
    )
    steps: int = field(
        default=800,
        metadata=about(
            "optimizer steps; with --resume, a larger number extends the run",
            "The learning rate then goes on as in a run that had this many steps from the start.",
        ),
    )
    batch_size: int = field(default=8, metadata=about("sequences per step"))
    seq_len: int = field(default=256, metadata=about("bytes per sequence"))
    warmup: int | None = field(
        default=None,
        metadata=about(
            "steps of linear warm-up; then linear decay to zero",
            default="a sixteenth of the steps",
            type=int,
        ),
    )
    seed: int = field(default=0, metadata=about("seed of the weights, the batches and the samples"))
    eval_every: int = field(
        default=100, metadata=about("steps between evaluations on held-out text")
    )
    eval_windows: int = field(
        default=128, metadata=about("sequences per evaluation", "They are always the same ones.")
    )
    save_every: int = field(default=50, metadata=about("steps between checkpoints"))
    device: str = field(default="cpu", metadata=about("where to train"))
    resume: bool = field(default=False, metadata=about("go on from the checkpoint in --out"))
    overwrite: bool = field(default=False, metadata=about("discard the run in --out"))
    quiet: bool = field(default=False, metadata=about("show no progress"))
    model: HopeConfig = field(default_factory=HopeConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "eval_every", "eval_windows", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must lie in 0 ... 2**63 - 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: give one of them")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup={self.warmup}: must be at least 0 and below steps={self.steps}"
            )
        if self.model.vocab_size != 256:
            raise ValueError(f"vocab_size={self.model.vocab_size}: must be 256, tokens are bytes")
        check_device(self.device)

    @property
    def warmup_steps(self) -> int:
        """The steps of warm-up; a sixteenth of all steps if `warmup` is None."""
        return self.steps // 16 if self.warmup is None else self.warmup

    @property
    def command(self) -> str:
        """The training command with the options of this run, except where it writes."""
        options = command_line(self, leave_out=ASIDE - {"data"})
        options += command_line(self.model, leave_out=set())
        return shlex.join(["python", "-m", "deepopt.hope.train", *options])

    def trajectory(self, corpus: Corpus) -> dict[str, Any]:
        """The options that decide every weight: a resumed run must agree in all of them."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in ASIDE}
        options["optimizer"] = optimizer_class(self.optimizer).__name__
        options["warmup"] = self.warmup_steps
        model = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.model).items()}
        return {**options, **model, "data_sha256": corpus.sha256}


@torch.no_grad()
def flops_per_token(model: nn.Module, tokens: int) -> float:
    """Operations of a forward pass over a text of bytes, divided by its tokens.

    Those of matrix products, convolutions and attention are counted, as torch's counter does: 2 for
    a multiplication and its addition. Nothing is computed.
    """
    shapes = copy.deepcopy(model).to("meta").requires_grad_(False)
    text = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        shapes(text, text)
    return counter.get_total_flops() / tokens


@dataclass(frozen=True)
class TrainResult:
    """What a finished run comes to.

    Attributes:
        val_loss: mean cross entropy on the held-out bytes, in nats.
        val_bits_per_byte: the same in bits.
        parameters: number of the model's parameters.
        state_floats_per_parameter: the optimizer's state in units of a float32 per parameter.
        model_cpu_seconds: mean of the forward and backward pass over this process's steps except
            the first.
        optimizer_cpu_seconds: the same mean of the optimizer's step; both are NaN without a step.
    """

    val_loss: float
    val_bits_per_byte: float
    parameters: int
    state_floats_per_parameter: float
    model_cpu_seconds: float
    optimizer_cpu_seconds: float


class Trainer:
    """A run, ready to start or to go on: what is wrong with its input shows when it is made.

    Args:
        config: the run.
        build_model: makes the model; None for Hope as in ``config.model``. Another model, for a
            comparison, is called with tokens and targets and returns something with a ``loss``.

    Raises:
        ValueError: an option, the data or the checkpoint does not fit; ``out`` is untouched.
        OSError: the data cannot be read.
    """

    def __init__(
        self, config: TrainConfig, build_model: Callable[[], nn.Module] | None = None
    ) -> None:
        self.config = config
        if config.data and config.data.resolve() in config.out.resolve().parents:
            raise ValueError(
                f"out={config.out} lies inside data={config.data}, so that the run would become "
                "part of its own text; choose another --out"
            )
        self.corpus = load_corpus(config.data) if config.data else stdlib_corpus()
        for part in (self.corpus.train, self.corpus.val):
            sample_batch(part, 1, config.seq_len, config.seed, 0)  # raises where text is too short
        self.trajectory = config.trajectory(self.corpus)

        torch.manual_seed(config.seed)
        self.model = (build_model() if build_model else Hope(config.model)).to(config.device)
        self.optimizers = build_optimizers(
            self.model,
            config.optimizer,
            config.lr,
            config.weight_decay,
            config.memory,
            config.batch_size * config.seq_len,
        )
        self.step = 0
        self.rng_state = torch.get_rng_state()
        self.model_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

        found = [name for name in OUTPUTS if self._path(name).exists()]
        if config.resume:
            self._load()
        elif found and not config.overwrite:
            go_on = "go on with --resume, " if "checkpoint.safetensors" in found else ""
            raise ValueError(
                f"out={config.out} holds a run already ({', '.join(found)}); {go_on}"
                "discard it with --overwrite, or choose another --out"
            )

    @property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(param.numel() for param in self.model.parameters())

    @property
    def size(self) -> str:
        """Parameters, and floating-point operations per token, of the model."""
        flops = flops_per_token(self.model, self.config.seq_len)
        return (
            f"{type(self.model).__name__}: {self.parameters:,} parameters, "
            f"{flops / 1e6:,.2f} MFLOP per token in the forward pass at "
            f"{self.config.seq_len} tokens, three times that to train"
        )

    def run(self, stop: threading.Event | None = None) -> TrainResult:
        """Train from here to the last step.

        Args:
            stop: once set, the run saves a checkpoint after the step it is in and ends.

        Raises:
            KeyboardInterrupt: it ended because of ``stop``.
            FloatingPointError: a loss, a gradient or a weight is not finite; the last checkpoint
                with finite weights stays.
            OSError: an output could not be written; the previous checkpoint stays.
        """
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            for name in OUTPUTS:
                self._path(name).unlink(missing_ok=True)
            self._save()
        keep_lines(self._path("metrics.jsonl"), self.step)
        torch.set_rng_state(self.rng_state)

        val_loss = math.nan
        name, tokens = self.trajectory["optimizer"], config.batch_size * config.seq_len
        progress = Progress(name, self.step, config.steps, tokens, config.quiet)
        with open(self._path("metrics.jsonl"), "a") as metrics, progress:

            def log(**values: Any) -> None:
                metrics.write(json.dumps({"step": self.step, **values}) + "\n")

            while self.step < config.steps:
                watched = (self.step + 1) % config.eval_every == 0 or self.step + 1 == config.steps
                values, diagnostics = self.train_step(watched)
                log(**values)
                if diagnostics:
                    log(diagnostics=diagnostics)
                progress.show(values["loss"])
                last = self.step == config.steps
                if watched:
                    val_loss = self.evaluate()
                    self._check_finite("loss on held-out text", val_loss, self.step)
                    log(val_loss=val_loss, val_bits_per_byte=val_loss / math.log(2))
                    progress.show_validation(val_loss)
                stopped = stop is not None and stop.is_set()
                if last or stopped or self.step % config.save_every == 0:
                    # The metrics first: lines beyond a checkpoint are cut, missing ones are lost.
                    metrics.flush()
                    os.fsync(metrics.fileno())
                    self._save()
                if stopped and not last:
                    if isinstance(self.model, Hope):
                        self.model.save_pretrained(config.out)
                    raise KeyboardInterrupt

        if math.isnan(val_loss):  # resumed when there was nothing left to do
            val_loss = self.evaluate()
        return self._finish(val_loss)

    def _finish(self, val_loss: float) -> TrainResult:
        """Write the plot and, for a Hope, the model, its samples and training.json."""
        if isinstance(self.model, Hope):
            self.model.save_pretrained(self.config.out)
            write_atomically(self._path("samples.txt"), self.samples(self.model).encode())
            provenance = json.dumps(self.provenance(val_loss), indent=2) + "\n"
            write_atomically(self._path("training.json"), provenance.encode())
        plot(self._path("loss.png"), {self.trajectory["optimizer"]: self._path("metrics.jsonl")})
        return self._result(val_loss)

    def train_step(
        self, watched: bool = False
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Take one step and return what there is to log about it.

        Args:
            watched: whether deepopt's optimizers tell what the step does to every parameter.

        Returns:
            Values by name, and for a watched step the diagnostics by parameter.
        """
        config = self.config
        factor = lr_factor(self.step, config.steps, self.trajectory["warmup"])
        prepare(self.optimizers, factor)
        tokens, targets = sample_batch(
            self.corpus.train, config.batch_size, config.seq_len, config.seed, self.step
        )

        began = time.process_time()
        loss = self.model(tokens.to(config.device), targets.to(config.device)).loss
        self._check_finite("loss", loss.item(), self.step + 1)
        loss.backward()
        model_seconds = time.process_time() - began
        with clipped(self.optimizers, self.model) as norm, ExitStack() as diagnostics:
            self._check_finite("norm of the gradient", norm.item(), self.step + 1)
            began, seen = time.process_time(), []
            for optimizer in self.optimizers:
                if watched and isinstance(optimizer.optimizer, MemoryOptimizer):
                    seen.append(diagnostics.enter_context(optimizer.optimizer.diagnostics()))
                optimizer.optimizer.step()
            optimizer_seconds = time.process_time() - began

        self.step += 1
        self.model_seconds.append(model_seconds)
        self.optimizer_seconds.append(optimizer_seconds)
        values = {
            "loss": loss.item(),
            "bits_per_byte": loss.item() / math.log(2),
            "lr": config.lr * factor,
            "grad_norm": norm.item(),
            "model_cpu_seconds": round(model_seconds, 6),
            "optimizer_cpu_seconds": round(optimizer_seconds, 6),
        }
        return values, {n: row.scalars() for rows in seen for n, row in rows.items()}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss on the held-out windows, in nats."""
        config, total, count = self.config, 0.0, 0
        for tokens, targets in evaluation_batches(
            self.corpus.val, config.batch_size, config.seq_len, config.eval_windows
        ):
            loss = self.model(tokens.to(config.device), targets.to(config.device)).loss
            total += loss.item() * len(tokens)
            count += len(tokens)
        return total / count

    def samples(
        self, model: Hope, prompts: int = 3, prompt_len: int = 64, length: int = 400
    ) -> str:
        """Return continuations of held-out text."""
        generator = torch.Generator(self.config.device).manual_seed(self.config.seed)
        prompt_len = min(prompt_len, self.config.seq_len)
        ((tokens, _),) = evaluation_batches(self.corpus.val, prompts, prompt_len, prompts)
        tokens = tokens.to(self.config.device)
        try:
            continued = generate(
                model, tokens, length, temperature=0.8, top_k=50, generator=generator
            )
        except FloatingPointError as error:
            return f"no samples: {error}\n"
        texts = []
        for row in continued.tolist():
            prompt, text = (
                bytes(part).decode(errors="replace") for part in (row[:prompt_len], row)
            )
            texts.append(f"=== prompt\n{prompt}\n=== prompt and continuation\n{text}\n")
        return "\n".join(texts)

    def provenance(self, val_loss: float) -> dict[str, Any]:
        """What made the model that lies in ``out``, and how good it is: training.json."""
        weights = self._path("model.safetensors").read_bytes()
        return {
            "command": self.config.command,
            "data": self.corpus.name,
            "data_sha256": self.corpus.sha256,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "parameters": self.parameters,
            "val_bits_per_byte": round(val_loss / math.log(2), 4),
            "model_sha256": hashlib.sha256(weights).hexdigest(),
        }

    def _path(self, name: str) -> Path:
        return self.config.out / name

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} at step {step} with lr={self.config.lr}; "
                f"the last checkpoint is kept in {self.config.out}; start anew with a smaller lr"
            )

    def _save(self) -> None:
        largest = torch.stack([param.detach().abs().amax() for param in self.model.parameters()])
        self._check_finite("largest weight", largest.max().item(), self.step)
        state = {
            "trajectory": self.trajectory,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng_state": torch.get_rng_state(),
        }
        files.save(self._path("checkpoint.safetensors"), state)

    def _load(self) -> None:
        path = self._path("checkpoint.safetensors")
        if not path.exists():
            raise ValueError(f"out={self.config.out} holds no checkpoint; start without --resume")
        state = files.load(path)
        theirs = state["trajectory"]
        if self.config.warmup is None:  # it stays as it was where the run is extended
            self.trajectory["warmup"] = theirs["warmup"]
        theirs = {**theirs, "steps": max(theirs["steps"], self.config.steps)}
        if differences := [
            f"{name}={theirs.get(name)!r} there and {self.trajectory.get(name)!r} here"
            for name in sorted(theirs.keys() | self.trajectory.keys())
            if theirs.get(name) != self.trajectory.get(name)
        ]:
            raise ValueError(
                f"{path} belongs to another run: {'; '.join(differences)}; "
                "give the options of that run, or choose another --out"
            )
        try:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except ValueError as error:
            raise ValueError(
                f"{path} does not fit the optimizers of this version ({error}); go on with the "
                "version that began the run, or start anew with --overwrite"
            ) from error
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.rng_state = state["rng_state"]

    def _result(self, val_loss: float) -> TrainResult:
        state_bytes = sum(
            value.numel() * value.element_size()
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        return TrainResult(
            val_loss=val_loss,
            val_bits_per_byte=val_loss / math.log(2),
            parameters=self.parameters,
            state_floats_per_parameter=state_bytes / 4 / self.parameters,
            model_cpu_seconds=statistics.fmean(self.model_seconds[1:] or [math.nan]),
            optimizer_cpu_seconds=statistics.fmean(self.optimizer_seconds[1:] or [math.nan]),
        )
