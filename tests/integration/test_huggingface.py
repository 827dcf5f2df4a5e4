"""Hope within transformers: Auto classes, generate, Trainer; and levels made of a Llama's MLPs."""

import copy
import json

import pytest
import torch

import deepopt
from deepopt.hope import (
    PRETRAINED,
    Hope,
    HopeConfig,
    Reader,
    adapt,
    adaptation,
    chunk_groups,
    generate,
    stack_levels,
)
from deepopt.optim import Continuum

transformers = pytest.importorskip("transformers")

import deepopt.hope.huggingface  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages

SIZES = {"dim": 16, "heads": 2, "layers": 2, "memory_chunk": 8, "projection_chunk": 8}


@pytest.fixture(params=["titans", "attention"])
def hope(request):
    torch.manual_seed(0)
    model = Hope(HopeConfig(**SIZES, mixer=request.param, cms_variant="nested"))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


@pytest.fixture
def tokens():
    return torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_model_that_comes_with_the_package_loads_with_equal_logits(tokens):
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(PRETRAINED)
    assert torch.equal(wrapped(tokens).logits, Hope.from_pretrained()(tokens).logits)


def test_the_same_folder_gives_the_same_logits_through_the_auto_classes(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(wrapped(tokens).logits, hope(tokens).logits)
    assert wrapped.config.hidden_size == 16
    wrapped.save_pretrained(tmp_path / "again")
    assert torch.equal(Hope.from_pretrained(tmp_path / "again")(tokens).logits, hope(tokens).logits)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, hope(tokens).logits)


def test_a_new_model_is_initialized_as_hope_is(tokens):
    config = deepopt.hope.huggingface.HopePretrainedConfig(**SIZES)
    torch.manual_seed(0)
    wrapped = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    hope = Hope(HopeConfig(**SIZES))
    for (name, a), b in zip(hope.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="mixer='mamba'"):
        deepopt.hope.huggingface.HopePretrainedConfig(mixer="mamba")


def test_generate_decodes_as_ours_does_from_the_state_and_with_padding(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    widths = []
    wrapped.model.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    found = wrapped.generate(tokens, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, generate(hope, tokens, 12, temperature=0))
    assert widths == [9] + [1] * 11
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    found = wrapped.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, generate(hope, tokens, 12, temperature=0, mask=mask.bool()))
    state = hope(tokens[:, :4]).state
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    found = wrapped.generate(tokens, state=state, **options)
    expected = generate(hope, tokens, 5, temperature=0, mask=mask.bool(), state=state)
    assert torch.equal(found, expected)
    assert not torch.equal(found, wrapped.generate(tokens, **options))
    assert wrapped.generate(tokens, max_new_tokens=3, do_sample=True, top_k=5).shape == (2, 12)
    with pytest.raises(NotImplementedError, match="num_beams=1"):
        wrapped.generate(tokens, max_new_tokens=3, num_beams=2)
    with pytest.raises(TypeError, match=r"past_key_values is given: .* as state="):
        wrapped(tokens, past_key_values=state)
    ours = generate(wrapped, tokens, 12, temperature=0)
    assert torch.equal(ours, generate(hope, tokens, 12, temperature=0))


