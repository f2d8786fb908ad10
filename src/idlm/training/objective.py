"""What a training minimises, and the mask blocks that it looks at.

Geometry, as at decode time: with token ``b`` pending, a forward samples token ``b + 1``; mask
``j`` stands at position ``b + j``, sees clean tokens up to ``b`` and masks ``1 .. j`` of its
block, and proposes token ``b + j + 1``. The clean row ``b + j`` is what it is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from idlm.training.data import Batch


@dataclass(frozen=True)
class Outcome:
    """One pass over a batch.

    Attributes:
        losses: per term of the objective the weighted sum, to be divided by `Objective.weights`
            of the whole step; differentiable, ``[terms]``.
        overlap_BAM: acceptance at temperature 1 by place, fp32.
        agree_BAM: acceptance at temperature 0 by place, fp32.
        valid_BAM: places with a target, bool.
    """

    losses: torch.Tensor
    overlap_BAM: torch.Tensor
    agree_BAM: torch.Tensor
    valid_BAM: torch.Tensor


class Objective(Protocol):
    """A sum of terms, each a weighted mean over the step's whole batch.

    Sums and weights are added over micro-batches and processes before they are divided, so the
    split changes nothing.

    Attributes:
        terms: their names.
        block_size: masks per block; the trainer may raise it during the run.
    """

    terms: tuple[str, ...]
    block_size: int

    def __call__(self, batch: Batch) -> Outcome:
        """Run the model on a part of the step's batch."""
        ...

    def weights(self, batch: Batch) -> torch.Tensor:
        """Per term the sum of its weights in ``batch``, ``[terms]`` fp32."""
        ...

    def factors(self, means: torch.Tensor) -> torch.Tensor:
        """What the terms count in the next step, given their means in this one, ``[terms]``."""
        ...


class Blocks:
    """The mask blocks of ``block_size`` masks at a batch's anchors.

    Attributes:
        starts_BA: index in the row at which the anchor's document begins, int64.
        rows_BP: index of the clean row ``b + j`` of every mask, block after block, int64; clamped
            to the row's end where the place has no target.
        positions_BP: position of every mask, int64.
        valid_BAM: places with a target, bool.
    """

    def __init__(self, batch: Batch, block_size: int) -> None:
        places_M = torch.arange(block_size, device=batch.anchors_BA.device)
        rows_BAM = batch.anchors_BA[..., None] + 1 + places_M
        self.starts_BA = batch.documents_BT.gather(1, batch.anchors_BA)
        self.rows_BP = rows_BAM.clamp(max=batch.tokens_BT.shape[1] - 1).flatten(1)
        anchors_BA1 = batch.positions_BT.gather(1, batch.anchors_BA)[..., None]
        self.positions_BP = (anchors_BA1 + 1 + places_M).flatten(1)
        self.valid_BAM = places_M < batch.places_BA[..., None]
