"""The small Llama, trained on sources, goes on with plain English: a fine-tuning."""

import copy
import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import llama
from deepopt.data import Corpus, evaluation_batches, load_corpus, sample_batch

TOPICS = "pydoc_data/topics.py"
PRETRAINING = 300


@functools.cache
def topics() -> Corpus:
    """Python's own help texts. The pretraining may draw windows of them: 3 % of its text."""
    return load_corpus(Path(sysconfig.get_path("stdlib")) / TOPICS)


@functools.cache
def pretrained() -> nn.Module:
    """The model after a fixed pretraining by AdamW, the same for every run."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = llama.Llama()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, PRETRAINING)
    for step in range(PRETRAINING):
        optimizer.zero_grad()
        llama.loss(model, llama.data(0, step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def data(seed: int, step: int) -> language.Text:
    return language.Text(*sample_batch(topics().train, 16, 64, seed, step))


def model() -> nn.Module:
    return copy.deepcopy(pretrained())


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    texts = [language.Text(*x) for x in evaluation_batches(topics().val, 64, 64, 256)]
    return language.mean_loss(model, texts)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=100,
    about="the small Llama after 300 steps of AdamW on sources, fine-tuned on Python's help texts, "
    "batches of 16 x 64 bytes",
    sha256=lambda: topics().sha256,
)
