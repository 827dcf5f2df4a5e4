"""``optimizer.state`` is the user's to clear, move, replace and add to, as torch's own is."""

import contextlib
import copy
import gc
import io
import re
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import deepopt
from tests.optim.contract.helpers import (
    ENTRIES,
    EXPECTED_WARNINGS,
    every_class,
    every_settled,
    label,
)

pytestmark = EXPECTED_WARNINGS
SHAPES = [(20, 24), (20, 24), (24, 20), (3,), (5,)]


def params_and_grads(seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return params, generator


def step(optimizer, params, generator, count=2):
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def tensors(value):
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def values(optimizer, params):
    return [copy.deepcopy(dict(optimizer.state.get(param, {}))) for param in params]


@every_settled
def test_every_state_tensor_owns_its_storage(cls, options):
    params, generator = params_and_grads()
    optimizer = cls(params, **options)
    step(optimizer, params, generator, 3)
    held = [t for param in params for t in tensors(dict(optimizer.state[param]))]
    assert held
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({t.untyped_storage().data_ptr() for t in held if t.numel()}) == sum(
        t.numel() > 0 for t in held
    )


@every_settled
@pytest.mark.parametrize("dropped", ["all", "one"])
def test_state_that_is_dropped_is_freed_and_begins_anew(cls, options, dropped):
    params, generator = params_and_grads()
    optimizer = cls(params, **options)
    step(optimizer, params, generator)
    gone = params if dropped == "all" else params[:1]
    held = [weakref.ref(t) for param in gone for t in tensors(dict(optimizer.state[param]))]
    for param in params:
        param.grad = None
    for param in gone:
        del optimizer.state[param]
    gc.collect()
    assert not any(reference() is not None for reference in held)
    step(optimizer, params, generator, 1)
    assert all(torch.isfinite(param).all() for param in params)
    assert optimizer.state[gone[0]]["step"] == 1


@every_settled
def test_entries_of_the_users_are_carried_saved_and_loaded_untouched(cls, options):
    def run(with_entries):
        params, generator = params_and_grads()
        optimizer = cls(params, **options)
        for param in params if with_entries else ():  # before the first step, too
            optimizer.state[param]["before"] = torch.ones(2, dtype=torch.float64)
        step(optimizer, params, generator)
        for param in params if with_entries else ():
            optimizer.state[param]["slow_weights"] = {
                "weights": [param.detach().clone()],
                "note": "mine",
            }
        step(optimizer, params, generator)
        return optimizer, params, generator

    optimizer, params, generator = run(with_entries=True)
    plain, others, _ = run(with_entries=False)
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        own, slow = optimizer.state[param], optimizer.state[param]["slow_weights"]
        assert own["before"].tolist() == [1.0, 1.0]
        assert slow["note"] == "mine"
        assert own.keys() - {"before", "slow_weights"} == plain.state[other].keys()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = cls(copies, **options)
    resumed.load_state_dict(torch.load(file))
    for param, clone in zip(params, copies, strict=True):
        mine, theirs = optimizer.state[param], resumed.state[clone]
        assert theirs["before"].dtype == torch.float64
        assert theirs["slow_weights"]["note"] == "mine"
        assert torch.equal(theirs["slow_weights"]["weights"][0], mine["slow_weights"]["weights"][0])
        assert theirs["slow_weights"]["weights"][0] is not mine["slow_weights"]["weights"][0]
    other_generator = torch.Generator()
    other_generator.set_state(generator.get_state())
    step(optimizer, params, generator, 1), step(resumed, copies, other_generator, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


class Pair(NamedTuple):
    first: Any
    second: Any


FOREIGN = {
    "pair": Pair(1, torch.ones(2, dtype=torch.int8)),
    "array": np.arange(3),
    "range": range(4),
    "size": torch.Size([2, 3]),
    "meta": torch.ones(2, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "double": torch.full((3,), 1 / 3, dtype=torch.float64),
    "text": b"bytes",
    "set": {1, 2},
    "nested": {"list": [Pair(torch.Size([1]), None), range(2)]},
    5: "a key that is no text",
    "function": torch.square,
}


@every_class
@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_entries_of_any_type_are_loaded_as_they_were_saved(cls, when):
    params, generator = params_and_grads()
    optimizer = cls(params)
    if when == "after it":
        step(optimizer, params, generator)
    for param in params:
        optimizer.state[param].update(FOREIGN)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = cls(copies)
    resumed.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, copies, strict=True):
        assert optimizer.state[param].keys() == resumed.state[twin].keys()
        for key, value in FOREIGN.items():
            found = resumed.state[twin][key]
            assert type(found) is type(value)
            assert repr(found) == repr(value)
    other = torch.Generator()
    other.set_state(generator.get_state())
    step(optimizer, params, generator), step(resumed, copies, other)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@pytest.mark.parametrize("path", ["auto", "elementwise"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.float32, "exact")],
)
@pytest.mark.parametrize(
    "mine", ["a note", torch.ones(7, dtype=torch.int16)], ids=["text", "tensor"]
)
def test_an_entry_called_low_is_the_users_where_no_low_bits_are_kept(path, dtype, rounding, mine):
    def run(own):
        params, generator = params_and_grads()
        params = [nn.Parameter(p.detach().to(dtype if p.ndim == 2 else p.dtype)) for p in params]
        params[0] = nn.Parameter(params[0].detach().bfloat16())  # beside one that may keep them
        optimizer = deepopt.DeepMomentum(params, rounding=rounding, path=path)
        for param in params[1:] if own else ():
            optimizer.state[param]["low"] = mine
        step(optimizer, params, generator)
        return optimizer, params

    optimizer, params = run(own=True)
    assert all(torch.equal(a, b) for a, b in zip(params, run(own=False)[1], strict=True))
    resumed = deepopt.DeepMomentum(params, rounding=rounding, path=path)
    resumed.load_state_dict(optimizer.state_dict())
    assert all(repr(resumed.state[param]["low"]) == repr(mine) for param in params[1:])


@every_settled
def test_a_parameter_with_entries_of_the_users_alone_begins_beside_others_that_have_stepped(
    cls, options
):
    params, generator = params_and_grads()
    optimizer = cls(params, **options)
    step(optimizer, params[1:], generator)  # the first one rests
    optimizer.state[params[0]]["mine"] = "kept"
    step(optimizer, params, generator, 1)
    assert optimizer.state[params[0]]["mine"] == "kept"
    assert [int(optimizer.state[param]["step"]) for param in params[:2]] == [1, 3]


@every_settled
@pytest.mark.parametrize("how", ["assigned", "data", "in place"])
def test_a_tensor_that_is_replaced_counts_at_the_next_step(cls, options, how):
    def run(how):
        params, generator = params_and_grads()
        optimizer = cls(params, **options)
        step(optimizer, params, generator)
        for param in params:
            state = optimizer.state[param]
            for key in [k for k in state if k != "step"]:
                other = state[key].detach().clone() + (state[key].dtype.is_floating_point * 0.125)
                if how == "assigned":
                    state[key] = other
                elif how == "data":
                    state[key].data = other
                else:
                    state[key].copy_(other)
        step(optimizer, params, generator, 1)
        return params

    for found, expected in zip(run(how), run("in place"), strict=True):
        assert torch.equal(found, expected)


@every_settled
def test_saving_changes_nothing_and_a_parameters_file_holds_that_parameter_alone(cls, options):
    params, generator = params_and_grads()
    optimizer = cls(params, **options)
    step(optimizer, params, generator)
    before = {key: value for key, value in optimizer.__dict__.items() if "hooks" in key}
    counts = {key: list(value) for key, value in before.items()}
    versions = [t._version for p in params for t in tensors(dict(optimizer.state[p]))]
    optimizer.state_dict()
    assert {key: list(optimizer.__dict__[key]) for key in counts} == counts
    assert [t._version for p in params for t in tensors(dict(optimizer.state[p]))] == versions
    own = dict(optimizer.state[params[0]])
    file = io.BytesIO()
    torch.save(own, file)
    entries = sum(tensor.nbytes for tensor in tensors(own))
    assert len(file.getvalue()) < entries + 4096


def inferred(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("momentum"), "'momentum' of parameter second of shape .* is missing"),
        (
            lambda s: s.update(momentum=s["momentum"].to("meta")),
            r"'momentum' of parameter second .* lies on meta, and the parameter on cpu",
        ),
        (
            lambda s: s.update(momentum=torch.ones(3, 20, 24)),
            r"'momentum' of .*second.*\(3, 20, 24",
        ),
        (lambda s: s.update(step=s["step"].long()), r"'step' of .*second.*torch.int64 on cpu"),
        (lambda s: s.update(step=s["step"].reshape(1)), r"'step' of .*second.*\(1,\)"),
        (lambda s: s.update(step=s["step"].to("meta")), r"'step' of .*second.*on meta"),
        (
            lambda s: s.update(
                momentum=s["momentum"].mean(1, keepdim=True).expand_as(s["momentum"])
            ),
            "'momentum' of .*second.* cannot be written to: it has been expanded",
        ),
        (
            lambda s: s.update(momentum=s["momentum"].as_strided((1, 20, 24), (1, 5, 1))),
            "'momentum' of .*second.* cannot be written to: it has been expanded",
        ),
        (
            lambda s: s.update(momentum=s["momentum"].to_sparse()),
            r"'momentum' of .*second.* of layout torch.sparse_coo: replace it by tensor.to_dense",
        ),
        (
            lambda s: s.update(momentum=inferred(s["momentum"])),
            "'momentum' .* made in inference mode",
        ),
        (lambda s: s.update(step=inferred(s["step"])), "'step' .* made in inference mode"),
    ],
)
def test_a_state_that_fits_no_longer_is_refused_before_anything_moves(spoil, message):
    params, generator = params_and_grads()
    names = ["first", "second", "third", "fourth", "fifth"]
    optimizer = deepopt.DeepMomentum(list(zip(names, params, strict=True)), memory="linear")
    step(optimizer, params, generator)
    spoil(optimizer.state[params[1]])
    before, states = [p.detach().clone() for p in params], values(optimizer, params)
    with pytest.raises(RuntimeError, match=message):
        step(optimizer, params, generator, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for old, new in zip(states, values(optimizer, params), strict=True):
        for a, b in zip(tensors(old), tensors(new), strict=True):
            assert a.is_meta or torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("path", ["auto", "elementwise"])
@pytest.mark.parametrize(
    "spoil", [torch.Tensor.float, lambda low: low[:1], lambda low: low.to("meta"), lambda low: None]
)
def test_low_bits_that_fit_no_longer_are_refused_before_anything_is_written(path, spoil):
    params, generator = params_and_grads()
    params = [nn.Parameter(param.detach().bfloat16()) for param in params]
    optimizer = deepopt.DeepMomentum(params, rounding="exact", path=path)
    step(optimizer, params, generator)
    state = optimizer.state[params[-2]]
    state["low"] = spoil(state["low"])
    before, states = [p.detach().clone() for p in params], values(optimizer, params)
    with pytest.raises(RuntimeError, match=r"'low' of parameter .*shape \(3,\) must be a tensor"):
        step(optimizer, params, generator, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for old, new in zip(states, values(optimizer, params), strict=True):
        for a, b in zip(tensors(old), tensors(new), strict=True):
            assert a.is_meta or torch.equal(a, b)


@every_settled
@pytest.mark.parametrize(
    ("key", "value"), [("lr", "1e-3"), ("lr", -1.0), ("weight_decay", None), ("betas", (0.9,))]
)
def test_a_value_that_becomes_wrong_is_refused_before_anything_moves(cls, options, key, value):
    params, generator = params_and_grads()
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], **options)
    step(optimizer, params, generator)
    optimizer.param_groups[1][key] = value
    with unchanged(optimizer, params), pytest.raises((TypeError, ValueError), match="Invalid"):
        optimizer.step()


