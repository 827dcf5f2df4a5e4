"""What only a GPU shows: graphs, streams, devices, and that nothing waits."""

import copy

import pytest
import torch

import deepopt
from deepopt.ops import (
    ScaleArguments,
    adamw_,
    apply_update_,
    backend,
    combine,
    frobenius,
    horizons_write,
    multi_scale_write,
    scale_update,
)
from deepopt.ops.operator import why_not
from tests.gpu import captured, no_waiting

pytestmark = pytest.mark.skipif(bool(why_not("cuda")), reason=why_not("cuda") or "")
CUDA = torch.device("cuda")
RATES = (1e-2, 0.9, 0.99, 1e-8, 0.1, False)


def lists(sizes=((64, 48), (48,), (7, 3)), device=CUDA):
    """Arguments of adamw_ up to the steps, which are on the device."""
    params = [torch.randn(size, device=device) for size in sizes]
    kinds = [[torch.randn_like(p).abs() for p in params] for _ in range(3)]
    return [params, *kinds, [torch.zeros((), device=device) for _ in params]]


def on_cpu(given):
    return [[tensor.cpu() for tensor in kind] for kind in given]


def assert_close(ours, theirs):
    for kind, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close([x.cpu() for x in kind], [x.cpu() for x in other])


def test_operators_do_not_wait_for_the_device():
    given, steps = lists(), [torch.zeros(()) for _ in range(3)]
    ones, norm, rows = (torch.ones(*size, device=CUDA) for size in ((1,), (1,), (1, 64)))
    host = torch.zeros(1)
    with backend("cuda"), no_waiting():
        adamw_(*given, [], [], *RATES)
        adamw_(*given[:4], steps, [], [], *RATES)
        apply_update_(given[0], given[1], [], [], 1e-2, 0.1)
        matrices = given[0][0][None]
        combine([matrices, matrices], ones.expand(2, 1))
        frobenius(matrices)
        for step in (host, ones):
            states = (norm, rows, rows)
            numbers = (step + 1, 0.9, 0.99, 1.5, 1.0)
            scale_update([matrices], ScaleArguments(matrices, matrices, *numbers, *states))
        multi_scale_write(matrices, matrices, matrices, ones, 0.9, 3, 0.99)
        phi = torch.ones(1, 2, 8, device=CUDA)
        horizons_write(
            [matrices, matrices], matrices, ones.expand(1, 2), ones, phi, ones, [0.9, 0.7]
        )


def test_a_replayed_graph_goes_on_counting():
    given = lists()
    expected = on_cpu(given)
    with backend("cuda"):
        adamw_(*copy.deepcopy(given), [], [], *RATES)  # loads the kernels before the capture
        replay = captured(lambda: adamw_(*given, [], [], *RATES), warm_up=0)
        for _ in range(3):
            replay()
    for _ in range(3):
        adamw_(*expected, [], [], *RATES)
    assert [int(step) for step in given[4]] == [3, 3, 3]
    assert_close(given, expected)


def test_a_graph_of_an_optimizer_step_replays_to_the_same_parameters():
    made = []
    for replayed in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 16)).to(CUDA)
        optimizer = deepopt.DeepMomentum(model.parameters(), lr=1e-2, capturable=True)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        play = captured(optimizer.step) if replayed else optimizer.step
        if not replayed:
            for _ in range(3):
                optimizer.step()
        for _ in range(4):
            play()
        made.append([param.detach().clone() for param in model.parameters()])
    torch.testing.assert_close(*made)


def test_kernels_run_on_the_current_stream():
    given = lists()
    expected = on_cpu(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), backend("cuda"):
        torch.cuda._sleep(10_000_000)
        given[1] = [grad + 1 for grad in given[1]]  # must be there before the kernel reads it
        adamw_(*given, [], [], *RATES)
    stream.synchronize()
    expected[1] = [grad + 1 for grad in expected[1]]
    adamw_(*expected, [], [], *RATES)
    assert_close(given, expected)


def test_tensors_of_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    given = lists(device=torch.device("cuda", 1))
    expected = on_cpu(given)
    with torch.cuda.device(0), backend("cuda"):
        adamw_(*given, [], [], *RATES)
        assert torch.cuda.current_device() == 0
    adamw_(*expected, [], [], *RATES)
    assert_close(given, expected)


def test_tensors_of_host_and_device_are_refused():
    for index in (0, 1, 2):
        given = lists()
        given[index][2] = given[index][2].cpu()
        with backend("cuda"), pytest.raises(RuntimeError, match="one device"):
            adamw_(*given, [], [], *RATES)
        with backend("cuda"), pytest.raises(RuntimeError, match="one device"):
            apply_update_(given[0], [g.cpu() for g in given[1]], [], [], 1e-2, 0.1)


def test_tensors_of_two_devices_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    given = lists()
    given[1][2] = given[1][2].to("cuda:1")
    with backend("cuda"), pytest.raises(RuntimeError, match="one device"):
        adamw_(*given, [], [], *RATES)


def test_more_entries_than_32_bits_count():
    entries = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 4 * entries * 3:
        pytest.skip("needs 26 GB of GPU memory")
    param = torch.zeros(entries, device=CUDA)
    update = torch.ones(entries, device=CUDA)
    with backend("cuda"):
        apply_update_([param], [update], [], [], 0.5, 0.0)
    assert param[-6:].tolist() == [-0.5] * 6
    assert param.sum(dtype=torch.float64).item() == -0.5 * entries


def test_results_are_the_same_bit_for_bit_in_every_run():
    matrices = torch.randn(3, 700, 513, device=CUDA)
    with backend("cuda"):
        assert torch.equal(frobenius(matrices), frobenius(matrices))
