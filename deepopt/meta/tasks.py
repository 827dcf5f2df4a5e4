"""Tasks to meta-train on: small networks and synthetic data, steady or switching between regimes.

No real data set is used, so that any data set on which a trained memory is measured is new to it.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deepopt.hope import Hope, HopeConfig

KINDS = ("regression", "classification", "language", "images", "hope")
USUAL_KINDS = KINDS[:3]
"""Those that a search learns from unless it is told otherwise."""
REGIMES = 3
CLASSES = 10
SIDE, PATTERN = 8, 3
"""Sides of an image, and of the pattern that is somewhere in it."""
MAPS = ("key", "value", "query", "gate", "output")
"""The square matrices of Hope's layer."""
TOKENS, LENGTH = 32, 17
Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One training run, without its optimizer.

    Args:
        kind: "regression" and "classification" learn random networks, "language" a Markov chain
            of second order with a Transformer, "hope" the same with a Hope, "images" which of ten
            patterns is in an image, with a convolutional network.
        seed: the seed of the data and the initial weights.
        dim: width of the network.
        layers: hidden layers, convolutions, or blocks of a Transformer or a Hope.
        batch_size: examples, images, or sequences of 16 tokens.
        noise: standard deviation of the answers' noise, or the share of random answers.
        period: steps until the next of three regimes, which recur; 0 for a single regime.
        steps: training steps. With regimes the rate stays constant, without it decays to zero.
        scale: the matrices are multiplied by factors from 1/scale (the first) to scale (the last),
            and the network divides by them again. The function is the same, but one learning rate
            means different step sizes for different matrices.
    """

    kind: str
    seed: int
    dim: int
    layers: int
    batch_size: int
    noise: float
    period: int
    steps: int
    scale: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step relative to its peak."""
        warm = min(1.0, 16 * (step + 1) / self.steps)
        return warm if self.period else warm * (1 - step / self.steps)

    def batch(self, step: int) -> Batch:
        """Inputs and answers."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        regime = step // self.period % REGIMES if self.period else 0
        if self.kind in ("language", "hope"):
            return self._text(self._chain(regime), generator)
        if self.kind == "images":
            return self._images(regime, generator)
        x = torch.randn(self.batch_size, self.dim, generator=generator)
        first, second = self._teacher(regime)
        y = torch.tanh(2 * x @ first) @ second
        if self.kind == "regression":
            return x, y + self.noise * torch.randn(y.shape, generator=generator)
        return x, self._flipped(y.argmax(-1), y.shape[-1], generator)

    def _flipped(self, answers: Tensor, kinds: int, generator: torch.Generator) -> Tensor:
        wrong = torch.rand(answers.shape, generator=generator) < self.noise
        return torch.where(wrong, torch.randint(kinds, answers.shape, generator=generator), answers)

    def _of_regime(self, regime: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed - 1 - regime)

    def _teacher(self, regime: int) -> tuple[Tensor, Tensor]:
        generator, hidden = self._of_regime(regime), 8
        first = torch.randn(self.dim, hidden, generator=generator) / self.dim**0.5
        return first, torch.randn(hidden, CLASSES, generator=generator) / hidden**0.5

    def _images(self, regime: int, generator: torch.Generator) -> Batch:
        """Noise with one of the regime's patterns somewhere in it, and which one."""
        shape = (CLASSES, PATTERN, PATTERN)
        patterns = 2 * torch.randn(shape, generator=self._of_regime(regime))
        answers = torch.randint(CLASSES, (self.batch_size,), generator=generator)
        images = torch.randn(self.batch_size, SIDE, SIDE, generator=generator)
        corners = torch.randint(SIDE - PATTERN + 1, (self.batch_size, 2), generator=generator)
        for image, answer, (row, column) in zip(images, answers, corners.tolist(), strict=True):
            image[row : row + PATTERN, column : column + PATTERN] += patterns[answer]
        return images[:, None], self._flipped(answers, CLASSES, generator)

    def _chain(self, regime: int) -> Tensor:
        """Logits of the next token after the last token, and after the one before it."""
        return 1.5 * torch.randn(2, TOKENS, TOKENS, generator=self._of_regime(regime))

    def _text(self, chain: Tensor, generator: torch.Generator) -> Batch:
        tokens = [torch.randint(TOKENS, (self.batch_size,), generator=generator) for _ in range(2)]
        for _ in range(LENGTH - 1):
            logits = chain[0, tokens[-1]] + chain[1, tokens[-2]]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            tokens.append(self._flipped(drawn, TOKENS, generator))
        text = torch.stack(tokens[1:], 1)
        return text[:, :-1], text[:, 1:]

    def weights(self) -> Params:
        """The initial weights: those called "matrices" are a stack of equal shapes."""
        if self.kind == "hope":
            return self._weights_of_hope()
        generator = torch.Generator().manual_seed(self.seed)
        language, inputs = self.kind == "language", self.dim
        if self.kind == "images":  # a row has the weights of one channel's filter
            inputs *= PATTERN**2
        count = 6 * self.layers if language else self.layers
        size = self.dim**-0.5 if language else (2 / inputs) ** 0.5
        shape = (count, self.dim, inputs)
        matrices = size * torch.randn(shape, generator=generator)
        weights = {"matrices": self._scales(count) * matrices}
        if language:
            weights["embedding"] = torch.randn(TOKENS, self.dim, generator=generator)
            weights["position"] = 0.3 * torch.randn(LENGTH, self.dim, generator=generator)
        if self.kind == "images":
            stem = (self.dim, 1, PATTERN, PATTERN)
            weights["stem"] = torch.randn(stem, generator=generator) / PATTERN
        weights["head"] = torch.zeros(TOKENS if language else CLASSES, self.dim)
        return weights

    def _weights_of_hope(self) -> Params:
        _hope_of(self.dim, self.layers)  # made here, because no transform may draw random numbers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Hope(_config(self.dim, self.layers))
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        matrices = [weights.pop(name) for name in _names_of_maps(self.layers)]
        return {"matrices": self._scales(len(matrices)) * torch.stack(matrices), **weights}

    def _scales(self, count: int) -> Tensor:
        """What the matrices are multiplied by, shape (count, 1, 1)."""
        return self.scale ** torch.linspace(-1, 1, count)[:, None, None]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        x, y = batch
        matrices = params["matrices"]
        params = {**params, "matrices": matrices / self._scales(len(matrices))}
        answers = self._answers(params, x)
        if self.kind == "regression":
            return F.mse_loss(answers, y)
        return F.cross_entropy(answers.flatten(0, -2), y.flatten())

    def _answers(self, params: Params, x: Tensor) -> Tensor:
        if self.kind == "hope":
            return _hope(params, x, self.dim, self.layers)
        if self.kind == "language":
            x = _transformer(params, x)
        elif self.kind == "images":
            x = _convolved(params, x)
        else:
            for matrix in params["matrices"].unbind(0):
                x = F.gelu(x @ matrix.mT)
        return x @ params["head"].mT


