"""The LoRA of a fused projection as CUDA has it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

# Rows that a stacked weight has a multiple of: with them, rows of its product are aligned.
ALIGNED = 16


@dataclass(frozen=True)
class LowRank:
    """The update of a fused projection, for inference.

    Attributes:
        A_ZI: ``rank`` rows for each module, one module after the other.
        B_OZ: ``[O, rank]``, the modules one after the other, times the update's scale.
        modules: output width of each module.
        merged_OI: base weight and update together; None: not made.
        stacked_SI: base weight, under it ``A`` and rows that count for nothing; None: not made.
    """

    A_ZI: torch.Tensor
    B_OZ: torch.Tensor
    modules: tuple[int, ...]
    merged_OI: torch.Tensor | None = None
    stacked_SI: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Of each module."""
        return self.B_OZ.shape[1]

    def merged(self, base_OI: torch.Tensor) -> LowRank:
        """The same with ``merged_OI``, summed in fp32."""
        whole_OI = base_OI.to(torch.float32, copy=True)
        for rows_OI, A_rI, B_Or in zip(
            whole_OI.split(self.modules),
            self.A_ZI.split(self.rank),
            self.B_OZ.split(self.modules),
            strict=True,
        ):
            rows_OI.addmm_(B_Or.float(), A_rI.float())
        return replace(self, merged_OI=whole_OI.to(base_OI.dtype))


def stack(base_OI: nn.Parameter, A_ZI: nn.Parameter) -> None:
    """Move ``A`` under a base weight, in one memory, so that one product is of both.

    Both are views of it from then on, and the memory that they had is free.
    """
    (O, I), Z = base_OI.shape, len(A_ZI)  # noqa: E741
    stacked_SI = base_OI.new_zeros(O + Z + -(O + Z) % ALIGNED, I)
    for held, rows_XI in ((base_OI, stacked_SI[:O]), (A_ZI, stacked_SI[O : O + Z])):
        rows_XI.copy_(held.detach())
        held.data = rows_XI


def stacked(base_OI: torch.Tensor, A_ZI: torch.Tensor) -> torch.Tensor | None:
    """What `stack` has put together; None: it has not, or they have been moved apart since."""
    memory = base_OI.untyped_storage()
    if A_ZI.untyped_storage().data_ptr() != memory.data_ptr():
        return None
    I = base_OI.shape[1]  # noqa: E741
    return base_OI.as_strided((memory.nbytes() // (I * base_OI.itemsize), I), (I, 1), 0)
