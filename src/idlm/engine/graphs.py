"""Decoding cycles as captured CUDA graphs that update their own inputs.

A graph is `cycle.decode` and nothing else, captured for so many requests, one layout and one kind
of sampling. Its inputs are tensors that stay where they are: it writes the state that it ends with
where it found the state that it began with. So the host has to do nothing between two forwards of
the same requests but to launch the next, long before it knows what the last one brought.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch

from idlm.decoding import cycle
from idlm.decoding.cycle import Method, Outcome, State
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.commit import Launch
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache

LEAST_TEXT = 16  # tokens of a captured prefill
TIMED_TEXT = 512  # tokens of each request when a cycle is timed
FEW_ROWS = 128  # of a forward: fewer take hardly less time


class CaptureError(RuntimeError):
    """A cycle could not be captured; it may still run launch by launch."""


class Graphs:
    """The graphs of an engine, each captured when it is first needed.

    Args:
        table_width: blocks that a request holds at most.
        places: drafts of a request at most.
        candidates: tokens among which each was chosen, where not all requests are greedy.
    """

    def __init__(
        self,
        cache: KVCache,
        device: torch.device,
        table_width: int,
        places: int,
        candidates: int,
    ) -> None:
        self._cache, self._device, self._width = cache, device, table_width
        self._places, self._candidates = places, candidates
        self._inputs: dict[tuple[object, ...], Inputs] = {}
        self._texts: dict[tuple[object, ...], Texts] = {}
        self._graphs: dict[tuple[object, ...], Graph] = {}
        self._last: Cycle | None = None
        self._pools: dict[type, tuple[Any, torch.cuda.Stream]] = {}

    def decode(
        self, method: Method, table_BP: torch.Tensor, state: State, sampling: Sampling
    ) -> Launch:
        """`cycle.decode`; the state of the outcome is overwritten by the next call."""
        last = self._last
        if last is None or not last.comes_before(method, state, sampling):
            last = self._last = self._cycle(method, table_BP, state, sampling)
        last.inputs.take_table(table_BP)
        last.graph.replay()
        return last.launch

    def _cycle(
        self, method: Method, table_BP: torch.Tensor, state: State, sampling: Sampling
    ) -> Cycle:
        """The cycle that goes on from ``state``, which its graph then finds in its inputs."""
        B = len(state.pending_B)
        size = _power(B)
        kind = (size, *sampling.kind)
        if kind not in self._inputs:
            candidates = 1 if sampling.all_greedy else self._candidates
            self._inputs[kind] = Inputs.empty(size, self._width, self._places, candidates, sampling)
        inputs, key = self._inputs[kind], (*kind, method.layout)
        if key not in self._graphs:

            def run() -> Outcome:
                caches = self._cache.k_LNKTD, self._cache.v_LNKTD
                return cycle.decode(method, *caches, inputs.table_BP, inputs.state, inputs.sampling)

            self._graphs[key] = self._captured(run, inputs)
        graph = self._graphs[key]
        state = inputs.take(table_BP, state, sampling)
        launch = Launch(state, graph.packed_BX[:B], graph.rows, None, graph.seconds)
        return Cycle(method, sampling, inputs, graph.graph, launch)

    def prefill(
        self,
        method: Method,
        table_BP: torch.Tensor,
        tokens_BC: torch.Tensor,
        count_B: torch.Tensor,
        start_B: torch.Tensor,
        sampling: Sampling,
    ) -> Launch:
        """`cycle.prefill`."""
        B, C = tokens_BC.shape
        size = text_requests(B, C)
        key = ("prefill", size, C, *sampling.kind, method.layout)
        if key not in self._texts:
            texts = Texts.empty(size, C, self._width, sampling)

            def run() -> Outcome:
                caches = self._cache.k_LNKTD, self._cache.v_LNKTD
                inputs = texts.table_BP, texts.tokens_BC, texts.count_B, texts.start_B
                return cycle.prefill(method, *caches, *inputs, texts.sampling)

            self._texts[key] = texts
            self._graphs[key] = self._captured(run, texts)
        self._texts[key].take(table_BP, tokens_BC, count_B, start_B, sampling)
        graph = self._graphs[key]
        graph.graph.replay()
        rows = torch.arange(B, device=self._device)
        return Launch(graph.state.select(rows), graph.packed_BX[:B], graph.rows, None)

    def _captured(self, run: Callable[[], Outcome], inputs: Inputs | Texts) -> Graph:
        """Capture one cycle over ``inputs``, which are not changed.

        Raises:
            CaptureError: it cannot be captured here.
        """
        kept = [tensor.clone() for tensor in inputs.tensors]
        try:
            inputs.clear()
            pool, stream = self._pool(type(inputs))
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                # What is compiled or allocated once is not part of the graph.
                outcome = run()
                inputs.go_on(outcome.state)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            inputs.clear()
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                outcome = run()
                state = inputs.go_on(outcome.state)
            inputs.pretend()
            seconds = timed(graph)
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            for tensor, before in zip(inputs.tensors, kept, strict=True):
                tensor.copy_(before)
        return Graph(graph, outcome.packed_BX, state, outcome.rows, seconds)

    def _pool(self, kind: type) -> tuple[Any, torch.cuda.Stream]:
        """Memory that all graphs of a kind share, and the stream that they are captured on.

        Prompts run beside cycles: they share neither memory nor a library's workspace with them.
        """
        if kind not in self._pools:
            pool = torch.cuda.graph_pool_handle()
            self._pools[kind] = pool, torch.cuda.Stream(self._device)
        return self._pools[kind]


def timed(graph: torch.cuda.CUDAGraph, times: int = 3) -> float:
    """Seconds that a replay takes, the mean of ``times`` after a first one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times * 1e-3


