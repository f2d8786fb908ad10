"""Counter-based random numbers: a pure function of (seed, position, stream, token).

A request's draws depend on nothing but its seed and the place in its text, so its result does not
depend on the batch, the stride or the layout. The generator is SplitMix64 (Steele, Lea and Flood
2014): the ``i``-th output of the stream with state ``key`` is ``mix(key + i * GOLDEN)``.
"""

from __future__ import annotations

from enum import IntEnum

import torch

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which wrap
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class Stream(IntEnum):
    """What a draw is for: draws of different streams are independent."""

    TOKEN = 1
    DRAFT = 2
    ACCEPT = 3


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64's own shift copies the sign


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _key(seed: torch.Tensor, position: torch.Tensor, stream: Stream) -> torch.Tensor:
    return _mix(_mix(_mix(seed) + position * GOLDEN) ^ int(stream))


def _open_unit(bits: torch.Tensor) -> torch.Tensor:
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def uniform(seed: torch.Tensor, position: torch.Tensor, stream: Stream) -> torch.Tensor:
    """One number in (0, 1), fp64, per element of the broadcast int64 ``seed`` and ``position``."""
    return _open_unit(_mix(_key(seed, position, stream) + GOLDEN))


def exponential(
    seed: torch.Tensor, position: torch.Tensor, stream: Stream, token: torch.Tensor
) -> torch.Tensor:
    """Exponential(1) noise, fp32, per element of the broadcast ``seed, position, token`` (int64).

    ``argmax(p / noise)`` is a sample from ``p``: the Gumbel-max trick, since
    ``-log(noise)`` is Gumbel noise.
    """
    bits = _mix(_key(seed, position, stream) + (token + 1) * GOLDEN)
    return -_open_unit(bits).log().float()
