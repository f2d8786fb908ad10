"""Mask rows inside the host's model: which rows they are, their embedding, and the gated LoRA.

The host gives every request the same number of rows and knows none of them apart. Its model's
`forward` is wrapped: for forwards of ours it replaces the rows' ids by drafts and the embedding of
mask rows by the learned one. The products of the linear layers (`product`) have the LoRA on mask
rows, before ranks of a tensor-parallel server sum theirs up. All of it is tensors and fixed shapes,
so that a CUDA graph captures it with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed import get_tp_group
from torch import nn

from idlm.decoding.layout import Layout
from idlm.integrations.sglang.product import Product
from idlm.integrations.sglang.rows import RowOrder, enter
from idlm.integrations.sglang.slots import Slots
from idlm.model.adapter import Adapter
from idlm.model.config import ModelConfig
from idlm.model.cuda.stack import is_small

# The host's names for the fused projections of a layer.
PROJECTIONS = {
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}


class Masks:
    """The mask rows of the forwards of one model.

    Raises:
        UnsupportedModelError: the host changed the shape of a layer that has a LoRA.
    Attributes:
        slots: set when the host has its memory.
    """

    def __init__(
        self, layout: Layout, model: nn.Module, adapter: Adapter | None, config: ModelConfig
    ) -> None:
        self.layout = layout
        self.slots: Slots | None = None
        self._embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._embedding_H = self._mask_embedding(adapter, config.mask_token_id)
        # The rows of the forward that runs; None: no forward of ours, or nobody asks for them.
        self._order: RowOrder | None = None
        self._products: list[Product] = []
        model.forward = self._wrap(model.forward)
        if adapter is None:
            return
        small = is_small(config)
        for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
            for fused, lora in adapter.layer(index).items():
                module: Any = layer.get_submodule(PROJECTIONS[fused])
                product = Product(module, lora, len(self._products), merge=small)
                module.quant_method = product.method(lambda: self._order)
                self._products.append(product)

    def _mask_embedding(self, adapter: Adapter | None, mask: int | None) -> torch.Tensor:
        if adapter is not None and adapter.mask_token_id is None:
            embedding_H: torch.Tensor = adapter.mask_embedding
            return embedding_H
        token = mask if adapter is None else adapter.mask_token_id
        weight: torch.Tensor = self._embed.weight  # type: ignore[assignment]
        with torch.no_grad():
            return self._embed(torch.tensor([token], device=weight.device))[0]

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapped(
            ids: torch.Tensor, positions: torch.Tensor, batch: Any, *args: Any, **kw: Any
        ) -> Any:
            if not batch.forward_mode.is_target_verify():
                return forward(ids, positions, batch, *args, **kw)
            assert self.slots is not None
            slot_B, whole = batch.req_pool_indices, get_tp_group().world_size == 1
            order_F, x_FH = enter(
                ids, slot_B, self.slots, self._embed, self._embedding_H, whole=whole
            )
            if self._products:
                ready_P1 = torch.full(
                    (len(self._products), 1), 0, dtype=torch.int32, device=ids.device
                )
                masks = len(slot_B) * self.layout.block_size
                self._order = RowOrder(order_F, masks, ready_P1)
            try:
                return forward(ids, positions, batch, *args, **{**kw, "input_embeds": x_FH})
            finally:
                self._order = None

        return wrapped

    def refresh(self) -> None:
        """Follow the model's weights, which have changed."""
        for product in self._products:
            product.refresh()
