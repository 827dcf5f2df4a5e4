import pytest
import torch

from deepopt.memory import BUILT_IN, Linear, OnePass, resolve


def recall(memory, state, grad, retention):
    """Write, and read."""
    if isinstance(memory, OnePass):
        return memory.write_and_read(state, grad, retention)
    memory.write(state, grad, retention)
    return memory.read(state, grad, retention)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_name_gives_a_memory_whose_rows_do_not_depend_on_one_another(name):
    memory = resolve(name)
    grads = torch.randn(5, 3, 4, 6)

    def run(grads):
        state = memory.init(grads[0])
        for step, grad in enumerate(grads, 1):
            state["step"] = torch.full((len(grad),), float(step))
            found = recall(memory, state, grad, 0.9)
        return found

    together = run(grads)
    alone = torch.cat([run(grads[:, i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_writing_leaves_the_gradient_alone(name):
    memory, grad = resolve(name), torch.randn(2, 4, 6)
    before = grad.clone()
    state = {**memory.init(grad), "step": torch.ones(2)}
    recall(memory, state, grad, 0.9)
    assert torch.equal(grad, before)


def test_the_linear_memory_is_an_exponential_average_with_a_look_ahead():
    grads = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    weights = 0.1 * 0.9 ** torch.arange(3, -1, -1, dtype=torch.float64)
    average = (weights[:, None, None, None] * grads).sum(0)
    for nesterov, expected in ((False, average), (True, 0.9 * average + 0.1 * grads[-1])):
        memory = Linear(nesterov=nesterov)
        state = memory.init(grads[0])
        for grad in grads:
            memory.write(state, grad, 0.9)
        torch.testing.assert_close(memory.read(state, grads[-1], 0.9), expected)


def test_unknown_names_and_other_objects_are_refused():
    with pytest.raises(ValueError, match="Invalid memory: 'liner'; choose 'linear'"):
        resolve("liner")
    for other in (Linear, 3, None):
        with pytest.raises(TypeError, match="init, write and read"):
            resolve(other)
