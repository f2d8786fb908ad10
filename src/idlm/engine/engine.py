"""Continuous batching over one model: requests join and leave between forwards."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Concatenate, ParamSpec

import torch

from idlm.decoding.cycle import Method
from idlm.decoding.params import SamplingParams
from idlm.engine.batch import Batch
from idlm.engine.blocks import BlockPool
from idlm.engine.check import check_request
from idlm.engine.commit import Commit
from idlm.engine.grammar import grammars_of
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache
from idlm.engine.request import Request
from idlm.engine.runner import Runner
from idlm.engine.scheduler import Scheduler
from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

P = ParamSpec("P")


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine's beginning, and how full it is now.

    Attributes:
        kv_tokens, kv_capacity: tokens of the blocks that requests hold, and of all blocks.
        prefix_hit_tokens: of prompts, found in the cache when a request was first admitted.
        preemptions: times that a request had to leave because blocks ran out.
        evictions: cached blocks that nobody held and whose place was needed.
        failed_forwards: those that raised; each request of one was then tried alone.
    """

    waiting: int
    running: int
    kv_tokens: int
    kv_capacity: int
    prefix_hit_tokens: int
    preemptions: int
    evictions: int
    failed_forwards: int


class Engine:
    """Runs requests of one `Method`: first come, first served, by priority.

    Args:
        max_batch: requests that run at once; more wait.
        kv_cache_tokens: tokens whose keys and values are kept; None: as many as ``max_batch``
            requests of the model's context have, but no more than a share of the free memory.
        chunk: tokens of a prompt that run in one forward.
    Raises:
        InvalidRequestError: ``kv_cache_tokens`` is not a positive whole number.
    """

    def __init__(
        self,
        method: Method,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_batch: int,
        kv_cache_tokens: int | None = None,
        chunk: int = 512,
    ) -> None:
        if kv_cache_tokens is not None and (
            isinstance(kv_cache_tokens, bool)
            or not isinstance(kv_cache_tokens, int)
            or kv_cache_tokens < 1
        ):
            raise InvalidRequestError(
                f"kv_cache_tokens must be a whole number of at least 1, not {kv_cache_tokens!r}."
            )
        config = method.decoder.config
        self.method, self.tokenizer, self.device = method, tokenizer, device
        self.dtype, self.max_batch, self.chunk = dtype, max_batch, chunk
        self._kv_cache_tokens = kv_cache_tokens
        self._eos = frozenset(config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
        self._grammars = grammars_of(tokenizer, config.vocab_size, self._eos)
        self._ids = itertools.count()
        self._failed_forwards = 0

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
            The requests that went forward.
        """
        self._scheduler.schedule()
        self._batch.become(self._scheduler.running)
        moved = list(self._batch.requests)
        if moved:
            self._decode(self._batch)
        if request := self._scheduler.prefilling:
            self._guarded(self._prefill, request)
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
            self._guarded(self._commit, request, commit, row)

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

    def _guarded(
        self,
        act: Callable[Concatenate[Request, P], None],
        request: Request,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        try:
            act(request, *args, **kwargs)
        except Exception as error:
            self._failed_forwards += 1
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        logger.error("Request %d failed.", request.id, exc_info=error)
        request.fail(error)

    @property
    def _context(self) -> int:
        return self.method.decoder.config.max_position_embeddings

    @property
    def _room(self) -> int:
        """The longest prompt and answer that fit into all blocks, with the rows in flight."""
        return self._pool.capacity - self.method.layout.num_rows

    # Made when the first request comes: memory may be taken by other engines until then.

    @cached_property
    def _cache(self) -> KVCache:
        longest = self._context + self.method.layout.num_rows + BLOCK_TOKENS
        return KVCache(
            self.method.decoder.config,
            self.device,
            self.dtype,
            self._kv_cache_tokens,
            self.max_batch * longest,
        )

    @cached_property
    def _pool(self) -> BlockPool:
        return BlockPool(self._cache.num_blocks, BLOCK_TOKENS)

    @cached_property
    def _scheduler(self) -> Scheduler:
        return Scheduler(self._pool, self.max_batch, self.method.layout.num_rows)

    @cached_property
    def _runner(self) -> Runner:
        return Runner(self.method, self._cache, self._grammars, self.device)

    @cached_property
    def _batch(self) -> Batch:
        return Batch(self._runner)
