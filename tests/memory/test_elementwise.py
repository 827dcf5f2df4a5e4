"""Adam and AdaGrad are the optimal memories of Appendix B, under the correspondences stated."""

import pytest
import torch

from deepopt.memory.elementwise import Elementwise, OuterProduct


def gradients(steps=6, rows=3, columns=4, batch=1):
    return list(torch.randn(steps, batch, rows, columns, dtype=torch.float64))


def recall(memory, grads, retention):
    """Reads after every write."""
    state, reads = memory.init(grads[0]), []
    for count, grad in enumerate(grads, 1):
        state["step"] = torch.full((len(grad),), float(count))
        memory.write(state, grad, retention)
        reads.append(memory.read(state, grad, retention))
    return reads


def torch_steps(kind, grads, **options):
    """The steps of a torch optimizer at a rate of 1, from zero."""
    param = torch.zeros_like(grads[0][0], requires_grad=True)
    optimizer, steps = kind([param], lr=1.0, **options), []
    for grad in grads:
        before = param.detach().clone()
        param.grad = grad[0].clone()
        optimizer.step()
        steps.append((before - param.detach())[None])
    return steps


def assert_steps_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def minimise(objective, start):
    """The minimiser of a quadratic, by one Newton step of autograd's."""
    gradient = torch.func.grad(objective)(start)
    hessian = torch.func.jacrev(torch.func.grad(objective))(start)
    size = start.numel()
    step = torch.linalg.solve(hessian.reshape(size, size), gradient.flatten())
    return start - step.view_as(start)


@pytest.mark.parametrize("value", ["root", "energy"])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_the_read_minimises_the_objective_of_eq_101(value, eps):
    grads = torch.stack(gradients())
    energy = grads.square().sum(0)
    target = energy.sqrt() if value == "root" else energy

    def objective(m):
        return (m * grads - target).square().sum() + eps * (target * m.square()).sum()

    expected = minimise(objective, torch.zeros_like(target))
    memory = Elementwise(value, second_retention=None, eps=eps)
    found = recall(memory, list(grads), 1.0)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_read_of_outer_products_minimises_its_objective():
    grads = torch.stack(gradients(steps=9, rows=2, columns=3))
    flat = grads.flatten(1)
    second = flat.mT @ flat
    values, vectors = torch.linalg.eigh(second)
    target = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT

    def objective(m):
        quadratic = 0.5 * m @ (second + 0.3 * target) @ m
        return quadratic - m @ target @ flat.sum(0)

    expected = minimise(objective, torch.zeros(6, dtype=torch.float64))
    found = recall(OuterProduct(eps=0.3), list(grads), 1.0)[-1]
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-8, atol=1e-10)


def test_averages_are_adam():
    grads = gradients()
    for betas, eps in (((0.9, 0.999), 1e-8), ((0.5, 0.8), 0.1)):
        found = recall(Elementwise(second_retention=betas[1], eps=eps), grads, betas[0])
        options = {"betas": betas, "eps": eps, "weight_decay": 0.0}
        assert_steps_equal(found, torch_steps(torch.optim.AdamW, grads, **options))


def test_with_decoupled_decay_it_is_adamw():
    grads, decay, lr = gradients(), 0.1, 0.3
    param = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = param.detach().clone()
    optimizer = torch.optim.AdamW([param], lr=lr, weight_decay=decay)
    for grad, step in zip(grads, recall(Elementwise(), grads, 0.9), strict=True):
        param.grad = grad[0].clone()
        optimizer.step()
        weight = (1 - lr * decay) * weight - lr * step[0]
    torch.testing.assert_close(weight, param.detach(), rtol=1e-10, atol=1e-12)


def test_sums_that_keep_the_last_gradient_alone_are_adagrad():
    grads = gradients()
    found = recall(Elementwise(second_retention=None, eps=1e-10), grads, 0.0)
    assert_steps_equal(found, torch_steps(torch.optim.Adagrad, grads))


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_momentum_form_is_adagrad_read_with_a_heavy_ball(momentum):
    """Momentum times the root of H: torch's two optimizers, each for one of the statistics."""
    grads = gradients()
    found = recall(Elementwise(second_retention=None, eps=0.0), grads, momentum)
    balls = torch_steps(torch.optim.SGD, grads, momentum=momentum)
    adagrad = torch_steps(torch.optim.Adagrad, grads, eps=0.0)
    expected = [b * a / g for b, a, g in zip(balls, adagrad, grads, strict=True)]
    assert_steps_equal(found, expected)


