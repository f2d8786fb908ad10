"""Mask rows inside the host's model: which rows they are, their embedding, and the gated LoRA.

The host gives every request the same number of rows and knows none of them apart. Its model's
`forward` is wrapped: for forwards of ours it replaces the rows' ids by drafts and the embedding of
mask rows by the learned one. The products of the linear layers are wrapped to add the LoRA to mask
rows, before ranks of a tensor-parallel server sum theirs up. All of it is tensors and fixed shapes,
so that a CUDA graph captures it with the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from idlm.decoding.layout import Layout
from idlm.integrations.sglang.lora_kernel import LoraKernel
from idlm.integrations.sglang.shares import share_of
from idlm.integrations.sglang.slots import Slots
from idlm.model.adapter import Adapter

# Adds to rows ``rows_F`` of ``y_FO`` what they get for ``x_FI``.
Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

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

    def __init__(self, layout: Layout, model: nn.Module, adapter: Adapter | None, mask: int | None):
        self.layout = layout
        self.slots: Slots | None = None
        self._embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._embedding_H = self._mask_embedding(adapter, mask)
        # The rows, flat over the batch, that hold masks in the forward that runs; None: no forward
        # of ours.
        self._rows_F: torch.Tensor | None = None
        model.forward = self._wrap(model.forward)
        if adapter is not None:
            for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
                for fused, lora in adapter.layer(index).items():
                    module: Any = layer.get_submodule(PROJECTIONS[fused])
                    product = copy.copy(module.quant_method)
                    product.apply = self._adding(product.apply, _update(*share_of(lora, module)))
                    module.quant_method = product

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
            first_B1 = torch.arange(0, len(ids), W, device=ids.device)[:, None]
            rows_F = (first_B1 + self._places(self.slots.count(slot_B))).flatten()
            ids = ids_BW.flatten()
            x_FH = self._embed(ids)
            x_FH = x_FH.index_copy(0, rows_F, self._embedding_H.expand(len(rows_F), -1))
            self._rows_F = rows_F
            try:
                return forward(ids, positions, batch, *args, **{**kw, "input_embeds": x_FH})
            finally:
                self._rows_F = None

        return wrapped

    def _adding(self, apply: Callable[..., torch.Tensor], update: Update) -> Callable[..., Any]:
        @functools.wraps(apply)
        def adding(
            module: nn.Module, x_FI: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            y_FO = apply(module, x_FI, bias)
            if self._rows_F is not None:
                update(y_FO, x_FI, self._rows_F)
            return y_FO

        return adding


def _update(A_ZI: torch.Tensor, B: list[torch.Tensor]) -> Update:
    """The function that adds a LoRA's update of ``x_FI`` to rows ``rows_F`` of ``y_FO``."""
    if A_ZI.is_cuda and LoraKernel.takes(B):
        return LoraKernel(A_ZI, B).add_to
    up_OZ = torch.block_diag(*B)

    def add_to(y_FO: torch.Tensor, x_FI: torch.Tensor, rows_F: torch.Tensor) -> None:
        y_FO.index_add_(0, rows_F, F.linear(F.linear(x_FI[rows_F], A_ZI), up_OZ))

    return add_to
