"""FSDP2 on a GPU: one rank on NCCL steps as the model without it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepopt
from deepopt.memory import BUILT_IN
from tests.gpu import DEVICE, HERE, needs_gpu

pytestmark = [
    needs_gpu,
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    if HERE:
        torch.cuda.set_device(0)
    backend = "nccl" if HERE else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("memory", BUILT_IN)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # NCCL's and DTensor's own
def test_fsdp2_on_one_rank_equals_the_model_without_it(group, memory):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layers = (nn.Linear(96, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 160))
    plain = nn.Sequential(*layers).to(DEVICE)
    model = copy.deepcopy(plain)
    mesh = init_device_mesh(DEVICE.type, (1,))
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = torch.randn(64, 96, device=DEVICE)
    optimizers = [
        deepopt.DeepMomentum(each.parameters(), lr=1e-2, memory=memory) for each in (model, plain)
    ]
    for _ in range(4):
        model.zero_grad()
        model(inputs).square().mean().backward()
        # Its own gradients, to the bit: Newton-Schulz enlarges what differs in the last place.
        for mine, twin in zip(model.parameters(), plain.parameters(), strict=True):
            twin.grad = mine.grad.full_tensor()
        for optimizer in optimizers:
            optimizer.step()
    for mine, twin in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), twin, rtol=1e-5, atol=1e-6)
