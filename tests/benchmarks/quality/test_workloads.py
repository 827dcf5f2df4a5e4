"""The workloads: batches repeat, data that is absent is told, a user's own file is one."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from benchmarks.quality import command, datasets, plan, tiers
from benchmarks.quality.contenders import Setting
from benchmarks.quality.plan import Rates
from benchmarks.quality.training import Run, execute
from benchmarks.quality.workload import HELD_OUT, Unavailable, built_in, digest, find
from benchmarks.quality.workloads import swap_transformer
from deepopt import param_groups
from deepopt.hope.trainer import TrainConfig, Trainer

ROOT = Path(__file__).parents[3]
SLOW = ("llama_tuned", "lora", "swap_hope", "swap_transformer")  # they have tests of their own
QUICK = [name for name in built_in() if name not in SLOW]


def available(name):
    workload = find(name)
    try:
        workload.sha256()
    except Unavailable as reason:
        pytest.skip(str(reason))
    return workload


@pytest.mark.parametrize("name", QUICK)
def test_a_workload_has_batches_of_its_seed_and_step_and_a_loss_that_falls(name):
    workload = available(name)
    assert digest(workload.data(0, 3)) == digest(workload.data(0, 3))
    others = {digest(workload.data(0, 3)), digest(workload.data(0, 4)), digest(workload.data(1, 3))}
    assert len(others) == 3
    torch.manual_seed(0)
    model = workload.model()
    assert any(group["path"] == "matrix" for group in param_groups(model))
    optimizer, batch = torch.optim.AdamW(model.parameters(), 3e-3), workload.data(0, 0)
    before = workload.loss(model, batch)
    for _ in range(3):
        optimizer.zero_grad()
        workload.loss(model, batch).backward()
        optimizer.step()
    assert workload.loss(model, batch) < before
    assert workload.metrics(model)["val_loss"] > 0
    assert re.fullmatch("[0-9a-f]{64}", workload.sha256())


def test_the_fine_tunings_start_where_the_pretraining_ended_and_lora_trains_its_factors_alone(
    monkeypatch,
):
    from benchmarks.quality.workloads import llama_tuned

    monkeypatch.setattr(llama_tuned, "PRETRAINING", 2)
    llama_tuned.pretrained.cache_clear()
    try:
        first, lora = (find(name).model() for name in ("llama_tuned", "lora"))
        batch = find("lora").data(0, 0)
        torch.testing.assert_close(
            find("lora").loss(lora, batch), find("llama_tuned").loss(first, batch)
        )
        trained = [name for name, p in lora.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 7 * 3  # two factors, seven matrices, three blocks
        assert all("lora_" in name for name in trained)
        paths = {group["path"] for group in param_groups(lora) if group["params"]}
        assert "matrix" in paths
    finally:
        llama_tuned.pretrained.cache_clear()


@pytest.mark.parametrize("name", ["swap_hope", "swap_transformer"])
@pytest.mark.parametrize("contender", ["AdamW", "Muon", "DeepMomentum, covariance"])
def test_a_run_of_the_swap_is_the_training_commands_run(name, contender, tmp_path, monkeypatch):
    for constant, value in (("BATCH", 2), ("LENGTH", 32), ("WINDOWS", 4)):
        monkeypatch.setattr(swap_transformer, constant, value)
    monkeypatch.setattr(Trainer, "samples", lambda *_: "")
    setting = Setting(4e-3, weight_decay=TrainConfig(tmp_path).weight_decay, beta=None)
    found = execute(Run(name, contender, setting, 1, 3))
    optimizer, _, memory = contender.partition(", ")
    config = TrainConfig(
        tmp_path / "run",
        optimizer=optimizer,
        memory=memory or None,
        seed=1,
        steps=3,
        batch_size=2,
        seq_len=32,
        eval_windows=4,
        quiet=True,
    )
    expected = Trainer(config, find(name).model).run()
    assert found["metrics"]["val_loss"] == expected.val_loss
    assert found["metrics"]["val_bits_per_byte"] == expected.val_bits_per_byte
    floats = found["state_bytes"] / 4 / found["parameters"]
    assert floats == expected.state_floats_per_parameter


def test_the_default_sizes_of_the_swap_are_the_training_commands(tmp_path):
    config = TrainConfig(tmp_path)
    sizes = (config.batch_size, config.seq_len, config.eval_windows)
    assert (swap_transformer.BATCH, swap_transformer.LENGTH, swap_transformer.WINDOWS) == sizes
    assert {find(name).steps for name in ("swap_hope", "swap_transformer")} == {config.steps}
    assert plan.SWAP_DECAY == config.weight_decay


def test_batches_of_a_pass_have_every_example_at_most_once():
    part = datasets.Part(torch.arange(10.0)[:, None], torch.arange(10))
    data = datasets.Dataset(part, part, "")
    seen = torch.cat([data.batch(3, 0, step).targets for step in range(3)])
    assert len(seen.unique()) == 9
    later = torch.cat([data.batch(3, 0, step).targets for step in range(3, 6)])
    assert len(later.unique()) == 9
    assert not torch.equal(seen, later)


def test_data_that_is_not_installed_is_refused_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install --no-deps scikit-learn"):
        datasets.digits.__wrapped__()


def test_the_guides_own_workload_runs_from_its_path(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "your_workload.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "product.py"
    path.write_text(block)
    workload = find(str(path))
    assert digest(workload.data(HELD_OUT, 0)) != digest(workload.data(0, 0))
    monkeypatch.setitem(
        tiers.TIERS,
        "rates",
        tiers.Tier(lambda w, c: [Rates(w, c, seeds=1, steps=3)], (), ("AdamW", "M3")),
    )
    arguments = ["--tier", "rates", "--workloads", str(path), "--out", str(tmp_path)]
    assert command.main([*arguments, "--jobs", "1"]) == 0
    assert len((tmp_path / "quality" / "product.jsonl").read_text().splitlines()) == 6
    assert "a product of two inputs, an MLP" in (tmp_path / "quality.md").read_text()


def test_a_file_without_a_workload_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"needs WORKLOAD = benchmarks.workload\(...\)"):
        find(str(tmp_path / "empty.py"))


@pytest.mark.parametrize("name", built_in())
def test_the_source_of_a_workload_has_the_workloads_that_it_builds_on(name):
    source = find(name).source
    others = [other for other in built_in() if re.search(rf"workloads.*\b{other}\b", source)]
    assert all(find(other).source in source for other in others)


def test_workloads_build_on_others_in_both_forms_of_an_import():
    assert find("llama").source in find("llama_tuned").source
    assert find("llama_tuned").source in find("lora").source
    assert find("lm_code").source in find("recall").source
