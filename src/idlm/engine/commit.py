"""What a forward brings, on its way to the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from idlm.decoding.cycle import State
from idlm.engine.logprobs import logprobs_of
from idlm.engine.request import Logprob, Request
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
    """The tokens that a launch brings to ``requests``, its rows.

    Attributes:
        kind: the same for those that can be read together.
    """

    def __init__(self, requests: Sequence[Request], launch: Launch) -> None:
        self.requests, self.seconds, self.rows = requests, launch.seconds, launch.rows
        self.kind = id(requests), launch.rows, launch.packed_BX.shape[1]
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

    def packed(self) -> npt.NDArray[np.int64]:
        """``packed_BX`` of the launch; after `wait`, and only while the commit is kept."""
        return self._packed_BX.numpy()

    def logprobs(self, row: int, tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
        """For each new token of a request, its log-probability and the likeliest, if wanted."""
        top = self.requests[row].params.logprobs
        if top is None:
            return []
        assert self._launch.logits_BNV is not None
        packed_BX = self._launch.packed_BX
        count = int(packed_BX[row, (packed_BX.shape[1] - 1) // 2]) + 1
        logits_NV = self._launch.logits_BNV[row, :count]
        return logprobs_of(logits_NV, packed_BX[row, :count], top, tokenizer)
