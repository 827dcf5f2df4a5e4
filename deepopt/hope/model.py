"""Hope: a language model of self-modifying memories and a continuum memory system."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.hope.block import HopeBlock
from deepopt.hope.config import HopeConfig
from deepopt.hope.titans import TitansState

HopeState = tuple[TitansState, ...]


class HopeOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: (batch, tokens, vocab_size).
        loss: mean cross entropy in nats, a scalar; None without targets.
        state: one state per block; hand it to the next call to go on exactly.
    """

    logits: Tensor
    loss: Tensor | None
    state: HopeState


class Hope(nn.Module):
    """Embedding, blocks, norm and head (§8.3 of the paper).

    The output of a call depends on its arguments alone: there is no dropout, `train()` and `eval()`
    are the same, and what the memories learn from a text lives in the returned state.

    Args:
        config: sizes and options; None means `HopeConfig()`.
    """

    def __init__(self, config: HopeConfig | None = None) -> None:
        super().__init__()
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
        # A head of zeros: the first loss is ln(vocab_size), whatever the rest does.
        nn.init.zeros_(self.head.weight)
        # Branches share the variance of the residual stream, whatever their number.
        branches = self.config.layers * (1 + len(self.config.cms_chunks))
        for name, param in self.named_parameters():
            if name.endswith(("titans.output.weight", "down.weight")):
                param.data.mul_(1 / math.sqrt(branches))

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, state: HopeState | None = None
    ) -> HopeOutput:
        """Predicts every next token.

        Args:
            tokens: (batch, tokens), integers below `vocab_size`; at least one token.
            targets: the tokens that follow, same shape; None for no loss.
            state: the state that an earlier call returned; None for the start of a text.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: "
                "must be integers of shape (batch, tokens) with at least one token"
            )
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}: must have the shape of tokens, "
                f"{tuple(tokens.shape)}, and hold the token that follows each"
            )
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"state has {len(state)} entries: must have one for each of the "
                f"{len(self.blocks)} blocks, as returned by an earlier call"
            )
        if state is not None and state[0].tails.key.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"state belongs to a batch of {state[0].tails.key.shape[0]}, tokens to one of "
                f"{tokens.shape[0]}: go on with the batch that the state was made from"
            )
        x = self.embedding(tokens)
        states = []
        for i, block in enumerate(self.blocks):
            x, new = block(x, None if state is None else state[i])
            states.append(new)
        logits = self.head(self.norm(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return HopeOutput(logits, loss, tuple(states))
