"""What a forward brought, on its way to the host, and how requests get it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from idlm.decoding.cycle import State
from idlm.engine.logprobs import logprobs_of
from idlm.engine.request import Logprob, Request, Source
from idlm.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Launch:
    """A forward that the device was told to make.

    Attributes:
        state: what the next one goes on from.
        packed_BX: as in `Outcome`.
        rows: clean and mask rows of each request.
        logits_BNV: the base model's raw logits behind the tokens; None: not kept.
        seconds: what it takes the device; None: not known.
    """

    state: State
    packed_BX: torch.Tensor
    rows: int
    logits_BNV: torch.Tensor | None
    seconds: float | None = None


class Commit:
    """The tokens that a launch brings to ``requests``, its rows."""

    def __init__(self, requests: Sequence[Request], launch: Launch) -> None:
        self.requests, self.seconds = list(requests), launch.seconds
        self._launch = launch
        self._packed_BX = launch.packed_BX.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if launch.packed_BX.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> float:
        """Wait until the tokens are there; for how many seconds."""
        start = time.perf_counter()
        if self._copied is not None:
            self._copied.synchronize()
        return time.perf_counter() - start

    def give(self, row: int, tokenizer: Tokenizer) -> tuple[int, int]:
        """Give the request at ``row`` its new tokens, up to the one that ends it; after `wait`.

        Returns:
            Drafts that were tested, and those that stood.
        """
        request, (tokens, accepted, drafted, overlap) = self.requests[row], self._rows[row]
        logprobs = self._logprobs(row, accepted + 1, request.params.logprobs, tokenizer)
        request.stats.forward(drafted, accepted, overlap, self._launch.rows)
        last = Source.CORRECTION if accepted < drafted else Source.SAMPLED
        request.extend(tokens[: accepted + 1], [Source.DRAFT] * accepted + [last], logprobs)
        return drafted, accepted

    @cached_property
    def _rows(self) -> list[tuple[list[int], int, int, list[float]]]:
        """Tokens, accepted, drafted and overlap of each row."""
        N = (self._packed_BX.shape[1] - 1) // 2
        overlap_BM = self._packed_BX[:, N + 2 :].int().view(torch.float32)
        rows = zip(self._packed_BX[:, : N + 2].tolist(), overlap_BM.tolist(), strict=True)
        return [(row[:N], row[N], row[N + 1], overlap) for row, overlap in rows]

    def _logprobs(
        self, row: int, count: int, top: int | None, tokenizer: Tokenizer
    ) -> list[dict[int, Logprob]] | None:
        """For each of ``count`` new tokens, its log-probability and the ``top`` likeliest."""
        if top is None:
            return None
        assert self._launch.logits_BNV is not None
        return logprobs_of(
            self._launch.logits_BNV[row, :count],
            self._launch.packed_BX[row, :count],
            top,
            tokenizer,
        )
