"""What a forward brought, on its way to the host, and how requests get it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from idlm.decoding.cycle import State
from idlm.engine.logprobs import logprobs_of
from idlm.engine.request import Forward, Logprob, Request
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

    def news(self) -> list[tuple[list[int], Forward]]:
        """For each request the tokens that it may take, and how they came to be; after `wait`."""
        packed_BX, rows = self._packed_BX.numpy(), self._launch.rows
        N = (packed_BX.shape[1] - 1) // 2
        accepted_B, drafted_B = packed_BX[:, N], packed_BX[:, N + 1]
        overlap_BM = packed_BX[:, N + 2 :].astype(np.int32).view(np.float32)
        reached_B = np.minimum(accepted_B + 1, drafted_B)
        overlap_B = overlap_BM.sum(1, where=np.arange(N - 1) < reached_B[:, None])
        packed = zip(packed_BX[:, : N + 2].tolist(), overlap_B.tolist(), strict=True)
        return [(x[: x[N] + 1], (x[N + 1], x[N], overlap, rows)) for x, overlap in packed]

    def logprobs(
        self, row: int, count: int, tokenizer: Tokenizer
    ) -> list[dict[int, Logprob]] | None:
        """For each of ``count`` new tokens, its log-probability and the likeliest, if wanted."""
        top = self.requests[row].params.logprobs
        if top is None:
            return None
        assert self._launch.logits_BNV is not None
        return logprobs_of(
            self._launch.logits_BNV[row, :count],
            self._launch.packed_BX[row, :count],
            top,
            tokenizer,
        )
