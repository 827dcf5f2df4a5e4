"""W2: next token of English, 8,192 tokens a batch: gradients are signal."""

from torch import Tensor, nn

from benchmarks.quality import english, language
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads.lm_code import Logits
from benchmarks.transformer import TransformerConfig
from deepopt.data import evaluation_batches, sample_batch

LENGTH = 64


def data(seed: int, step: int) -> language.Text:
    return language.Text(*sample_batch(english.of_tokens().train, 128, LENGTH, seed, step))


def model() -> nn.Module:
    return Logits(TransformerConfig(vocab_size=1024, dim=64, layers=2))


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    texts = evaluation_batches(english.of_tokens().val, 64, LENGTH, 256)
    return language.mean_loss(model, [language.Text(*text) for text in texts])


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=150,
    about="next token of a public-domain English text in 1,024 tokens of a byte pair encoding, a "
    "Transformer of width 64 with two layers and a zero head, batches of 128 x 64 tokens",
    sha256=lambda: english.of_tokens().sha256,
)
