"""The LoRA of a fused projection as CUDA has it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class LowRank:
    """The update of a fused projection, for inference.

    Attributes:
        A_ZI: ``rank`` rows for each module, one module after the other.
        B_OZ: ``[O, rank]``, the modules one after the other, times the update's scale.
        modules: output width of each module.
        merged_OI: base weight and update together; None: not made.
    """

    A_ZI: torch.Tensor
    B_OZ: torch.Tensor
    modules: tuple[int, ...]
    merged_OI: torch.Tensor | None = None

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
