"""The kernels on a GPU, at the sizes they are for."""

import importlib.util

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install triton", allow_module_level=True)

import deepopt.ops
from deepopt.hope import fused
from deepopt.memory import Delta
from deepopt.ops import frobenius, polar_express
from deepopt.ops.triton import (
    delta_write,
    gram_average,
    inverse_power,
    newton_schulz,
    split_product,
    symmetric_product,
)
from deepopt.ops.triton.memories import memories
from deepopt.ops.triton.memories_gradient import memories_gradient
from tests.gpu import captured, no_waiting

reference = deepopt.ops.newton_schulz.reference
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(4, 768, 768), (2, 768, 3072), (2, 2304, 768), (1, 1000, 1111), (1, 4096, 4096)]


def random(*shape):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 65, 33), (300, 64, 64)])
def test_a_symmetric_product_is_as_near_as_its_sums_allow(shape, dtype):
    x = random(*shape).to(dtype)
    for view in (x, x.mT):
        size, depth = view.shape[-2:]
        found = symmetric_product(view, view, alpha=0.5, shift=2.0, dtype=dtype)
        wide = view.double()
        expected = 0.5 * wide @ wide.mT + 2 * torch.eye(size, device="cuda")
        total = 0.5 * wide.abs() @ wide.abs().mT + 2
        assert torch.equal(found, found.mT)
        # Matrix units add in an order of their own, and drop what falls off their accumulators.
        bound = 4 * (depth + 4) * 2.0**-24 * total + ROUNDING[dtype] * expected.abs()
        assert ((found.double() - expected).abs() <= bound).all()
        assert torch.equal(found, symmetric_product(view, view, alpha=0.5, shift=2.0, dtype=dtype))


def test_matrices_beyond_two_to_the_31_elements_are_addressed():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.zeros(1, 300, 2**23, device="cuda", dtype=torch.float16)
    x[0, -1, -1] = 3.0
    found = symmetric_product(x, x, dtype=torch.float32)
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
    ahead = Delta().write_and_read(state, grad.double(), 0.9)
    found = delta_write(*arguments)
    slack = 4 * ROUNDING[dtype] + 2.0**-18
    largest = 0.3 * torch.linalg.matrix_norm(old, 2).max() + old.abs().max()
    assert (found[0].double() - state["momentum"]).abs().max() <= slack * largest
    torch.testing.assert_close(found[1].double(), state["norm"], rtol=slack, atol=0)
    torch.testing.assert_close(found[2].double(), state["erasure"], rtol=slack, atol=0)
    assert (found[3].double() - ahead).abs().max() <= 4 * slack * (largest + grad.abs().max())
    assert all(map(torch.equal, found, delta_write(*arguments)))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 65, 33)])
@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_a_split_product_is_as_near_as_float32(shape, scale):
    a, b = scale * random(*shape), random(*shape).flip(0).mT
    found, exact = split_product(a, b), a.double() @ b.double()
    norms = torch.linalg.matrix_norm(a.double()) * torch.linalg.matrix_norm(b.double())
    bound = (shape[2] + 12) * 2.0**-24 * (a.abs().double() @ b.abs().double())
    assert ((found - exact).abs() <= bound + 2.0**-34 * norms[:, None, None]).all()
    assert torch.equal(found, split_product(a, b))


@pytest.mark.parametrize(("size", "rank"), [(768, 3072), (768, 300), (192, 768)])
@pytest.mark.parametrize("power", [0.5, 0.25])
def test_roots_are_those_of_eigenvalues_on_the_cpu(size, rank, power):
    factor = random(2, size, rank)
    gram = factor @ factor.mT
    found = inverse_power(gram, power, 1e-6).cpu()
    exact = deepopt.ops.inverse_power.reference(gram.cpu().double(), power, 1e-6)
    # Rounding of the Gram matrix alone moves eigenvalues that should be zero by as much.
    assert (found - exact).norm() < (0.02 if rank < size else 1e-3) * exact.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_average_is_that_of_rounded_keys(shape):
    grad, of_rows = random(*shape), shape[1] <= shape[2]
    side, scale = min(shape[1:]), grad.abs().amax((1, 2))
    gram, kept = random(shape[0], side, side), torch.full((shape[0],), 0.9, device="cuda")
    gram = gram @ gram.mT
    found = gram_average(gram, grad, scale, kept, 0.05, of_rows)
    keys = (grad / scale[:, None, None]).bfloat16().double()
    keys = keys if of_rows else keys.mT
    expected = 0.9 * gram.double() + 0.05 * keys @ keys.mT
    total = gram.double().abs() + 0.05 * keys.abs() @ keys.abs().mT
    assert ((found - expected).abs() <= 4 * (max(shape[1:]) + 4) * 2.0**-24 * total).all()


