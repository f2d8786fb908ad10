"""What forwards brought to the same requests, kept as it came until these take it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from idlm.engine.commit import Commit
from idlm.engine.request import Forwards

FORWARDS = 8  # that are kept: to give them out takes the host no longer than the device a forward
LIVE = FORWARDS + 1  # more than there will be
NEVER = 1 << 60


class News:
    """Of up to `FORWARDS` forwards of one layout, in the order in which they ran.

    Requests take what is theirs when somebody asks for it, all together, or when they may end.
    That is looked for in whole arrays: the host does not go through the requests for each forward.

    Args:
        first: says which requests and layout; requests that have ended get nothing.
        vocab_size: above every token.
    Attributes:
        requests: the rows of the forwards.
    """

    def __init__(self, first: Commit, vocab_size: int) -> None:
        self.requests, self._stride, self._rows = first.requests, first.stride, first.rows
        requests, X = first.requests, 2 * first.stride + 1
        self._packed_BFX = np.empty((len(requests), FORWARDS, X), np.int64)
        self._count = self._handed_out = 0
        rows = [row for row, request in enumerate(requests) if not request.finished]
        live = [requests[row] for row in rows]
        self._begun_B = np.zeros(len(requests), np.int64)  # forwards that requests took
        self._ends_B = np.zeros(len(requests), np.int64)  # forwards that are theirs
        self._ends_B[rows] = LIVE
        self._left_B = np.full(len(requests), NEVER)
        self._left_B[rows] = [request.follow(self.hand_out) for request in live]
        self._watched_B = np.zeros(len(requests), np.bool_)
        self._watched_B[rows] = [request.watched for request in live]
        self._watched = bool(self._watched_B.any())
        stops = frozenset[int]().union(*{request.stop_token_ids for request in live})
        self._stops_V = _members(stops, vocab_size)

    def takes(self, commit: Commit) -> bool:
        """Whether ``commit`` is one more of these forwards, and there is room for it."""
        alike = (commit.stride, commit.rows) == (self._stride, self._rows)
        return alike and commit.requests is self.requests and self._count < FORWARDS

    def add(self, packed_BX: npt.NDArray[np.int64]) -> Sequence[int]:
        """Keep what one more forward brought (see `idlm.decoding.cycle.Outcome`); it is copied.

        Returns:
            The rows of requests that have to take it at once, as they may end by it.
        """
        N = self._stride
        self._packed_BFX[:, self._count] = packed_BX
        self._count += 1
        count_B = packed_BX[:, N] + 1
        self._left_B -= count_B
        stops_BN = self._stops_V.take(packed_BX[:, :N], mode="clip")
        if self._left_B.min() > 0 and not stops_BN.any() and not self._watched:
            return ()
        taken_BN = np.arange(N) < count_B[:, None]
        may_end_B = (stops_BN & taken_BN).any(1) | (self._left_B <= 0) | self._watched_B
        return _places(may_end_B & (self._ends_B == LIVE))

    def hand_out(self) -> None:
        """Let all requests take what is theirs; nobody ends by it."""
        if self._handed_out < self._count:
            self._handed_out = self._count
            behind_B = (self._begun_B < self._count) & (self._ends_B == LIVE)
            for row, tokens, forwards in self.portions(_places(behind_B)):
                self.requests[row].append(tokens, forwards)

    def portions(self, rows: Sequence[int]) -> Iterator[tuple[int, list[int], Forwards]]:
        """For each of ``rows`` the tokens that it has not taken yet, and how they came to be."""
        if not len(rows):
            return
        N, F = self._stride, self._count
        begun_R = self._begun_B[rows]
        first = int(begun_R.min())
        packed_RFX = self._packed_BFX[rows, first:F]
        self._begun_B[rows] = F
        outcomes_RF2 = packed_RFX[..., [N + 1, N]]
        accepted_RF, drafted_RF = packed_RFX[..., N], packed_RFX[..., N + 1]
        new_RF = np.arange(first, F) >= begun_R[:, None]
        count_RF = (accepted_RF + 1) * new_RF
        taken_RFN = np.arange(N) < count_RF[..., None]
        overlap_RFM = packed_RFX[..., N + 2 :].astype(np.int32).view(np.float32)
        tested_RFM = np.arange(N - 1) < np.minimum(count_RF, drafted_RF)[..., None]
        # Nothing that Python's garbage collector would have to look at is kept.
        tokens = packed_RFX[..., :N][taken_RFN].tolist()
        outcomes = outcomes_RF2[new_RF].astype(np.uint8).tobytes()
        token, outcome = 0, 0
        for row, tokens_end, outcomes_end, overlap in zip(
            rows,
            count_RF.sum(1).cumsum().tolist(),
            (2 * new_RF.sum(1).cumsum()).tolist(),
            overlap_RFM.sum((1, 2), np.float64, where=tested_RFM).tolist(),
            strict=True,
        ):
            own = outcomes[outcome:outcomes_end]
            forwards = Forwards(own, overlap, self._rows * len(own) // 2)
            yield row, tokens[token:tokens_end], forwards
            token, outcome = tokens_end, outcomes_end

    def end(self, row: int) -> None:
        """Note that the request at ``row`` has ended: what comes later is not for it."""
        self._ends_B[row], self._left_B[row] = self._count, NEVER

    def tested(self) -> tuple[list[int], list[int]]:
        """By place, drafts that were tested with all before them standing, and those that stood."""
        N = self._stride
        told_BF = np.arange(self._count) < self._ends_B[:, None]
        counts_X2 = self._packed_BFX[:, : self._count, N : N + 2][told_BF]
        accepted_X1, drafted_X1 = counts_X2[:, :1], counts_X2[:, 1:]
        place_M = np.arange(N - 1)
        reached_M = (place_M < np.minimum(accepted_X1 + 1, drafted_X1)).sum(0)
        return reached_M.tolist(), (place_M < accepted_X1).sum(0).tolist()


def _places(true_B: npt.NDArray[np.bool_]) -> list[int]:
    return list(true_B.nonzero()[0].tolist())


@lru_cache(maxsize=16)
def _members(ids: frozenset[int], vocab_size: int) -> npt.NDArray[np.bool_]:
    """``[V]``: which tokens are among ``ids``."""
    members_V = np.zeros(vocab_size, np.bool_)
    members_V[[i for i in ids if i < vocab_size]] = True
    return members_V
