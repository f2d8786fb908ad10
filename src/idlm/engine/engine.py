"""Continuous batching over one model: requests join and leave between forwards."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Sequence

import torch

from idlm.decoding.cycle import Method, Outcome, State, decode, prefill
from idlm.decoding.params import SamplingParams
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.grammar import grammars_of
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Logprob, Phase, Request, Source
from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer


class Engine:
    """Runs requests of one `Method`; first come, first served.

    The running requests are rows 0 .. n-1 of the batch and of the KV cache.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_batch: int,
    ) -> None:
        config = method.decoder.config
        self.method, self.tokenizer, self.device = method, tokenizer, device
        self.context = config.max_position_embeddings
        self.max_batch = max_batch
        self._eos = frozenset(config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
        self._grammars = grammars_of(tokenizer, config.vocab_size, self._eos)
        self._cache = KVCache(config, device, dtype)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._state: State | None = None
        self._sampling: Sampling | None = None
        self._ids = itertools.count()

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for a request that cannot be run."""
        vocab = self.method.decoder.config.vocab_size
        if not prompt_token_ids:
            raise InvalidRequestError("The prompt is empty; give at least one token.")
        for token in prompt_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise InvalidRequestError(
                    f"Token id {token!r} is not in the vocabulary (0 to {vocab - 1})."
                )
        if len(prompt_token_ids) >= self.context:
            raise InvalidRequestError(
                f"The prompt has {len(prompt_token_ids)} tokens; the context holds "
                f"{self.context}, and the answer needs at least one. Shorten the prompt."
            )
        for token in [*(params.logit_bias or {}), *(params.stop_token_ids or ())]:
            if not 0 <= token < vocab:
                raise InvalidRequestError(
                    f"Token id {token} in logit_bias or stop_token_ids is not in the vocabulary "
                    f"(0 to {vocab - 1})."
                )
        self._grammars.start(params)

    def add(self, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        """Queue a request.

        Raises:
            InvalidRequestError: see `check`.
        """
        self.check(prompt_token_ids, params)
        request = Request.create(
            next(self._ids),
            prompt_token_ids,
            params,
            secrets.randbits(63) if params.seed is None else params.seed,
            self.tokenizer,
            self._eos,
            self.context,
            self._grammars.start(params),
        )
        self._waiting.append(request)
        return request

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """End ``request`` at once; what it held is free for others."""
        if request.finished:
            return
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        request.abort()
        self._drop_finished()

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def kv_capacity(self) -> int:
        """Tokens whose keys and values the memory set aside holds."""
        return self._cache.k_LBKSD.shape[1] * self._cache.k_LBKSD.shape[3]

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One forward: a prefill if a request can join the batch, else one decoding cycle.

        Returns:
            The requests that went forward.
        """
        if self._waiting and len(self._running) < self.max_batch:
            moved = [self._prefill(self._waiting.popleft())]
        elif self._running:
            moved = self._decode()
        else:
            return []
        self._drop_finished()
        return moved

    def _prefill(self, request: Request) -> Request:
        slot = len(self._running)
        length = len(request.prompt_token_ids) + request.max_tokens + self.method.layout.num_rows
        self._cache.ensure(slot + 1, length)
        request.phase, request.started = Phase.RUNNING, time.perf_counter()
        sampling = self._sampling_of([request])
        self._restrict(sampling, [request], Drafts.none(1, self.device))
        outcome = prefill(
            self.method,
            self._cache.k_LBKSD[:, slot : slot + 1],
            self._cache.v_LBKSD[:, slot : slot + 1],
            torch.tensor([request.prompt_token_ids], device=self.device),
            sampling,
        )
        self._running.append(request)
        parts = [outcome.state] if self._state is None else [self._state, outcome.state]
        self._state, self._sampling = State.cat(parts), None
        self._commit([request], outcome)
        return request

    def _decode(self) -> list[Request]:
        assert self._state is not None
        if self._sampling is None:
            self._sampling = self._sampling_of(self._running)
        self._restrict(self._sampling, self._running, self._state.drafts)
        n = len(self._running)
        outcome = decode(
            self.method,
            self._cache.k_LBKSD[:, :n],
            self._cache.v_LBKSD[:, :n],
            self._state,
            self._sampling,
        )
        self._state = outcome.state
        moved = list(self._running)
        self._commit(moved, outcome)
        return moved

    def _sampling_of(self, requests: list[Request]) -> Sampling:
        return Sampling.of(
            [r.params for r in requests],
            [r.seed for r in requests],
            [r.prompt_token_ids for r in requests],
            [r.token_ids for r in requests],
            self.method.decoder.config.vocab_size,
            self.device,
        )

    def _restrict(self, sampling: Sampling, requests: list[Request], drafts: Drafts) -> None:
        """Let grammars say what may follow each of the model's own rows of this forward."""
        if not any(r.params.constrained for r in requests):
            return
        tokens, counts = drafts.tokens_BM.tolist(), drafts.count_B.tolist()
        sampling.allowed_BNV = self._grammars.allowed(
            [r.grammar for r in requests],
            [t[:count] for t, count in zip(tokens, counts, strict=True)],
            rows=drafts.tokens_BM.shape[1] + 1,
        ).to(self.device)

    def _commit(self, requests: list[Request], outcome: Outcome) -> None:
        """Give every request its new tokens, up to the one that ends it."""
        tokens = outcome.tokens_BN.tolist()
        accepted = outcome.verdict.accepted_B.tolist()
        drafted = outcome.drafted_B.tolist()
        overlap = outcome.verdict.overlap_BM.tolist()
        for row, request in enumerate(requests):
            request.stats.forward(drafted[row], accepted[row], overlap[row], outcome.rows)
            logprobs = self._logprobs(request, outcome, row, accepted[row] + 1)
            for place in range(accepted[row] + 1):
                if place < accepted[row]:
                    source = Source.DRAFT
                else:
                    rejected = accepted[row] < drafted[row]
                    source = Source.CORRECTION if rejected else Source.SAMPLED
                request.append(
                    tokens[row][place], source, None if logprobs is None else logprobs[place]
                )
                if request.finished:
                    break

    def _logprobs(
        self, request: Request, outcome: Outcome, row: int, count: int
    ) -> list[dict[int, Logprob]] | None:
        """For each of ``count`` new tokens, its log-probability and those of the likeliest."""
        top = request.params.logprobs
        if top is None:
            return None
        logprobs_NV = outcome.logits_BNV[row, :count].float().log_softmax(-1)
        chosen_N1 = outcome.tokens_BN[row, :count, None]
        ranks_N1 = (logprobs_NV > logprobs_NV.gather(1, chosen_N1)).sum(-1, keepdim=True) + 1
        best_NT = logprobs_NV.topk(top, dim=-1).indices
        ids_NX = torch.cat((chosen_N1, best_NT), dim=1)
        places = torch.arange(1, top + 1, device=ids_NX.device).expand_as(best_NT)
        ranks_NX = torch.cat((ranks_N1, places), dim=1)
        rows = zip(
            ids_NX.tolist(), logprobs_NV.gather(1, ids_NX).tolist(), ranks_NX.tolist(), strict=True
        )
        # Reversed, so that the chosen token's own entry (its true rank) comes last and stays.
        return [
            {
                token: Logprob(logprob, rank, self.tokenizer.token_text(token))
                for token, logprob, rank in reversed(list(zip(*entry, strict=True)))
            }
            for entry in rows
        ]

    def _drop_finished(self) -> None:
        """Close the gaps that finished requests leave: the last running one moves in."""
        if not any(r.finished for r in self._running):
            return
        assert self._state is not None
        order = list(range(len(self._running)))
        for row in reversed(range(len(self._running))):
            if self._running[row].finished:
                last = order.pop()
                request = self._running.pop()
                if row < len(order):
                    self._cache.move(len(order), row)
                    order[row], self._running[row] = last, request
        self._state = self._state.select(torch.tensor(order, dtype=torch.int64, device=self.device))
        self._sampling = None
        if not self._running:
            self._state = None
