"""Learning at test time: the levels of a trained model learn online from the text that they read.

A token is predicted first and learned from afterwards. A level of C tokens rests until C tokens
have been predicted, and then takes one optimizer step on their mean loss (Eq 71); what follows is
read with the new weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import deepopt
from deepopt._arguments import is_int
from deepopt.hope.cms import chunk_groups, frequencies, levels_of
from deepopt.hope.state import INTEGERS, HopeState, check_tensor
from deepopt.optim.continuum import Continuum

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
WINDOW = 256
"""The most tokens of a text through which gradients go back, and whose activations are kept."""
LR = 1e-3
"""Learning rate of the default optimizer."""


def deep_momentum(lr: float) -> MakeOptimizer:
    """A function that makes the default optimizer of a reader, at another learning rate.

    It names the memory with which reading was measured, ``docs/results/hope.md``.
    """
    return lambda groups: deepopt.DeepMomentum(groups, lr, weight_decay=0.0, memory="delta")


@contextmanager
def adaptation(model: nn.Module) -> Iterator[None]:
    """A context at whose end the model forgets what it learned inside, also after an exception::

        with adaptation(model):
            Reader(model).read(tokens)

    Afterwards every weight and buffer in the model's `state_dict` is what it was, bit for bit. One
    copy of them is kept meanwhile. What was not there, or had another shape, stays.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: must be a torch.nn.Module")
    kept = {name: x.detach().clone() for name, x in model.state_dict(keep_vars=True).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, x in model.state_dict(keep_vars=True).items():
                if name in kept and kept[name].shape == x.shape:
                    x.copy_(kept[name])
        torch.clear_autocast_cache()  # it may hold copies of what was learned


class Reader:
    """Reads texts once, a piece at a time, and lets levels of the model learn from them.

    How the text is cut into pieces changes no number. The losses are those of predictions that were
    made first: the weights that predict a token have learned neither from it nor from a later one.
    Weights change in place; `adaptation` takes the changes back. Inside a chunk, gradients go back
    through the state by up to `WINDOW` tokens, and only this reader may change the weights.

    Args:
        model: a `Hope`, or a causal language model of transformers whose MLPs `stack_levels` has
            made levels. It is called as it is: set it to `eval()` if it has dropout.
        levels: which levels learn, as indices among the model's chunks, 0 for the fastest; None for
            all.
        optimizer: makes an optimizer from parameter groups; None for `DeepMomentum` with the delta
            memory, at a learning rate of 1e-3 without weight decay.
        chunk: tokens between two updates of the fastest of these levels, the others in proportion;
            None for the levels' own chunks. Tokens of all texts of a batch count.

    Attributes:
        state: what the model remembers of all tokens but the last, without history.
        last: the last token of every text, (batch, 1), not yet given to the model; with the state,
            it is the prompt to go on from. None before the first.
        updates: optimizer steps so far.

    Raises:
        TypeError: `optimizer` is not a function, or `model` is of another kind.
        ValueError: the model has no level that can learn, an index in `levels` or `chunk` is out
            of range, or `optimizer` did not keep the groups that it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[int] | None = None,
        optimizer: MakeOptimizer | None = None,
        chunk: int | None = None,
    ) -> None:
        _check_model(model)
        if chunk is not None and not (is_int(chunk) and chunk >= 1):
            raise ValueError(
                f"chunk={chunk!r}: must be an int of at least 1, the tokens between two updates"
            )
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                f"optimizer is of type {type(optimizer).__name__}: must be a function that makes "
                "one from parameter groups, such as lambda groups: torch.optim.SGD(groups, lr=0.1)"
            )
        groups = _learning_groups(model, levels, chunk)
        learning = {param for group in groups for _, param in group["params"]}
        inner = (optimizer or deep_momentum(LR))(groups)
        _check_groups(inner, learning)
        self.model, self.optimizer, self.updates = model, Continuum(inner), 0
        # The vocabulary's size is known before the first token only from a configuration.
        self._vocab_size: int | None = getattr(getattr(model, "config", None), "vocab_size", None)
        self.last: Tensor | None = None
        self._state: Any = None
        self._fastest = min(self.optimizer.param_groups, key=lambda group: group["chunk"])
        self._losses: list[Tensor] = []
        # The window under way: its summed loss, its tokens so far, and the positions still to come.
        self._loss_sum: Tensor | None = None
        self._loss_tokens = self._positions_left = self._changes = 0

    @property
    def state(self) -> Any:
        return _detached(self._state)

    @property
    def losses(self) -> Tensor:
        """Those of all tokens that were read, (batch, tokens), as `read` returns them."""
        return torch.cat(self._losses, 1) if self._losses else torch.empty(0, 0)

    # Learning needs gradients, even where the caller has turned them off to generate text.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Predict tokens, then learn from them where a chunk ends.

        Args:
            tokens: (batch, tokens), integers; the texts go on from piece to piece.

        Returns:
            (batch, tokens), the loss of every token in nats; NaN for the first of a text, which
            nothing predicts.

        Raises:
            TypeError: not a tensor.
            ValueError: another shape or dtype, another batch size than before, or tokens outside of
                the vocabulary. Nothing is read.
            RuntimeError: something else has changed the weights inside a chunk. Nothing is read.
            FloatingPointError: a loss is not finite.
        """
        check_tensor("tokens", tokens)
        if tokens.ndim != 2 or tokens.dtype not in INTEGERS:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: must be "
                "integers of shape (batch, tokens)"
            )
        tokens = tokens.to(torch.int64, copy=True)  # one made in inference mode has no gradients
        if self._losses and len(self._losses[0]) != len(tokens):
            raise ValueError(
                f"tokens has {len(tokens)} texts, those before had {len(self._losses[0])}: the "
                "texts of a batch go on together; take a new reader for others"
            )
        size = self._vocab_size
        if size is not None and (outside := tokens[(tokens < 0) | (tokens >= size)]).numel():
            raise ValueError(
                f"tokens has {outside[0].item()}: must lie in 0 ... {size - 1}, the model's "
                "vocabulary; encode the text with fewer tokens"
            )
        waits = any(group["pending_tokens"] for group in self.optimizer.param_groups)
        if (waits or self._loss_sum is not None) and self._changes != _changes(self.model):
            raise RuntimeError(
                "the model's weights have changed since this reader's last tokens, inside a chunk "
                "from which it has still to learn: go on with a new reader, and read with one "
                "reader at a time"
            )
        before = len(self._losses)
        self._losses.append(torch.zeros(len(tokens), 0, device=tokens.device))
        if self.last is None and tokens.numel():
            self.last, tokens = tokens[:, :1], tokens[:, 1:]
            self._losses.append(torch.full(self.last.shape, torch.nan, device=tokens.device))
        while tokens.numel() and self.last is not None:
            self._positions_left = self._positions_left or self._window(len(tokens))
            piece, tokens = tokens[:, : self._positions_left], tokens[:, self._positions_left :]
            self._losses.append(self._predict(torch.cat([self.last, piece[:, :-1]], 1), piece))
            self.last = piece[:, -1:]
            self._positions_left -= piece.shape[1]
            if self._positions_left == 0:
                self._learn()
        return torch.cat(self._losses[before:], 1)

    def _window(self, batch: int) -> int:
        """Positions of the next window: those left in the chunk, or an equal part of them."""
        missing = self._fastest["chunk"] - self._fastest["pending_tokens"]
        positions = -(-missing // batch)
        # As few windows of at most WINDOW positions as the chunk needs, of nearly equal length.
        return -(-positions // -(-positions // WINDOW))

    def _predict(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits, state = _forward(self.model, tokens, self._state)
        wide = torch.promote_types(logits.dtype, torch.float32)
        flat = F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), reduction="none")
        if not flat.isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite after {self.updates} updates: read with a smaller lr"
            )
        self._state, self._changes = state, _changes(self.model)
        self._loss_sum = flat.sum() if self._loss_sum is None else self._loss_sum + flat.sum()
        self._loss_tokens += targets.numel()
        return flat.detach().view(targets.shape)

    def _learn(self) -> None:
        """Gradients of the window, for the levels whose chunk ends and for those that wait."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert self._loss_sum is not None
        grads = torch.autograd.grad(self._loss_sum / self._loss_tokens, params, allow_unused=True)
        kept = [param.grad for param in params]
        try:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            for group in self.optimizer.param_groups:
                group["tokens"] = self._loss_tokens
            with self.optimizer.due() as ends:
                if ends:
                    self.optimizer.optimizer.step()
                    self.updates += 1
        finally:
            for param, own in zip(params, kept, strict=True):
                param.grad = own
            self._state, self._loss_sum, self._loss_tokens = _detached(self._state), None, 0
            self._changes = _changes(self.model)
            torch.clear_autocast_cache()  # it holds copies of the weights from before


def adapt(
    model: nn.Module,
    stream: Tensor | Iterable[Tensor],
    *,
    levels: Sequence[int] | None = None,
    optimizer: MakeOptimizer | None = None,
    chunk: int | None = None,
) -> Reader:
    """Read a text, and let CMS levels learn from it online, each at the end of its chunks::

        with model.adaptation():                          # forgets it all at the end
            reader = model.adapt(tokens, optimizer=lambda groups: AdamW(groups, lr=1e-3))
            more = generate(model, reader.last, 200, state=reader.state)

    Every token is predicted before the model learns from it or from a later one.

    Args:
        model: as for `Reader`.
        stream: tokens (batch, tokens), or pieces of them; how it is cut changes nothing.
        levels: which levels learn, as for `Reader`.
        optimizer: makes an optimizer from parameter groups, as for `Reader`.
        chunk: tokens between two updates, as for `Reader`.

    Returns:
        The reader at the end of the stream, with its `losses` and `state`.

    Raises:
        TypeError, ValueError, FloatingPointError: as `Reader` does.
    """
    reader = Reader(model, levels, optimizer, chunk)
    if not isinstance(stream, Iterable):
        raise TypeError(
            f"stream is of type {type(stream).__name__}: must be a tensor (batch, tokens), or "
            "pieces of one"
        )
    for piece in [stream] if isinstance(stream, Tensor) else stream:
        reader.read(piece)
    return reader


def _check_model(model: Any) -> None:
    """Raise TypeError for a model that cannot read a text in pieces."""
    if isinstance(model, nn.Module):
        known = inspect.signature(model.forward).parameters
        wrapped = any(each.kind is each.VAR_KEYWORD for each in known.values())
        if hope_in(model) is not None or "past_key_values" in known or wrapped:
            return
    raise TypeError(
        f"model is of type {type(model).__name__}: must be a deepopt.hope.Hope, or a causal "
        "language model of transformers with past_key_values, to read a text in pieces"
    )


def _learning_groups(
    model: nn.Module, levels: Sequence[int] | None, chunk: int | None
) -> list[dict[str, Any]]:
    """Parameter groups of the levels that learn, each with its chunk.

    Raises:
        ValueError: the model has no level that can learn, or `levels` names one that it has not.
    """
    known = {
        param: own_chunk for level in levels_of(model) for param, own_chunk, _ in frequencies(level)
    }
    if not any(param.requires_grad for param in known):
        raise ValueError("the model has no level that can learn: see stack_levels")
    chunks = sorted(set(known.values()))
    if levels is not None and not (
        isinstance(levels, Sequence)
        and levels
        and all(is_int(i) and i in range(len(chunks)) for i in levels)
    ):
        raise ValueError(
            f"levels={levels!r}: must be a list of indices of the model's {len(chunks)} "
            f"frequencies, 0 to {len(chunks) - 1}"
        )
    learning = {param: own_chunk for param, own_chunk in known.items() if param.requires_grad}
    wanted = range(len(chunks)) if levels is None else sorted(set(levels))
    chosen = [chunks[i] for i in wanted if chunks[i] in learning.values()]
    if levels is not None and len(chosen) < len(wanted):
        raise ValueError(
            f"levels={levels!r}: must be of levels that can learn; all parameters of one are "
            "frozen, so call requires_grad_() on it or leave it out"
        )
    fastest, chunk = chosen[0], chunk or chosen[0]
    groups = []
    for group in chunk_groups(model, deepopt.param_groups(model), tokens=1):
        params = [(n, p) for n, p in group["params"] if learning.get(p) in chosen]
        if params:
            lifetime = group["lifetime"] and group["lifetime"] * chunk // fastest
            scaled = {"chunk": group["chunk"] * chunk // fastest, "lifetime": lifetime}
            groups.append({**group, **scaled, "params": params})
    return groups


def _check_groups(optimizer: Any, learning: set[Tensor]) -> None:
    """Raise ValueError unless an optimizer has just these parameters, in groups with chunks."""
    made = getattr(optimizer, "param_groups", [])
    if {param for group in made for param in group["params"]} != learning or not all(
        "chunk" in group for group in made
    ):
        raise ValueError(
            "optimizer made an optimizer of other groups than it was given: must be made from "
            "them, such as lambda groups: torch.optim.SGD(groups, lr=0.1)"
        )


def hope_in(model: Any) -> Any:
    """The Hope that a model is or, for transformers, wraps; None for another model."""
    both = (model, getattr(model, "model", None))
    return next((hope for hope in both if hasattr(hope, "initial_state")), None)


def _forward(model: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Logits and the state after the tokens, of a Hope or of a model of transformers."""
    if (hope := hope_in(model)) is not None:
        out = hope(tokens, state=state)
        return out.logits, out.state
    out = model(input_ids=tokens, past_key_values=state, use_cache=True)
    if (cache := getattr(out, "past_key_values", None)) is None:
        raise RuntimeError(
            "the model returned no past_key_values, as transformers' models do that train with "
            "gradient checkpointing: call model.gradient_checkpointing_disable() or model.eval()"
        )
    if not all(hasattr(layer, "keys") for layer in getattr(cache, "layers", ())):
        raise RuntimeError(
            f"{type(model).__name__} has layers whose cache is no keys and values, as Mamba's: "
            "such a cache changes in place, so no gradient can go back through it; read with a "
            "model of softmax attention"
        )
    return out.logits, cache


def _changes(model: nn.Module) -> int:
    """A number that grows when a weight changes in place; autograd counts it."""
    return sum(param._version for param in model.parameters() if not param.is_inference())


def _detached(state: Any) -> Any:
    """A state without history, which neither reading nor decoding from it changes."""
    if isinstance(state, HopeState):
        return state.detach()
    if not hasattr(state, "layers"):
        return state
    cache = copy.copy(state)  # of transformers: a model writes new keys into the one it is given
    cache.layers = list(map(copy.copy, state.layers))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache
