"""Hope: a language model of self-modifying memories and a continuum memory system."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepopt._compat import inside_transform
from deepopt.hope import reader
from deepopt.hope.block import HopeBlock
from deepopt.hope.config import HopeConfig
from deepopt.hope.layout import Documents
from deepopt.hope.options import check_device
from deepopt.hope.state import INTEGERS, HopeState, check_tensor

IGNORED = -100  # as a target; torch's own value
PRETRAINED = Path(__file__).with_name("pretrained")
"""The folder of the model that comes with the package; its training.json says what made it."""


class HopeOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: (batch, tokens, vocab_size); zero where `mask` is False.
        loss: mean cross entropy in nats, a scalar; None without targets.
        state: hand it to the next call to go on exactly.
    """

    logits: Tensor
    loss: Tensor | None
    state: HopeState


class Hope(nn.Module):
    """Embedding, blocks, norm and head (section 8.3).

    The output of a call depends on its arguments alone: there is no dropout, `train()` and `eval()`
    are the same, and what the memories learn from a text lives in the returned state.

    Args:
        config: sizes and options; None means `HopeConfig()`.

    Raises:
        TypeError: `config` is something else.
    """

    def __init__(self, config: HopeConfig | None = None) -> None:
        super().__init__()
        # Attributes decide, because the class may have been reloaded. The configuration that
        # transformers wraps has no head_dim.
        if isinstance(config, type) or not (config is None or hasattr(config, "head_dim")):
            raise TypeError(
                f"config is of type {type(config).__name__}: must be a HopeConfig, such as "
                "HopeConfig(dim=256, layers=4), or None"
            )
        self.config = config = config or HopeConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HopeBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # With a head of zeros the first loss is ln(vocab_size), whatever the rest computes.
        nn.init.zeros_(self.head.weight)
        # Every branch adds to the residual stream: scaled down, their sum has the same variance
        # whatever their number.
        branches = self.config.layers * (1 + len(self.config.cms_chunks))
        for name, param in self.named_parameters():
            if name.endswith("titans.turns.rates.weight"):
                param.data.mul_(0.1)  # queries start almost unturned
            if name.endswith(("titans.output.weight", "attention.output.weight", "down.weight")):
                param.data.mul_(1 / math.sqrt(branches))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        state: HopeState | None = None,
        *,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> HopeOutput:
        """Predicts every next token.

        Padding and packing change no number: every document has the same logits and state as in a
        call of its own.

        Args:
            tokens: (batch, tokens), integers of any type below `vocab_size`; at least one token.
            targets: the tokens that follow, same shape, or -100 where nothing is to be predicted;
                None for no loss.
            state: the state that an earlier call returned; None for the start of a text.
            mask: (batch, tokens) bool, False for padding, wherever it is; None for no padding.
            starts: (batch, tokens) bool, True for the first token of a document, where the state is
                reset; None for one text per sequence. The target of the token before belongs to
                another document: set it to -100.

        Raises:
            TypeError: an argument that is not a tensor, or a state that is not a `HopeState`.
            ValueError: shapes or dtypes that do not fit, tokens that are not below `vocab_size`, or
                the state of a model with other sizes.
        """
        self._check(tokens, targets, state, mask, starts)
        if state is None:
            state = self.initial_state(len(tokens))
        tokens = tokens.long()
        if mask is None and starts is None:
            hidden, state = self._hidden(tokens, state, None)
        else:
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            first = torch.zeros_like(real) if starts is None else starts
            hidden, state = self._each_document(tokens, state, Documents.of(real, first))
        logits = self.head(self.norm(hidden))
        if targets is None:
            return HopeOutput(logits, None, state)
        targets = targets.long()
        if mask is not None:
            targets = targets.masked_fill(~mask, IGNORED)
        try:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        except IndexError as error:
            raise ValueError(self._out_of_range("targets", targets)) from error
        return HopeOutput(logits, loss, state)

    adapt = reader.adapt
    adaptation = reader.adaptation

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the configuration, config.json, and the weights, model.safetensors.

        Args:
            folder: where to write; it is made if it is missing. `deepopt.hope.huggingface` reads it
                too.

        Raises:
            OSError: the files cannot be written.
        """
        config = dataclasses.asdict(self.config)
        _files().save_model(Path(folder), config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str] = PRETRAINED, device: str = "cpu"
    ) -> Hope:
        """The model that `save_pretrained` or the training command wrote; no pickle is read.

        Args:
            folder: where the two files are; left out, the model that comes with the package, a
                small one of bytes that has read the sources of Python's standard library.
            device: the device of the weights; their dtype is that of the file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, its weights are not those of the configuration, or torch
                cannot compute on `device` here.
        """
        check_device(device)
        config, weights = _files().load_model(Path(folder), device)
        names = [field.name for field in dataclasses.fields(HopeConfig)]
        with torch.device("meta"):
            model = cls(HopeConfig(**{name: config[name] for name in names if name in config}))
        # The wrapper for transformers keeps the model in an attribute.
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights do not fit config.json ({error})") from error
        return model

    def initial_state(self, batch: int) -> HopeState:
        """The state before the first token of `batch` texts."""
        blocks = cast(list[HopeBlock], self.blocks)
        return HopeState(tuple(block.mixer.initial_state(batch) for block in blocks))

    def _hidden(
        self, tokens: Tensor, state: HopeState, lengths: tuple[int, ...] | None
    ) -> tuple[Tensor, HopeState]:
        """The residual stream after the last block, and the state."""
        try:
            x = self.embedding(tokens)
        except IndexError as error:
            raise ValueError(self._out_of_range("tokens", tokens)) from error
        states = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            # torch.utils.checkpoint works by saved tensor hooks, which torch.func does not support.
            if self.config.recompute and torch.is_grad_enabled() and not inside_transform():
                run = _with_its_weights(block)
                x, after = checkpoint(run, x, before, lengths, use_reentrant=False)
            else:
                x, after = block(x, before, lengths)
            states.append(after)
        return x, HopeState(tuple(states))

    def _each_document(
        self, tokens: Tensor, state: HopeState, documents: Documents
    ) -> tuple[Tensor, HopeState]:
        """`_hidden` with a row for every document; the state is that after each text's last one."""
        batch, count, initial = len(tokens), len(documents.lengths), self.initial_state(1)
        # `state.rows` numbers the rows of the second state after those of the first: `batch` is the
        # only row of the initial state, and `count + i` below is text i of what was there before.
        kept = [batch if begun else i for i, begun in enumerate(documents.begun)]
        if count == 0:  # cloned, because an initial state is made of the model's weights
            hidden = self.head.weight.new_zeros(*tokens.shape, self.config.dim)
            return hidden, state.rows(kept, initial).clone()
        source = [batch if i < 0 else i for i in documents.source]
        before = state.rows(source, initial)
        hidden, after = self._hidden(documents.take_apart(tokens), before, documents.lengths)
        last = [count + i if row < 0 else row for i, row in enumerate(documents.last)]
        return documents.put_together(hidden), after.rows(last, state.rows(kept, initial))

    def _check(
        self,
        tokens: Tensor,
        targets: Tensor | None,
        state: HopeState | None,
        mask: Tensor | None,
        starts: Tensor | None,
    ) -> None:
        check_tensor("tokens", tokens)
        if targets is not None:
            check_tensor("targets", targets)
        if tokens.ndim != 2 or not all(tokens.shape) or tokens.dtype not in INTEGERS:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: "
                "must be integers of shape (batch, tokens) with at least one token"
            )
        if targets is not None and (targets.shape != tokens.shape or targets.dtype not in INTEGERS):
            raise ValueError(
                f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}: must be "
                f"integers of the shape {tuple(tokens.shape)} of tokens, the one that follows each"
            )
        for name, where in (("mask", mask), ("starts", starts)):
            if where is not None and not isinstance(where, Tensor):
                raise TypeError(
                    f"{name} is of type {type(where).__name__}: must be a bool tensor of the shape "
                    f"of tokens, {tuple(tokens.shape)}"
                )
            if where is not None and (where.shape != tokens.shape or where.dtype != torch.bool):
                raise ValueError(
                    f"{name} has shape {tuple(where.shape)} and dtype {where.dtype}: must be bool "
                    f"of the shape of tokens, {tuple(tokens.shape)}"
                )
        if state is not None:
            self.check_state(state, len(tokens))

    def check_state(self, state: HopeState, batch: int) -> None:
        """Raise TypeError or ValueError unless a state fits the model and the batch."""
        if not isinstance(state, HopeState):
            raise TypeError(
                f"state is of type {type(state).__name__}: must be the state that an earlier call "
                "returned, or HopeState.from_state_dict(saved)"
            )
        if len(state.blocks) != len(self.blocks):
            raise ValueError(
                f"state has {len(state.blocks)} blocks: must have one for each of the "
                f"{len(self.blocks)} blocks, as returned by an earlier call"
            )
        expected = cast(HopeBlock, self.blocks[0]).mixer.initial_state(1)  # all are of its sizes
        own = expected.tensors
        for block in state.blocks:
            if type(block) is not type(expected):
                raise ValueError(
                    f"state is one of {type(block).__name__}, the blocks have "
                    f"{type(expected).__name__}: give the state of a model with the same mixer"
                )
            if block.positions != state.blocks[0].positions:
                raise ValueError(
                    f"state has positions {state.blocks[0].positions} in one block and "
                    f"{block.positions} in another: give it as an earlier call returned it"
                )
            theirs = block.tensors
            for name, ours in own.items():
                self._check_state_tensor(name, theirs[name], ours, block.size)
        if (count := len(state.blocks[0].positions)) != batch:
            raise ValueError(
                f"state belongs to a batch of {count}, tokens to one of {batch}: go on with the "
                "batch that the state was made from"
            )

    @staticmethod
    def _check_state_tensor(
        name: str, given: Tensor | None, ours: Tensor | None, size: Callable[[Tensor], Any]
    ) -> None:
        """Raise ValueError unless a tensor of a state is as one of this model's own."""
        # Another size may go unnoticed: a state without momentum would turn the momentum off.
        sizes = [None if x is None else size(x) for x in (given, ours)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"state has {name} of size {sizes[0]}, the model's has {sizes[1]}: give the state "
                "of a model with the same configuration"
            )
        if given is None or ours is None:
            return
        for what, of_state, of_model in (
            ("dtype", given.dtype, ours.dtype), ("device", given.device, ours.device)
        ):  # fmt: skip
            if of_state != of_model:
                remedy = of_model if what == "dtype" else repr(str(of_model))
                raise ValueError(
                    f"state has {name} of {what} {of_state}, the model's has {of_model}: move one "
                    f"of them, such as state.to({remedy})"
                )

    def _out_of_range(self, name: str, tokens: Tensor) -> str:
        size = self.config.vocab_size
        outside = tokens[(tokens >= size) | (tokens < 0)]
        outside = outside[outside != IGNORED] if name == "targets" else outside
        return (
            f"{name} has {outside[0].item()}: must lie in 0 ... {size - 1}; encode the text with "
            f"fewer tokens or make the model with a larger vocab_size"
        )


def _with_its_weights(block: nn.Module) -> Callable[..., Any]:
    """A callable for `checkpoint` that recomputes the block with the weights of its forward pass.

    `torch.func.functional_call` gives a model other weights for the forward pass alone. Without
    this, the backward pass would compute the block again with the model's own.
    """
    weights: dict[str, Tensor] = dict(block.named_parameters())

    def run(*args: Any) -> Any:
        if all(weights[name] is param for name, param in block.named_parameters()):
            return block(*args)
        return torch.func.functional_call(block, weights, args)

    return run


def _files() -> Any:
    """The module that reads and writes files. To run a model, torch alone is enough."""
    try:
        from deepopt.hope import files
    except ImportError as missing:
        raise ImportError(
            f"models on disk need {missing.name}: pip install safetensors"
        ) from missing
    return files
