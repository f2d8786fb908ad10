"""The memory that keys and values lie in, and how much of it there is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import psutil
import torch

from idlm.engine.blocks import Lease
from idlm.errors import ResourceError
from idlm.model.config import ModelConfig

BLOCK_TOKENS = 16
# Of the memory that is free when it is first asked for. A CPU is shared with others.
SHARE = {"cuda": 0.8, "cpu": 0.25}


class KVCache:
    """``[L, N, K, T, D]`` keys and values in blocks of T tokens; block 0 belongs to nobody.

    Args:
        tokens: how many it has to hold; None: ``wanted``, or what fits into a share of the
            memory that is free now.
    Raises:
        ResourceError: there is no memory for a single block.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int | None,
        wanted: int,
    ) -> None:
        c = config
        self._layer_shape = (c.num_kv_heads, BLOCK_TOKENS, c.head_dim)
        self._num_layers, self._device, self._dtype = c.num_layers, device, dtype
        if tokens is None:
            block_bytes = (
                2 * c.num_layers * c.num_kv_heads * BLOCK_TOKENS * c.head_dim * dtype.itemsize
            )
            share = SHARE.get(device.type, SHARE["cpu"])
            fitting = int(share * _free_memory(device)) // block_bytes * BLOCK_TOKENS
            tokens = min(wanted, fitting)
            if tokens < BLOCK_TOKENS:
                raise ResourceError(
                    f"No memory for keys and values on {device}: end other programs, or use a "
                    "smaller model or dtype."
                )
        self.num_blocks = 1 + -(-tokens // BLOCK_TOKENS)

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``k_LNKTD`` and ``v_LNKTD``, made on first use; what nobody has written is garbage.

        Raises:
            ResourceError: out of memory.
        """
        shape = (self._num_layers, self.num_blocks, *self._layer_shape)
        try:
            # Not zeros: the operating system provides what is touched only.
            k = torch.empty(shape, dtype=self._dtype, device=self._device)
            v = torch.empty(shape, dtype=self._dtype, device=self._device)
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(
                f"No memory on {self._device} for the keys and values of "
                f"{(self.num_blocks - 1) * BLOCK_TOKENS} tokens; lower kv_cache_tokens or "
                "max_batch."
            ) from error
        k[:, 0], v[:, 0] = 0, 0
        return k, v

    def table(self, leases: Sequence[Lease]) -> torch.Tensor:
        """``table_BP``: the blocks of each lease, int32, filled up with block 0."""
        most = max(len(lease.ids) for lease in leases)
        rows = [lease.ids + [0] * (most - len(lease.ids)) for lease in leases]
        return torch.tensor(rows, dtype=torch.int32, device=self._device)


def _free_memory(device: torch.device) -> int:
    """Bytes that could be had on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
