"""The kernels on a GPU, at the sizes they are for."""

import importlib.util

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install triton", allow_module_level=True)

import deepopt.ops
from deepopt.memory import Delta
from deepopt.ops import frobenius, polar_express
from deepopt.ops.triton import (
    delta_write,
    erase,
    half_product,
    newton_schulz,
    symmetric_product,
)

reference = deepopt.ops.newton_schulz.reference
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(4, 768, 768), (2, 768, 3072), (2, 2304, 768), (1, 1000, 1111), (1, 4096, 4096)]


def random(*shape):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 65, 33), (300, 64, 64)])
def test_half_product_is_as_near_as_its_sums_allow(shape, dtype):
    x = random(*shape).to(dtype)
    for view in (x, x.mT):
        size, depth = view.shape[-2:]
        found = half_product(view, view, None, 0.5, 0.0, 2.0, dtype)
        wide = view.double()
        expected = 0.5 * wide @ wide.mT + 2 * torch.eye(size, device="cuda")
        total = 0.5 * wide.abs() @ wide.abs().mT + 2
        assert torch.equal(found, found.mT)
        # Matrix units add in an order of their own, and drop what falls off their accumulators.
        bound = 4 * (depth + 4) * 2.0**-24 * total + ROUNDING[dtype] * expected.abs()
        assert ((found.double() - expected).abs() <= bound).all()
        assert torch.equal(found, half_product(view, view, None, 0.5, 0.0, 2.0, dtype))


def test_matrices_beyond_two_to_the_31_elements_are_addressed():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.zeros(1, 300, 2**23, device="cuda", dtype=torch.float16)
    x[0, -1, -1] = 3.0
    found = half_product(x, x, None, 1.0, 0.0, 0.0, torch.float32)
    assert found[0, -1, -1] == 9.0
    assert found.sum() == 9.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_newton_schulz_is_as_orthogonal_as_the_reference(shape, dtype):
    matrices = random(*shape)
    coefficients = polar_express(5)
    exact = torch.linalg.svdvals(reference(matrices.double(), coefficients, torch.float64))
    found = newton_schulz(matrices, coefficients, dtype)
    error = (torch.linalg.svdvals(found.double()) - exact).abs().max()
    simple = reference(matrices, coefficients, dtype)
    assert error <= (torch.linalg.svdvals(simple.double()) - exact).abs().max().clamp_min(1e-3)
    assert torch.equal(found, newton_schulz(matrices, coefficients, dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_delta_write_follows_the_memory(shape, dtype):
    grad, old = random(*shape), random(*shape).flip(-1)
    state = Delta().init(grad.double())
    state["momentum"], state["norm"] = old.double(), frobenius(grad).double() / 2
    arguments = (old, grad, state["norm"].float(), state["erasure"].float(), 0.3, 0.9, dtype)
    Delta().write(state, grad.double(), 0.9)
    found = delta_write(*arguments)
    slack = 4 * ROUNDING[dtype] + 2.0**-18
    largest = 0.3 * torch.linalg.matrix_norm(old, 2).max() + old.abs().max()
    assert (found[0].double() - state["momentum"]).abs().max() <= slack * largest
    torch.testing.assert_close(found[1].double(), state["norm"], rtol=slack, atol=0)
    torch.testing.assert_close(found[2].double(), state["erasure"], rtol=slack, atol=0)
    assert all(map(torch.equal, found, delta_write(*arguments)))


def test_norms_do_not_remember_the_trials_of_other_tiles():
    """The first call at a size tries several, which write different numbers of partial norms."""
    momentum = random(3, 200, 456)
    a, b = random(3, 200, 200).bfloat16(), random(3, 200, 456).bfloat16()
    for _ in range(2):
        _, _, before = erase(momentum, momentum, a, b, torch.ones(3, device="cuda"), 0.5)
        torch.testing.assert_close(before, torch.linalg.matrix_norm(momentum))


def test_steps_are_captured_in_a_graph_and_do_not_synchronize():
    grad, momentum = random(2, 256, 512), random(2, 256, 512).flip(-1)
    norm, erasure = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")

    def step():
        written = delta_write(momentum, grad, norm, erasure, 0.3, 0.9)
        return newton_schulz(written[0], polar_express(5), torch.bfloat16)

    expected = step()  # measures and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured, expected)


def test_an_operator_around_it_compiles():
    matrices = random(2, 256, 512)

    @torch.library.custom_op("deepopt_test::newton_schulz", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return newton_schulz(x, polar_express(5), torch.bfloat16)

    opaque.register_fake(torch.empty_like)
    expected = opaque(matrices) + 1
    assert torch.equal(torch.compile(lambda x: opaque(x) + 1, fullgraph=True)(matrices), expected)


def test_symmetric_product_is_one_of_its_candidates():
    x = random(2, 96, 160).bfloat16()
    found = symmetric_product(x, x, alpha=2.0, shift=1.0)
    expected = 2 * x.double() @ x.double().mT + torch.eye(96, device="cuda")
    assert ((found - expected).abs() <= 2.0**-6 * expected.abs() + 1e-2).all()
