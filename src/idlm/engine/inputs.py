"""What captured graphs of cycles read and write: tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from idlm.decoding.cycle import State
from idlm.decoding.sampling import Sampling
from idlm.engine.kind import FOR_EVERY_TOKEN, NEUTRAL, NUMBER, Kind, SlabState
from idlm.engine.kv_cache import BLOCK_TOKENS
from idlm.engine.slab import Changes, Slab
from idlm.engine.table import Moved
from idlm.model.transfer import upload

TIMED_TEXT = 512  # tokens of each request when a cycle is timed
SPARE = 8  # rows of requests for each that may be nobody's, where all would fit into half of them


class Inputs:
    """What the graphs of cycles of one size and kind read and write.

    Rows of nobody have no tokens and write into block 0, which is nobody's.

    Attributes:
        real_B: int64, 1 for rows of requests, 0 for rows of nobody.
        seats: the requests in it.
    """

    def __init__(self, size: int, kind: Kind) -> None:
        own = {**kind.table, **kind.state, "real_B": NUMBER, **kind.columns}
        self.kind, self.slab = kind, Slab(size, own, kind.device, {**kind.drawn, **kind.vocabulary})
        self.table_BP, self.real_B = self.slab["table_BP"], self.slab["real_B"]
        self.sampling = kind.sampling(self.slab)
        self.state = SlabState.of(self.slab, self.sampling)
        self.seats: Seats | None = None

    @property
    def size(self) -> int:
        """Rows."""
        return self.slab.rows

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return self.slab.tensors

    def clear(self) -> None:
        """Let all rows be nobody's."""
        for tensor in self.tensors:
            tensor.zero_()
        for name, number in NEUTRAL.items():
            if name in self.slab:
                self.slab[name].fill_(number)

    def pretend(self) -> None:
        """Let all rows be somebody's with texts of middling length, in block 0 throughout."""
        self.real_B.fill_(1)
        self.state.length_B.fill_(min(TIMED_TEXT, self.table_BP.shape[1] * BLOCK_TOKENS // 2))

    def seat(self, table_BP: torch.Tensor, state: State, sampling: Sampling) -> Seats:
        """Let requests have the first rows; whoever was there before is not any more."""
        B, P = table_BP.shape
        # What else is left of others in rows of nobody does no harm.
        for tensor in (self.table_BP, self.real_B, self.state.length_B):
            tensor.zero_()
        self.table_BP[:B, :P] = table_BP
        # Block 0 is nobody's, and so is a row that begins with it.
        self.real_B[:B] = table_BP[:, 0] != 0
        for name, tensor in sampling.tensors.items():
            self.slab[name][:B] = tensor
        self.state.take(state, B)
        self.seats = Seats(self, B)
        return self.seats

    def go_on(self, state: State) -> None:
        """Write ``state`` over the one that it came from; rows of nobody stay short."""
        self.state.take(state, self.size, self.real_B)


class Seats:
    """Requests in the first rows of some inputs.

    Attributes:
        state: theirs, which the next cycle overwrites.
    """

    def __init__(self, inputs: Inputs, count: int) -> None:
        self.inputs = inputs
        self._count(count)

    def _count(self, count: int) -> None:
        self.state = self.inputs.state.part(0, count)

    @property
    def taken(self) -> bool:
        """Whether they are still there."""
        return self.inputs.seats is self

    @property
    def open(self) -> bool:
        """Whether others can come: what they have for every token is not taken over."""
        return self.inputs.kind.wants.isdisjoint(FOR_EVERY_TOKEN)

    def suits(self, rows: int, idle: int, wants: frozenset[str]) -> bool:
        """Whether so many rows that want this, ``idle`` of them nobody's, would stay there."""
        inputs = self.inputs
        fits = inputs.kind.wants == wants and rows <= inputs.size
        # Half as many rows are a faster graph, but to arrange all anew takes the host its time.
        return fits and (2 * (rows - idle) > inputs.size or idle * (SPARE + 1) <= rows)

    def leave(self, rows: Sequence[int]) -> None:
        """Let ``rows`` be nobody's."""
        rows_R = upload(rows, self.inputs.table_BP.device)
        for tensor in (self.inputs.table_BP, self.inputs.real_B):
            tensor.index_fill_(0, rows_R, 0)

    def grow(self, moved: Moved) -> None:
        """Take over blocks that have come or gone."""
        changes = Changes(self.inputs.slab)
        _put_blocks(changes, moved)
        changes.make()

    def replace(
        self,
        rows: Sequence[int],
        states: Sequence[tuple[SlabState, int]],
        columns: dict[str, npt.NDArray[Any]],
        moved: Moved | None,
    ) -> None:
        """Let others have ``rows``, which may lie behind the last.

        Args:
            states: where the state of each lies.
            columns: of `Sampling`, of each.
            moved: their blocks, and what else has changed.
        """
        inputs, changes = self.inputs, Changes(self.inputs.slab)
        by_source: dict[int, tuple[SlabState, list[int], list[int]]] = {}
        for row, (state, source_row) in zip(rows, states, strict=True):
            _, to, sources = by_source.setdefault(id(state), (state, [], []))
            to.append(row)
            sources.append(source_row)
        for state, to, sources in by_source.values():
            drafts = state.drafts.resized(inputs.kind.places, inputs.kind.candidates)
            wide = {name: getattr(drafts, name) for name in inputs.kind.drawn}
            changes.move(list(inputs.kind.state), to, state.slab, sources, wide)
        changes.put_rows(columns, rows)
        if moved is not None:
            _put_blocks(changes, moved)
        changes.make()
        if max(rows) >= len(self.state.pending_B):
            self._count(max(rows) + 1)


def _put_blocks(changes: Changes, moved: Moved) -> None:
    changes.put("table_BP", moved.rows_X, moved.places_X, moved.blocks_X)
    changes.put_rows({"real_B": moved.real_R}, moved.rows_R)