def test_a_wrapped_hope_learns_while_it_reads_as_the_hope_itself_does(hope, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(40)[None]
    found, expected = adapt(wrapped, tokens, chunk=8), hope.adapt(tokens, chunk=8)
    torch.testing.assert_close(found.losses, expected.losses, equal_nan=True)
    assert torch.equal(wrapped(tokens).logits, wrapped.model(tokens).logits)


def test_the_loss_is_shifted_and_ignores_what_labels_ignore(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = hope(tokens[:, :-1], tokens[:, 1:]).loss
    torch.testing.assert_close(wrapped(tokens, labels=tokens).loss, expected)
    labels = tokens.clone()
    labels[:, :4] = -100
    targets = labels[:, 1:]
    torch.testing.assert_close(
        wrapped(tokens, labels=labels).loss, hope(tokens[:, :-1], targets).loss
    )


def test_documents_packed_by_position_ids_do_not_meet(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    packed, positions = tokens.reshape(1, -1), torch.arange(9).repeat(2)[None]
    found = wrapped(packed, position_ids=positions).logits.view(2, 9, -1)
    torch.testing.assert_close(found, hope(tokens).logits, rtol=0, atol=1e-5)
    whole = wrapped(packed, position_ids=torch.arange(18)[None]).logits
    assert torch.equal(whole, hope(packed).logits)


def test_a_resized_vocabulary_is_saved_with_its_size(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped.resize_token_embeddings(300)
    wrapped.model.save_pretrained(tmp_path / "larger")
    loaded = Hope.from_pretrained(tmp_path / "larger")
    assert loaded.config.vocab_size == wrapped.config.vocab_size == 300
    assert torch.equal(loaded(tokens + 40).logits, wrapped(tokens + 40).logits)


def test_a_tuple_is_returned_where_it_is_asked_for(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loss, logits = wrapped(tokens, labels=tokens, return_dict=False)
    assert torch.equal(logits, hope(tokens).logits)
    assert loss.ndim == 0


def test_gradient_checkpointing_recomputes_the_blocks_with_equal_gradients(hope, tokens, tmp_path):
    hope.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ran = []
    model.model.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [param.grad.clone() for param in model.parameters()]

    kept = gradients()
    assert len(ran) == 1
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), kept)
    assert len(ran) == 3
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    gradients()
    assert len(ran) == 4


def test_trainer_trains_it(hope, tmp_path):
    hope.save_pretrained(tmp_path / "start")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    row = torch.arange(32) % 5
    data = [{"input_ids": row, "labels": row}] * 16
    groups = chunk_groups(model, deepopt.param_groups(model), tokens=4 * 32)
    optimizer = Continuum(deepopt.DeepMomentum(groups, lr=3e-2))
    args = transformers.TrainingArguments(
        tmp_path / "run", per_device_train_batch_size=4, num_train_epochs=6, save_strategy="no",
        report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    logits = trainer.predict([{"input_ids": row}] * 2).predictions
    assert logits.shape == (2, 32, 256)
    trainer.save_model(tmp_path / "end")
    trained = Hope.from_pretrained(tmp_path / "end")
    assert trained(row[None, :-1], row[None, 1:]).loss < 0.5 * losses[0]


# -- ad-hoc level stacking ---------------------------------------------------------------------


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_the_mlps_of_a_llama_become_levels_and_it_stays_what_it_was(llama, tmp_path):
    tokens = torch.arange(11)[None]
    before = llama(tokens).logits
    levels = stack_levels(llama, (64, 256))
    assert [(level.name, level.chunk) for level in levels] == [
        (f"model.layers.{i}.mlp", (64, 256)[i % 2]) for i in range(4)
    ]
    assert torch.equal(llama(tokens).logits, before)
    llama.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, before)
    assert "cms" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_levels_of_a_llama_train_at_their_chunks(llama):
    stack_levels(llama, (8, 32))
    start = copy.deepcopy(llama.state_dict())
    groups = chunk_groups(llama, deepopt.param_groups(llama), tokens=8)
    optimizer = Continuum(deepopt.DeepMomentum(groups, lr=1e-2))
    for step in range(1, 5):
        tokens = torch.arange(step, step + 8)[None]
        llama(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, x in llama.state_dict().items() if not torch.equal(x, start[n])}
        assert "model.layers.0.mlp.up_proj.weight" in moved
        assert ("model.layers.1.mlp.up_proj.weight" in moved) == (step == 4)


def test_a_llama_learns_while_it_reads_and_a_rate_of_zero_changes_no_logit(llama):
    tokens = (torch.arange(240) % 6)[None]
    stack_levels(llama, (8, 16))
    logits = llama(tokens).logits
    plain = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")

    def read(rate):
        def optimizer(groups):
            return torch.optim.AdamW(groups, lr=rate, weight_decay=0)

        return adapt(llama, tokens.split(50, 1), optimizer=optimizer)

    with adaptation(llama):
        still = read(0.0)
        torch.testing.assert_close(still.losses[0, 1:], plain, rtol=0, atol=1e-5)
        assert torch.equal(llama(tokens).logits, logits)
        assert still.updates == 29
        assert read(1e-2).losses[0, -40:].mean() < 0.9 * plain[-40:].mean()
    assert torch.equal(llama(tokens).logits, logits)


def test_a_state_that_is_looked_at_or_decoded_from_changes_nothing_that_is_read(llama):
    tokens = torch.randint(13, (1, 48), generator=torch.Generator().manual_seed(0))
    stack_levels(llama, (8, 16))

    def read(look):
        reader = Reader(llama, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        with adaptation(llama):
            for piece in tokens.split(5, 1):
                reader.read(piece)
                look(reader)
        return reader.losses[:, 1:]

    def decode(reader):
        with torch.no_grad():
            llama(input_ids=reader.last, past_key_values=reader.state, use_cache=True)

    expected = read(lambda reader: None)
    assert torch.equal(read(lambda reader: reader.state), expected)
    assert torch.equal(read(decode), expected)


def test_a_llama_without_a_cache_is_not_read(llama):
    stack_levels(llama, (8, 16))
    llama.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        adapt(llama, torch.arange(12)[None])


def test_a_model_with_another_kind_of_cache_is_refused_by_name():
    config = transformers.MambaConfig(
        vocab_size=13, hidden_size=16, state_size=4, num_hidden_layers=2
    )
    mamba = transformers.MambaForCausalLM(config)
    stack_levels(mamba, (8,), ["backbone.layers.1.mixer"])
    with pytest.raises(RuntimeError, match="MambaForCausalLM has layers whose cache is no keys"):
        adapt(mamba, torch.arange(12)[None])
