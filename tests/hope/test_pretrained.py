"""Models on disk: safetensors and JSON, never a pickle, bit for bit what was saved."""

import contextlib
import dataclasses
import json
import pickle
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deepopt.hope import Hope, HopeConfig, files
from deepopt.hope.trainer import TrainConfig, Trainer, flops_per_token

TOKENS = torch.arange(12)[None]
VARIANTS = [
    {"mixer": mixer, "cms_variant": variant}
    for mixer in ("titans", "attention")
    for variant in ("sequential", "nested", "independent")
]


def make(**options):
    torch.manual_seed(0)
    model = Hope(HopeConfig(**{"dim": 8, "heads": 2, "layers": 2, **options}))
    for param in model.parameters():
        param.data.add_(0.1 * torch.randn_like(param))
    return model


@pytest.mark.parametrize(
    "options", [*VARIANTS, {"memory_hidden": 0, "cms_expansion": 1.5}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_comes_back_bit_for_bit_and_in_its_dtype(options, dtype, tmp_path):
    model = make(**options).to(dtype)
    model.save_pretrained(tmp_path / "made" / "here")
    random = torch.get_rng_state()
    loaded = Hope.from_pretrained(str(tmp_path / "made" / "here"))
    assert torch.equal(torch.get_rng_state(), random)
    assert loaded.config == model.config
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype == dtype, name
        assert torch.equal(a, b), name
    assert all(param.requires_grad for param in loaded.parameters())
    if dtype != torch.bfloat16:  # some operators of the CPU have none
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_saving_again_replaces_both_files(tmp_path):
    make().save_pretrained(tmp_path)
    other = make(cms_variant="nested")
    other.save_pretrained(tmp_path)
    assert torch.equal(Hope.from_pretrained(tmp_path)(TOKENS).logits, other(TOKENS).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_pickles_are_refused_and_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ValueError, match=r"in (model\.pt|pytorch_model\.bin), a pickle"):
            Hope.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is damaged"):
        Hope.from_pretrained(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_a_model_with_a_flipped_bit_is_refused_with_the_remedy(tmp_path):
    model = make(layers=1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:  # as transformers wants it
        assert file.metadata()["format"] == "pt"
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in (*range(start, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(
            ValueError, match=r"is damaged \(.*from its checksum\): write or copy it"
        ):
            Hope.from_pretrained(tmp_path)
    for at in range(0, start, 7):  # a flip in what is not read may pass, but no weight is another
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with contextlib.suppress(ValueError):
            assert same_weights(Hope.from_pretrained(tmp_path), model)
    save_file(model.state_dict(), path, {"format": "pt"})  # as others write it, without a digest
    assert same_weights(Hope.from_pretrained(tmp_path), model)


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no config.json: give")):
        Hope.from_pretrained(tmp_path)
    model = make()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    # Weights that another program wrote, which do not tell their configuration.
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    write(layers=3)
    with pytest.raises(ValueError, match=r"(?s)do not fit config\.json.*blocks\.2"):
        Hope.from_pretrained(tmp_path)
    write(dim=16)
    with pytest.raises(ValueError, match=r"(?s)do not fit config\.json.*size mismatch"):
        Hope.from_pretrained(tmp_path)
    write(mixer="mamba")
    with pytest.raises(ValueError, match="mixer='mamba'"):
        Hope.from_pretrained(tmp_path)
    write(model_type="llama")
    with pytest.raises(ValueError, match="a model of type 'llama': must be 'deepopt_hope'"):
        Hope.from_pretrained(tmp_path)
    for text in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            Hope.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"update": "dgd"}, {"max_inner_lr": 0.01}, {"heads": 4}, {"turns": None}], ids=str
)
def test_a_configuration_of_other_weights_is_refused_by_the_field_that_differs(changes, tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ((name, value),) = changes.items()
    config[name] = value
    if value is None:
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"has {name}={value!r}.*not of one model"):
        Hope.from_pretrained(tmp_path)


def test_a_save_that_was_interrupted_between_the_files_does_not_load(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    write = files.write_atomically

    def stopped(path, content):
        if path.name == "model.safetensors":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(files, "write_atomically", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(update="dgd").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="update='dgd'"):
        Hope.from_pretrained(tmp_path)


def test_a_device_that_torch_lacks_here_is_named(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='vulkan': cannot be used here"):
        Hope.from_pretrained(tmp_path, device="vulkan")


@pytest.fixture
def trainer(tmp_path):
    text = tmp_path / "text"
    text.write_text("some words and more words\n" * 60)
    config = TrainConfig(
        out=tmp_path / "run", data=text, batch_size=2, seq_len=16, steps=3, save_every=1,
        eval_windows=2, quiet=True, model=HopeConfig(dim=8, layers=1, heads=1),
    )  # fmt: skip
    return Trainer(config)


def test_a_training_run_writes_its_model_when_it_ends_or_is_stopped(trainer, monkeypatch):
    monkeypatch.setattr(Trainer, "samples", lambda *_: "")

    class Stopped:
        def is_set(self):
            return trainer.step == 2

    with pytest.raises(KeyboardInterrupt):
        trainer.run(Stopped())
    stopped = Hope.from_pretrained(trainer.config.out)
    assert torch.equal(stopped(TOKENS).logits, trainer.model(TOKENS).logits)
    resumed = Trainer(dataclasses.replace(trainer.config, resume=True))
    resumed.run()
    ended = Hope.from_pretrained(trainer.config.out)
    assert torch.equal(ended(TOKENS).logits, resumed.model(TOKENS).logits)
    assert not torch.equal(ended(TOKENS).logits, stopped(TOKENS).logits)


def test_the_size_of_a_model_is_told(trainer):
    parameters = sum(param.numel() for param in trainer.model.parameters())
    assert trainer.size.startswith(f"Hope: {parameters:,} parameters, ")
    assert "MFLOP per token" in trainer.size


def test_the_operations_of_hope_attention_are_those_of_its_matrices_and_scores():
    config = HopeConfig(mixer="attention", dim=8, heads=2, layers=3, cms_chunks=(4, 8))
    model, tokens = Hope(config), 20
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    matrices -= model.embedding.weight.numel()
    scores = 2 * config.layers * tokens * config.dim  # queries by keys, shares by values
    assert flops_per_token(model, tokens) == 2 * (matrices + scores)
    assert all(not param.is_meta for param in model.parameters())
    assert flops_per_token(Hope(HopeConfig(dim=8, heads=2)), 32) > 2 * matrices / 3
