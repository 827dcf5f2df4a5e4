"""Training steps, in tokens per second: ``python -m benchmarks.gpu.training --out DIR``.

GPT-2-small's size with AdamW, torch's Muon and DeepMomentum, in bfloat16 by autocast; and Hope
beside a Transformer of as many parameters.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import AdamW, Muon

import deepopt
from benchmarks import work
from benchmarks.gpu.clock import Clock, rates
from benchmarks.gpu.rows import write_line
from benchmarks.speed.optimizers import LR
from benchmarks.timing import Quartiles, quartiles
from benchmarks.transformer import Transformer, TransformerConfig
from benchmarks.work import Phase, Work
from deepopt.hope import Hope, HopeConfig
from deepopt.hope.trainer import flops_per_token

Step: TypeAlias = Callable[[], Any]
STEP_TOKENS = 2**19
"""Tokens of the training step of which an optimizer takes a share, as for GPT-2-small."""
GPT2 = TransformerConfig(vocab_size=50304, dim=768, layers=12, heads=12)
GPT2_BATCH = (16, 1024)
HOPE = HopeConfig(vocab_size=256, dim=1024, layers=12, heads=16)
HOPE_BATCH = (4, 2048)


# -- What it should take ---------------------------------------------------------------------------


def matrices(config: TransformerConfig) -> list[tuple[int, int]]:
    """The hidden ones, which Muon and DeepMomentum step as matrices."""
    d, e = config.dim, config.expansion * config.dim
    return [*[(d, d)] * 4, (e, d), (d, e)] * config.layers


def rest(config: TransformerConfig) -> int:
    """Entries of the embedding, the head and the norms, which AdamW steps."""
    return 2 * config.vocab_size * config.dim + (2 * config.layers + 1) * config.dim


def passes_work(config: TransformerConfig, batch: tuple[int, int]) -> Work:
    """Forward and backward: six FLOPs per weight of a product and token, and attention's."""
    weights = sum(m * n for m, n in matrices(config)) + config.vocab_size * config.dim
    attention = config.layers * config.dim * batch[1]  # causal: half of all pairs
    return [Phase("products", 0.0, 6.0 * batch[0] * batch[1] * (weights + attention), "bfloat16")]


def hope_work(config: HopeConfig, batch: tuple[int, int]) -> Work:
    """Forward and backward of Hope: three times the products of a forward pass.

    They are counted over the longest chunk, since a token costs the same in a text of any length.
    """
    with torch.device("meta"):
        model = Hope(config)
    flops = flops_per_token(model, max(config.memory_chunk, config.projection_chunk))
    return [Phase("products", 0.0, 3 * batch[0] * batch[1] * flops, "bfloat16")]


def beside_hope(config: HopeConfig) -> TransformerConfig:
    """The Transformer whose parameters are nearest to Hope's in number."""
    with torch.device("meta"):
        wanted = sum(param.numel() for param in Hope(config).parameters())
    sizes = (config.vocab_size, config.dim, config.layers, config.heads)
    return min(
        (TransformerConfig(*sizes, expansion=e) for e in range(1, 17)),
        key=lambda it: abs(sum(m * n for m, n in matrices(it)) + rest(it) - wanted),
    )


def step_work(config: TransformerConfig) -> dict[str, Work]:
    """The work of each optimizer's step, by name."""
    hidden, others = matrices(config), work.adamw(rest(config))

    def ours(rule: Callable[..., Work], **options: Any) -> Work:
        least = functools.partial(rule, least=True, **options)
        return [*work.over(hidden, least), *others]

    return {
        "AdamW fused": work.adamw(sum(m * n for m, n in hidden) + rest(config)),
        "torch Muon": [*work.over(hidden, work.muon), *others],
        "DeepMomentum linear": ours(work.linear),
        "DeepMomentum delta": ours(work.delta),
    }


# -- Measurements ----------------------------------------------------------------------------------


