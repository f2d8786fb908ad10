"""Continuous batching over one model: requests join and leave between forwards."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from idlm.decoding.cycle import Method
from idlm.decoding.layout import Layout
from idlm.decoding.params import SamplingParams
from idlm.decoding.policy import Policy
from idlm.engine.batch import Batch
from idlm.engine.check import check_request
from idlm.engine.commit import Commit
from idlm.engine.grammar import grammars_of
from idlm.engine.graphs import text_requests, text_size
from idlm.engine.kv_cache import KVCache
from idlm.engine.news import News
from idlm.engine.request import Phase, Place, Request
from idlm.engine.runner import Runner
from idlm.engine.scheduler import Scheduler
from idlm.engine.stats import EngineStats
from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Running requests for each one that joins them at once; steps that others wait for more to join.
# A forward for prompts costs about what one for the others does: with requests of some 100 tokens
# this many cost about as much by waiting as they save.
GATHER, GATHER_STEPS = 8, 16
# Forwards that are launched in one go where nobody could join, and seconds that they take at most:
# for so long a stream sees nothing new and who arrives is not noticed.
BURST, BURST_SECONDS = 4, 4e-3
# Requests for each one that may reach its limit on tokens in a burst, and then idles to its end.
FEW = 16
# Tokens that requests get blocks for at a time: a GPU has to be told of new ones.
AT_ONCE = 64
# Of a forward's time on the device, what a step is taken to last at most: more is a disturbance.
MOST_HOST = 4.0
# Enough for a policy to try what is worth a try.
WARM_UP_TOKENS = 48


class Engine:
    """Runs requests of one `Method`: first come, first served, by priority.

    Args:
        cache: keys and values; engines that share it take turns in one thread.
        max_batch: requests that run at once; more wait.
        chunk: tokens of prompts that run in one step.
        ahead: launch forwards before the tokens of the last ones are read, so that the device
            never waits for the host, and several in one go where nobody could join; None: on CUDA.
            A request that has ended takes part in those that were launched by then; nothing of
            them is kept. Grammars, penalties and log-probabilities need the tokens first: beside
            them nothing is launched ahead.
        policy: chooses the layout of every forward in place of the method's own.
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
        ahead: bool | None = None,
        policy: Policy | None = None,
    ) -> None:
        config = method.decoder.config
        self.method, self.tokenizer = method, tokenizer
        self.max_batch, self.chunk = max_batch, chunk
        self._context = config.max_position_embeddings
        self._ahead = device.type == "cuda" if ahead is None else ahead
        layouts = [method.layout, *(policy.plans if policy else ())]
        self._rows = max(x.num_rows for x in layouts)
        self._stride = max(x.stride for x in layouts)
        rows = self._rows + self._stride * self._ahead
        # With the rows in flight a request has to fit into all blocks there are.
        self._room = cache.pool.capacity - rows
        self._eos = frozenset(config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
        self._grammars = grammars_of(tokenizer, config.vocab_size, self._eos)
        self._ids = itertools.count()
        self._forwards = self._failed_forwards = self._gathering = 0
        self._waited = 0.0
        self._pool, self._beside = cache.pool, cache.beside
        self._scheduler = Scheduler(cache.pool, max_batch, rows, AT_ONCE * self._ahead)
        longest = min(self._context, self._room) + rows + 2 * BURST * self._stride
        longest += AT_ONCE + text_size(chunk)
        table_width = -(-longest // cache.pool.block_tokens)
        places = max(x.block_size for x in layouts)
        self._runner = Runner(method, cache, self._grammars, device, table_width, places)
        self._policy = policy
        self._method_of = {x: replace(method, layout=x) for x in layouts}
        # The last burst, how many forwards it was and when it began, if nothing came since.
        self._began: tuple[Layout, int, float] | None = None
        self._seconds = 0.0  # that the last forward takes the device, if it is known
        self._batch = Batch(self._runner)
        self._flights: deque[Commit] = deque()  # launched and not read, the oldest first

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
        if not request.finished:
            self._scheduler.add(request)
        return request

    def warm_up(self) -> None:
        """Run made-up greedy requests, in all the numbers that are told apart up to ``max_batch``.

        What is compiled, captured or timed when it is first needed is there before the load is.
        """
        sizes = [1 << n for n in range(self.max_batch.bit_length()) if 1 << n < self.max_batch]
        for size in [*sizes, self.max_batch]:
            logger.info("Setting up for %d of %d requests at once.", size, self.max_batch)
            self._run_made_up(size, 1, WARM_UP_TOKENS)
        length = text_size(1)
        while self._ahead and length < min(self.chunk + 1, self._room, self._context):
            logger.info("Setting up for prompts of up to %d tokens.", length)
            most = min(self.chunk // length, self.max_batch)
            counts = {text_requests(count, length) for count in range(1, most + 1)}
            for count in sorted(counts):
                self._run_made_up(min(count, most), length, 1)
            length *= 2
        if self._policy is not None:
            self._policy.forget()

    def _run_made_up(self, requests: int, prompt: int, tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        vocab_size = self.method.decoder.config.vocab_size
        for _ in range(requests):
            self.add([secrets.randbelow(vocab_size)] * prompt, params)
        while self.busy:
            self.step()

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """End ``request`` at once; what it held is free for others."""
        if not request.finished:
            request.abort()
            self._scheduler.remove(request)

    def close(self) -> None:
        """Give back what all requests hold; the engine is not used again."""
        self._scheduler.clear()
        self._flights.clear()

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
            forwards=self._forwards,
            failed_forwards=self._failed_forwards,
            waited=self._waited,
            plans=dict(self._policy.chosen) if self._policy else {},
        )

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """At most one burst of decoding cycles of those that run and one chunk of prompts.

        A cycle that raises is tried again for each request alone; one that raises alone ends its
        request with the finish reason ``error``.

        Returns:
            The requests that went forward; none while other engines hold the blocks.
        """
        moved: list[Request] = []
        self._beside.join()
        gathers = self._gathers()
        times = self._burst(gathers)
        if times > 1 and not self._make_room(times):
            times = 1
        if times == 1 and not self._make_room(1):
            moved = self._read(len(self._flights))  # who has to leave leaves with all its tokens
            self._scheduler.preempt()
        elif not gathers:
            self._scheduler.admit()
        self._gathering = self._gathering + times if gathers else 0
        self._batch.become(self._scheduler.running)
        due = len(self._flights)
        if self._batch.requests:
            moved += [r for r in self._batch.requests if r.phase is not Phase.FINISHED]
            # The rest is left in flight: the next burst is launched while it runs.
            due += self._decode(self._batch, times) // 2
        if self._scheduler.prefilling:
            with self._beside.prompts():
                moved += self._run_texts()
        if not self._ahead or any(request.host_bound for request in moved):
            due = len(self._flights)
        self._read(due)
        if not (self._scheduler.running or self._scheduler.prefilling):
            self._flights.clear()  # of requests that ended
            self._began = None
        return list(dict.fromkeys(moved))

    def _burst(self, gathers: bool) -> int:
        """Forwards to launch before the host looks again: one, if somebody could join."""
        s = self._scheduler
        # What the host launches kernel by kernel takes it as long as the device.
        times = min(BURST, int(BURST_SECONDS / self._seconds)) if self._seconds else 1
        joins = s.prefilling is not None or (self._joiners > 0 and not gathers)
        if times < 2 or not self._ahead or joins or any(r.host_bound for r in s.running):
            return 1
        left = sorted(r.max_tokens - len(r.token_ids) for r in s.running)
        if left:
            plan = self._policy.current(len(left)) if self._policy else self.method.layout
            times = min(times, left[len(left) // FEW] // plan.stride - len(self._flights))
        return max(times, 1)

    def _make_room(self, times: int) -> bool:
        """Let those that run have blocks for so many forwards; whether there are enough."""
        # Of one request never more than a burst leaves: others' prompts are in flight, too.
        unread = min(len(self._flights), BURST - BURST // 2)
        committed = (unread + times - 1) * self._stride
        return self._scheduler.grow(committed + self._rows)

    def _gathers(self) -> bool:
        """Whether those that could join now wait for more.

        On a GPU a forward for one prompt takes as long as for many: a few wait for each other.
        """
        running = len(self._scheduler.running)
        few = 0 < self._joiners * GATHER < running
        return self._ahead and few and self._gathering < GATHER_STEPS

    @property
    def _joiners(self) -> int:
        """Requests that wait and for which there is a place."""
        s = self._scheduler
        return min(len(s.waiting), self.max_batch - len(s.running))

    def _decode(self, batch: Batch, times: int = 1) -> int:
        """Begin up to so many forwards of ``batch``; how many of them, if none failed."""
        requests = batch.requests
        try:
            return self._launch(batch, times)
        except Exception as error:
            self._failed_forwards += 1
            self._beside.join()  # nothing runs beside what is left of it
            self._read(len(self._flights))  # what came before it counts
            if len(requests) == 1:
                self._fail(requests[0], error)
                return 0
            logger.warning("A forward of %d requests failed; each is tried alone.", len(requests))
            batches = [alone for alone in batch.alone() if not alone.requests[0].finished]
            for alone in batches:
                self._decode(alone)
            batch.join(batches)
            return 0

    def _launch(self, batch: Batch, times: int) -> int:
        """Begin up to so many forwards of ``batch``, by the plan that is best for it."""
        self._beside.cycle()
        method, size = self.method, len(batch.requests)
        if self._policy is not None:
            method = self._method_of[self._policy.choose(size)]
            times = 1 + self._policy.stay(size, times - 1)
        start = time.perf_counter()
        for _ in range(times):
            self._flights.append(batch.launch(method))
            self._forwards += 1
        self._seconds = self._flights[-1].seconds or 0.0
        if self._policy is None:
            return times
        # Without a graph, the host is busy for as long as the forward takes.
        seconds = self._seconds or (time.perf_counter() - start) / times
        if self._seconds and self._began is not None and self._began[0] == method.layout:
            # What a graph takes is not all: the host may need longer for what it brings.
            _, before, began = self._began
            seconds = max(seconds, min((start - began) / before, MOST_HOST * seconds))
        self._began = method.layout, times, start
        self._policy.took(size, method.layout, seconds)
        return times

    def _run_texts(self) -> list[Request]:
        """Run a chunk of what is not cached; whose text is cached decodes from then on."""
        self._began = None
        moved: list[Request] = []
        whole: list[Request] = []
        left = self.chunk
        while left > 0 and (request := self._scheduler.prefilling):
            # What follows a prompt's last token is not part of it: that row is for decoding.
            last = len(request.prompt_token_ids) - 1 if request.scoring else request.prefill_end
            end = min(request.cached + left, last)
            left -= end - request.cached
            moved.append(request)
            if end == request.prefill_end:
                self._scheduler.prefilled(request)
                if not request.token_ids:
                    whole.append(request)
                    self._scheduler.admit()
                    continue
            try:
                self._cache(request, end)
            except Exception as error:
                self._blame(request, error)
            self._scheduler.admit()
        for group in self._groups(whole):
            self._prefill(group)
        return moved

    def _cache(self, request: Request, end: int) -> None:
        """Run the text of ``request`` before ``end``, and score it if that is wanted."""
        if request.scoring:
            first = request.cached + 1
            request.score(first, self._runner.score(request, end, self.tokenizer))
        else:
            self._runner.cache(request, end)
        self._keep(request, end)
        if request.finished:
            self._scheduler.remove(request)

    def _groups(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Prompts that share a forward: those of like length, if forwards are launched ahead."""
        if not self._ahead:
            return [[request] for request in requests]
        groups: dict[int, list[Request]] = {}
        for request in requests:
            groups.setdefault(text_size(request.num_tokens - request.cached), []).append(request)
        return list(groups.values())

    def _prefill(self, requests: list[Request]) -> None:
        """Run the rest of these prompts, and begin their answers."""
        try:
            launch = self._runner.prefill(self._first_method(), requests)
        except Exception as error:
            self._failed_forwards += 1
            if len(requests) == 1:
                self._fail(requests[0], error)
                return
            for request in requests:
                self._prefill([request])
            return
        self._flights.append(Commit(requests, launch))
        for row, request in enumerate(requests):
            request.place = Place(launch.state, row)
            self._keep(request, request.num_tokens)

    def _first_method(self) -> Method:
        """What prompts run with: no proposals where the others have none either.

        With graphs, where they cost little, all prompts share those of one layout.
        """
        if self._policy is None or self._ahead:
            return self.method
        return self._method_of[self._policy.current(len(self._scheduler.running))]

    def _read(self, count: int) -> list[Request]:
        """Give requests what the oldest ``count`` launches brought; those that got something."""
        given: list[Request] = []
        commits = [self._flights.popleft() for _ in range(min(count, len(self._flights)))]
        for _, group in groupby(commits, lambda commit: commit.kind):
            given += self._give(list(group))
        return given

    def _give(self, commits: Sequence[Commit]) -> list[Request]:
        """The same for forwards of the same requests."""
        requests = commits[0].requests
        self._waited += commits[-1].wait()
        news = News([commit.packed() for commit in commits], commits[0].rows)
        rows = [row for row, r in enumerate(requests) if r.phase is not Phase.FINISHED]
        given = [requests[row] for row in rows]
        tokens, ends = news.tokens()
        for row, request in zip(rows, given, strict=True):
            try:
                if request.by_hand:
                    for commit in commits:
                        request.logprobs += commit.logprobs(row, self.tokenizer)
                request.take(tokens[ends[row] : ends[row + 1]], news, row)
            except Exception as error:
                self._blame(request, error)
        for request in given:
            if request.phase is Phase.FINISHED:
                self._scheduler.remove(request)
        if self._policy is not None:
            for outcome in news.outcomes(rows):
                self._policy.saw(*outcome)
        return given

    def _keep(self, request: Request, cached: int) -> None:
        """Note that the first ``cached`` tokens of ``request`` are cached."""
        request.cached = cached
        self._pool.commit(request.lease, request.tokens, cached)

    def _blame(self, request: Request, error: Exception) -> None:
        self._failed_forwards += 1
        self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, InvalidRequestError):  # else whoever asked is told
            logger.error("Request %d failed.", request.id, exc_info=error)
        if not request.finished:
            request.fail(error)
            self._scheduler.remove(request)
