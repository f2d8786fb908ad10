"""The memory that keys and values lie in, and how much of it there is."""

from __future__ import annotations

import math

import psutil
import torch

from idlm.engine.beside import Beside
from idlm.engine.blocks import BlockPool
from idlm.errors import InvalidRequestError, ResourceError
from idlm.model.config import ModelConfig

BLOCK_TOKENS = 16
# Of the memory that is free once the weights are there. Others use the CPU's too.
SHARE = {"cuda": 0.8, "cpu": 0.25}


class KVCache:
    """``[L, N, K, T, D]`` keys and values in blocks of T tokens; block 0 belongs to nobody.

    Engines of one model may share it: a token's key does not depend on how it was decoded.

    Args:
        tokens: how many it holds; None: ``wanted``, or what fits into a share of the memory that
            is free now.
    Attributes:
        k_LNKTD, v_LNKTD: garbage where nobody has written.
        pool: who holds which block.
        beside: what is launched over it, and in which order.
    Raises:
        InvalidRequestError: ``tokens`` is not a positive whole number.
        ResourceError: out of memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int | None,
        wanted: int,
    ) -> None:
        layer_shape = (config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
        if tokens is None:
            block_bytes = 2 * config.num_layers * math.prod(layer_shape) * dtype.itemsize
            blocks_free = int(SHARE[device.type] * _free_memory(device)) // block_bytes
            tokens = max(min(wanted, blocks_free * BLOCK_TOKENS), 1)
        elif isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise InvalidRequestError(
                f"kv_cache_tokens must be a whole number of at least 1, not {tokens!r}."
            )
        num_blocks = 1 + -(-tokens // BLOCK_TOKENS)
        shape = (config.num_layers, num_blocks, *layer_shape)
        try:
            # Not zeros: the operating system provides the pages that are touched, and no others.
            self.k_LNKTD = torch.empty(shape, dtype=dtype, device=device)
            self.v_LNKTD = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(
                f"No memory on {device} for the keys and values of {tokens} tokens; lower "
                "kv_cache_tokens or max_batch."
            ) from error
        self.k_LNKTD[:, 0], self.v_LNKTD[:, 0] = 0, 0
        self.pool, self.beside = BlockPool(num_blocks, BLOCK_TOKENS), Beside(device)


def _free_memory(device: torch.device) -> int:
    """Bytes that could be had on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
