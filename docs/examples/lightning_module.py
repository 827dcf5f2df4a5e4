"""A Lightning module with DeepMomentum: scheduler, clipping, checkpoint and a resumed run.

Run it with ``python docs/examples/lightning_module.py``: seconds on a CPU, nothing to download.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deepopt

EPOCHS = 8

x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
y = (x[:, :4].sum(1) > 0).long() + 2 * (x[:, 4] > 0).long()
loader = DataLoader(TensorDataset(x, y), batch_size=32)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = deepopt.create_optimizer(self, "deep_momentum", lr=1e-2, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def make_trainer(folder: Path) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[
            lightning.pytorch.callbacks.ModelCheckpoint(
                dirpath=folder, filename="{epoch}", save_top_k=-1
            )
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = Classifier()
        trainer = make_trainer(Path(name))
        trainer.fit(whole, loader)
        resumed = Classifier()
        checkpoint = Path(name) / f"epoch={EPOCHS // 2 - 1}.ckpt"
        make_trainer(Path(name)).fit(resumed, loader, ckpt_path=str(checkpoint))
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert gap <= 1e-6, f"the resumed run ended {gap} away"
    print(f"loss {trainer.callback_metrics['loss']:.3f}; resumed run differs by {gap:.1e}")


if __name__ == "__main__":
    main()
