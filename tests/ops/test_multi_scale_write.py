"""The write of M3's momenta; tests/ops/test_parity.py holds its kernels to the reference."""

import pytest
import torch

from deepopt.ops import multi_scale_write

kernel = multi_scale_write.overload
needs_kernel = pytest.mark.skipif(
    "cpu" not in multi_scale_write.implementations, reason="not built"
)


@pytest.mark.parametrize("retention", [0.0, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(5, 7), (40, 33)])
def test_the_fast_momentum_and_its_look_ahead_have_the_bits_of_the_linear_memory(shape, retention):
    generator = torch.Generator().manual_seed(0)
    momentum, slow, grad = torch.randn(3, 2, *shape, generator=generator)
    steps = torch.tensor([1.0, 4.0])
    fast, _, ahead = multi_scale_write(momentum, slow, grad, steps, retention, 3, 0.99)
    assert torch.equal(fast, momentum.lerp(grad, 1 - retention))
    assert torch.equal(ahead, grad.lerp(fast, retention))


@needs_kernel
def test_arguments_that_do_not_fit_are_refused():
    x, steps = torch.ones(2, 3, 4), torch.ones(2)
    for matrices in ((x, x[:, :2], x), (x, x, x.double()), (x[0], x[0], x[0])):
        with pytest.raises(RuntimeError, match=r"of one shape|of shape"):
            kernel(*matrices, steps, 0.9, 3, 0.99)
    with pytest.raises(RuntimeError, match=r"step of shape \(B,\)"):
        kernel(x, x, x, steps[:1], 0.9, 3, 0.99)
