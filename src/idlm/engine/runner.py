"""Requests in, tensors of a forward out: what `idlm.decoding.cycle` needs of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from idlm.decoding import cycle
from idlm.decoding.cycle import Method, Outcome, State
from idlm.decoding.propose import num_candidates
from idlm.decoding.sampling import Sampling, kind_of
from idlm.decoding.verify import Drafts
from idlm.engine.commit import Launch
from idlm.engine.grammar import Grammars
from idlm.engine.graphs import LEAST_TEXT, CaptureError, Graphs, text_size
from idlm.engine.inputs import Seats
from idlm.engine.kind import FOR_EVERY_TOKEN, SlabState
from idlm.engine.kv_cache import KVCache
from idlm.engine.logprobs import logprobs_of
from idlm.engine.request import Logprob, Request
from idlm.engine.table import Moved, Table
from idlm.engine.texts import Prompts
from idlm.model.cuda.stack import is_small
from idlm.model.tokenizer import Tokenizer
from idlm.model.transfer import upload, upload_all

logger = logging.getLogger(__name__)

SCORED_ROWS = 64  # of a prompt at once: logits of whole chunks would take much memory


class Runner:
    """Runs forwards of one method over one cache; knows nothing of whose turn it is.

    Args:
        table_width: blocks that a request holds at most.
        places: drafts of a request at most.

    On CUDA, cycles run as captured graphs; those of batches in which somebody has a grammar or
    wants log-probabilities run launch by launch, as do prompts.

    Attributes:
        along: whether cycles take prompts along where they can. The rows cost little where it is
            the bytes of the weights that take time. Launches are what a small model's forward
            costs, and two of them overlap.
    """

    def __init__(
        self,
        method: Method,
        cache: KVCache,
        grammars: Grammars,
        device: torch.device,
        table_width: int,
        places: int,
    ) -> None:
        self.method, self.device, self.pool = method, device, cache.pool
        self._cache, self._grammars = cache, grammars
        self.along = not is_small(method.decoder.config)
        self._graphs: Graphs | None = None
        if device.type == "cuda":
            vocab_size = method.decoder.config.vocab_size
            candidates = num_candidates(device, vocab_size)
            self._graphs = Graphs(cache, device, table_width, places, candidates, vocab_size)

    def seat(self, requests: Sequence[Request], table: Table, state: State) -> Seats | None:
        """Let graphs go on with ``requests``; None: there are none."""
        if self._graphs is None:
            return None
        return self._graphs.seat(table.on(self.device), state, self.sampling(requests, state))

    def replay(self, method: Method, seats: Seats) -> Launch | None:
        """One cycle of ``method``, which is the runner's own but for the layout, by a graph.

        None: it cannot be captured here.
        """
        if self._graphs is None:
            return None
        try:
            return self._graphs.decode(method, seats)
        except CaptureError as error:
            self._do_without_graphs(error)
            return None

    @property
    def takes_along(self) -> bool:
        """Whether a cycle can take prompts along."""
        return self.along and self._graphs is not None

    def replay_with(
        self, method: Method, seats: Seats, requests: Sequence[Request]
    ) -> tuple[Launch, Launch] | None:
        """`replay`, and the prompts of ``requests`` with it; what it brings to either.

        They want nothing that those on the ``seats`` do not, and need no more than `ALONG` rows.
        """
        if self._graphs is None:
            return None
        rows = [
            (r, start, min(start + LEAST_TEXT, r.num_tokens))
            for r in requests
            for start in range(r.cached, r.num_tokens, LEAST_TEXT)
        ]
        rows.sort(key=lambda row: row[2] < row[0].num_tokens)  # the last of each text first
        columns = self._columns([r for r, _, _ in rows], seats.inputs.kind.wants)
        room = max(start for _, start, _ in rows) + LEAST_TEXT + method.layout.block_size
        try:
            prompts = Prompts.of(rows, LEAST_TEXT, room, columns)
            return self._graphs.decode_with(method, seats, prompts)
        except CaptureError as error:
            self._do_without_graphs(error)
            return None

    def replace(
        self,
        seats: Seats,
        rows: Sequence[int],
        requests: Sequence[Request],
        states: Sequence[tuple[SlabState, int]],
        moved: Moved | None,
    ) -> None:
        """`Seats.replace` by ``requests``."""
        columns = self._columns(requests, seats.inputs.kind.wants)
        seats.replace(rows, states, columns, moved)

    def decode(
        self,
        method: Method,
        requests: Sequence[Request],
        table: Table,
        state: State,
        sampling: Sampling,
    ) -> Launch:
        """One cycle of ``method``, launch by launch."""
        self._restrict(sampling, requests, state.drafts.resized(method.layout.block_size))
        caches = self._cache.k_LNKTD, self._cache.v_LNKTD
        return _launched(cycle.decode(method, *caches, table.on(self.device), state, sampling))

    def prefill(self, method: Method, requests: Sequence[Request]) -> Launch:
        """Run what is not cached of the prompts, in one forward; the longest sets its width.

        ``method`` is the runner's own but for the layout.
        """
        captured = self._graphs is not None and not any(r.by_hand for r in requests)
        wants = kind_of(r.params for r in requests)
        prompts = self._prompts(requests, wants, method.layout.block_size, captured)
        if captured and self._graphs is not None:
            everybody = None if wants.isdisjoint(FOR_EVERY_TOKEN) else self.sampling(requests)
            try:
                return self._graphs.prefill(method, prompts, wants, everybody)
            except CaptureError as error:
                self._do_without_graphs(error)
        sampling = self.sampling(requests)
        self._restrict(sampling, requests, Drafts.none(len(requests), self.device))
        caches = self._cache.k_LNKTD, self._cache.v_LNKTD
        inputs = upload_all(list(prompts.texts.values()), self.device)
        texts = dict(zip(prompts.texts, inputs, strict=True))
        return _launched(cycle.prefill(method, *caches, **texts, sampling=sampling))

    def _prompts(
        self, requests: Sequence[Request], wants: frozenset[str], masks: int, captured: bool
    ) -> Prompts:
        width = max(r.num_tokens - r.cached for r in requests)
        if captured:
            width = text_size(width)
        # What fills up has to be somewhere, too: in block 0.
        room = max(r.cached for r in requests) + width + masks
        rows = [(r, r.cached, r.num_tokens) for r in requests]
        return Prompts.of(rows, width, room, self._columns(requests, wants))

    def _columns(
        self, requests: Sequence[Request], wants: frozenset[str]
    ) -> dict[str, npt.NDArray[Any]]:
        vocab_size = self.method.decoder.config.vocab_size
        params, seeds = [r.params for r in requests], [r.seed for r in requests]
        return Sampling.columns(params, seeds, wants, vocab_size)

    def cache(self, request: Request, end: int) -> torch.Tensor:
        """Cache the tokens before ``end`` that are not cached yet; their final hidden states."""
        return cycle.cache(
            self.method,
            self._cache.k_LNKTD,
            self._cache.v_LNKTD,
            upload([request.lease.ids], self.device, torch.int32),
            upload([request.tokens(request.cached, end)], self.device),
            upload([request.cached], self.device),
        )

    def score(self, request: Request, end: int, tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
        """`cache`, and the log-probabilities of the prompt's tokens that follow one of those."""
        top, tokens = request.params.prompt_logprobs, request.tokens(request.cached + 1, end + 1)
        assert top is not None and len(tokens) == end - request.cached
        hidden_1CH, tokens_C = self.cache(request, end), upload(tokens, self.device)
        return [
            entry
            for hidden_1NH, tokens_N in zip(
                hidden_1CH.split(SCORED_ROWS, dim=1), tokens_C.split(SCORED_ROWS), strict=True
            )
            for entry in logprobs_of(
                cycle.logits(self.method, hidden_1NH)[0], tokens_N, top, tokenizer
            )
        ]

    def sampling(self, requests: Sequence[Request], state: State | None = None) -> Sampling:
        """The sampling parameters of ``requests`` and what their penalties count.

        That is in their ``state``; without it, the host counts the tokens that it knows.
        """
        prompts: Sequence[Sequence[int]] | torch.Tensor
        outputs: Sequence[Sequence[int]] | torch.Tensor
        if state is not None and state.prompt_BV is not None and state.counts_BV is not None:
            prompts, outputs = state.prompt_BV, state.counts_BV
        else:
            prompts = [r.prompt_token_ids for r in requests]
            # Nobody is asked for tokens that do not matter: they may not have been handed out.
            outputs = [r.token_ids if r.params.penalised else () for r in requests]
        return Sampling.of(
            [r.params for r in requests],
            [r.seed for r in requests],
            prompts,
            outputs,
            self.method.decoder.config.vocab_size,
            self.device,
        )

    def select(self, state: State, rows: Sequence[int]) -> State:
        """The requests at ``rows`` of ``state``."""
        return state.select(upload(rows, self.device, torch.int64))

    def _do_without_graphs(self, error: CaptureError) -> None:
        logger.warning("No CUDA graphs: %s. Every kernel is launched by itself now.", error)
        self._graphs = None

    def _restrict(self, sampling: Sampling, requests: Sequence[Request], drafts: Drafts) -> None:
        """Let grammars say what may follow each of the model's own rows of this forward."""
        if not any(r.params.constrained for r in requests):
            return
        tokens, counts = drafts.tokens_BM.tolist(), drafts.count_B.tolist()
        sampling.allowed_BNV = self._grammars.allowed(
            [r.grammar for r in requests],
            [t[:count] for t, count in zip(tokens, counts, strict=True)],
            rows=drafts.tokens_BM.shape[1] + 1,
        ).to(self.device)


def _launched(outcome: Outcome) -> Launch:
    return Launch(outcome.state, outcome.packed_BX, outcome.rows, outcome.logits_BNV)