@contextlib.contextmanager
def unchanged(optimizer, params):
    """Inside, parameters are not moved and their state is not written to."""
    before, states = [p.detach().clone() for p in params], values(optimizer, params)
    yield
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for old, new in zip(states, values(optimizer, params), strict=True):
        assert old.keys() == new.keys()
        for a, b in zip(tensors(old), tensors(new), strict=True):
            assert torch.equal(a, b)


def refused_and_nothing_moved(optimizer, params, generator, error, message):
    """All parameters, and the states of all but the first, which may be no state at all."""
    first = params[0].detach().clone()
    with unchanged(optimizer, params[1:]), pytest.raises(error, match=message):
        step(optimizer, params, generator, 1)
    assert torch.equal(params[0], first)


@every_class
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("path", "stack", r"Invalid path: 'stack' for parameter .* of shape \((3,|20, 24)\)"),
        ("split", 7, r"Invalid split: 7 for parameter .* rows cannot be cut"),
        ("split", 0, "Invalid split: 0"),
    ],
)
def test_a_path_or_split_that_does_not_fit_in_mid_run_is_refused_before_anything_moves(
    cls, key, value, message
):
    params, generator = params_and_grads()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], path="auto")
    step(optimizer, params, generator)
    group = optimizer.param_groups[1]
    kept, group[key] = group[key], value
    refused_and_nothing_moved(optimizer, params, generator, ValueError, message)
    group[key] = kept
    step(optimizer, params, generator, 1)


