"""Gradients of all magnitudes, one after the other: finite in, finite out, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepopt
from deepopt.memory import (
    BUILT_IN,
    Covariance,
    DeltaRule,
    Elementwise,
    EntrywiseMLP,
    Preconditioned,
)
from deepopt.ops import backend
from deepopt.ops.operator import UNAVAILABLE

SHAPES = ((64, 64), (72, 200), (200, 72), (32, 32), (20, 24), (1, 7), (9, 1))
"""Square, wide and tall for the kernels in bfloat16 and for those of small matrices; vectors."""

MEMORIES = {
    **{name: name for name in BUILT_IN},
    "covariance of both sides": Covariance(sides="both", refresh=2),
    "mlp that learns": EntrywiseMLP(inner_lr=0.1),
    "delta rule": DeltaRule(),
    "preconditioned": Preconditioned(),
    "elementwise": Elementwise(),
}
OPTIMIZERS = {
    **{
        name: lambda params, memory=memory: deepopt.DeepMomentum(params, memory=memory)
        for name, memory in MEMORIES.items()
    },
    "a share of the momentum": lambda params: deepopt.DeepMomentum(params, momentum_share=0.3),
    "M3": lambda params: deepopt.M3(params, slow_chunk=2),
    "DMGD": deepopt.DMGD,
    "AdamW": lambda params: deepopt.DeepMomentum([{"params": params, "path": "elementwise"}]),
}
LARGEST, SMALLEST = 38.0, -45.0
"""Decimal exponents of float32: the largest power of ten, and the last that is not zero."""


@st.composite
def exponents(draw):
    """Magnitudes of a sequence of gradients: anything, fading, exploding, or spikes."""
    exponent = st.floats(SMALLEST, LARGEST)
    kind = draw(st.sampled_from(("any", "fading", "exploding", "spikes")))
    if kind == "any":
        return draw(st.lists(exponent, min_size=2, max_size=6))
    if kind == "spikes":
        low, high = draw(exponent), draw(exponent)
        return [low, low, high, low, low]
    start, step = draw(exponent), draw(st.floats(1.0, 30.0)) * (-1 if kind == "fading" else 1)
    return [min(LARGEST, max(SMALLEST, start + step * k)) for k in range(6)]


def gradient(shape, exponent, structure, generator):
    """A matrix whose largest entry is 10 to the exponent.

    It is dense, of rank one, spread or sparse, or all its entries are as large, of one sign or two.
    """
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if structure == "rank one":
        drawn = drawn[:, :1] * drawn[:1]
    elif structure == "spread":
        drawn = drawn * 10.0 ** (3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    elif structure == "sparse":
        drawn[torch.rand(shape, generator=generator) < 0.9] = 0.0
    elif structure == "constant":
        drawn = drawn[:1, :1].expand(shape)
    elif structure == "signs":
        drawn = drawn.sign()
    largest = drawn.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return (drawn / largest * 10.0**exponent).float()


def steps(make, shape, sizes, structure):
    """The change of the parameter by each step; it and its state must not become NaN."""
    generator = torch.Generator().manual_seed(len(sizes))
    param = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
    optimizer = make([param])
    optimizer.param_groups[0]["lr"] = 1e-3
    changes = []
    for exponent in sizes:
        before = param.detach().clone()
        param.grad = gradient(shape, exponent, structure, generator)
        assert param.grad.isfinite().all()
        optimizer.step()
        assert param.isfinite().all()
        for key, value in optimizer.state[param].items():
            if torch.is_tensor(value):  # a square may be infinite, as in torch's AdamW
                assert not value.isnan().any(), key
        changes.append(param.detach() - before)
    return changes


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    sizes=exponents(),
    shape=st.sampled_from(SHAPES),
    structure=st.sampled_from(("dense", "rank one", "spread", "sparse")),
)
def test_finite_gradients_never_give_nan_and_steps_have_the_size_of_the_references(
    name, sizes, shape, structure
):
    check_steps(name, shape, sizes, structure)


def check_steps(name, shape, sizes, structure, rtol=0.1):
    found = {}
    for backend_name in ("reference", "cpu"):
        if backend_name not in UNAVAILABLE:
            with backend(backend_name):
                found[backend_name] = steps(OPTIMIZERS[name], shape, sizes, structure)
    if "cpu" not in found or min(sizes) < -35:
        return  # at the last numbers above zero, both lose a size in rounding, each another one
    for ours, theirs in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("structure", ["constant", "signs"])
@pytest.mark.parametrize("exponents", [[36.0, 36.5, 37.0], [38.0] * 4, [38.0, 20.0, 0.0]], ids=str)
def test_matrices_whose_norms_are_beyond_the_largest_float_never_give_nan(
    name, structure, exponents
):
    if name == "preconditioned":  # a sum, which is ten times as large as its gradients
        exponents = [exponent - 1 for exponent in exponents]
    # Where all entries are alike, their rounding to bfloat16 does not average out.
    check_steps(name, (512, 400), exponents, structure, rtol=0.25)


@pytest.mark.parametrize("shape", [(64, 64), (80, 300), (32, 32)])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([2.0**-i for i in range(0, 160, 2)], id="fades"),
        pytest.param([1e3] * 30 + [3e-45] + [1e3] * 3, id="one denormal"),
        pytest.param([1.0] * 5 + [1e20] + [1e-38] * 2 + [1.0], id="spike"),
        pytest.param([1.0, 1e38, 1e38, 1e38, 1.0], id="end of the range"),
    ],
)
def test_the_delta_memory_stays_finite_after_gradients_far_from_those_before(shape, sizes):
    exponents = torch.tensor(sizes, dtype=torch.float64).log10().tolist()
    steps(OPTIMIZERS["delta"], shape, exponents, "dense")