def test_the_energy_for_a_value_is_the_heavy_ball():
    grads = gradients()
    found = recall(Elementwise("energy", second_retention=None, eps=0.0), grads, 0.9)
    assert_steps_equal(found, torch_steps(torch.optim.SGD, grads, momentum=0.9))


def test_the_printed_sums_are_neither_adagrad_nor_adam_and_their_betas_scale_the_step():
    grads = gradients()
    beta1, beta2 = 0.7, 0.6
    printed, momenta = [], []
    for count in range(1, len(grads) + 1):
        seen = torch.stack(grads[:count])
        first, second = beta1 * seen.sum(0), beta2 * seen.square().sum(0)
        printed.append(seen.square().sum(0).sqrt() * first / second)  # Eq 102 with P of Eq 105
        momenta.append(seen.square().sum(0) * first / second)  # and with P of Eq 104
    sums = recall(Elementwise(second_retention=None, eps=0.0), grads, 1.0)
    assert_steps_equal(printed, [beta1 / beta2 * step for step in sums])
    assert_steps_equal(momenta, [beta1 / beta2 * s for s in torch.stack(grads).cumsum(0)])
    adagrad = torch_steps(torch.optim.Adagrad, grads)
    torch.testing.assert_close(sums[0], adagrad[0])  # the first gradient is the sum of all
    for step, theirs in zip(sums[1:], adagrad[1:], strict=True):
        assert (step - theirs).abs().max() > 0.1
    adam = torch_steps(torch.optim.AdamW, grads, betas=(beta1, beta2), weight_decay=0.0)
    assert (printed[-1] - adam[-1]).abs().max() > 0.1


def test_outer_products_of_gradients_along_the_axes_are_the_elementwise_memory():
    grads = [torch.zeros(1, 2, 3, dtype=torch.float64) for _ in range(6)]
    for index, grad in enumerate(grads):
        grad.view(-1)[index] = index + 1.0
    found = recall(OuterProduct(eps=0.1), grads, 0.9)
    assert_steps_equal(found, recall(Elementwise(second_retention=None, eps=0.1), grads, 0.9))


def test_outer_products_turn_with_the_coordinates():
    """Unlike the element-wise memory, they know no axes: rotated gradients, rotated steps."""
    grads = gradients(rows=2, columns=3)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q

    def rotated(tensor):
        return (tensor.flatten(1) @ rotation).view_as(tensor)

    def gap(memory):
        turned = recall(memory, [rotated(grad) for grad in grads], 0.0)[-1]
        return (turned - rotated(recall(memory, grads, 0.0)[-1])).abs().max()

    assert gap(OuterProduct()) < 1e-6
    assert gap(Elementwise(second_retention=None)) > 0.01


@pytest.mark.parametrize(
    "memory", [Elementwise(), Elementwise("energy"), Elementwise(second_retention=None, eps=0.0),
               OuterProduct(), OuterProduct(eps=0.0)],
)  # fmt: skip
def test_zero_gradients_read_as_zero_and_rows_do_not_meet(memory):
    grads = gradients(batch=2)
    for grad in grads:
        grad[0] = 0
    reads = recall(memory, grads, 0.9)
    alone = recall(memory, [grad[1:] for grad in grads], 0.9)
    assert not torch.stack(reads)[:, 0].any()
    assert_steps_equal([read[1:] for read in reads], alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Elementwise("root mean square"), "Invalid value"),
        (lambda: Elementwise(second_retention=1.0), r"Invalid second_retention: 1\.0"),
        (lambda: Elementwise(eps=-1.0), r"Invalid eps: -1\.0"),
        (lambda: OuterProduct(eps=float("nan")), "Invalid eps: nan"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
