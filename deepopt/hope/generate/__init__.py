"""Continuing a text with a Hope model, one token at a time, from its carried state.

`stream` yields tokens as they are drawn, `generate` collects them, `complete` takes and gives text.
All are exact: every token has the logits that a full forward pass gives. With self-modifying
memories a token costs the same time and memory however long the text is; with Hope-Attention it
costs more as the text grows.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from deepopt.hope.model import Hope
from deepopt.hope.reader import hope_in
from deepopt.hope.state import INTEGERS, HopeState

PREFILL = 1024
"""The most tokens of a prompt that are read at once, unless the caller names another number."""
ENDED = -1
"""Takes the place of tokens after the end of a text, while others of its batch go on."""


def generate(model: Hope, prompt: Tensor, length: int, **options: Any) -> Tensor:
    """Continues prompts, and returns each with its continuation.

    Args:
        model: the model; torch.compile or `deepopt.hope.huggingface` may have wrapped it.
        prompt: (batch, tokens), integers; at least one token.
        length: number of tokens to add, at most.
        **options: those of `stream`.

    Returns:
        (batch, tokens + added). Fewer than `length` are added if all texts end earlier. After the
        end of a text follows `ENDED`, -1.

    Raises:
        ValueError, TypeError, FloatingPointError: as `stream` does.
    """
    added = list(stream(model, prompt, length, **options))
    return torch.cat([prompt.long(), *(tokens[:, None] for tokens in added)], 1)


def complete(model: Hope, text: str | bytes, length: int, **options: Any) -> Iterator[str]:
    """Continues a text, and yields the continuation in pieces, as soon as each is there.

    Args:
        model: a model of bytes.
        text: the prompt, of at least one character or byte. A string may hold bytes that are not
            UTF-8 as surrogates, as Python passes them from a command line.
        length: number of bytes to add, at most.
        **options: those of `stream` except `mask`.

    Yields:
        whole characters; joined, they are the continuation. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        ValueError, TypeError, FloatingPointError: as `stream` does, and for another vocabulary.
    """
    model = _hope(model)
    if not isinstance(text, str | bytes):
        raise TypeError(
            f"text is of type {type(text).__name__}: must be text or bytes; for tokens call stream"
        )
    if model.config.vocab_size != 256:
        raise ValueError(
            f"the model has vocab_size={model.config.vocab_size}: text needs one of bytes, 256; "
            "encode the text by its own tokenizer and call stream"
        )
    if not text:
        raise ValueError("text is empty: give at least one character to continue, such as '\\n'")
    try:
        encoded = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has {error.object[error.start]!r}, half of a character: give whole ones, or "
            "bytes"
        ) from error
    prompt = torch.tensor([list(encoded)], device=next(model.parameters()).device)
    return _decoded(stream(model, prompt, length, **options))


def _decoded(stream: Iterator[Tensor]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for tokens in stream:
        if piece := decoder.decode(bytes(tokens.tolist())):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def stream(
    model: Hope,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: bytes | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    state: HopeState | None = None,
    prefill: int = PREFILL,
) -> Iterator[Tensor]:
    """Continues prompts, and yields the tokens as soon as they are drawn.

    Args:
        model: as for `generate`.
        prompt: (batch, tokens), integers; at least one token.
        length: number of tokens to add, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens alone; None for all.
        top_p: draw among the likeliest tokens that together have this probability, after
            temperature and top_k; None for all.
        stop: a sequence of tokens, such as b"\\n\\n", that ends a text once it has been added, and
            stays in it; None for texts of `length` tokens.
        generator: source of randomness, on the model's device; None for torch's global one.
        mask: (batch, tokens) bool, False where a prompt is padded, on its left; None for prompts of
            one length.
        state: what the model remembers of the text before the prompt; None for the start of a
            text.
        prefill: tokens of the prompt that are read at once; fewer take less memory.

    Yields:
        (batch,), int64: a token for every text, `ENDED` for one that has ended.

    Raises:
        TypeError: `prompt` is text, or an argument is not a number.
        ValueError: an argument out of range, or a prompt that ends with padding.
        FloatingPointError: the logits are not finite.
    """
    model = _hope(model)
    _check_prompt(prompt, mask, model.config.vocab_size)
    _check_numbers(length, temperature, top_k, top_p, prefill)
    _check_stop(stop, model.config.vocab_size)
    _check_generator(generator, prompt.device)
    if state is not None:
        model.check_state(state, len(prompt))

    @torch.no_grad()
    def tokens_one_by_one(state: HopeState | None) -> Iterator[Tensor]:
        if length == 0:
            return
        for first in range(0, prompt.shape[1], prefill):
            part = slice(first, first + prefill)
            padding = {} if mask is None else {"mask": mask[:, part]}
            logits, _, state = model(prompt[:, part].long(), state=state, **padding)
        ending = prompt.new_tensor(list(stop or ()), dtype=torch.long)
        last = prompt.new_full((len(prompt), len(ending)), ENDED, dtype=torch.long)
        ended = prompt.new_zeros(len(prompt), dtype=torch.bool)
        for count in range(1, length + 1):
            tokens = _draw(logits[:, -1], temperature, top_k, top_p, generator)
            yield tokens[:, 0].masked_fill(ended, ENDED)
            if stop is not None:
                last = torch.cat([last[:, 1:], tokens], 1)
                ended = ended | (last == ending).all(1)
                if ended.all():
                    return
            if count < length:
                logits, _, state = model(tokens, state=state)

    return tokens_one_by_one(state)


def _draw(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token per row of logits (batch, vocab_size); (batch, 1)."""
    if not logits.isfinite().all():
        raise FloatingPointError(
            "the model's logits are not finite: its weights or memories have diverged; train it at "
            "a smaller learning rate, or make it with a smaller max_inner_lr"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
    logits = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature cannot overflow
    # A temperature that this dtype rounds to 0 or to infinity would make NaN of 0 or of -inf.
    limits = torch.finfo(logits.dtype)
    shares = (logits / min(max(float(temperature), limits.tiny), limits.max)).softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p
        dropped[:, 0] = False  # the likeliest always stays, also if top_p rounds to 0
        shares = shares.scatter(1, order, ordered.masked_fill(dropped, 0))
    return torch.multinomial(shares, 1, generator=generator)


def _hope(model: Any) -> Any:
    """The model itself, which torch.compile or transformers may wrap."""
    if isinstance(model, type) or (hope := hope_in(model)) is None:
        raise TypeError(
            f"model is of type {type(model).__name__}: must be a deepopt.hope.Hope, such as "
            "Hope(HopeConfig(...)) or Hope.from_pretrained(folder)"
        )
    return hope


def _check_prompt(prompt: Tensor, mask: Tensor | None, size: int) -> None:
    if not isinstance(prompt, Tensor):
        raise TypeError(
            f"prompt is of type {type(prompt).__name__}: must be a tensor of tokens (batch, tokens)"
            "; for text call complete, or torch.tensor([list(text.encode())])"
        )
    if prompt.ndim != 2 or prompt.numel() == 0 or prompt.dtype not in INTEGERS:
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}: must be integers of "
            "shape (batch, tokens) with at least one token"
        )
    ends = (int(token) for token in prompt.long().aminmax())
    if outside := [token for token in ends if not 0 <= token < size]:
        raise ValueError(
            f"prompt has {outside[0]}: tokens must lie in 0 ... {size - 1}, the model's "
            "vocabulary; encode the text with fewer tokens"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is of type {type(mask).__name__}: must be a tensor (batch, tokens)")
    if mask.shape != prompt.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: must have that of prompt, {tuple(prompt.shape)}"
        )
    if not mask[:, -1].all():
        raise ValueError("mask is False at the end of a prompt: pad on the left")


