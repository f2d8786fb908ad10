"""Continuous batching over one model: requests join and leave between forwards."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from idlm.decoding.cycle import Method
from idlm.decoding.params import SamplingParams
from idlm.engine.batch import Batch
from idlm.engine.check import check_request
from idlm.engine.commit import Commit
from idlm.engine.grammar import grammars_of
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Request
from idlm.engine.runner import Runner
from idlm.engine.scheduler import Scheduler
from idlm.engine.stats import EngineStats
from idlm.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests of one `Method`: first come, first served, by priority.

    Args:
        cache: keys and values; engines that share it take turns in one thread.
        max_batch: requests that run at once; more wait.
        chunk: tokens of a prompt that run in one forward.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Tokenizer,
        *,
        cache: KVCache,
        device: torch.device,
        max_batch: int,
        chunk: int = 512,
    ) -> None:
        config = method.decoder.config
        self.method, self.tokenizer = method, tokenizer
        self.max_batch, self.chunk = max_batch, chunk
        self._context = config.max_position_embeddings
        # With the rows in flight a request has to fit into all blocks there are.
        self._room = cache.pool.capacity - method.layout.num_rows
        self._eos = frozenset(config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
        self._grammars = grammars_of(tokenizer, config.vocab_size, self._eos)
        self._ids = itertools.count()
        self._failed_forwards = 0
        self._pool = cache.pool
        self._scheduler = Scheduler(cache.pool, max_batch, method.layout.num_rows)
        self._runner = Runner(method, cache, self._grammars, device)
        self._batch = Batch(self._runner)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for a request that cannot be run."""
        vocab_size = self.method.decoder.config.vocab_size
        check_request(prompt_token_ids, params, vocab_size, self._context, self._room)
        self._grammars.start(params)

    def add(
        self, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0
    ) -> Request:
        """Queue a request; those of lower ``priority`` run first.

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
            min(self._context, self._room),
            self._grammars.start(params),
            priority,
        )
        self._scheduler.add(request)
        return request

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """End ``request`` at once; what it held is free for others."""
        if not request.finished:
            request.abort()
            self._scheduler.remove(request)

    def close(self) -> None:
        """Give back what all requests hold; the engine is not used again."""
        self._scheduler.clear()

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        s = self._scheduler
        return bool(s.waiting or s.prefilling or s.running)

    @property
    def kv_capacity(self) -> int:
        """Tokens whose keys and values the memory set aside holds."""
        return self._pool.capacity

    @property
    def stats(self) -> EngineStats:
        """Counts and load, now."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running) + (scheduler.prefilling is not None),
            kv_tokens=pool.held * pool.block_tokens,
            kv_capacity=pool.capacity,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            evictions=pool.evictions,
            failed_forwards=self._failed_forwards,
        )

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """At most one decoding cycle of those that run and one chunk of a prompt.

        A cycle that raises is tried again for each request alone; one that raises alone ends its
        request with the finish reason ``error``.

        Returns:
            The requests that went forward; none while other engines hold the blocks.
        """
        self._scheduler.schedule()
        self._batch.become(self._scheduler.running)
        moved = list(self._batch.requests)
        if moved:
            self._decode(self._batch)
        if request := self._scheduler.prefilling:
            with self._blamed_on(request):
                self._prefill(request)
            moved.append(request)
        for request in moved:
            if request.finished:
                self._scheduler.remove(request)
        return moved

    def _decode(self, batch: Batch) -> None:
        requests = batch.requests
        try:
            outcome = batch.decode()
            commit = Commit.of(outcome)
        except Exception as error:
            self._failed_forwards += 1
            if len(requests) == 1:
                self._fail(requests[0], error)
                return
            logger.warning("A forward of %d requests failed; each is tried alone.", len(requests))
            batches = batch.alone()
            for alone in batches:
                self._decode(alone)
            batch.join(batches)
            return
        batch.advance(outcome)
        for row, request in enumerate(requests):
            with self._blamed_on(request):
                self._commit(request, commit, row)

    def _prefill(self, request: Request) -> None:
        """Run the next chunk of what is not cached; after a prompt's last one, decoding begins."""
        end = min(request.cached + self.chunk, request.prefill_end)
        last = end == request.prefill_end
        if last and not request.token_ids:
            outcome = self._runner.prefill(request, end)
            self._commit(request, Commit.of(outcome), 0)
            request.state = outcome.state
        else:
            self._runner.cache(request, end)
            self._keep(request, end)
        if last and not request.finished:
            self._scheduler.prefilled(request)

    def _commit(self, request: Request, commit: Commit, row: int) -> None:
        commit.give(row, request, self.tokenizer)
        self._keep(request, request.num_tokens - 1)

    def _keep(self, request: Request, cached: int) -> None:
        """Note that the first ``cached`` tokens of ``request`` are cached."""
        request.cached = cached
        self._pool.commit(request.lease, request.tokens, cached)

    @contextmanager
    def _blamed_on(self, request: Request) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed_forwards += 1
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        logger.error("Request %d failed.", request.id, exc_info=error)
        request.fail(error)
