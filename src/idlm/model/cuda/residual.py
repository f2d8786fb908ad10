"""The residual stream of a forward on CUDA, and the projections between it and the layers.

Two ways to the same: one launch for a projection and all that surrounds it, or the library's
product and one launch for all that surrounds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from idlm.model.cuda import epilogue, projection
from idlm.model.cuda.low_rank import LowRank
from idlm.model.cuda.rotation import Heads, rotate_and_append
from idlm.model.cuda.stream import begin
from idlm.model.decoder import Layer, Linear, RMSNorm

# Up to so many rows a projection rotates its heads itself; what that takes grows with the rows, a
# launch of its own takes the same time for all.
ROTATED_ROWS = 128

Update = tuple[LowRank | None, int]  # and the first row that it acts on


class Residual(ABC):
    """Rows ``[N, H]`` on their way into a norm.

    Args:
        x_NH: the rows, dense.
        norm: what comes next.
    """

    def __init__(self, x_NH: torch.Tensor, norm: RMSNorm) -> None:
        self._stream = begin(x_NH, norm.weight, norm.eps)

    def normed(self) -> torch.Tensor:
        """``[N, H]``: what comes out of the norm."""
        return self._stream.normed()

    @abstractmethod
    def rotated(
        self, layer: Layer, update: Update, ready_1: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        """``[N, (Q + 2 K) * D]``: the layer's queries, rotated, of what comes out of the norm.

        Keys and values go into the cache.

        Args:
            ready_1: int32, 0; used up.
        """

    @abstractmethod
    def gated(self, linear: Linear, update: Update, ready_1: torch.Tensor) -> torch.Tensor:
        """``[N, O / 2]``: ``silu(gate) * up`` of what comes out of the norm."""

    @abstractmethod
    def add(
        self,
        x_NI: torch.Tensor,
        linear: Linear,
        update: Update,
        ready_1: torch.Tensor,
        norm: RMSNorm,
    ) -> None:
        """Add ``linear`` of ``x``; ``norm`` comes next."""


class FusedResidual(Residual):
    """Each projection is one launch (but for its heads, if there are many or they have norms)."""

    def rotated(
        self, layer: Layer, update: Update, ready_1: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        at_once = len(self._stream.x_NH) <= ROTATED_ROWS and layer.q_norm is None
        qkv_NW = projection.project(
            self._stream,
            layer.qkv.weight,
            layer.qkv.bias,
            low_rank=update[0],
            first_mask=update[1],
            ready_1=ready_1,
            heads=heads if at_once else None,
        )
        if not at_once:
            rotate_and_append(qkv_NW, heads, *_head_norms(layer))
        return qkv_NW

    def gated(self, linear: Linear, update: Update, ready_1: torch.Tensor) -> torch.Tensor:
        return projection.project(
            self._stream,
            linear.weight,
            linear.bias,
            low_rank=update[0],
            first_mask=update[1],
            ready_1=ready_1,
            gated=True,
        )

    def add(
        self,
        x_NI: torch.Tensor,
        linear: Linear,
        update: Update,
        ready_1: torch.Tensor,
        norm: RMSNorm,
    ) -> None:
        self._stream = projection.add(
            self._stream,
            x_NI,
            linear.weight,
            linear.bias,
            norm_H=norm.weight,
            eps=norm.eps,
            low_rank=update[0],
            first_mask=update[1],
            ready_1=ready_1,
        )


class LibraryResidual(Residual):
    """Each projection is the library's product, faster for many rows, and a launch behind it."""

    def rotated(
        self, layer: Layer, update: Update, ready_1: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        made = epilogue.product(self._stream, layer.qkv.weight, layer.qkv.bias, *update)
        return epilogue.rotate(made, self._stream, heads, *_head_norms(layer))

    def gated(self, linear: Linear, update: Update, ready_1: torch.Tensor) -> torch.Tensor:
        made = epilogue.product(self._stream, linear.weight, linear.bias, *update)
        return epilogue.gate(made, self._stream)

    def add(
        self,
        x_NI: torch.Tensor,
        linear: Linear,
        update: Update,
        ready_1: torch.Tensor,
        norm: RMSNorm,
    ) -> None:
        made = epilogue.product(x_NI, linear.weight, linear.bias, *update)
        self._stream = epilogue.add(made, self._stream, norm.weight, norm.eps)


def _head_norms(layer: Layer) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """Weights of the norms of queries and keys, if any, and what their squares get added."""
    if layer.q_norm is None or layer.k_norm is None:
        return None, None, 0.0
    return layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.eps
