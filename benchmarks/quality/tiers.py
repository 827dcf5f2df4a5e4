"""What each tier runs, and which plans a page shows."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.quality.contenders import ABLATIONS, CONTENDERS, MAIN, MEMORIES, PARTS
from benchmarks.quality.plan import PAIR, Plan, Rates, Swap, Tuning
from benchmarks.quality.report import shown
from benchmarks.quality.training import Lines
from benchmarks.quality.workload import find
from benchmarks.quality.workloads import LOCKED

SHARES = ("DeepMomentum, covariance, share 0.15", "DeepMomentum, covariance, share 0.3")
SMALL = (
    "digits_mlp",
    "mnist_cnn",
    "mnist_vit",
    "llama",
    "llama_tuned",
    "lora",
    "lstm",
    "breast_cancer",
    "friedman",
)
MORE = (
    "lm_text",
    "recall",
    "hope_code",
    "mnist_resnet",
    "permuted_digits",
    "lm_aba",
    "quadratic",
)


@dataclass(frozen=True)
class Tier:
    """What is run by default: the plans of a workload with its contenders."""

    plans: Callable[[str, Sequence[str]], Sequence[Plan]]
    workloads: tuple[str, ...]
    contenders: tuple[str, ...]


def thorough(
    workload: str, contenders: Sequence[str], steps: int = 1, batch: int = 1, device: str = "cpu"
) -> list[Plan]:
    """Twelve trials and ten seeds: at T steps, at 4 T, and at T with batches of four times as much.

    Args:
        workload: its name.
        contenders: names.
        steps: T in units of the workload's own.
        batch: batches of the workload in a step.
        device: where the models are.
    """

    def plan(longer: int, larger: int) -> Tuning:
        count = steps * longer * find(workload).steps if steps * longer > 1 else None
        return Tuning(workload, contenders, 12, 10, count, batch * larger, device)

    return [plan(1, 1), plan(4, 1), plan(1, 4)]


def accelerator() -> str | None:
    """The machine's device beside its CPU, if torch has one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else None


TIERS: dict[str, Tier] = {
    "smoke": Tier(lambda w, c: [Tuning(w, c, 1, 2, 40)], ("lm_code",), PAIR),
    "swap": Tier(
        lambda w, c: [Swap(w, c)], ("swap_hope", "swap_transformer"), ("AdamW", "Muon", *MEMORIES)
    ),
    "rates": Tier(
        lambda w, c: [Rates(w, c)],
        SMALL,
        (*PAIR, "DeepMomentum, delta", *SHARES, *PARTS.values()),
    ),
    "long": Tier(
        lambda w, c: [Rates(w, c, seeds=5, steps=4 * find(w).steps)],
        ("friedman", "breast_cancer"),
        PAIR,
    ),
    "standard": Tier(
        lambda w, c: [Tuning(w, c)],
        ("lm_code", "lm_text", "mnist_vit", "recall", "hope_code", "digits_mlp"),
        MAIN,
    ),
    "locked": Tier(lambda w, c: [Tuning(w, c)], LOCKED, MAIN),
    "full": Tier(
        thorough, ("lm_code", *SMALL, *MORE), tuple(c for c in CONTENDERS if c not in ABLATIONS)
    ),
    "gpu": Tier(
        lambda w, c: thorough(w, c, 4, 16, accelerator() or "cuda"),
        ("lm_code", "llama", "mnist_vit"),
        MAIN,
    ),
}


def plans(
    tier: str, workloads: Sequence[str] | None, optimizers: Sequence[str] | None
) -> list[Plan]:
    chosen = TIERS[tier]
    contenders = tuple(dict.fromkeys(["AdamW", *(optimizers or chosen.contenders)]))
    names = workloads or chosen.workloads
    return [plan for name in names for plan in chosen.plans(name, contenders)]


def with_all_tiers(asked: Sequence[Plan], lines: Lines) -> list[Plan]:
    """The plans of the page: what was asked for, and everything else that has lines."""

    def key(plan: Plan) -> Plan:
        own = dataclasses.replace(plan, contenders=(), seeds=0)
        return dataclasses.replace(own, trials=0) if isinstance(own, Tuning) else own

    every = [plan for tier in TIERS if tier != "smoke" for plan in plans(tier, None, None)]
    found: dict[Plan, Plan] = {}
    for plan in every:
        found.setdefault(key(plan), plan)
    found |= {key(plan): plan for plan in asked}
    return [with_lines(p, lines) if isinstance(p, Tuning) else p for p in found.values()]


def with_lines(plan: Tuning, lines: Lines) -> Tuning:
    """The plan with its optimizers of the standard tier and all others that have begun."""
    known = dict.fromkeys([*plan.contenders, *CONTENDERS])
    own = {*MAIN} & {*plan.contenders}
    begun = [c for c in known if c in own or lines.keys() & plan.trials_of(c, lines)]
    return dataclasses.replace(plan, contenders=tuple(begun))


def tunings(lines: Lines) -> list[Tuning]:
    """The tuned workloads that have lines."""
    every = with_all_tiers([], lines)
    return [plan for plan in every if isinstance(plan, Tuning) and shown(plan, lines)]