@pytest.mark.parametrize(
    ("sizes", "chunks", "position", "pulled"),
    [
        ((4, 4, 32, 32, 64, 130), (32, 32), 0, True),  # Hope's default
        ((2, 2, 16, 16, 32, 70), (16, 32), 5, False),
        ((1, 2, 24, 20, 50, 67), (32, 16), 40, True),
    ],
)
def test_memories_and_their_gradients_equal_the_reference_in_float64(
    sizes, chunks, position, pulled
):
    batch, heads, d, hidden, memory_hidden, tokens = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def weights(count, rows, *lead):
        return [normal(*lead, heads, count, rows, d, scale=d**-0.5),
                normal(*lead, heads, count, d, rows, scale=rows**-0.5)]  # fmt: skip

    inputs = [normal(batch, heads, d, tokens) for _ in range(3)]
    inputs[2] /= inputs[2].norm(dim=2, keepdim=True)
    of_all = [(4, hidden), (4, hidden), (1, memory_hidden), (1, memory_hidden)]
    states = [x for count, rows in of_all for x in weights(count, rows, batch)]
    pulls = (
        [x for count, rows in of_all[::2] for x in weights(count, rows)] if pulled else [None] * 4
    )
    gates = normal(heads, 6) + torch.tensor([-2.0, 4.0, 0.0, 0.0, 0.0, 2.0])
    numbers = (0.5 / max(chunks), 2.0, 1.5, 1.0, 1e-4, 6.0, *chunks, position)
    exact = fused.MemoryArguments(*inputs, *states, *pulls, gates, *numbers)
    given = fused.MemoryArguments._make(
        x.to("cuda", torch.float32) if isinstance(x, torch.Tensor) else x for x in exact
    )
    expected = fused.memories.reference(True, exact)
    grads = [normal(*x.shape) for x in expected[:-1]]
    found = memories(True, given)
    of_float32 = [x.to("cuda", torch.float32) for x in grads]
    back = memories_gradient(of_float32, found[-1], given)
    wanted = fused.memories_gradient.reference(grads, expected[-1], exact)
    if not pulled:
        back[11:15] = wanted[11:15] = []
    for ours, theirs in zip([*found, *back], [*expected, *wanted], strict=True):
        assert (ours.cpu().double() - theirs).norm() < 1e-3 * theirs.norm()
    assert all(map(torch.equal, found, memories(True, given)))
    again = memories_gradient(of_float32, found[-1], given)
    assert all(map(torch.equal, back[:11], again))


def test_steps_are_captured_in_a_graph_and_do_not_synchronize():
    grad, momentum = random(2, 256, 512), random(2, 256, 512).flip(-1)
    norm, erasure = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")

    def step():
        written = delta_write(momentum, grad, norm, erasure, 0.3, 0.9)
        return newton_schulz(written[0], polar_express(5), torch.bfloat16)

    expected = step()  # measures and compiles
    with no_waiting():
        step()
    found = torch.zeros_like(expected)
    captured(lambda: found.copy_(step()), warm_up=0)()
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch itself imports
def test_an_operator_around_it_compiles():
    matrices = random(2, 256, 512)

    @torch.library.custom_op("deepopt_test::newton_schulz", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return newton_schulz(x, polar_express(5), torch.bfloat16)

    opaque.register_fake(torch.empty_like)
    expected = opaque(matrices) + 1
    assert torch.equal(torch.compile(lambda x: opaque(x) + 1, fullgraph=True)(matrices), expected)
