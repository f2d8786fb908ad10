"""What requests carry from one forward to the next, on the device, by the host's request slots."""

from __future__ import annotations

import torch

from idlm.decoding.verify import Drafts


class Slots:
    """Drafts with their distributions, and what the last forward committed, of ``P`` slots.

    Slot 0 is the host's own for rows that pad a batch: whatever is written there is lost.

    Attributes:
        tokens_PM, count_P: the drafts and how many there are (0 or all places), int64.
        committed_PN: tokens of the last forward, the first ``accepted_P + 1`` of each row, int64.
        accepted_P: drafts that the last forward accepted, int64.
    """

    def __init__(self, slots: int, places: int, candidates: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self._drafts = Drafts(
            zeros(places),
            zeros(places, candidates),
            zeros(places, candidates, dtype=torch.float32),
            zeros(),
        )
        self.tokens_PM, self.count_P = self._drafts.tokens_BM, self._drafts.count_B
        # Drafts of greedy batches have no distribution but their tokens.
        self._certain_P = zeros(dtype=torch.bool)
        self.committed_PN = zeros(places + 1)
        self.accepted_P = zeros()

    def drafts(self, slot_B: torch.Tensor, all_greedy: bool) -> Drafts:
        """The drafts of the requests in these slots."""
        if all_greedy:
            return Drafts.certain(self.tokens_PM[slot_B], self.count_P[slot_B])
        drafts = self._drafts.select(slot_B)
        certain = Drafts.certain(drafts.tokens_BM, drafts.count_B).resized(
            *drafts.ids_BMK.shape[1:]
        )
        certain_B11 = self._certain_P[slot_B][:, None, None]
        drafts.ids_BMK = torch.where(certain_B11, certain.ids_BMK, drafts.ids_BMK)
        drafts.probs_BMK = torch.where(certain_B11, certain.probs_BMK, drafts.probs_BMK)
        return drafts

    def clear(self, slot_B: torch.Tensor) -> None:
        """Forget the drafts: a new request is in each of these slots."""
        self.count_P[slot_B] = 0

    def store(
        self,
        slot_B: torch.Tensor,
        tokens_BN: torch.Tensor,
        accepted_B: torch.Tensor,
        proposals: Drafts,
        all_greedy: bool,
    ) -> None:
        """Keep what a forward committed and what it proposes."""
        self.committed_PN[slot_B] = tokens_BN
        self.accepted_P[slot_B] = accepted_B
        self.tokens_PM[slot_B] = proposals.tokens_BM
        self.count_P[slot_B] = proposals.count_B
        self._certain_P.index_fill_(0, slot_B, all_greedy)  # unlike `[]`, it can be captured
        if not all_greedy:
            self._drafts.ids_BMK[slot_B] = proposals.ids_BMK
            self._drafts.probs_BMK[slot_B] = proposals.probs_BMK
