import pytest
import torch
from torch import nn

import deepopt
from deepopt.optim.engine import buckets
from deepopt.optim.engine.buckets import batched, distribute, stacked


def separate(*counts):
    return [{"m": torch.randn(count, 2, 3)} for count in counts]


def counts(states):
    return [len(state["m"]) for state in states]


def values(states):
    return torch.cat([state["m"] for state in states])


def owns_its_storage(tensor):
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2, 1)])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_assigned_or_written_reaches_the_states_in_the_tensors_that_they_have(
    sizes, in_place
):
    states = separate(*sizes)
    before, tensors = values(states).clone(), [state["m"] for state in states]
    with stacked(states, ["m"], counts(states)) as found:
        assert torch.equal(found["m"], before)
        if in_place:
            found["m"].add_(1)
        else:
            found["m"] = found["m"] + 1
    assert torch.equal(values(states), before + 1)
    assert all(state["m"] is tensor for state, tensor in zip(states, tensors, strict=True))
    assert all(map(owns_its_storage, tensors))


def test_what_is_not_touched_is_not_copied_back():
    states = separate(1, 1)
    versions = [state["m"]._version for state in states]
    with stacked(states, ["m"], counts(states)):
        pass
    assert [state["m"]._version for state in states] == versions


def test_states_that_are_not_contiguous_are_stacked():
    for count in (1, 2):
        states = [{"m": torch.arange(6.0).view(1, 3, 2).mT} for _ in range(count)]
        with stacked(states, ["m"], counts(states)) as found:
            assert found["m"].is_contiguous()
            found["m"].add_(1)
        assert torch.equal(states[-1]["m"], torch.arange(6.0).view(1, 3, 2).mT + 1)


def test_an_exception_leaves_the_states_as_they_were():
    states = [{"m": torch.zeros(1, 3)}, {"m": torch.zeros(1, 3)}]

    def fail():
        with stacked(states, ["m"], counts(states)) as found:
            found["m"] += 1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert not any(state["m"].any() for state in states)


@pytest.mark.parametrize("count", [1, 2])
def test_differentiable_states_are_new_tensors_with_their_history(count):
    old = [torch.zeros(1, 3) for _ in range(count)]
    states, scale = [{"m": tensor} for tensor in old], torch.tensor(2.0, requires_grad=True)
    with stacked(states, ["m"], counts(states), differentiable=True) as found:
        found["m"] = found["m"] + scale
    values(states).sum().backward()
    assert scale.grad == 3 * count
    assert not torch.cat(old).any()


def test_parts_that_are_handed_out_share_no_storage():
    states = [{}, {}]
    distribute(torch.arange(3.0).view(3, 1), states, "m", [1, 2])
    assert [state["m"].flatten().tolist() for state in states] == [[0], [1, 2]]
    assert all(owns_its_storage(state["m"]) for state in states)


def test_updates_are_applied_together_within_a_group_and_while_they_are_small(monkeypatch):
    monkeypatch.setattr(buckets, "ENTRIES_AT_ONCE", 1000)
    sizes = [(16, 20), (16, 30), (20, 30), (16, 24), (40, 40), (16, 16)]
    params = [nn.Parameter(torch.ones(size)) for size in sizes]
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    optimizer = deepopt.DeepMomentum(groups, path="matrix")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    every = [
        bucket
        for group in optimizer.param_groups
        for bucket in optimizer._buckets(group, [param.grad for param in group["params"]])
    ]
    states = [[optimizer.state[param] for param in bucket.params] for bucket in every]
    found = [
        [tuple(param.shape) for bucket, _ in batch for param in bucket.params]
        for batch in batched(zip(every, states, strict=True))
    ]
    assert found == [[(16, 20), (16, 30)], [(20, 30), (16, 24)], [(40, 40)], [(16, 16)]]


def test_updates_of_parameters_that_overlap_are_applied_one_after_the_other():
    base = torch.ones(32, 40)
    params = [nn.Parameter(base), nn.Parameter(base[:16]), nn.Parameter(torch.ones(20, 24))]
    optimizer = deepopt.DeepMomentum(params, path="matrix")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    every = optimizer._buckets(optimizer.param_groups[0], [param.grad for param in params])
    states = [[optimizer.state[param] for param in bucket.params] for bucket in every]
    assert [len(batch) for batch in batched(zip(every, states, strict=True))] == [1, 1, 1]
