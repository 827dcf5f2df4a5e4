"""A loop on Hugging Face's accelerate with DeepMomentum, in bfloat16, and a resumed run.

Run it with ``python docs/examples/accelerate_loop.py``: seconds on a CPU, nothing to download.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import deepopt

EPOCHS = 8

x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
y = (x[:, :4].sum(1) > 0).long() + 2 * (x[:, 4] > 0).long()


def prepare(accelerator: Accelerator) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)
    )
    optimizer = deepopt.create_optimizer(model, "deep_momentum", lr=1e-2, weight_decay=0.01)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    return accelerator.prepare(model, optimizer, loader, scheduler)


def train(accelerator: Accelerator, prepared: tuple, epochs: int) -> float:
    model, optimizer, loader, scheduler = prepared
    for _ in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return loss.item()


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    whole = prepare(accelerator)
    first = train(accelerator, whole, EPOCHS // 2)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        last = train(accelerator, whole, EPOCHS // 2)
        accelerator.free_memory()  # forget what was prepared: as a new process would begin
        resumed = prepare(accelerator)
        accelerator.load_state(folder)
    train(accelerator, resumed, EPOCHS // 2)
    pairs = zip(whole[0].parameters(), resumed[0].parameters(), strict=True)
    gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert gap <= 1e-6, f"the resumed run ended {gap} away"
    print(f"loss {first:.3f}, then {last:.3f}; resumed run differs by {gap:.1e}")


if __name__ == "__main__":
    main()
