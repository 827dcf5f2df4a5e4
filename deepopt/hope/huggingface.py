"""Hope for Hugging Face's transformers. Importing this module registers it with the Auto classes.

::

    import deepopt.hope.huggingface
    model = AutoModelForCausalLM.from_pretrained("runs/hope")
    model.generate(tokens, max_new_tokens=100)

It reads and writes the folders of `Hope.save_pretrained`. `model.model` is the `Hope` itself, for
`adapt` and everything else that transformers has no name for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepopt.hope.config import HopeConfig
from deepopt.hope.model import IGNORED, Hope
from deepopt.hope.state import HopeState

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.utils import ModelOutput
except ImportError as missing:
    raise ImportError(
        f"deepopt.hope.huggingface needs {missing.name}: pip install transformers"
    ) from missing


class HopePretrainedConfig(PreTrainedConfig):
    """`HopeConfig` as transformers wants it: all of its fields, and those of every model."""

    model_type = "deepopt_hope"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    }  # fmt: skip

    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012

    def __post_init__(self, **others: Any) -> None:
        for field in dataclasses.fields(HopeConfig):
            value = others.pop(field.name, field.default)
            setattr(self, field.name, list(value) if isinstance(value, tuple) else value)
        self.hope()  # raises if an option is wrong
        super().__post_init__(**others)

    def hope(self) -> HopeConfig:
        """The configuration of the model itself."""
        return HopeConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(HopeConfig)})


@dataclass
class HopeForCausalLMOutput(ModelOutput):
    """What a forward pass gives; see `HopeOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: HopeState | None = None


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Hope` that `Trainer` trains and `generate` decodes."""

    config_class = HopePretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _is_stateful = True  # assisted decoding rolls the cache back, which a state cannot do

    def __init__(self, config: HopePretrainedConfig) -> None:
        super().__init__(config)
        self.model = Hope(config.hope())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: Hope has initialized itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `state` is this model's cache

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.model.config.recompute

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """The backward pass recomputes blocks, as with `HopeConfig(recompute=True)`."""
        self.model.config = dataclasses.replace(self.model.config, recompute=True)

    def gradient_checkpointing_disable(self) -> None:
        self.model.config = dataclasses.replace(self.model.config, recompute=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value
        # `resize_token_embeddings` updates only its own configuration.
        self.model.config = dataclasses.replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: HopeState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: None = None,
        **_: Any,
    ) -> HopeForCausalLMOutput | tuple[Any, ...]:
        """Predicts every next token.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens or more), 0 for padding; None for none. The last tokens
                are those of `input_ids`.
            state: what an earlier call returned; None for the start of a text.
            labels: (batch, tokens), -100 to be ignored. As elsewhere in transformers they are the
                tokens themselves, and are shifted inside.
            use_cache: whether to return the state; None returns it if there are no labels.
            position_ids: (batch, tokens); a 0 after the first token starts another document, as in
                the packed batches of transformers' collators. Nothing else is read from it.
            return_dict: False for a tuple without what is None.
            past_key_values: None; `state` takes its place.

        Raises:
            TypeError: `past_key_values` is given.
            TypeError, ValueError: as `Hope` does.
        """
        if past_key_values is not None:
            raise TypeError(
                "past_key_values is given: Hope has a state instead; pass the one that an earlier "
                "call returned as state="
            )
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -input_ids.shape[1] :].bool()
            mask = None if mask.all() else mask
        targets = None
        if labels is not None:
            targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)
        starts = None
        if position_ids is not None:
            starts = (position_ids == 0).expand_as(input_ids).clone()
            # The first real token continues `state`, or starts a text anyway.
            first = torch.zeros_like(input_ids[:, :1])
            if mask is not None:
                first, starts = mask.int().argmax(1, keepdim=True), starts & mask
            starts.scatter_(1, first, False)
            starts = starts if starts.any() else None
        out = self.model(input_ids, targets, state, mask=mask, starts=starts)
        carries = labels is None if use_cache is None else use_cache
        found = HopeForCausalLMOutput(out.loss, out.logits, out.state if carries else None)
        return found.to_tuple() if return_dict is False else found

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> dict[str, Any]:
        """Arguments of the next step of `generate`; not every release passes a state on."""
        following: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **options
        )
        return {**following, "state": outputs.state}

    def _reorder_cache(self, *_: Any) -> None:
        raise NotImplementedError("beam search is not supported: use num_beams=1")


AutoConfig.register(HopePretrainedConfig.model_type, HopePretrainedConfig, exist_ok=True)
AutoModelForCausalLM.register(HopePretrainedConfig, HopeForCausalLM, exist_ok=True)
