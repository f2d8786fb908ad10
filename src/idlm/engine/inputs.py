"""What captured graphs read and write: tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from idlm.decoding.cycle import State
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.kv_cache import BLOCK_TOKENS
from idlm.engine.slab import Changes, Field, Slab
from idlm.engine.table import Moved
from idlm.model.transfer import upload

TIMED_TEXT = 512  # tokens of each request when a cycle is timed
NUMBER = ((), torch.int64)
SPARE = 8  # rows of requests for each that may be nobody's, where all would fit into half of them
FOR_EVERY_TOKEN = frozenset(("penalties", "bias"))  # what a request has a whole vocabulary for
NEUTRAL = {"temperature_B": 1.0, "top_k_B": 1}  # of nobody, where zeros would not do


@dataclass(frozen=True)
class Kind:
    """What is common to all inputs of a size.

    Attributes:
        wants: `Sampling.kind`.
        table_width: blocks of a request at most.
        places: drafts of a request at most.
        candidates: tokens among which each was chosen, where not all requests are greedy.
    """

    wants: frozenset[str]
    table_width: int
    places: int
    candidates: int
    vocab_size: int
    device: torch.device

    def of(self, wants: frozenset[str]) -> Kind:
        """The same for other sampling."""
        return replace(self, wants=wants)

    @property
    def greedy(self) -> bool:
        """Whether all requests are."""
        return "sampled" not in self.wants

    @property
    def table(self) -> dict[str, Field]:
        """The blocks of each request."""
        return {"table_BP": ((self.table_width,), torch.int32)}

    @property
    def state(self) -> dict[str, Field]:
        """What stands in a `State`, but for what drafts were drawn from."""
        numbers = dict.fromkeys(("pending_B", "length_B", "count_B"), NUMBER)
        return {**numbers, "tokens_BM": ((self.places,), torch.int64)}

    @property
    def drawn(self) -> dict[str, Field]:
        """What drafts were drawn from; those of greedy requests follow from their tokens."""
        shape = self.places, self.candidates
        return (
            {}
            if self.greedy
            else {"ids_BMK": (shape, torch.int64), "probs_BMK": (shape, torch.float32)}
        )

    @property
    def columns(self) -> dict[str, Field]:
        """Those of `Sampling.columns`."""
        fields: dict[str, Field] = {"seed_B": NUMBER, "greedy_B": ((), torch.bool)}
        names = ["temperature_B"]
        if "top_k" in self.wants:
            fields["top_k_B"] = NUMBER
        names += [f"{limit}_B" for limit in ("top_p", "min_p") if limit in self.wants]
        if "penalties" in self.wants:
            names += ["repetition_B", "presence_B", "frequency_B"]
        return fields | dict.fromkeys(names, ((), torch.float32))

    @property
    def vocabulary(self) -> dict[str, Field]:
        """What `Sampling` has for every token."""
        V, found = (self.vocab_size,), dict[str, Field]()
        if "penalties" in self.wants:
            found = {"counts_BV": (V, torch.float32), "prompt_BV": (V, torch.bool)}
        return found | ({"bias_BV": (V, torch.float32)} if "bias" in self.wants else {})

    def sampling(self, slab: Slab) -> Sampling:
        """The parameters that lie in ``slab``."""
        tensors: dict[str, Any] = {name: slab[name] for name in (*self.columns, *self.vocabulary)}
        greedy = self.greedy, "greedy" in self.wants
        return Sampling(all_greedy=greedy[0], any_greedy=greedy[1], **tensors)


@dataclass(kw_only=True)
class SlabState(State):
    """A state that lies in a slab."""

    slab: Slab

    @classmethod
    def of(cls, slab: Slab, sampling: Sampling) -> SlabState:
        """What lies there; what penalties look at is in ``sampling``."""
        drafts = Drafts.certain(slab["tokens_BM"], slab["count_B"])
        own = cls(slab["pending_B"], slab["length_B"], drafts, slab=slab)
        own.counts_BV, own.prompt_BV = sampling.counts_BV, sampling.prompt_BV
        if "ids_BMK" in slab:
            drafts.ids_BMK, drafts.probs_BMK = slab["ids_BMK"], slab["probs_BMK"]
        return own

    def clone(self) -> SlabState:
        """The same in memory of its own."""
        slab, drafts = self.slab.clone(), self.drafts
        tokens_BM = slab["tokens_BM"]
        ids_BMK, probs_BMK = tokens_BM[..., None], drafts.probs_BMK  # which are all 1
        if "ids_BMK" in slab:
            ids_BMK, probs_BMK = slab["ids_BMK"], slab["probs_BMK"]
        return SlabState(
            slab["pending_B"],
            slab["length_B"],
            Drafts(tokens_BM, ids_BMK, probs_BMK, slab["count_B"]),
            None if self.counts_BV is None else self.counts_BV.clone(),
            None if self.prompt_BV is None else self.prompt_BV.clone(),
            slab=slab,
        )

    def take(self, state: State, B: int, real_B: torch.Tensor | None = None) -> None:
        """Write ``state`` over the first ``B``; lengths of rows that are not real become 0."""
        own, places = self.drafts, self.drafts.tokens_BM.shape[1]
        # Places that there are no drafts for stay as they are: nobody counts them.
        M = min(places, state.drafts.tokens_BM.shape[1])
        drafts = state.drafts.resized(M, own.ids_BMK.shape[2])
        self.pending_B[:B] = state.pending_B
        if real_B is None:
            self.length_B[:B] = state.length_B
        else:
            torch.mul(state.length_B, real_B[:B], out=self.length_B[:B])
        own.tokens_BM[:B, :M] = drafts.tokens_BM
        own.count_B[:B] = drafts.count_B
        if "ids_BMK" in self.slab:
            own.ids_BMK[:B, :M], own.probs_BMK[:B, :M] = drafts.ids_BMK, drafts.probs_BMK


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

    def go_on(self, state: State) -> State:
        """Write ``state`` over the one that it came from; rows of nobody stay short."""
        self.state.take(state, self.size, self.real_B)
        return self.state


class Seats:
    """Requests in the first rows of some inputs.

    Attributes:
        state: theirs, which the next cycle overwrites.
    """

    def __init__(self, inputs: Inputs, count: int) -> None:
        self.inputs = inputs
        self._count(count)

    def _count(self, count: int) -> None:
        state, drafts = self.inputs.state, self.inputs.state.drafts
        counts_BV, prompt_BV = state.counts_BV, state.prompt_BV
        self.state = State(
            state.pending_B[:count],
            state.length_B[:count],
            Drafts(*(getattr(drafts, f.name)[:count] for f in fields(drafts))),
            None if counts_BV is None else counts_BV[:count],
            None if prompt_BV is None else prompt_BV[:count],
        )

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
        count = max(len(self.state.pending_B), max(rows) + 1)
        if count > len(self.state.pending_B):
            self._count(count)


def _put_blocks(changes: Changes, moved: Moved) -> None:
    changes.put("table_BP", moved.rows_X, moved.places_X, moved.blocks_X)
    changes.put_rows({"real_B": moved.real_R}, moved.rows_R)


@dataclass
class Prompts:
    """Prompts of ``B`` requests that run together, on the host.

    Attributes:
        table_BP: int32, their blocks, filled up with block 0.
        tokens_BC, count_B, start_B: as in `cycle.prefill`, int64.
        columns: `Sampling.columns`.
    """

    table_BP: npt.NDArray[np.int32]
    tokens_BC: npt.NDArray[np.int64]
    count_B: npt.NDArray[np.int64]
    start_B: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[Any]]

    @property
    def texts(self) -> tuple[npt.NDArray[Any], ...]:
        """What `cycle.prefill` takes, without the sampling."""
        return self.table_BP, self.tokens_BC, self.count_B, self.start_B


class Texts:
    """What a graph of `cycle.prefill` reads and writes; rows of nobody are one token in block 0.

    Attributes:
        state: what the answers begin with.
    """

    def __init__(self, size: int, tokens: int, kind: Kind) -> None:
        text: dict[str, Field] = {"tokens_BC": ((tokens,), torch.int64)}
        text |= dict.fromkeys(("count_B", "start_B"), NUMBER)
        own = {**kind.table, **text, **kind.columns}
        self._slab = slab = Slab(size, own, kind.device, kind.vocabulary)
        self.table_BP, self.tokens_BC = slab["table_BP"], slab["tokens_BC"]
        self.count_B, self.start_B = slab["count_B"], slab["start_B"]
        self.sampling = kind.sampling(slab)
        self.state = SlabState.of(Slab(size, kind.state, kind.device, kind.drawn), self.sampling)
        memory_X, arrays = slab.image(np.zeros(slab.memory_X.nbytes, np.uint8))
        for name, number in {**NEUTRAL, "count_B": 1}.items():
            if name in arrays:
                arrays[name].fill(number)
        self._nobody = memory_X.numpy()

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
        names = ("table_BP", "tokens_BC", "count_B", "start_B")
        for name, array in (*zip(names, prompts.texts, strict=True), *prompts.columns.items()):
            own[name][tuple(map(slice, array.shape))] = array
        self._slab.memory_X.copy_(memory_X, non_blocking=True)
        for name, tensor in self._slab.wide.items():
            assert sampling is not None
            tensor[: len(prompts.count_B)] = sampling.tensors[name]

    def pretend(self) -> None:
        """As they are, they will do for a timing."""

    def go_on(self, state: State) -> State:
        """Keep ``state``, which the answers begin with."""
        self.state.take(state, self._slab.rows)
        return self.state
