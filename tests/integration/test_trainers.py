"""The examples of docs/ as a user runs them, and what docs/trainers.md says about trainers.

Needs the packages of the extra ``trainers``; no test downloads anything.
"""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import deepopt

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path, tmp_path):
    imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    for package in imported:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(text) for text in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses, done.stdout
    assert losses[-1] < {"huggingface_trainer": 4.0}.get(path.stem, 1.0)
    assert list(tmp_path.iterdir()) == []


def llama_trainer(folder, steps=4, **optimization):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    rows = torch.arange(16)[:, None] + torch.arange(12)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=steps // 2,
            learning_rate=0.5,
            weight_decay=0.25,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        **optimization,
    )


def names_on_path(model, optimizer, path):
    groups = [g for g in optimizer.param_groups if g["path"] == path]
    chosen = {param for group in groups for param in group["params"]}
    return {name for name, param in model.named_parameters() if param in chosen}


def test_the_groups_that_trainer_makes_have_no_names_and_its_own_decay(tmp_path):
    options = {"lr": 1e-3, "weight_decay": 0.1}
    trainer = llama_trainer(tmp_path, optimizer_cls_and_kwargs=(deepopt.DeepMomentum, options))
    optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert not any("param_names" in group for group in optimizer.param_groups)
    # Without names nothing tells the embedding and the head from any other 64 x 32 matrix.
    assert "matrix          6 of 64 x 32" in repr(optimizer)
    trainer.train()
    assert all(param.isfinite().all() for param in trainer.model.parameters())


def test_trainer_takes_create_optimizer_as_a_factory_and_resumes(tmp_path):
    factory = (
        lambda: deepopt.create_optimizer,
        {"name": "deep_momentum", "lr": 1e-3, "weight_decay": 0.1, "layer_decay": 0.5},
    )
    whole = llama_trainer(tmp_path, optimizer_cls_and_kwargs=factory)
    whole.train()
    matrices = names_on_path(whole.model, whole.optimizer.optimizer, "matrix")
    assert len(matrices) == 14
    assert all(".layers." in name for name in matrices)
    resumed = llama_trainer(tmp_path, optimizer_cls_and_kwargs=factory)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@dataclass(frozen=True)
class Signs:
    """A user's memory."""

    share: float = 0.1

    def init(self, like):
        return {"signs": torch.zeros_like(like)}

    def write(self, state, grad, retention):
        state["signs"] = state["signs"].lerp(grad.sign(), self.share)

    def read(self, state, grad, retention):
        return state["signs"] * grad.abs().mean((-2, -1), keepdim=True)


def test_accelerate_prepares_a_fresh_optimizer_with_any_memory():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(32, 32)
    memory = Signs(0.2)
    optimizer = deepopt.DeepMomentum(model.named_parameters(), memory=memory)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert prepared.optimizer is optimizer
    assert optimizer.param_groups[0]["memory"] is memory
    assert optimizer.param_groups[0]["params"][0] is model.weight
    before = model.weight.detach().clone()
    model(torch.randn(4, 32)).square().sum().backward()
    prepared.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(("fused", "clip"), [(None, 1.0), (True, None), (True, 1.0)])
def test_lightning_scales_gradients_and_clips_them_unless_fused(fused, clip, tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 20))

        def training_step(self, batch):
            return self.layers(batch[0]).float().square().mean()

        def configure_optimizers(self):
            return deepopt.create_optimizer(self, "deep_momentum", lr=1e-2, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    trainer = lightning.Trainer(
        max_epochs=4,
        gradient_clip_val=clip,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Model(), torch.randn(128, 20)
    before = copy.deepcopy(model.layers)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=8)
    if fused and clip:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            trainer.fit(model, loader)
        return
    trainer.fit(model, loader)
    assert scaler.get_scale() < 2.0**30  # steps were skipped
    assert model.layers(data).square().mean() < 0.5 * before(data).square().mean()


def test_an_optimizer_per_parameter_steps_during_the_backward_pass():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 24))
    expected = copy.deepcopy(model)
    _apply_optimizer_in_backward(deepopt.DeepMomentum, model.parameters(), {"lr": 1e-2})
    optimizer = deepopt.DeepMomentum(expected.parameters(), lr=1e-2)
    for _ in range(3):
        x = torch.randn(8, 32)
        model(x).square().mean().backward()
        expected(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert a.grad is None
        torch.testing.assert_close(a, b)
