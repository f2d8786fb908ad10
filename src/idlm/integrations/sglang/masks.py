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
from torch import nn

from idlm.decoding.layout import Layout
from idlm.integrations.sglang.product import Product, RowOrder
from idlm.integrations.sglang.slots import Slots
from idlm.model.adapter import Adapter
from idlm.model.config import ModelConfig
from idlm.model.cuda.stack import SMALL_WEIGHT

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
        small = config.hidden_size * config.intermediate_size < SMALL_WEIGHT
        for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
            for fused, lora in adapter.layer(index).items():
                module: Any = layer.get_submodule(PROJECTIONS[fused])
                product = Product(module, lora, len(self._products), merge=small)
                module.quant_method = product.method(lambda: self._order)
                self._products.append(product)

    def block(self, rows_BWX: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
        """Of all rows, the mask block ``[B, M, X]`` of requests with ``count`` drafts."""
        batch_B1 = torch.arange(len(count_B), device=count_B.device)[:, None]
        return rows_BWX[batch_B1, self._places(count_B)]

    def _mask_embedding(self, adapter: Adapter | None, mask: int | None) -> torch.Tensor:
        if adapter is not None and adapter.mask_token_id is None:
            embedding_H: torch.Tensor = adapter.mask_embedding
            return embedding_H
        token = mask if adapter is None else adapter.mask_token_id
        weight: torch.Tensor = self._embed.weight  # type: ignore[assignment]
        with torch.no_grad():
            return self._embed(torch.tensor([token], device=weight.device))[0]

    def _places(self, count_B: torch.Tensor) -> torch.Tensor:
        """Places of the mask rows ``[B, M]`` among a request's: right after its drafts."""
        M = self.layout.block_size
        return count_B[:, None] + torch.arange(1, M + 1, device=count_B.device)

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapped(
            ids: torch.Tensor, positions: torch.Tensor, batch: Any, *args: Any, **kw: Any
        ) -> Any:
            if not batch.forward_mode.is_target_verify():
                return forward(ids, positions, batch, *args, **kw)
            assert self.slots is not None
            W, M = self.layout.num_rows, self.layout.block_size
            slot_B = batch.req_pool_indices
            ids_BW = ids.view(-1, W)
            ids_BW = torch.cat((ids_BW[:, :1], self.slots.tokens(slot_B), ids_BW[:, 1 + M :]), 1)
            masks_BM = self._places(self.slots.count(slot_B))
            masks_F = self._flat(masks_BM)
            ids = ids_BW.flatten()
            x_FH = self._embed(ids)
            x_FH = x_FH.index_copy(0, masks_F, self._embedding_H.expand(len(masks_F), -1))
            if self._products:
                self._order = self._row_order(masks_BM, masks_F)
            try:
                return forward(ids, positions, batch, *args, **{**kw, "input_embeds": x_FH})
            finally:
                self._order = None

        return wrapped

    def _row_order(self, masks_BM: torch.Tensor, masks_F: torch.Tensor) -> RowOrder:
        """The rows of tokens (and those that nothing sees), then the mask rows."""
        N, M = self.layout.stride, self.layout.block_size
        place_N = torch.arange(N, device=masks_F.device)
        tokens_BN = place_N + M * (place_N >= masks_BM[:, :1])
        order_F = torch.cat((self._flat(tokens_BN), masks_F))
        ready_P1 = torch.full((len(self._products), 1), 0, dtype=torch.int32, device=order_F.device)
        return RowOrder(order_F, len(masks_F), ready_P1)

    def _flat(self, place_BX: torch.Tensor) -> torch.Tensor:
        """Rows, flat over the batch, that have these places among those of their requests."""
        W, B = self.layout.num_rows, len(place_BX)
        first_B = torch.arange(0, B * W, W, device=place_BX.device)
        return (first_B[:, None] + place_BX).flatten()

    def refresh(self) -> None:
        """Follow the model's weights, which have changed."""
        for product in self._products:
            product.refresh()
