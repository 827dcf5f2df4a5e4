"""Training steps, in tokens per second: ``python -m benchmarks.gpu.training --out DIR``.

GPT-2-small's size with AdamW, torch's Muon and DeepMomentum, in bfloat16 by autocast; and Hope
beside a Transformer of as many parameters.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

import deepopt
from benchmarks import work
from benchmarks.gpu.clock import Clock, quartiles, rates
from benchmarks.gpu.rows import LR, predicted_seconds, write_line
from benchmarks.transformer import Transformer, TransformerConfig
from benchmarks.work import Phase, Work
from deepopt.hope import Hope, HopeConfig

BATCH_TOKENS = 2**19
"""Of the step that an optimizer's share is of, as GPT-2-small is trained."""


def steps(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """The optimizers' steps by name; Muon's takes embeddings, heads and vectors to AdamW."""
    hidden = hidden_matrices(model)
    others = [param for param in model.parameters() if all(param is not h for h in hidden)]

    def muon() -> Callable[[], Any]:
        parts = [Muon(hidden, lr=LR), AdamW(others, lr=LR, fused=True)]
        return lambda: [part.step() for part in parts]

    def adamw() -> Callable[[], Any]:
        return AdamW(model.parameters(), lr=LR, fused=True).step

    def deep(memory: str) -> Callable[[], Any]:
        return deepopt.DeepMomentum(deepopt.param_groups(model), lr=LR, memory=memory).step

    return {
        "AdamW fused": adamw(),
        "torch Muon": muon(),
        "DeepMomentum linear": deep("linear"),
        "DeepMomentum delta": deep("delta"),
    }


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What DeepMomentum steps as matrices."""
    return [
        param
        for group in deepopt.param_groups(model)
        if group["path"] == "matrix"
        for _, param in group["params"]
    ]


def matrices(model: nn.Module) -> list[tuple[int, int]]:
    return [(param.shape[0], param.shape[1]) for param in hidden_matrices(model)]


def passes(model: nn.Module, batch: tuple[int, int], clock: Clock, repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward passes, gradients set to none before each."""
    tokens = torch.randint(model.config.vocab_size, batch, device=clock.device)

    def step() -> None:
        for param in model.parameters():
            param.grad = None
        with torch.autocast(clock.device.type, torch.bfloat16):
            loss = model(tokens, tokens).loss
        loss.backward()

    for _ in range(3):
        step()
    issue = clock.issue(step)
    seconds = quartiles([clock.wall(step) for _ in range(repeats)])
    return {"wall": seconds, "issue": issue, "tokens": tokens.numel()}


def products(model: nn.Module, tokens: int, length: int) -> Work:
    """Forward and backward: six FLOPs per parameter of a product and token, and attention's."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    weights -= config.vocab_size * config.dim  # the embedding's table is read, not multiplied
    attention = 6.0 * config.layers * config.dim * length  # causal: half of 12
    return [Phase("products", 0.0, tokens * (6.0 * weights + attention), "bfloat16")]


def gpt2(clock: Clock, quick: bool, folder: Path, about: dict[str, Any]) -> None:
    sizes = {"dim": 64, "layers": 2, "heads": 2, "vocab_size": 128} if quick else {
        "dim": 768, "layers": 12, "heads": 12, "vocab_size": 50304,
    }  # fmt: skip
    batch, length = (2, 16) if quick else (16, 1024)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**sizes)).to(clock.device)
    machine = rates(clock, quick)
    repeats = 2 if quick else 10
    model.forward = torch.compile(model.forward) if clock.on_gpu else model.forward
    passed = passes(model, (batch, length), clock, repeats)
    tokens, one = passed["tokens"], passed["wall"].median
    line = {"kind": "training", **about, "model": "GPT-2-small"}
    predicted = predicted_seconds(products(model, tokens, length), machine)
    write_line(folder, {**line, "what": "forward and backward", **passed, "predicted": predicted})
    entries = sum(param.numel() for param in model.parameters())
    rest = entries - sum(m * n for m, n in matrices(model))
    least = {
        "AdamW fused": work.adamw(entries),
        "torch Muon": [*work.over(matrices(model), work.muon), *work.adamw(rest)],
        **{
            f"DeepMomentum {name}": [
                *work.over(matrices(model), lambda m, n, r=rule: r(m, n, least=True)),
                *work.adamw(rest),
            ]
            for name, rule in (("linear", work.linear), ("delta", work.delta))
        },
    }
    for name, step in steps(model).items():
        for _ in range(3):
            step()
        issue = clock.issue(step)
        seconds = quartiles([clock.wall(step) for _ in range(repeats)])
        whole = BATCH_TOKENS / tokens * one
        write_line(
            folder,
            {
                **line,
                "what": name,
                "wall": seconds,
                "work": quartiles([clock.work(step, issue) for _ in range(repeats)]),
                "predicted": predicted_seconds(least[name], machine),
                "tokens_per_second": tokens / (one + seconds.median),
                "share_of_half_a_million": seconds.median / whole,
            },
        )


def hope(clock: Clock, quick: bool, folder: Path, about: dict[str, Any]) -> None:
    """Forward and backward at d = 1024, 12 layers, 2,048 tokens; as many parameters in both."""
    size = (
        {"dim": 64, "layers": 1, "heads": 2} if quick else {"dim": 1024, "layers": 12, "heads": 16}
    )
    batch = (1, 64) if quick else (4, 2048)
    torch.manual_seed(0)
    ours = Hope(HopeConfig(vocab_size=256, **size))
    wanted = sum(param.numel() for param in ours.parameters())
    theirs = min(
        (TransformerConfig(vocab_size=256, expansion=e, **size) for e in range(1, 17)),
        key=lambda config: abs(parameters_of(config) - wanted),
    )
    models: dict[str, Callable[[], nn.Module]] = {
        "Transformer": lambda: Transformer(theirs), "Hope": lambda: ours,
    }  # fmt: skip
    for name, make in models.items():
        model = make().to(clock.device)
        line = {"kind": "training", **about, "model": f"{name}, d = {size['dim']}"}
        line["parameters"] = sum(param.numel() for param in model.parameters())
        try:
            passed = passes(model, batch, clock, 2 if quick else 5)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            write_line(folder, {**line, "kind": "failed", "note": reason})
            continue
        rate = passed["tokens"] / passed["wall"].median
        found = {"what": "forward and backward", **passed, "tokens_per_second": rate}
        if clock.on_gpu:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        write_line(folder, {**line, **found})


def parameters_of(config: TransformerConfig) -> int:
    return config.layers * config.dim**2 * (4 + 2 * config.expansion)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    clock = Clock(arguments.device)
    about = {"device": arguments.device, "quick": arguments.quick}
    gpt2(clock, arguments.quick, arguments.out, about)
    hope(clock, arguments.quick, arguments.out, about)


if __name__ == "__main__":
    main()
