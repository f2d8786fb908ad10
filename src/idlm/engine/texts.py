"""What captured graphs of prompts read and write: tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from idlm.decoding.cycle import State
from idlm.decoding.sampling import Sampling
from idlm.engine.kind import NEUTRAL, NUMBER, Kind, SlabState
from idlm.engine.kv_cache import BLOCK_TOKENS
from idlm.engine.request import Request
from idlm.engine.slab import Field, Slab


@dataclass
class Prompts:
    """Prompts that run together in ``B`` rows, on the host; each has a row, a longer one more.

    Attributes:
        table_BP: int32, their blocks, filled up with block 0.
        tokens_BC, count_B, start_B: as in `cycle.prefill`, int64.
        last_B: bool; whether a row is the last of its prompt. These come first.
        columns: `Sampling.columns`.
    """

    table_BP: npt.NDArray[np.int32]
    tokens_BC: npt.NDArray[np.int64]
    count_B: npt.NDArray[np.int64]
    start_B: npt.NDArray[np.int64]
    last_B: npt.NDArray[np.bool_]
    columns: dict[str, npt.NDArray[Any]]

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[Request, int, int]],
        width: int,
        room: int,
        columns: dict[str, npt.NDArray[Any]],
    ) -> Prompts:
        """The tokens of requests from the second number up to the third.

        Args:
            width: C.
            room: positions that the blocks are filled up for.
        """
        texts = [request.tokens(start, end) for request, start, end in rows]
        blocks = max(-(-room // BLOCK_TOKENS), *(len(r.lease.ids) for r, _, _ in rows))
        table = [r.lease.ids + [0] * (blocks - len(r.lease.ids)) for r, _, _ in rows]
        return cls(
            np.array(table, np.int32),
            np.array([text + [0] * (width - len(text)) for text in texts]),
            np.array([len(text) for text in texts]),
            np.array([start for _, start, _ in rows]),
            np.array([end == request.num_tokens for request, _, end in rows]),
            columns,
        )

    @property
    def texts(self) -> dict[str, npt.NDArray[Any]]:
        """What `cycle.prefill` takes by name, without the sampling."""
        names = "table_BP", "tokens_BC", "count_B", "start_B"
        return {name: getattr(self, name) for name in names}


class Texts:
    """What a graph of `cycle.prefill` reads and writes; rows of nobody are one token in block 0.

    Attributes:
        state: what the answers begin with.
    """

    def __init__(self, size: int, tokens: int, kind: Kind) -> None:
        text: dict[str, Field] = {"tokens_BC": ((tokens,), torch.int64)}
        text |= dict.fromkeys(("count_B", "start_B"), NUMBER) | {"last_B": ((), torch.bool)}
        own = {**kind.table, **text, **kind.columns}
        self._slab = slab = Slab(size, own, kind.device, kind.vocabulary)
        self.table_BP, self.tokens_BC = slab["table_BP"], slab["tokens_BC"]
        self.count_B, self.start_B, self.last_B = slab["count_B"], slab["start_B"], slab["last_B"]
        self.sampling = kind.sampling(slab)
        self.state = SlabState.of(Slab(size, kind.state, kind.device, kind.drawn), self.sampling)
        memory_X, arrays = slab.image(np.zeros(slab.memory_X.nbytes, np.uint8))
        for name, number in {**NEUTRAL, "count_B": 1}.items():
            if name in arrays:
                arrays[name].fill(number)
        self._nobody = memory_X.numpy()

    @property
    def size(self) -> int:
        """Rows."""
        return self._slab.rows

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that are read."""
        return self._slab.tensors

    def clear(self) -> None:
        """Let all rows be nobody's."""
        memory_X, _ = self._slab.image(self._nobody)
        self._slab.memory_X.copy_(memory_X, non_blocking=True)
        for tensor in self._slab.wide.values():
            tensor.zero_()

    def take(self, prompts: Prompts, sampling: Sampling | None) -> None:
        """Take over requests, with what ``sampling`` has for every token."""
        memory_X, own = self._slab.image(self._nobody)
        for name, array in (prompts.texts | prompts.columns | {"last_B": prompts.last_B}).items():
            own[name][tuple(map(slice, array.shape))] = array
        self._slab.memory_X.copy_(memory_X, non_blocking=True)
        for name, tensor in self._slab.wide.items():
            assert sampling is not None
            tensor[: len(prompts.count_B)] = sampling.tensors[name]

    def pretend(self) -> None:
        """As they are, they will do for a timing."""

    def go_on(self, state: State) -> None:
        """Keep ``state``, which the answers begin with."""
        self.state.take(state, self._slab.rows)
