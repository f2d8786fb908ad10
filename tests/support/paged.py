"""Contiguous keys and values cut into shuffled blocks, and back."""

from __future__ import annotations

import torch


def block_table(batch: int, length: int, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    """``[B, P]`` int32: shuffled blocks for ``length`` tokens a request; block 0 is unused."""
    most = -(-length // tokens)
    order = torch.randperm(batch * most, generator=torch.Generator().manual_seed(seed)) + 1
    return order.view(batch, most).int()


def paged(cache: torch.Tensor, table_BP: torch.Tensor, tokens: int = 16) -> torch.Tensor:
    """``[..., B, K, S, D]`` to ``[..., N, K, T, D]``; what no request owns is NaN."""
    B, P = table_BP.shape
    *leading, _, K, S, D = cache.shape
    blocks = cache.new_full((*leading, B * P + 1, K, tokens, D), torch.nan)
    padded = cache.new_full((*leading, B, K, P * tokens, D), torch.nan)
    padded[..., :S, :] = cache
    blocks[..., table_BP.long(), :, :, :] = padded.unflatten(-2, (P, tokens)).transpose(-4, -3)
    return blocks


def contiguous(cache: torch.Tensor, table_BP: torch.Tensor, length: int) -> torch.Tensor:
    """The inverse of `paged`: ``[..., B, K, S, D]``."""
    return cache[..., table_BP.long(), :, :, :].transpose(-4, -3).flatten(-3, -2)[..., :length, :]


def flat(x_BRX: torch.Tensor, clean: int) -> torch.Tensor:
    """``[B, R, ...]`` to ``[N, ...]``: the ``clean`` rows of all requests, then their masks."""
    return torch.cat((x_BRX[:, :clean].flatten(0, 1), x_BRX[:, clean:].flatten(0, 1)))


def cells(
    table_BP: torch.Tensor, start_B: torch.Tensor, rows: int, clean: int, tokens: int = 16
) -> torch.Tensor:
    """``[N]`` int64, flat: where the keys of ``rows`` of each request go, from ``start`` on."""
    index_BR = start_B[:, None] + torch.arange(rows, device=start_B.device)
    block_BR = table_BP.long().gather(1, index_BR // tokens)
    return flat(block_BR * tokens + index_BR % tokens, clean)