def steps(model: nn.Module) -> dict[str, Step]:
    """The optimizers' steps by name; beside Muon, AdamW takes embeddings, head and vectors."""
    groups = deepopt.param_groups(model)
    hidden = [p for group in groups if group["path"] == "matrix" for _, p in group["params"]]
    known = set(map(id, hidden))
    others = [param for param in model.parameters() if id(param) not in known]
    parts = [Muon(hidden, lr=LR), AdamW(others, lr=LR, fused=True)]

    def deep(memory: str) -> Step:
        return deepopt.DeepMomentum(deepopt.param_groups(model), lr=LR, memory=memory).step

    return {
        "AdamW fused": AdamW(model.parameters(), lr=LR, fused=True).step,
        "torch Muon": lambda: [part.step() for part in parts],
        "DeepMomentum linear": deep("linear"),
        "DeepMomentum delta": deep("delta"),
    }


def passes(
    model: nn.Module, vocab_size: int, batch: tuple[int, int], clock: Clock, repeats: int
) -> Quartiles:
    """Seconds of a forward and a backward pass."""
    tokens = torch.randint(vocab_size, batch, device=clock.device)
    forward = torch.compile(model) if clock.on_gpu and isinstance(model, Transformer) else model

    def step() -> None:
        for param in model.parameters():
            param.grad = None
        with torch.autocast(clock.device.type, torch.bfloat16):
            loss = forward(tokens, tokens).loss
        loss.backward()

    for _ in range(3):
        step()
    return quartiles([clock.wall(step) for _ in range(repeats)])


def gpt2(clock: Clock, quick: bool, folder: Path) -> None:
    config, batch, repeats = GPT2, GPT2_BATCH, 10
    if quick:
        config, batch, repeats = TransformerConfig(128, 64, 2, 2), (2, 16), 2
    torch.manual_seed(0)
    model = Transformer(config).to(clock.device)
    machine, tokens = rates(clock, quick), batch[0] * batch[1]
    about = {"kind": "training", "device": clock.device.type, "model": "GPT-2-small"}
    passed = passes(model, config.vocab_size, batch, clock, repeats)
    predicted = work.roofline_seconds(passes_work(config, batch), machine)
    found = {"what": "forward and backward", "wall": passed, "predicted": predicted}
    write_line(folder, {**about, **found})
    for name, step in steps(model).items():
        for _ in range(3):
            step()
        seconds = quartiles([clock.wall(step) for _ in range(repeats)])
        found = {
            "what": name,
            "wall": seconds,
            "predicted": work.roofline_seconds(step_work(config)[name], machine),
            "tokens_per_second": tokens / (passed.median + seconds.median),
            "share_of_half_a_million": seconds.median / (passed.median * STEP_TOKENS / tokens),
        }
        write_line(folder, {**about, **found})


def hope(clock: Clock, quick: bool, folder: Path) -> None:
    """Forward and backward of Hope, and of a Transformer of as many parameters."""
    config, batch, repeats = HOPE, HOPE_BATCH, 5
    if quick:
        config, batch, repeats = HopeConfig(dim=64, layers=1, heads=2), (1, 64), 2
    torch.manual_seed(0)
    theirs, machine = beside_hope(config), rates(clock, quick)
    contenders: dict[str, tuple[Callable[[], nn.Module], Work]] = {
        "Transformer": (lambda: Transformer(theirs), passes_work(theirs, batch)),
        "Hope": (lambda: Hope(config), hope_work(config, batch)),
    }
    for name, (make, least) in contenders.items():
        model = make().to(clock.device)
        about = {"kind": "training", "device": clock.device.type}
        about["model"] = f"{name}, d = {config.dim}, {batch[1]} tokens"
        if clock.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            passed = passes(model, config.vocab_size, batch, clock, repeats)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            write_line(folder, {**about, "kind": "failed", "note": reason})
            continue
        found = {
            "what": "forward and backward",
            "wall": passed,
            "predicted": work.roofline_seconds(least, machine),
            "parameters": sum(param.numel() for param in model.parameters()),
            "tokens_per_second": batch[0] * batch[1] / passed.median,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if clock.on_gpu else None,
        }
        write_line(folder, {**about, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    clock = Clock(arguments.device)
    gpt2(clock, arguments.quick, arguments.out)
    hope(clock, arguments.quick, arguments.out)


if __name__ == "__main__":
    main()