def _check_numbers(
    length: int, temperature: float, top_k: int | None, top_p: float | None, prefill: int
) -> None:
    numbers = (
        ("length", length, Integral),
        ("temperature", temperature, Real),
        ("top_k", top_k, Integral),
        ("top_p", top_p, Real),
        ("prefill", prefill, Integral),
    )
    for name, given, kind in numbers:
        if given is None and name in ("top_k", "top_p"):
            continue
        if not isinstance(given, kind) or isinstance(given, bool):
            needed = "whole number" if kind is Integral else "number"
            raise TypeError(f"{name}={given!r}: must be a {needed}")
    if length < 0:
        raise ValueError(f"length={length}: must be at least 0, the number of tokens to add")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be finite and at least 0, greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1, or None for no limit")
    if prefill < 1:
        raise ValueError(f"prefill={prefill}: must be at least 1, the tokens read at once")


def _check_stop(stop: bytes | Sequence[int] | None, size: int) -> None:
    if isinstance(stop, str):
        raise TypeError(f"stop={stop!r} is text: must be tokens, such as {stop.encode()!r}")
    if stop is not None and not (
        isinstance(stop, Sequence) and all(isinstance(token, Integral) for token in stop)
    ):
        raise TypeError(f"stop={stop!r}: must be tokens, such as b'\\n' or [10], or None")
    if stop is not None and not (len(stop) and all(0 <= token < size for token in stop)):
        raise ValueError(
            f"stop={stop!r}: must be at least one token, each in 0 ... {size - 1}, or None"
        )


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(getattr(generator, "device", 0), torch.device):
        raise TypeError(f"generator={generator!r}: must be a torch.Generator, or None")
    if generator.device.type != device.type:
        raise ValueError(
            f"generator lies on {generator.device}, prompt on {device}: make it by "
            f"torch.Generator({str(device)!r})"
        )
