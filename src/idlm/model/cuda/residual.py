"""The residual stream of a forward on CUDA, and the projections between it and the layers.

Two ways to the same: one launch for a projection and all that surrounds it, or the library's
products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from idlm.model.cuda.low_rank import LowRank
    from idlm.model.cuda.projection import Heads
    from idlm.model.decoder import Linear, RMSNorm

    Update = tuple[LowRank | None, int]  # and the first row that it acts on


class FusedResidual:
    """Rows ``[N, H]`` on their way into a norm; each projection is one launch.

    Args:
        x_NH: the rows, dense.
        norm: what comes next.
    """

    def __init__(self, x_NH: torch.Tensor, norm: RMSNorm) -> None:
        # Not at the top: there may be no Triton here.
        from idlm.model.cuda import projection
        from idlm.model.cuda.stream import begin

        self._projection = projection
        self._stream = begin(x_NH, norm.weight, norm.eps)

    def project(
        self,
        linear: Linear,
        update: Update,
        ready_1: torch.Tensor,
        *,
        gated: bool = False,
        heads: Heads | None = None,
    ) -> torch.Tensor:
        """``[N, O]``: ``linear`` of what comes out of the norm; gated: ``silu(gate) * up``.

        Args:
            ready_1: int32, 0; used up.
            heads: where keys and values go, if queries and keys are to be rotated.
        """
        return self._projection.project(
            self._stream,
            linear.weight,
            linear.bias,
            low_rank=update[0],
            first_mask=update[1],
            ready_1=ready_1,
            gated=gated,
            heads=heads,
        )

    def add(
        self,
        x_NI: torch.Tensor,
        linear: Linear,
        update: Update,
        ready_1: torch.Tensor,
        norm: RMSNorm,
    ) -> None:
        """Add ``linear`` of ``x``; ``norm`` comes next."""
        self._stream = self._projection.add(
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

    def normed(self) -> torch.Tensor:
        """``[N, H]``: what comes out of the norm."""
        return self._stream.normed()


class PlainResidual:
    """`FusedResidual` with the library's products, which are faster for many rows."""

    def __init__(self, x_NH: torch.Tensor, norm: RMSNorm) -> None:
        self._x_NH, self._norm = x_NH, norm

    def project(
        self, linear: Linear, update: Update, ready_1: torch.Tensor, *, gated: bool = False
    ) -> torch.Tensor:
        """As there."""
        y_NO = _product(self.normed(), linear, update)
        if gated:
            gate_NI, up_NI = y_NO.chunk(2, dim=-1)
            y_NO = F.silu(gate_NI) * up_NI
        return y_NO

    def add(
        self,
        x_NI: torch.Tensor,
        linear: Linear,
        update: Update,
        ready_1: torch.Tensor,
        norm: RMSNorm,
    ) -> None:
        """As there."""
        self._x_NH, self._norm = self._x_NH + _product(x_NI, linear, update), norm

    def normed(self) -> torch.Tensor:
        """As there."""
        return self._norm(self._x_NH)


def _product(x_NI: torch.Tensor, linear: Linear, update: Update) -> torch.Tensor:
    y_NO = F.linear(x_NI, linear.weight, linear.bias)
    low_rank, first_mask = update
    if low_rank is not None and first_mask < len(x_NI):
        z_MZ = F.linear(x_NI[first_mask:], low_rank.A_ZI)
        modules = zip(
            y_NO[first_mask:].split(low_rank.modules, dim=1),
            z_MZ.split(low_rank.rank, dim=1),
            low_rank.B_OZ.split(low_rank.modules),
            strict=True,
        )
        for y_MO, z_Mr, B_Or in modules:
            y_MO.addmm_(z_Mr, B_Or.T)
    return y_NO
