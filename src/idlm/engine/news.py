"""What some forwards brought to the same requests, read in one go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

# Drafts that a forward tested, those that stood, their overlap, and its rows: what
# `DecodeStats.forward` counts.
Forward = tuple[int, int, float, int]


class News:
    """Of F forwards of the same B requests, in the order in which they ran.

    Args:
        packed_FBX: as in `idlm.decoding.cycle.Outcome`, on the host; copied.
        rows: clean and mask rows of each request.
    """

    def __init__(self, packed_FBX: Sequence[npt.NDArray[np.int64]], rows: int) -> None:
        self._packed_FBX, self._rows = np.stack(packed_FBX), rows
        self._stride = (self._packed_FBX.shape[2] - 1) // 2

    def tokens(self) -> tuple[list[int], list[int]]:
        """The tokens that requests may take, those of the first request before those of the next.

        Not a list for each: that would be a load for Python's garbage collector.

        Returns:
            The tokens, and where those of each request begin; and the last ones' end.
        """
        N = self._stride
        packed_BFX = self._packed_FBX.swapaxes(0, 1)
        count_BF = packed_BFX[:, :, N] + 1
        taken_BFN = np.arange(N) < count_BF[:, :, None]
        return packed_BFX[:, :, :N][taken_BFN].tolist(), [0, *count_BF.sum(1).cumsum().tolist()]

    def outcomes(self, rows: Sequence[int]) -> list[tuple[int, int, int]]:
        """Drafts that forwards of the requests at ``rows`` tested, those that stood, how often."""
        N = self._stride
        outcome_FB = self._packed_FBX[:, :, N + 1] * N + self._packed_FBX[:, :, N]
        times = np.bincount(outcome_FB[:, rows].ravel()).tolist()
        return [(*divmod(key, N), count) for key, count in enumerate(times) if count]

    def forwards(self, row: int) -> list[Forward]:
        """How the forwards of one request went."""
        return self._forwards[row]

    @cached_property
    def _forwards(self) -> list[list[Forward]]:
        """By request; all at once, as they are asked for by all."""
        N, rows = self._stride, self._rows
        packed_BFX = self._packed_FBX.swapaxes(0, 1)
        accepted_BF, drafted_BF = packed_BFX[:, :, N], packed_BFX[:, :, N + 1]
        overlap_BFM = packed_BFX[:, :, N + 2 :].astype(np.int32).view(np.float32)
        reached_BF = np.minimum(accepted_BF + 1, drafted_BF)
        overlap_BF = overlap_BFM.sum(2, where=np.arange(N - 1) < reached_BF[:, :, None])
        columns = (x.tolist() for x in (drafted_BF, accepted_BF, overlap_BF))
        return [list(zip(*x, [rows] * len(x[0]), strict=True)) for x in zip(*columns, strict=True)]
