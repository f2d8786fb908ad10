"""What forwards brought to the same requests, kept as it came until these take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from idlm.engine.commit import Commit
from idlm.engine.request import Forwards

FORWARDS = 16  # that are kept: to give them out takes the host no longer than the device a forward
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
        B, X, self._vocab_size = len(first.requests), 2 * first.stride + 1, vocab_size
        self._packed_BFX = np.empty((B, FORWARDS, X), np.int64)
        self._told_BF = np.zeros((B, FORWARDS), np.bool_)  # which forwards are somebody's
        self._count = self._handed_out = 0
        self._begun_B = np.zeros(B, np.int64)  # forwards that requests took, or had no part in
        self._live_B = np.zeros(B, np.bool_)
        self._left_B = np.full(B, NEVER)
        self._watched_B = np.zeros(B, np.bool_)
        self._stops = frozenset[int]()
        self._seat(range(B))

    def _seat(self, rows: Iterable[int]) -> None:
        """Let the requests at ``rows`` be part of the forwards to come."""
        live = [row for row in rows if not self.requests[row].finished]
        requests = [self.requests[row] for row in live]
        self._live_B[live], self._begun_B[live] = True, self._count
        self._left_B[live] = [request.follow(self.hand_out) for request in requests]
        self._watched_B[live] = [request.watched for request in requests]
        self._watched = bool(self._watched_B.any())
        self._stops |= frozenset().union(*{request.stop_token_ids for request in requests})
        self._stops_V = _members(self._stops, self._vocab_size)

    def takes(self, commit: Commit) -> bool:
        """Whether ``commit`` is one more of these forwards, and there is room for it.

        Rows of requests that have ended may be those of others by now.
        """
        if (commit.stride, commit.rows) != (self._stride, self._rows) or self._count == FORWARDS:
            return False
        if commit.requests is self.requests:
            return True
        if len(commit.requests) != len(self.requests):
            return False
        pairs = enumerate(zip(self.requests, commit.requests, strict=True))
        others = [row for row, (before, now) in pairs if before is not now]
        if self._live_B[others].any():
            return False
        self.requests = commit.requests
        self._seat(others)
        return True

    def add(self, packed_BX: npt.NDArray[np.int64]) -> Sequence[int]:
        """Keep what one more forward brought (see `idlm.decoding.cycle.Outcome`); it is copied.

        Returns:
            The rows of requests that have to take it at once, as they may end by it.
        """
        N = self._stride
        self._packed_BFX[:, self._count] = packed_BX
        self._told_BF[:, self._count] = self._live_B
        self._count += 1
        count_B = packed_BX[:, N] + 1
        self._left_B -= count_B
        stops_BN = self._stops_V.take(packed_BX[:, :N], mode="clip")
        if self._left_B.min() > 0 and not stops_BN.any() and not self._watched:
            return ()
        taken_BN = np.arange(N) < count_B[:, None]
        may_end_B = (stops_BN & taken_BN).any(1) | (self._left_B <= 0) | self._watched_B
        return _places(may_end_B & self._live_B)

    def hand_out(self) -> None:
        """Let all requests take what is theirs; nobody ends by it."""
        if self._handed_out < self._count:
            self._handed_out = self._count
            behind_B = (self._begun_B < self._count) & self._live_B
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
        self._live_B[row], self._watched_B[row], self._left_B[row] = False, False, NEVER

    def tested(self) -> tuple[list[int], list[int]]:
        """By place, drafts that were tested with all before them standing, and those that stood."""
        N = self._stride
        told_BF = self._told_BF[:, : self._count]
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
