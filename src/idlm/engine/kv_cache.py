"""Keys and values of the running requests, one contiguous slot each."""

from __future__ import annotations

import torch

from idlm.errors import ResourceError
from idlm.model.config import ModelConfig


class KVCache:
    """``[L, slots, K, S, D]`` keys and values; running requests fill the first slots.

    Slots and length grow by reallocation, up to a bound that the engine sets.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self.k_LBKSD = self._empty(0, 0)
        self.v_LBKSD = self._empty(0, 0)

    def ensure(self, slots: int, length: int) -> None:
        """Make room for ``slots`` requests of ``length`` tokens and in-flight rows.

        Raises:
            ResourceError: out of memory.
        """
        has_slots, has_length = self.k_LBKSD.shape[1], self.k_LBKSD.shape[3]
        if slots <= has_slots and length <= has_length:
            return
        new_length = has_length if length <= has_length else -(-length // 256) * 256
        new_slots = has_slots if slots <= has_slots else max(slots, 2 * has_slots)
        self.k_LBKSD = self._grown(self.k_LBKSD, new_slots, new_length)
        self.v_LBKSD = self._grown(self.v_LBKSD, new_slots, new_length)

    def move(self, source: int, target: int) -> None:
        """Copy slot ``source`` over slot ``target``."""
        for cache_LBKSD in (self.k_LBKSD, self.v_LBKSD):
            cache_LBKSD[:, target] = cache_LBKSD[:, source]

    def _grown(self, old_LBKSD: torch.Tensor, slots: int, length: int) -> torch.Tensor:
        new_LBKSD = self._empty(slots, length)
        new_LBKSD[:, : old_LBKSD.shape[1], :, : old_LBKSD.shape[3]] = old_LBKSD
        return new_LBKSD

    def _empty(self, slots: int, length: int) -> torch.Tensor:
        c = self._config
        shape = (c.num_layers, slots, c.num_kv_heads, length, c.head_dim)
        try:
            # Zeros, not garbage: an unwritten slot may be read with weight 0, and 0 * NaN is NaN.
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(
                f"No memory for a KV cache of {slots} requests x {length} tokens; generate fewer "
                "prompts at once, or lower max_tokens."
            ) from error
