"""A plain loop whose optimizer is made as timm's are: by name, with rates that differ by layer.

Run it with ``python docs/examples/layer_decay.py``: seconds on a CPU, nothing to download.
"""

import torch
from torch import Tensor, nn

import deepopt


class Encoder(nn.Module):
    """Patches in, blocks, a mean, a head."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.embed(patches)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


def main() -> None:
    torch.manual_seed(0)
    model = Encoder()
    optimizer = deepopt.create_optimizer(
        model, "deep_momentum", lr=2e-3, weight_decay=0.05, layer_decay=0.75
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    x = torch.randn(128, 9, 16)
    y = (x.mean(1)[:, :2] > 0).long() @ torch.tensor([1, 2])
    for step in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 13 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}")
    for group in optimizer.param_groups:
        rate, decay = group["initial_lr"], group["weight_decay"]
        print(f"lr {rate:.2e}  decay {decay}  {group['path']:<11}  {group['param_names'][0]}, ...")


if __name__ == "__main__":
    main()
