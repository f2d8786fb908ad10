"""What a forward brings, on its way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from idlm.decoding.cycle import State
from idlm.engine.logprobs import logprobs_of
from idlm.engine.request import Logprob, Request
from idlm.model.tokenizer import Tokenizer

SLOTS = 4  # launches of a graph whose results are in the host's memory, the last one among them


@dataclass(frozen=True)
class Launch:
    """A forward that the device was told to make.

    Attributes:
        state: what the next one goes on from.
        packed_BX: as in `Outcome`.
        rows: clean and mask rows of each request.
        logits_BNV: the base model's raw logits behind the tokens; None: not kept.
        seconds: what it takes the device; None: not known.
        host_BX: where the device writes ``packed_BX`` for the host by itself, until the graph has
            been launched `SLOTS` times more; None: nowhere.
    """

    state: State
    packed_BX: torch.Tensor
    rows: int
    logits_BNV: torch.Tensor | None
    seconds: float | None = None
    host_BX: npt.NDArray[np.int64] | None = None

    def part(self, first: int, end: int, state: State, rows: int) -> Launch:
        """What it brings to the requests from ``first`` up to ``end``, who go on from ``state``."""
        host_BX = None if self.host_BX is None else self.host_BX[first:end]
        packed_BX = self.packed_BX[first:end]
        return replace(self, state=state, packed_BX=packed_BX, rows=rows, host_BX=host_BX)


class Landing:
    """Tells when the results of one launch after another are there, and holds copies of them.

    Args:
        size: numbers of one launch at most.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._size = size
        self._memory: torch.Tensor | None = None
        self._host_BX = torch.empty(0, dtype=torch.int64)
        self._results_BX: npt.NDArray[np.int64] = self._host_BX.numpy()

    def fetch(self, launch: Launch) -> None:
        """Begin to bring what ``launch`` brings, unless it comes by itself."""
        if launch.host_BX is not None:
            self._results_BX = launch.host_BX
        else:
            self._copy(launch.packed_BX)
        if self._copied is not None:
            self._copied.record()

    def _copy(self, packed_BX: torch.Tensor) -> None:
        if self._memory is None:
            pinned = self._copied is not None
            self._memory = torch.empty(self._size, dtype=torch.int64, pin_memory=pinned)
        if packed_BX.shape != self._host_BX.shape:
            self._host_BX = self._memory[: packed_BX.numel()].view(packed_BX.shape)
        self._results_BX = self._host_BX.numpy()
        self._host_BX.copy_(packed_BX, non_blocking=True)

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self._copied is None or self._copied.query()

    def hold(self) -> None:
        """Wait for it, and keep it apart from what comes after it."""
        self._results_BX = self.wait().copy()

    def wait(self) -> npt.NDArray[np.int64]:
        """What was fetched, once it is there; until the next `fetch`."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._results_BX


class Commit:
    """The tokens that a launch brings to ``requests``, its rows, which are not changed in place.

    Attributes:
        first: whether they are the first tokens of these requests, which then get other rows.
    """

    def __init__(
        self, requests: Sequence[Request], launch: Launch, landing: Landing, first: bool
    ) -> None:
        self.requests, self.rows, self.first = requests, launch.rows, first
        self.stride = (launch.packed_BX.shape[1] - 1) // 2
        self.landing, self._launch = landing, launch
        landing.fetch(launch)

    def logprobs(self, row: int, count: int, tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
        """For each of ``count`` new tokens, its log-probability and the likeliest, if wanted."""
        top = self.requests[row].params.logprobs
        if top is None:
            return []
        assert self._launch.logits_BNV is not None
        return logprobs_of(
            self._launch.logits_BNV[row, :count],
            self._launch.packed_BX[row, :count],
            top,
            tokenizer,
        )