def _transformer(params: Params, tokens: Tensor) -> Tensor:
    """Pre-norm blocks of one head each, whose MLPs are as wide as the residual stream."""
    x = params["embedding"][tokens] + params["position"][: tokens.shape[1]]
    dim = x.shape[-1:]
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for block in params["matrices"].unflatten(0, (-1, 6)).unbind(0):
        query, key, value, out, up, down = block.mT.unbind(0)
        z = F.rms_norm(x, dim)
        q, k = (F.rms_norm(z @ matrix, dim) for matrix in (query, key))
        attention = (2 * q @ k.mT / dim[0] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + attention @ (z @ value) @ out
        x = x + F.gelu(F.rms_norm(x, dim) @ up) @ down
    return F.rms_norm(x, dim)


def _convolved(params: Params, images: Tensor) -> Tensor:
    """Convolutions one after the other, and the mean over the image."""
    x = F.gelu(F.conv2d(images, params["stem"], padding="same"))
    for matrix in params["matrices"].unbind(0):
        filters = matrix.unflatten(-1, (-1, PATTERN, PATTERN))
        x = F.gelu(F.conv2d(x, filters, padding="same"))
    return x.mean((-2, -1))


def _config(dim: int, layers: int) -> HopeConfig:
    return HopeConfig(
        vocab_size=TOKENS, dim=dim, layers=layers, heads=2, memory_chunk=8, projection_chunk=8
    )


def _names_of_maps(layers: int) -> list[str]:
    return [f"blocks.{block}.titans.{name}.weight" for block in range(layers) for name in MAPS]


@functools.lru_cache
def _hope_of(dim: int, layers: int) -> Hope:
    """The model without weights, which are given in each call."""
    with torch.device("meta"):
        return Hope(_config(dim, layers))


def _hope(params: Params, tokens: Tensor, dim: int, layers: int) -> Tensor:
    """Logits of a Hope."""
    maps = zip(_names_of_maps(layers), params["matrices"].unbind(0), strict=True)
    rest = {name: weight for name, weight in params.items() if name != "matrices"}
    weights = {**rest, **dict(maps)}
    logits: Tensor = torch.func.functional_call(_hope_of(dim, layers), weights, (tokens,)).logits
    return logits


def draw(
    seed: int, steps: tuple[int, int] = (100, 200), kinds: Sequence[str] = USUAL_KINDS
) -> Task:
    """A random task; even seeds give streams, and the kinds take turns.

    Args:
        seed: decides everything.
        steps: the range of the length of a run (default: (100, 200)).
        kinds: to choose from (default: ``USUAL_KINDS``).
    """
    rng = random.Random(f"task {seed}")
    kind = kinds[seed // 2 % len(kinds)]
    language = kind in ("language", "hope")
    return Task(
        kind,
        seed,
        dim=rng.choice((16, 24, 32)),
        layers=1 if language else rng.choice((1, 2, 3)),
        batch_size=rng.choice((8, 16)) if language else rng.choice((16, 64, 256)),
        noise=rng.choice((0.0, 0.1, 0.3)) if kind == "regression" else rng.choice((0.0, 0.1)),
        period=0 if seed % 2 else rng.choice((15, 25, 40)),
        steps=rng.randint(*steps),
        # The usual kinds keep their scale, so that a search that was made can be repeated.
        scale=1.0 if kind in USUAL_KINDS else rng.choice((0.5, 1.0, 2.0)),
    )
