"""The blocks of the requests of a batch, whose leases grow, as an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from idlm.engine.blocks import BlockPool, Lease
from idlm.engine.request import Request
from idlm.model.transfer import upload


class Moved(NamedTuple):
    """Blocks that stand somewhere else in a table, or newly.

    Attributes:
        rows_X, places_X, blocks_X: where they stand, int64, and what stands there, int32.
        rows_R, real_R: the requests concerned, and whether they have any blocks, int64.
    """

    rows_X: npt.NDArray[np.int64]
    places_X: npt.NDArray[np.int64]
    blocks_X: npt.NDArray[np.int32]
    rows_R: npt.NDArray[np.int64]
    real_R: npt.NDArray[np.int64]


class Table:
    """``table_BP`` of some requests, int32, filled up with block 0, which is nobody's."""

    def __init__(self, requests: Sequence[Request], pool: BlockPool) -> None:
        self._leases, self._pool = [_watched(request.lease) for request in requests], pool
        self._seen: int | None = None  # of the pool's changes; None: not enough
        self._lengths_B = np.zeros(len(requests), np.int64)
        self._others: list[int] = []  # rows that other requests have now
        self._blocks_BP = np.zeros((len(requests), 0), np.int32)
        self._there: torch.Tensor | None = None

    def replace(self, row: int, request: Request) -> None:
        """Let ``request`` have ``row``, which may be the next behind the last."""
        self._seen = None
        if row < len(self._leases):
            self._leases[row] = _watched(request.lease)
            self._others.append(row)
            return
        self._leases.append(_watched(request.lease))
        self._lengths_B = np.append(self._lengths_B, 0)
        self._blocks_BP = np.pad(self._blocks_BP, ((0, 1), (0, 0)))

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Let ``rows`` have no blocks, as their requests have ended; those that had any."""
        left = [row for row in rows if self._lengths_B[row]]
        if self._seen is not None:
            self._seen += len(left)  # they have given theirs back, which is known by this
        self._blocks_BP[left], self._lengths_B[left] = 0, 0
        self._there = None if left else self._there
        return left

    def moved(self) -> Moved | None:
        """What has changed since the last call (or `on`); None: nothing."""
        if self._seen == self._pool.changes:
            return None
        self._seen = self._pool.changes
        lengths_B = np.array([len(lease.ids) for lease in self._leases])
        is_new_B = lengths_B != self._lengths_B
        is_new_B[self._others] = True
        rows_R = is_new_B.nonzero()[0]
        if not len(rows_R):
            return None
        most, width = int(lengths_B.max()), self._blocks_BP.shape[1]
        if most > width:
            self._blocks_BP = np.pad(self._blocks_BP, ((0, 0), (0, 2 * most - width)))
        # Leases grow at their ends, or are given back.
        first_R, end_R = self._lengths_B[rows_R], lengths_B[rows_R]
        grown = not self._others and bool((first_R < end_R).all())
        some = slice(int(first_R.min()) if grown else 0, int(max(first_R.max(), end_R.max())))
        before_RP = self._blocks_BP[rows_R, some]
        for row in rows_R.tolist():
            ids = self._leases[row].ids[some]
            self._blocks_BP[row, some] = ids + [0] * (some.stop - some.start - len(ids))
        now_RP = self._blocks_BP[rows_R, some]
        changed_X, places_X = (now_RP != before_RP).nonzero()
        self._lengths_B, self._there = lengths_B, None
        self._others = []
        blocks_X, real_R = now_RP[changed_X, places_X], (end_R > 0).astype(np.int64)
        return Moved(rows_R[changed_X], places_X + some.start, blocks_X, rows_R, real_R)

    def on(self, device: torch.device) -> torch.Tensor:
        """All of it; new only if something has changed."""
        self.moved()
        if self._there is None:
            self._there = upload(self._blocks_BP[:, : int(self._lengths_B.max())], device)
        return self._there


def _watched(lease: Lease) -> Lease:
    lease.watched = True
    return lease