def _power(n: int) -> int:
    """The least power of two from ``n``."""
    return 1 << (n - 1).bit_length()


def text_size(tokens: int) -> int:
    """Tokens that a captured prefill of so many has room for."""
    return max(_power(tokens), LEAST_TEXT)


def text_requests(requests: int, tokens: int) -> int:
    """Requests that a captured prefill of so many, of so many tokens each, has room for.

    One, or enough to be worth a forward: else there would be a graph for every number of them.
    """
    return 1 if requests == 1 else max(_power(requests), FEW_ROWS // tokens)


@dataclass(frozen=True)
class Graph:
    """A captured cycle, where it leaves what it brought, and what it takes on middling texts."""

    graph: torch.cuda.CUDAGraph
    packed_BX: torch.Tensor
    state: State
    rows: int
    seconds: float


@dataclass(frozen=True)
class Cycle:
    """A graph of some requests, which is launched again as long as nothing changes."""

    method: Method
    sampling: Sampling
    inputs: Inputs
    graph: torch.cuda.CUDAGraph
    launch: Launch

    def comes_before(self, method: Method, state: State, sampling: Sampling) -> bool:
        """Whether it is to be launched once more, with these."""
        same = self.method is method and self.sampling is sampling
        return same and self.launch.state is state


@dataclass
class Inputs:
    """What the graphs of one size and kind of sampling read and write.

    Rows of nobody have no tokens and write into block 0, which is nobody's.

    Attributes:
        real_B: int64, 1 for rows of requests, 0 for rows of nobody.
    """

    table_BP: torch.Tensor
    state: State
    sampling: Sampling
    real_B: torch.Tensor
    _table_BP: torch.Tensor | None = None  # that was taken over last, as were these
    _sampling: Sampling | None = None
    _state: State | None = None

    @classmethod
    def empty(
        cls, size: int, table_width: int, places: int, candidates: int, sampling: Sampling
    ) -> Inputs:
        """Rows of nobody."""
        zeros_B = torch.zeros_like(sampling.seed_B[:1]).repeat(size)
        drafts = Drafts.certain(zeros_B.new_zeros(size, places), zeros_B.clone())
        if candidates > 1:
            drafts.ids_BMK = zeros_B.new_zeros(size, places, candidates)
            drafts.probs_BMK = drafts.ids_BMK.float()
        return cls(
            torch.zeros(size, table_width, dtype=torch.int32, device=zeros_B.device),
            State(zeros_B, zeros_B.clone(), drafts),
            _like(sampling, size),
            zeros_B.clone(),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        drafts = self.state.drafts
        return [
            self.table_BP,
            self.state.pending_B,
            self.state.length_B,
            drafts.tokens_BM,
            *self._distributions(drafts),
            drafts.count_B,
            *self.sampling.tensors.values(),
            self.real_B,
        ]

    def clear(self) -> None:
        """Let all rows be nobody's."""
        for tensor in self.tensors:
            tensor.zero_()
        _neutral(self.sampling)

    def pretend(self) -> None:
        """Let all rows be somebody's with texts of middling length, in block 0 throughout."""
        self.real_B.fill_(1)
        self.state.length_B.fill_(min(TIMED_TEXT, self.table_BP.shape[1] * BLOCK_TOKENS // 2))

    def take(self, table_BP: torch.Tensor, state: State, sampling: Sampling) -> State:
        """Take over what is not the same objects as in the last call.

        Returns:
            The state as it is here, which the next graph overwrites.
        """
        if self._state is None or self._state is not state or self._sampling is not sampling:
            B, self._table_BP = len(state.pending_B), None
            # What else is left of others in rows of nobody does no harm.
            for tensor in (self.table_BP, self.real_B, self.state.length_B):
                tensor.zero_()
            self.take_table(table_BP)
            for name, tensor in self.sampling.tensors.items():
                tensor[:B] = sampling.tensors[name]
            self._take_state(state, B)
            self._sampling, self._state = sampling, self._rows(B)
        return self._state

    def take_table(self, table_BP: torch.Tensor) -> None:
        """Take over the blocks of the requests that were taken last."""
        if table_BP is not self._table_BP:
            B, P = table_BP.shape
            self.table_BP[:B, :P] = table_BP
            # Block 0 is nobody's, and so is a row that begins with it.
            self.real_B[:B] = table_BP[:, 0] != 0
            self._table_BP = table_BP

    def _rows(self, B: int) -> State:
        """The first ``B`` of the state."""
        drafts = self.state.drafts
        return State(
            self.state.pending_B[:B],
            self.state.length_B[:B],
            Drafts(*(getattr(drafts, f.name)[:B] for f in fields(drafts))),
            None if self.sampling.counts_BV is None else self.sampling.counts_BV[:B],
            None if self.sampling.prompt_BV is None else self.sampling.prompt_BV[:B],
        )

    def go_on(self, state: State) -> State:
        """Write ``state`` over the one that it came from; rows of nobody stay short."""
        self._take_state(state, len(self.real_B))
        return self.state

    def _take_state(self, state: State, B: int) -> None:
        own, (_, places, candidates) = self.state.drafts, self.state.drafts.ids_BMK.shape
        # Places that there are no drafts for stay as they are: nobody counts them.
        M = min(places, state.drafts.tokens_BM.shape[1])
        drafts = state.drafts.resized(M, candidates)
        self.state.pending_B[:B] = state.pending_B
        torch.mul(state.length_B, self.real_B[:B], out=self.state.length_B[:B])
        own.tokens_BM[:B, :M] = drafts.tokens_BM
        own.count_B[:B] = drafts.count_B
        for mine, given in zip(self._distributions(own), self._distributions(drafts), strict=True):
            mine[:B, :M] = given

    def _distributions(self, drafts: Drafts) -> list[torch.Tensor]:
        """What drafts were drawn from; those of greedy requests follow from their tokens."""
        return [] if self.sampling.all_greedy else [drafts.ids_BMK, drafts.probs_BMK]


@dataclass
class Texts:
    """What a graph of `cycle.prefill` reads; rows of nobody are one token in block 0."""

    table_BP: torch.Tensor
    tokens_BC: torch.Tensor
    count_B: torch.Tensor
    start_B: torch.Tensor
    sampling: Sampling

    @classmethod
    def empty(cls, size: int, tokens: int, table_width: int, sampling: Sampling) -> Texts:
        """Rows of nobody."""
        device = sampling.seed_B.device
        return cls(
            torch.zeros(size, table_width, dtype=torch.int32, device=device),
            torch.zeros(size, tokens, dtype=torch.int64, device=device),
            torch.ones(size, dtype=torch.int64, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
            _like(sampling, size),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        own = [self.table_BP, self.tokens_BC, self.count_B, self.start_B]
        return [*own, *self.sampling.tensors.values()]

    def clear(self) -> None:
        """Let all rows be nobody's."""
        for tensor in self.tensors:
            tensor.zero_()
        self.count_B.fill_(1)
        _neutral(self.sampling)

    def take(
        self,
        table_BP: torch.Tensor,
        tokens_BC: torch.Tensor,
        count_B: torch.Tensor,
        start_B: torch.Tensor,
        sampling: Sampling,
    ) -> None:
        """Take over the rows of requests."""
        self.clear()
        B, P = table_BP.shape
        self.table_BP[:B, :P] = table_BP
        self.tokens_BC[:B], self.count_B[:B], self.start_B[:B] = tokens_BC, count_B, start_B
        for name, tensor in self.sampling.tensors.items():
            tensor[:B] = sampling.tensors[name]

    def pretend(self) -> None:
        """As they are, they will do for a timing."""

    def go_on(self, state: State) -> State:
        """What the answers begin with; nothing is written back."""
        return state


def _like(sampling: Sampling, size: int) -> Sampling:
    """``size`` requests of the same kind, with parameters that do nothing."""
    like = copy(sampling)
    for name, tensor in sampling.tensors.items():
        setattr(like, name, tensor.new_zeros((size, *tensor.shape[1:])))
    _neutral(like)
    return like


def _neutral(sampling: Sampling) -> None:
    sampling.temperature_B.fill_(1.0)
    if sampling.top_k_B is not None:
        sampling.top_k_B.fill_(1)