@every_class
@pytest.mark.parametrize("value", [None, [], "step", 1.0])
@pytest.mark.parametrize("begun", [True, False])
def test_what_is_put_in_the_place_of_a_state_is_refused_before_anything_moves(cls, value, begun):
    params, generator = params_and_grads()
    optimizer = cls(params)
    step(optimizer, params, generator, 2 * begun)
    optimizer.state[params[0]] = value
    message = r"optimizer.state of parameter .* of shape \(20, 24\) is .* and not a dict"
    refused_and_nothing_moved(optimizer, params, generator, RuntimeError, message)
    del optimizer.state[params[0]]
    step(optimizer, params, generator, 1)


@pytest.mark.parametrize(
    ("cls", "wrong", "error", "message"),
    [
        (cls, wrong, error, message)
        for cls, inputs in ENTRIES
        for wrong, error, message in (
            *inputs.all_errors,
            *(({"split": n}, ValueError, f"Invalid split: {n}") for n in (7, 0, 2.0)),
        )
    ],
    ids=label,
)
def test_what_the_constructor_refuses_is_refused_in_mid_run_too(cls, wrong, error, message):
    params, generator = params_and_grads()
    optimizer = cls([{"params": params[1:]}, {"params": params[:1]}])
    step(optimizer, params, generator)
    optimizer.param_groups[1].update(wrong)
    with unchanged(optimizer, params), pytest.raises(error, match=re.escape(message)):
        optimizer.step()


