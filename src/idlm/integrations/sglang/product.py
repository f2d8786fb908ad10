"""A fused projection of the host's model with its LoRA, which acts on mask rows alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from idlm.integrations.sglang.rows import RowOrder
from idlm.integrations.sglang.shares import share_of
from idlm.model.adapter import LoraLinear
from idlm.model.cuda import stack as cuda_stack
from idlm.model.cuda.low_rank import LowRank
from idlm.model.cuda.projection import project
from idlm.model.cuda.tile import MIN_ROWS

# Up to so many rows a projection with unmerged LoRA is one launch; else there are many small ones.
FUSED_ROWS = 64


class Product:
    """The product of one projection, on this rank.

    On CUDA, weights of numbers as they are go through the kernel of `model.cuda.projection`: one
    launch for base and update, or, with ``merge``, weights of their own for mask rows. Others
    (quantised ones, and large ones with many rows) go through the host's own product.

    Args:
        module: the host's layer.
        index: its place among the projections with a LoRA.
        merge: whether to hold base and update together, as is worth while for small models.

    Raises:
        UnsupportedModelError: the host changed the shape of the layer.
    """

    @torch.no_grad()
    def __init__(self, module: Any, lora: LoraLinear, index: int, *, merge: bool) -> None:
        self._module, self._host, self._index = module, module.quant_method, index
        A_ZI, B = share_of(lora, module)
        modules = tuple(len(part) for part in B)
        self._low_rank = LowRank(A_ZI.detach().contiguous(), torch.cat(B), modules)
        self._fuses = (
            isinstance(self._host, UnquantizedLinearMethod)
            and cuda_stack.usable(A_ZI.device)
            and module.weight.dtype is A_ZI.dtype
            and gcd(*modules) % MIN_ROWS == 0
        )
        if self._fuses and merge:
            self._low_rank = self._low_rank.merged(module.weight)

    def method(self, order: Callable[[], RowOrder | None]) -> Any:
        """The host's method for this layer; ``order()`` is the forward's, None: it has no masks."""
        method = copy.copy(self._host)

        def apply(
            module: Any, x_FI: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            rows = order()
            if rows is None:
                y_FO: torch.Tensor = self._host.apply(module, x_FI, bias)
                return y_FO
            return self(x_FI, bias, rows)

        method.apply = apply
        return method

    def __call__(
        self, x_FI: torch.Tensor, bias_O: torch.Tensor | None, rows: RowOrder
    ) -> torch.Tensor:
        """``[F, O]``."""
        low_rank = self._low_rank
        few = low_rank.merged_OI is not None or len(x_FI) <= FUSED_ROWS
        if self._fuses and few:
            return project(
                x_FI.contiguous(),
                self._module.weight,
                bias_O,
                low_rank=low_rank,
                first_mask=rows.first_mask,
                ready_1=rows.ready_P1[self._index],
                order_N=rows.order_F,
            )
        y_FO: torch.Tensor = self._host.apply(self._module, x_FI, bias_O)
        masks_M = rows.order_F[rows.first_mask :]
        z_MZ = F.linear(x_FI[masks_M], low_rank.A_ZI)
        parts = zip(
            z_MZ.split(low_rank.rank, dim=1),
            low_rank.B_OZ.split(low_rank.modules),
            strict=True,
        )
        return y_FO.index_add_(0, masks_M, torch.cat([F.linear(z, B) for z, B in parts], dim=1))

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the base weight, which has changed."""
        held_OI = self._low_rank.merged_OI
        if held_OI is None:
            return
        anew_OI = self._low_rank.merged(self._module.weight).merged_OI
        assert anew_OI is not None
        held_OI.copy_(anew_OI)  # where graphs look for it
