"""Every case of ``python -m benchmarks speed``, with its contenders and its targets."""

import torch

from benchmarks import work
from benchmarks.speed.case import Case, Target
from benchmarks.speed.coordinate_mlp import MLP_TARGETS, coordinate_mlp
from benchmarks.speed.correctness import farther, singular_values, strides
from benchmarks.speed.elementwise import elementwise
from benchmarks.speed.matrices import matrices
from benchmarks.speed.optimizers import matrix_optimizers
from benchmarks.speed.overheads import buckets, growth, memory, python_overhead
from benchmarks.speed.race import ratio, rest
from benchmarks.speed.scaling import LINEAR, scaling

MILLION = 2**20
GPT2 = (768, 12)
MUON, FUSED = "torch Muon", "AdamW fused"
FEW_TENSORS = tuple(name for name in matrix_optimizers("cpu") if name != "heavyball Muon")
FULL = (MUON, "DeepMomentum linear", "DeepMomentum delta")
MATRIX_TARGETS = (
    ratio("DeepMomentum linear", MUON, 0.60),
    ratio("DeepMomentum delta", MUON, 0.70),
    ratio("DeepMomentum covariance", MUON, 1.0, "DeepMomentum covariance, refresh included / Muon"),
    ratio("M3", "DeepMomentum linear", 1.15, "M3, over a slow chunk / DeepMomentum linear"),
    ratio("DMGD row", "DeepMomentum linear", 1.5),
    ratio("DeepMomentum mlp", "DeepMomentum linear", 1.25),
)

CASES: dict[str, Case] = {
    "adamw-large": Case(
        "Element-wise, 4 tensors of 8 M, float32",
        elementwise([(8 * MILLION,)] * 4, 12.0),
        [ratio("DeepMomentum", FUSED, 1.05)],
        FUSED,
    ),
    "adamw-huge": Case(
        "Element-wise, one tensor of 100 M, float32",
        elementwise([(100_000_000,)], 12.0, names=(FUSED, "AdamW foreach")),
        [ratio("DeepMomentum", FUSED, 1.05)],
        FUSED,
    ),
    "adamw-bf16": Case(
        "Element-wise, 4 tensors of 8 M, bfloat16",
        elementwise([(8 * MILLION,)] * 4, 12.0, torch.bfloat16),
        [ratio("DeepMomentum", FUSED, 1 / 1.5)],
        FUSED,
        note="torch keeps bfloat16 averages, 14 bytes per element and step; DeepMomentum keeps "
        "them in float32, 22 bytes, because an average in bfloat16 stops moving.",
    ),
    "adamw-400": Case(
        "Element-wise, 400 tensors of 2 k, float32",
        elementwise([(2075,)] * 400, 10.0),
        [ratio("DeepMomentum", FUSED, 1 / 2)],
        FUSED,
    ),
    "adamw-500": Case(
        "Element-wise, 500 tensors of 1 k, float32",
        elementwise([(1000,)] * 500, 10.0),
        (),
        FUSED,
    ),
    "strides": Case(
        "Element-wise, channels-last parameters with contiguous gradients: errors against float64",
        strides,
        [
            Target(
                "DeepMomentum: largest error of three steps of 0.01",
                lambda line: line["details"][-1]["largest error"],
                1e-6,
            )
        ],
        threads=(1,),
    ),
    "gpt2": Case(
        "Matrices of 3 of GPT-2-small's 12 layers",
        matrices(work.transformer(GPT2[0], 3), 120.0),
        [
            *MATRIX_TARGETS,
            *(rest(f"DeepMomentum {m}") for m in ("linear", "delta", "covariance")),
        ],
        MUON,
        note="All layers are alike, and the time of a layer does not depend on their number: "
        "the next case has all twelve.",
    ),
    "gpt2-full": Case(
        "All matrices of GPT-2-small, 85 M parameters",
        matrices(work.transformer(*GPT2), 0.0, FULL),
        MATRIX_TARGETS[:2],
        MUON,
        threads=(1,),
    ),
    "vit": Case(
        "Matrices of ViT-tiny, 5.3 M parameters",
        matrices(work.transformer(192, 12), 40.0),
        MATRIX_TARGETS,
        MUON,
    ),
    "tiny": Case(
        "500 matrices of 32 x 32",
        matrices([(32, 32)] * 500, 20.0, FEW_TENSORS),
        MATRIX_TARGETS,
        MUON,
        note="Without heavyball, which compiles the step of 500 parameters as one piece, for more "
        "than four minutes.",
    ),
    "singular-values": Case(
        "Singular values after five steps of Newton-Schulz",
        singular_values,
        [Target("50, 90, 99 % of σ within: the worst ratio to torch Muon's", farther, 1.0)],
        threads=(1,),
        note="The distance from 1 within which so many of the singular values are.",
    ),
    "coordinate-mlp": Case(
        "The coordinate MLP's value, 7 M entries, 2 features, 8 units",
        coordinate_mlp(gradient=False),
        MLP_TARGETS,
        "reference",
    ),
    "coordinate-mlp-gradient": Case(
        "The coordinate MLP's gradient, 7 M entries, 2 features, 8 units",
        coordinate_mlp(gradient=True),
        MLP_TARGETS,
        "reference",
    ),
    "scaling-elementwise": Case(
        "Element-wise step against parameters", scaling("elementwise"), [LINEAR], threads=(1,)
    ),
    "scaling-delta": Case(
        "Step of matrices of 768 x 768, delta memory, against parameters",
        scaling("delta"),
        [LINEAR],
        threads=(1,),
    ),
    "buckets": Case(
        "Python per bucket: 40 tiny matrices of 40 shapes",
        buckets,
        [python_overhead(m) for m in ("linear", "delta", "mlp")],
        threads=(1,),
    ),
    "memory": Case(
        "Memory of a step beyond parameters, gradients and state",
        memory,
        [Target("peak with two buckets / peak with one, the worst", growth, 1.1)],
        threads=(1,),
        note="Scratch is to be that of one bucket, whatever the size of the model: torch's "
        "allocations above what was held before the step, in units of a bucket's float32 entries.",
    ),
}