def expanded():
    return torch.zeros(20, 1).expand(20, 24)


def interleaved():
    return torch.zeros(20 * 24).as_strided((20, 24), (5, 1))


@every_settled
@pytest.mark.parametrize("make", [expanded, interleaved])
def test_a_parameter_with_several_entries_in_one_place_is_refused_before_anything_moves(
    cls, options, make
):
    plain, odd = nn.Parameter(torch.ones(20, 24)), nn.Parameter(make())
    optimizer = cls([{"params": [("a", plain)]}, {"params": [("b", odd)]}], **options)
    plain.grad = odd.grad = torch.ones(20, 24)
    message = "parameter b of shape .* put several entries in one place.*clone"
    with unchanged(optimizer, [plain, odd]), pytest.raises(RuntimeError, match=message):
        optimizer.step()
    odd.data = odd.data.clone(memory_format=torch.contiguous_format)
    optimizer.step()
    odd.data = make()  # in mid-run, too
    with unchanged(optimizer, [plain, odd]), pytest.raises(RuntimeError, match=message):
        optimizer.step()
    odd.grad = None  # what is not stepped is not written to
    optimizer.step()


def test_a_chunk_that_ends_in_a_refused_step_has_counted_nothing():
    plain, odd = nn.Parameter(torch.ones(20, 24)), nn.Parameter(torch.zeros(20, 24))
    inner = deepopt.DeepMomentum([{"params": [plain]}, {"params": [odd]}])
    optimizer = deepopt.Continuum(inner, chunk=2)
    plain.grad = odd.grad = torch.ones(20, 24)
    optimizer.step()
    odd.data = expanded()
    with unchanged(inner, [plain, odd]), pytest.raises(RuntimeError, match="several entries"):
        optimizer.step()
    assert [group["pending_steps"] for group in optimizer.param_groups] == [1, 1]


@every_settled
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            lambda x: torch.zeros(16, 8),
            r"of shape \(16, 8\) on cpu has shape \(16, 8, 3, 3\) on cpu",
        ),
        (lambda x: x.flatten(), r"of shape \(1152,\) on cpu has shape \(16, 8, 3, 3\) on cpu"),
    ],
    ids=["cut", "flat"],
)
def test_a_gradient_that_no_longer_fits_its_parameter_is_refused_before_anything_moves(
    cls, options, replaced, message
):
    plain, odd = nn.Parameter(torch.ones(20, 24)), nn.Parameter(torch.ones(16, 8, 3, 3))
    optimizer = cls([{"params": [("a", plain)]}, {"params": [("b", odd)]}], **options)
    plain.grad, odd.grad = torch.ones(20, 24), torch.ones(16, 8, 3, 3)
    odd.data = replaced(odd.data)
    with unchanged(optimizer, [plain]), pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert not optimizer.state.get(odd)


@pytest.mark.parametrize("path", ["auto", "elementwise"])
def test_parameters_over_one_storage_are_stepped_one_after_the_other(path):
    def run(threads, apart):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            base = torch.linspace(-1, 1, 2**16).view(256, 256)
            params = [nn.Parameter(torch.empty(0)) for _ in range(3)]
            params[0].data, params[1].data, params[2].data = base, base, base[64:128]
            stepped = [[param] for param in params] if apart else [params]
            optimizers = [deepopt.DeepMomentum(x, lr=0.1, path=path) for x in stepped]
            for _ in range(3):
                for param in params:
                    param.grad = torch.ones_like(param)
                for optimizer in optimizers:
                    optimizer.step()
            return base.clone()
        finally:
            torch.set_num_threads(before)

    for threads in (1, 4, 4, 4):
        # The same threads in both: torch's products have other last bits with another number.
        expected = run(threads, apart=True)
        assert torch.isfinite(expected).all()
        assert torch.equal(run(threads, apart=False), expected)
