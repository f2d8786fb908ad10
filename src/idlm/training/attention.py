"""Attention in training: documents, and mask blocks over them.

On CUDA FlexAttention, which skips what nobody sees; elsewhere the same visibility as a dense bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from idlm.model.attention import grouped_attention, visibility_bias
from idlm.training.compilation import compiled

# (request, head, query row, key row) as index tensors -> bool: FlexAttention's mask function.
Sees = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def documents_see(documents_BT: torch.Tensor) -> Sees:
    """Causal inside each document of a packed row."""

    def sees(
        b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= row) & (documents_BT[b, row] == documents_BT[b, key])

    return sees


def blocks_see(
    anchors_BA: torch.Tensor, starts_BA: torch.Tensor, length: int, block_size: int
) -> Sees:
    """Mask rows (block after block) over ``length`` clean keys and then the mask rows' own.

    Mask ``j`` of the block at anchor ``b`` sees the clean tokens of its document up to ``b``
    (``starts`` is where the document begins) and masks ``1 .. j`` of its own block.
    """

    def sees(
        b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        block = row // block_size
        clean = (key >= starts_BA[b, block]) & (key <= anchors_BA[b, block])
        mask = key - length
        own = (mask >= block * block_size) & (mask <= row)
        return clean | own

    return sees


def joint_see(
    documents_BT: torch.Tensor, anchors_BA: torch.Tensor, starts_BA: torch.Tensor, block_size: int
) -> Sees:
    """Clean rows (`documents_see`) and the mask rows behind them (`blocks_see`) in one pass."""
    length = documents_BT.shape[1]
    documents = documents_see(documents_BT)
    blocks = blocks_see(anchors_BA, starts_BA, length, block_size)

    def sees(
        b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        # Either function is asked about every row, so the index has to exist for both.
        last = length - 1
        clean = documents(b, h, row.clamp(max=last), key.clamp(max=last)) & (key < length)
        masked = blocks(b, h, (row - length).clamp(min=0), key)
        return torch.where(row < length, clean, masked)

    return sees


class Visibility:
    """Attention under one visibility function, shared by all layers of a pass."""

    def __init__(
        self, sees: Sees, rows: int, keys: int, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._flex = device.type == "cuda"
        if self._flex:
            self._blocks = compiled(_flex().create_block_mask)(
                sees, batch, None, rows, keys, device=device
            )
        else:
            index = torch.arange(max(rows, keys), device=device)
            visible_BRS = sees(
                index[:batch, None, None], index[:1], index[:rows, None], index[:keys]
            ).expand(batch, rows, keys)
            self._bias_BRS = visibility_bias(visible_BRS, dtype)

    def attend(
        self, q_BRQD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor
    ) -> torch.Tensor:
        """Attended values ``[B, R, Q, D]``."""
        k_BKSD, v_BKSD = k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
        if not self._flex:
            return grouped_attention(q_BRQD, k_BKSD, v_BKSD, self._bias_BRS)
        o_BQRD = compiled(_flex().flex_attention)(
            q_BRQD.transpose(1, 2), k_BKSD, v_BKSD, block_mask=self._blocks, enable_gqa=True
        )
        return o_BQRD.transpose(1, 2)


class DocumentAttention:
    """The clean pass: keeps every layer's keys and values, ``[B, T, K, D]`` each."""

    def __init__(self, documents_BT: torch.Tensor, dtype: torch.dtype) -> None:
        B, T = documents_BT.shape
        self._visibility = Visibility(
            documents_see(documents_BT), T, T, B, documents_BT.device, dtype
        )
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        self.keys.append(k_BRKD)
        self.values.append(v_BRKD)
        return self._visibility.attend(q_BRQD, k_BRKD, v_BRKD)


class BlockAttention:
    """The mask pass over what a `DocumentAttention` kept."""

    def __init__(
        self,
        documents: DocumentAttention,
        anchors_BA: torch.Tensor,
        starts_BA: torch.Tensor,
        block_size: int,
    ) -> None:
        self._documents = documents
        B, T, *_ = documents.keys[0].shape
        rows = anchors_BA.shape[1] * block_size
        sees = blocks_see(anchors_BA, starts_BA, T, block_size)
        self._visibility = Visibility(
            sees, rows, T + rows, B, anchors_BA.device, documents.keys[0].dtype
        )

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        k_BSKD = torch.cat((self._documents.keys[layer], k_BRKD), dim=1)
        v_BSKD = torch.cat((self._documents.values[layer], v_BRKD), dim=1)
        return self._visibility.attend(q_BRQD, k_BSKD, v_BSKD)


class JointAttention:
    """Clean rows and the mask blocks over them in one pass, with gradients through both."""

    def __init__(
        self,
        documents_BT: torch.Tensor,
        anchors_BA: torch.Tensor,
        starts_BA: torch.Tensor,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        B, T = documents_BT.shape
        rows = T + anchors_BA.shape[1] * block_size
        sees = joint_see(documents_BT, anchors_BA, starts_BA, block_size)
        self._visibility = Visibility(sees, rows, rows, B, documents_BT.device, dtype)

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        return self._visibility.attend(q_BRQD, k_BRKD, v_BRKD)


def _flex() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention
