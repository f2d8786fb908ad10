"""Stands in for SGLang's kernels on a CPU, for which the package index has none: tests only.

The engine imports many names and, with its plain PyTorch back ends, calls two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.4.5"


def copy_all_layer_kv_cache_cpu(
    buffers: torch.Tensor, strides: torch.Tensor, to: torch.Tensor, source: torch.Tensor
) -> None:
    """Copy cache entries ``source`` to ``to`` in buffers given by address and stride in bytes."""
    for address, stride in zip(buffers.tolist(), strides.tolist(), strict=True):
        for a, b in zip(to.tolist(), source.tolist(), strict=True):
            ctypes.memmove(address + a * stride, address + b * stride, stride)


def assign_req_to_token_pool_cpu(
    slots: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    locations: torch.Tensor,
    width: int,
) -> None:
    """Write each request's new cache locations into its row of the table."""
    first = 0
    for slot, a, b in zip(slots.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[slot, a:b] = locations[first : first + b - a].to(req_to_token.dtype)
        first += b - a


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kw: Any) -> NoReturn:
        raise NotImplementedError(f"the stand-in for SGLang's CPU kernels has no {name}")

    return missing
