"""Hope on a GPU equals Hope in float64 on the CPU."""

import copy

import torch

from deepopt.hope import Hope, HopeConfig
from tests.gpu import DEVICE, needs_gpu

pytestmark = needs_gpu
CONFIG = HopeConfig(
    vocab_size=64, dim=64, heads=2, layers=2, memory_chunk=16, projection_chunk=32,
    cms_chunks=(32, 64),
)  # fmt: skip


def models():
    torch.manual_seed(0)
    exact = Hope(CONFIG).double()
    torch.nn.init.normal_(exact.head.weight, std=0.1)
    return exact, copy.deepcopy(exact).to(DEVICE, torch.float32)


def tokens(length, batch=2):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


def relative(found, exact):
    return (found.cpu().double() - exact).norm() / exact.norm()


def test_forward_and_backward_equal_float64_on_the_cpu():
    exact, model = models()
    text = tokens(131)
    outputs = []
    for each in (exact, model):
        device = next(each.parameters()).device
        out = each(text[:, :-1].to(device), text[:, 1:].to(device))
        out.loss.backward()
        outputs.append(out)
    assert relative(outputs[1].logits.detach(), outputs[0].logits.detach()) < 1e-4
    for (name, mine), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative(mine.grad, right.grad) < 1e-3, name


@torch.no_grad()
def test_decoding_token_by_token_equals_the_whole_in_float64_on_the_cpu():
    exact, model = models()
    text = tokens(70)
    expected = exact(text).logits
    state, logits = None, []
    for piece in text.to(DEVICE).split([32, *[1] * 38], 1):
        out = model(piece, state=state)
        state = out.state
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), expected) < 1e-4


def test_bfloat16_autocast_trains():
    import deepopt

    _, model = models()
    optimizer = deepopt.DeepMomentum(deepopt.param_groups(model), lr=2e-3)
    text = tokens(65, 4).to(DEVICE)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(text[:, :-1], text[:, 1:]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float())
    assert losses[-1] < losses[0]
