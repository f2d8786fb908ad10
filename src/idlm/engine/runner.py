"""Requests in, tensors of a forward out: what `idlm.decoding.cycle` needs of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from idlm.decoding import cycle
from idlm.decoding.cycle import Method, Outcome, State
from idlm.decoding.propose import num_candidates
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.commit import Launch
from idlm.engine.grammar import Grammars
from idlm.engine.graphs import CaptureError, Graphs, text_size
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache
from idlm.engine.logprobs import logprobs_of
from idlm.engine.request import Logprob, Request
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
        self._graphs: Graphs | None = None
        if device.type == "cuda":
            candidates = num_candidates(device, method.decoder.config.vocab_size)
            self._graphs = Graphs(cache, device, table_width, places, candidates)

    def decode(
        self,
        method: Method,
        requests: Sequence[Request],
        table_BP: torch.Tensor,
        state: State,
        sampling: Sampling,
        by_hand: bool,
    ) -> Launch:
        """One cycle of ``method``, which is the runner's own but for the layout.

        ``by_hand``: whether the host takes part in it for one of ``requests``.
        """
        if self._graphs is not None and not by_hand:
            try:
                return self._graphs.decode(method, table_BP, state, sampling)
            except CaptureError as error:
                self._do_without_graphs(error)
        self._restrict(sampling, requests, state.drafts.resized(method.layout.block_size))
        return _launched(
            cycle.decode(
                method, self._cache.k_LNKTD, self._cache.v_LNKTD, table_BP, state, sampling
            )
        )

    def prefill(self, method: Method, requests: Sequence[Request]) -> Launch:
        """Run what is not cached of the prompts, in one forward; the longest sets its width.

        ``method`` is the runner's own but for the layout.
        """
        texts = [r.tokens(r.cached, r.num_tokens) for r in requests]
        width = max(map(len, texts))
        if self._graphs is not None:
            width = text_size(width)
        # What fills up has to be somewhere, too: in block 0.
        end = max(r.cached for r in requests) + width + method.layout.block_size
        blocks = max(-(-end // BLOCK_TOKENS), *(len(r.lease.ids) for r in requests))
        table = [r.lease.ids + [0] * (blocks - len(r.lease.ids)) for r in requests]
        table_BP, tokens_BC, count_B, start_B = upload_all(
            [
                np.array(table, np.int32),
                np.array([text + [0] * (width - len(text)) for text in texts]),
                np.array([len(text) for text in texts]),
                np.array([r.cached for r in requests]),
            ],
            self.device,
        )
        sampling = self.sampling(requests)
        if self._graphs is not None and not any(r.by_hand for r in requests):
            try:
                return self._graphs.prefill(method, table_BP, tokens_BC, count_B, start_B, sampling)
            except CaptureError as error:
                self._do_without_graphs(error)
        self._restrict(sampling, requests, Drafts.none(len(requests), self.device))
        k_LNKTD, v_LNKTD = self._cache.k_LNKTD, self._cache.v_LNKTD
        return _launched(
            cycle.prefill(method, k_LNKTD, v_LNKTD, table_BP, tokens_BC, count_B, start_B, sampling)
        )

    def takes_nobody(self, requests: Sequence[Request]) -> bool:
        """Whether a batch may have rows of requests that have given their blocks back."""
        return self._graphs is not None and not any(r.by_hand for r in requests)

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
