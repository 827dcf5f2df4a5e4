"""Hugging Face's Trainer with DeepMomentum; a resumed run ends where the uninterrupted one does.

Run it with ``python docs/examples/huggingface_trainer.py``: seconds on a CPU, nothing to download.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

import deepopt

STEPS = 20

# Counting in steps of 1 to 4, modulo 61: sequences that a tiny model can learn.
starts, strides = torch.arange(64)[:, None], torch.arange(64)[:, None] % 4 + 1
data = [{"input_ids": row, "labels": row} for row in (starts + strides * torch.arange(32)) % 61]


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def make_trainer(folder: Path, model: GPT2LMHeadModel, **optimization: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model=model, args=args, train_dataset=data, **optimization)


def with_optimizers(folder: Path) -> Trainer:
    """An optimizer made beforehand: nothing is left to the Trainer."""
    model = make_model()
    optimizer = deepopt.create_optimizer(model, "deep_momentum", lr=4e-3, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    return make_trainer(folder, model, optimizers=(optimizer, scheduler))


def with_class(folder: Path) -> Trainer:
    """A class and its arguments; ``params`` take the place of the Trainer's own groups."""
    model = make_model()
    options = {"params": deepopt.param_groups(model), "lr": 4e-3, "weight_decay": 0.1}
    return make_trainer(folder, model, optimizer_cls_and_kwargs=(deepopt.DeepMomentum, options))


def main() -> None:
    for make in (with_optimizers, with_class):
        with tempfile.TemporaryDirectory() as name:
            whole = make(Path(name))
            whole.train()
            checkpoint = Path(name) / f"checkpoint-{STEPS // 2}"
            resumed = make(Path(name))
            resumed.train(resume_from_checkpoint=str(checkpoint))
        pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
        assert gap <= 1e-6, f"the resumed run ended {gap} away"
        loss = whole.state.log_history[-1]["train_loss"]
        print(f"{make.__name__}: loss {loss:.3f}, resumed run differs by {gap:.1e}")


if __name__ == "__main__":
    main()
