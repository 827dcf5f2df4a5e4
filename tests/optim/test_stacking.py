import pytest
import torch

from deepopt.optim.stacking import distribute, stacked


def separate(counts):
    return [{"m": torch.randn(count, 2, 3)} for count in counts]


def test_states_made_together_are_stacked_without_a_copy():
    states = [{}, {}, {}]
    whole = torch.randn(4, 2, 3)
    distribute(whole, states, "m", [1, 2, 1])
    with stacked(states, ["m"], False, {}) as found:
        assert found["m"].data_ptr() == whole.data_ptr()
        assert found["m"].shape == whole.shape
        found["m"].add_(1)
    assert torch.equal(states[1]["m"], whole[1:3])


def test_separate_states_move_into_one_storage_at_their_first_use():
    states = separate([1, 2])
    before = [state["m"].clone() for state in states]
    with stacked(states, ["m"], False, {}) as found:
        assert torch.equal(found["m"], torch.cat(before))
        found["m"].mul_(2)
        address = found["m"].data_ptr()
    assert torch.equal(states[1]["m"], 2 * before[1])
    with stacked(states, ["m"], False, {}) as found:
        assert found["m"].data_ptr() == address


def test_some_states_of_a_storage_are_written_back_and_stay_where_they_are():
    states = [{}, {}, {}]
    whole = torch.arange(3.0).view(3, 1)
    distribute(whole, states, "m", [1, 1, 1])
    with stacked([states[0], states[2]], ["m"], False, {}) as found:
        found["m"].add_(10)
    assert whole.flatten().tolist() == [10, 1, 12]
    assert states[2]["m"].data_ptr() == whole[2:].data_ptr()


def test_another_order_than_that_of_the_storage_is_respected():
    states = [{}, {}]
    distribute(torch.tensor([[1.0], [2.0]]), states, "m", [1, 1])
    with stacked(states[::-1], ["m"], False, {}) as found:
        assert found["m"].flatten().tolist() == [2, 1]


def test_states_that_are_not_contiguous_are_stacked():
    states = [{"m": torch.arange(6.0).view(1, 3, 2).mT} for _ in range(2)]
    with stacked(states, ["m"], False, {}) as found:
        found["m"].add_(1)
    assert torch.equal(states[1]["m"], torch.arange(6.0).view(1, 3, 2).mT + 1)


def test_assigned_tensors_reach_the_states_and_keep_their_storage():
    states = [{}, {}]
    whole = torch.zeros(2, 3)
    distribute(whole, states, "m", [1, 1])
    with stacked(states, ["m"], False, {}) as found:
        found["m"] = found["m"] + 1
    assert torch.equal(whole, torch.ones(2, 3))
    assert states[1]["m"].data_ptr() == whole[1:].data_ptr()


def test_an_exception_leaves_the_states_as_they_were():
    states = [{"m": torch.zeros(1, 3)}, {"m": torch.zeros(1, 3)}]

    def fail():
        with stacked(states, ["m"], False, {}) as found:
            found["m"] = found["m"] + 1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert not any(state["m"].any() for state in states)


def test_differentiable_states_are_new_tensors_with_their_history():
    old = torch.zeros(1, 3)
    states, scale = [{"m": old}], torch.tensor(2.0, requires_grad=True)
    with stacked(states, ["m"], True, {}) as found:
        found["m"] = found["m"] + scale
    states[0]["m"].sum().backward()
    assert scale.grad == 3
    assert not old.any()


def test_what_is_joined_is_found_again_without_a_look_at_storages_until_a_tensor_is_replaced():
    states = [{"m": torch.ones(2, 3)}, {"m": torch.ones(1, 3)}]
    joints = {}
    with stacked(states, ["m"], False, joints) as first:
        pass
    with stacked(states, ["m"], False, joints) as again:
        again["m"] = again["m"] + 1
    assert first["m"].data_ptr() == joints[id(states[0])].whole[0].data_ptr()
    assert torch.equal(states[1]["m"], torch.full((1, 3), 2.0))
    states[1]["m"] = torch.full((1, 3), 7.0)
    with stacked(states, ["m"], False, joints) as found:
        assert torch.equal(found["m"], torch.tensor([[2.0] * 3, [2.0] * 3, [7.0] * 3]))
