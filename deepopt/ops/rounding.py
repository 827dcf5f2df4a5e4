"""How a float32 number is kept in a bfloat16 parameter; kernels have csrc/rules/rounding.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rounding = Tensor | int | None
"""Low bits beside the parameter, a seed for stochastic rounding, or None for the nearest."""

_WORD = 0xFFFFFFFF


def roundings(
    params: Sequence[Tensor], lows: Sequence[Tensor], seeds: Sequence[int]
) -> Sequence[Rounding]:
    """The rounding of each parameter, from the two lists of an operator.

    Raises:
        ValueError: both lists are given, or one that is not as long as that of the parameters.
    """
    chosen: list[Rounding] = [*lows, *seeds] or [None] * len(params)
    if (lows and seeds) or len(chosen) != len(params):
        raise ValueError(
            f"Invalid lows or seeds: {len(lows)} and {len(seeds)} for {len(params)} parameters; "
            "give one for each parameter in at most one of the two lists"
        )
    return [
        rounding if param.dtype == torch.bfloat16 else None
        for param, rounding in zip(params, chosen, strict=True)
    ]


def to_fp32(param: Tensor, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    """The numbers that a parameter stands for, in ``dtype``: float32, or float64 for float64.

    It is the parameter itself if that has the dtype already.
    """
    if not isinstance(rounding, Tensor):
        return param.to(dtype)
    high, low = param.view(torch.int16).to(torch.int32) << 16, rounding.to(torch.int32)
    # No rounding leaves negative low bits beside a zero. So the user, by pruning for example, has
    # set the parameter to zero: the low bits are stale, and with them the number would be NaN.
    stale = (high & 0x7FFFFFFF == 0) & (low < 0)
    return (high + low.masked_fill(stale, 0)).view(torch.float32)


def store_rounded(param: Tensor, value: Tensor, rounding: Rounding) -> None:
    """Round numbers as :func:`to_fp32` gives them, and write them into the parameter."""
    if rounding is None:
        param.copy_(value)
        return
    bits = value.view(torch.int32)
    bits = torch.where(value.isnan(), 0x7FC00000, bits)  # one NaN, whose payload cannot overflow
    if isinstance(rounding, Tensor):
        rounding.copy_(((bits & 0xFFFF) ^ 0x8000) - 0x8000)  # the low 16 bits, as a signed number
        bits = bits + 0x8000
    else:
        bits = torch.where(value.isfinite(), bits + _noise(param, rounding), bits)
    param.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))


def _noise(param: Tensor, seed: int) -> Tensor:
    """16 random bits for every entry, from the seed and the entry's place in memory."""
    place = torch.zeros(param.shape, dtype=torch.int64, device=param.device)
    for dim, (size, stride) in enumerate(zip(param.shape, param.stride(), strict=True)):
        along = torch.arange(size, device=param.device) * stride
        place += along.view(-1, *[1] * (param.dim() - 1 - dim))
    high = _scrambled(torch.tensor(((seed >> 32) + 1) & _WORD))
    key = _scrambled(high ^ (seed & _WORD)).to(param.device)
    return (_scrambled((place + key) & _WORD) >> 16).to(torch.int32)


def _scrambled(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer of 32-bit numbers, which are held in 64 bits."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B & _WORD
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35 & _WORD
    return x ^ (x >> 16)
