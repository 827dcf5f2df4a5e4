"""W7: bytes of sources, then of English, then of sources again: what is forgotten on the way.

Rates fall to zero over a run, as in every workload, so that the return is learned at lower ones.
"""

import statistics

from torch import Tensor, nn

from benchmarks.quality import datasets, english, language
from benchmarks.quality.online import Online, kept, losses
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import lm_code
from deepopt.data import evaluation_batches, sample_batch

PHASE = 150
"""Steps after which the text changes, by turns; the usual run has three phases."""
LEVEL, FIRST = 20, 5
"""Steps that the level before a change, and the loss after it, are means of."""


def data(seed: int, step: int) -> language.Text:
    if step // PHASE % 2 == 0:
        return lm_code.data(seed, step)
    return language.Text(*sample_batch(english.of_bytes().train, 32, 64, seed, step))


def model() -> nn.Module:
    return Online(lm_code.model())


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return kept(model, language.cross_entropy(model, batch))


def metrics(model: nn.Module) -> dict[str, float]:
    texts = evaluation_batches(english.of_bytes().val, 64, 64, 256)
    return {
        "val_loss": statistics.fmean(losses(model)),
        "code_loss": lm_code.metrics(model)["val_loss"],
        "text_loss": language.mean_loss(model, [language.Text(*x) for x in texts])["val_loss"],
        **returns(losses(model)),
    }


def returns(losses: list[float]) -> dict[str, float]:
    """What the first return to a text shows, if there was one.

    Forgotten: the loss just after the return, less the level that was reached before the text was
    left. Relearned: steps until the mean of the last five is back at that level.
    """
    back = losses[2 * PHASE : 3 * PHASE]
    if len(back) < FIRST:
        return {}
    level = statistics.fmean(losses[PHASE - LEVEL : PHASE])
    means = [statistics.fmean(back[i : i + FIRST]) for i in range(len(back) - FIRST + 1)]
    reached = (i + FIRST for i, mean in enumerate(means) if mean <= level)
    return {
        "forgotten": means[0] - level,
        "relearned_steps": next(reached, PHASE),
    }


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=3 * PHASE,
    about="bytes of Python's sources, then of English, then of sources again, 150 steps each, "
    "W1's Transformer, batches of 32 x 64 bytes; val_loss is the mean over the steps of the loss "
    "of the batch that comes next",
    sha256=lambda: datasets.digest_of(language.corpus(), english.of_bytes()),
)
