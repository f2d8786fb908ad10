"""Decoding cycles as captured CUDA graphs that update their own inputs.

A graph is `cycle.decode` or `cycle.decode_with` and nothing else, captured for so many requests,
one layout and one kind of sampling. Its inputs are tensors that stay where they are: it writes the
state that it ends with where it found the state that it began with. So the host has to do nothing
between two forwards of the same requests but to launch the next, long before it knows what the last
one brought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from idlm.decoding import cycle
from idlm.decoding.cycle import Method, Outcome, State
from idlm.decoding.sampling import Sampling
from idlm.engine.commit import SLOTS, Launch
from idlm.engine.inputs import Inputs, Seats
from idlm.engine.kind import Kind
from idlm.engine.kv_cache import KVCache
from idlm.engine.texts import Prompts, Texts
from idlm.model.cuda import head as cuda_head

if TYPE_CHECKING:
    from idlm.model.cuda.ring import Ring

LEAST_TEXT = 16  # tokens of a captured prefill
FEW_ROWS = 128  # of a forward: fewer take hardly less time
ALONG = (2, FEW_ROWS // LEAST_TEXT)  # rows of prompts that cycles take along, as many as needed


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
        vocab_size: int,
    ) -> None:
        self._cache, self._device = cache, device
        self._kind = Kind(frozenset(), table_width, places, candidates, vocab_size, device)
        self._inputs: dict[tuple[object, ...], Inputs] = {}
        self._texts: dict[tuple[object, ...], Texts] = {}
        self._along: dict[tuple[int, frozenset[str]], Texts] = {}
        self._graphs: dict[tuple[object, ...], Graph] = {}
        self._last: Cycle | None = None
        self._pools: dict[type, tuple[Any, torch.cuda.Stream]] = {}

    def seat(self, table_BP: torch.Tensor, state: State, sampling: Sampling) -> Seats:
        """Let requests have the inputs of the graphs that they need."""
        size, kind = _power(len(state.pending_B)), self._kind.of(sampling.kind)
        if (size, kind.wants) not in self._inputs:
            self._inputs[size, kind.wants] = Inputs(size, kind)
        return self._inputs[size, kind.wants].seat(table_BP, state, sampling)

    def decode(self, method: Method, seats: Seats) -> Launch:
        """`cycle.decode`; the state of the outcome is overwritten by the next call."""
        last = self._last
        if last is None or last.method is not method or last.launch.state is not seats.state:
            last = self._last = self._cycle(method, seats)
        last.graph.replay()
        return last.graph.landed(last.launch)

    def _cycle(self, method: Method, seats: Seats) -> Cycle:
        inputs = seats.inputs
        key = (inputs.size, inputs.kind.wants, method.layout)
        if key not in self._graphs:

            def run() -> Outcome:
                caches = self._cache.k_LNKTD, self._cache.v_LNKTD
                return cycle.decode(method, *caches, inputs.table_BP, inputs.state, inputs.sampling)

            self._graphs[key] = self._captured(run, inputs)
        graph, B = self._graphs[key], len(seats.state.pending_B)
        launch = Launch(seats.state, graph.packed_BX[:B], graph.rows, None, graph.seconds)
        return Cycle(method, graph, launch)

    def decode_with(self, method: Method, seats: Seats, prompts: Prompts) -> tuple[Launch, Launch]:
        """`cycle.decode_with`: what it brings to those on the ``seats``, and to the prompts."""
        inputs, wants = seats.inputs, seats.inputs.kind.wants
        rows = next(rows for rows in ALONG if rows >= len(prompts.last_B))
        key = ("with prompts", inputs.size, rows, wants, method.layout)
        if (rows, wants) not in self._along:
            self._along[rows, wants] = Texts(rows, LEAST_TEXT, inputs.kind)
        texts = self._along[rows, wants]
        if key not in self._graphs:

            def run() -> Outcome:
                caches = self._cache.k_LNKTD, self._cache.v_LNKTD
                sampling = Sampling.cat([inputs.sampling, texts.sampling])
                own = texts.table_BP, texts.tokens_BC, texts.count_B, texts.start_B, texts.last_B
                along, table_BP = cycle.Texts(*own), inputs.table_BP
                return cycle.decode_with(method, *caches, table_BP, inputs.state, along, sampling)

            self._graphs[key] = self._captured(run, inputs, texts)
        graph, B = self._graphs[key], len(seats.state.pending_B)
        texts.take(prompts, None)
        graph.replay()
        packed_BX, begun = graph.packed_BX, int(prompts.last_B.sum())
        launch = Launch(seats.state, packed_BX, graph.rows, None, graph.seconds)
        landed = graph.landed(launch)
        # The next prompts overwrite what these begin with.
        state, own_rows = texts.state.clone(), 1 + method.layout.block_size
        return landed.part(0, B, seats.state, graph.rows), landed.part(
            inputs.size, inputs.size + begun, state, own_rows
        )

    def prefill(
        self,
        method: Method,
        prompts: Prompts,
        wants: frozenset[str],
        sampling: Sampling | None,
    ) -> Launch:
        """`cycle.prefill` of requests who want ``wants``.

        ``sampling`` is only looked at for what it has for every token.
        """
        B, C = prompts.tokens_BC.shape
        size = text_requests(B, C)
        key = ("prefill", size, C, wants, method.layout)
        if key not in self._texts:
            texts = self._texts[key] = Texts(size, C, self._kind.of(wants))

            def run() -> Outcome:
                caches = self._cache.k_LNKTD, self._cache.v_LNKTD
                inputs = texts.table_BP, texts.tokens_BC, texts.count_B, texts.start_B
                return cycle.prefill(method, *caches, *inputs, texts.sampling)

            self._graphs[key] = self._captured(run, texts)
        texts, graph = self._texts[key], self._graphs[key]
        texts.take(prompts, sampling)
        graph.replay()
        # The next prompts overwrite what these begin with.
        state = texts.state.clone()
        launch = Launch(state, graph.packed_BX[:B], graph.rows, None, graph.seconds)
        return graph.landed(launch)

    def _captured(self, run: Callable[[], Outcome], *inputs: Inputs | Texts) -> Graph:
        """Capture one cycle over ``inputs``, the rows of which are its; they are not changed.

        Raises:
            CaptureError: it cannot be captured here.
        """

        def clear() -> None:
            for own in inputs:
                own.clear()

        def run_and_go_on() -> Outcome:
            outcome = run()
            go_on(inputs, outcome.state)
            return outcome

        tensors = [tensor for own in inputs for tensor in own.tensors]
        kept = [tensor.clone() for tensor in tensors]
        try:
            clear()
            pool, stream = self._pool(type(inputs[0]))
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                # What is compiled or allocated once is not part of the graph.
                outcome = run_and_go_on()
                ring = _ring(outcome.packed_BX)
                if ring is not None:
                    ring.write(outcome.packed_BX)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            clear()
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                outcome = run_and_go_on()
                if ring is not None:
                    ring.write(outcome.packed_BX)
            for own in inputs:
                own.pretend()
            seconds = timed(graph)
            if ring is not None:
                ring.restart()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
        return Graph(graph, outcome.packed_BX, outcome.rows, seconds, ring)

    def _pool(self, kind: type) -> tuple[Any, torch.cuda.Stream]:
        """Memory that all graphs of a kind share, and the stream that they are captured on.

        Prompts run beside cycles: they share neither memory nor a library's workspace with them.
        """
        if kind not in self._pools:
            pool = torch.cuda.graph_pool_handle()
            self._pools[kind] = pool, torch.cuda.Stream(self._device)
        return self._pools[kind]


def go_on(inputs: Sequence[Inputs | Texts], state: State) -> None:
    """Let ``inputs``, whose rows are those of ``state`` in turn, go on from it."""
    first = 0
    for own in inputs:
        own.go_on(state.part(first, first + own.size))
        first += own.size


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


def _ring(packed_BX: torch.Tensor) -> Ring | None:
    """For the results of a graph; None: without Triton they have to be copied."""
    if not cuda_head.usable(packed_BX.device):
        return None
    from idlm.model.cuda.ring import Ring

    return Ring(packed_BX, SLOTS)


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
    rows: int
    seconds: float
    ring: Ring | None

    def replay(self) -> None:
        """Run the cycle once more."""
        self.graph.replay()

    def landed(self, launch: Launch) -> Launch:
        """``launch``, of the last replay, with the place where its results will be."""
        if self.ring is None:
            return launch
        return replace(launch, host_BX=self.ring.following()[: len(launch.packed_BX)])


@dataclass(frozen=True)
class Cycle:
    """A graph of some requests, which is launched again as long as nothing changes."""

    method: Method
    graph: Graph
    launch: Launch
