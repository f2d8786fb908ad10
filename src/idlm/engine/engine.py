"""Continuous batching over one model: requests join and leave between forwards."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections.abc import Sequence

import torch

from idlm.decoding.cycle import Method
from idlm.decoding.params import SamplingParams
from idlm.decoding.policy import Policy
from idlm.engine.batch import Batch
from idlm.engine.check import check_request
from idlm.engine.commit import Commit, Launch
from idlm.engine.flights import Flights
from idlm.engine.grammar import grammars_of
from idlm.engine.graphs import ALONG, LEAST_TEXT, text_requests, text_size
from idlm.engine.kv_cache import KVCache
from idlm.engine.news import News
from idlm.engine.plans import Plans
from idlm.engine.request import Forwards, Place, Request
from idlm.engine.runner import Runner
from idlm.engine.scheduler import Scheduler
from idlm.engine.stats import EngineStats
from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Running requests for each one that joins them at once; steps that others wait for more to join.
# A forward for prompts costs about what one for the others does: with requests of some 100 tokens
# this many cost about as much by waiting as they save. More than so many save nothing more.
GATHER, GATHER_STEPS, ENOUGH = 8, 16, 8
GATHER_ALONG = 16  # in place of `GATHER` where a cycle takes them along: that costs less
# Tokens that requests get blocks for at a time: a GPU has to be told of new ones.
AT_ONCE = 128
AHEAD = 2  # forwards that are launched before the tokens of the last one are read, at most
# Enough for a policy to try what is worth a try.
WARM_UP_TOKENS = 48


class Engine:
    """Runs requests of one `Method`: first come, first served, by priority.

    Args:
        cache: keys and values; engines that share it take turns in one thread.
        max_batch: requests that run at once; more wait.
        chunk: tokens of prompts that run in one step.
        ahead: launch a forward, or two, before the tokens of the last one are read, so that the
            device never waits for the host; None: on CUDA. A request that has ended has then
            taken part in as many more, of which nothing is kept. Grammars and log-probabilities
            need the tokens first: beside them nothing is launched ahead.
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
        self._plans = Plans(method, policy)
        layouts = self._plans.layouts
        stride = max(x.stride for x in layouts)
        rows = max(x.num_rows for x in layouts) + AHEAD * stride * self._ahead
        # With the rows in flight a request has to fit into all blocks there are.
        self._room = cache.pool.capacity - rows
        self._eos = frozenset(config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
        self._grammars = grammars_of(tokenizer, config.vocab_size, self._eos)
        self._ids = itertools.count()
        self._failed_forwards, self._gathering = 0, 0
        self._pool, self._beside = cache.pool, cache.beside
        self._scheduler = Scheduler(cache.pool, max_batch, rows, AT_ONCE * self._ahead)
        longest = min(self._context, self._room) + rows + AT_ONCE + text_size(chunk)
        table_width = -(-longest // cache.pool.block_tokens)
        places = max(x.block_size for x in layouts)
        self._runner = Runner(method, cache, self._grammars, device, table_width, places)
        self._batch = Batch(self._runner)
        self._arriving: set[Request] = set()  # whose prompts run beside the others' cycles
        self._arriving_seconds = 0.0  # that all these prompts take
        self._along_rows = min(ALONG[-1], chunk // LEAST_TEXT)  # of prompts in a cycle, at most
        self._went_along = False  # whether a cycle took the last prompts along
        self._flights = Flights(device, max_batch * (2 * stride + 1))
        self._news: News | None = None  # of the last forwards read, which may not be handed out

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
        longest = min(self.chunk, self._room - 1, self._context - 1)
        # The shortest prompt that takes each number of rows that cycles take along.
        along = [rows * LEAST_TEXT + 1 for rows in (0, *ALONG[:-1])]
        along = [length for length in along if length <= longest and self._runner.takes_along]
        for size in [*sizes, self.max_batch]:
            logger.info("Setting up for %d of %d requests at once.", size, self.max_batch)
            self._run_made_up(size, 1, WARM_UP_TOKENS, along)
        length = text_size(1)
        while self._ahead and length <= longest:
            logger.info("Setting up for prompts of up to %d tokens.", length)
            most = min(self.chunk // length, self.max_batch)
            counts = {text_requests(count, length) for count in range(1, most + 1)}
            for count in sorted(counts):
                self._run_made_up(min(count, most), length, 1)
            length *= 2
        self._plans.forget()

    def _run_made_up(
        self, requests: int, prompt: int, tokens: int, others: Sequence[int] = ()
    ) -> None:
        """``others``: prompts that come while the first ones run, each for a moment."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        vocab_size = self.method.decoder.config.vocab_size

        def come(count: int, length: int) -> list[Request]:
            prompts = [[secrets.randbelow(vocab_size)] * length for _ in range(count)]
            return [self.add(prompt_token_ids, params) for prompt_token_ids in prompts]

        there = come(requests, prompt)
        for length in others:
            while self.busy and not all(request.token_ids for request in there):
                self.step()
            if len(there) == self.max_batch:
                self.abort(there.pop())
            (other,) = come(1, length)
            while self.busy and not other.token_ids:
                self.step()
            self.abort(other)
        while self.busy:
            self.step()

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """End ``request`` at once; what it held is free for others."""
        if not request.finished:
            self._hand_out()
            self._beside.join()  # who gets its blocks runs after what may write into them
            request.abort()
            self._scheduler.remove(request)

    def close(self) -> None:
        """Give back what all requests hold; the engine is not used again."""
        self._beside.join()
        self._scheduler.clear()
        self._flights.clear()
        self._hand_out()

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
            waited=self._flights.waited,
            plans=self._plans.chosen,
        )

    @torch.inference_mode()
    def step(self) -> bool:
        """At most one decoding cycle of those that run and one chunk of prompts, maybe in one.

        A cycle that raises is tried again for each request alone; one that raises alone ends its
        request with the finish reason ``error``.

        Returns:
            Whether anybody went forward; nobody does while other engines hold the blocks.
        """
        moved = False
        if not self._scheduler.grow():
            moved = bool(self._flights)
            self._read_all()  # who has to leave leaves with all its tokens
            self._beside.join()
            self._scheduler.preempt()
        elif self._gathered():
            self._scheduler.admit()
        self._renew_batch()
        texts = list[Request]()
        self._flights.begin_step()
        if self._scheduler.prefilling:
            self._beside.mark()
        by_hand = self._batch.by_hand
        left: Sequence[Request] = self._taken_along()
        if not self._batch.idle:
            left = self._decode(self._batch, left)
            moved = True
        if left or self._runs_texts():
            with self._beside.prompts():
                texts = self._run_texts(left)
            by_hand = by_hand or any(request.by_hand for request in texts)
        self._read(all=by_hand or not self._ahead)
        if not (self._scheduler.running or self._scheduler.prefilling):
            self._flights.clear()  # of requests that ended
            self._arriving.clear()
            self._hand_out()
            self._plans.interrupt()
        return moved or bool(texts)

    def _renew_batch(self) -> None:
        """Let the batch be those that run, but for prompts that still run beside others' cycles."""
        running = self._scheduler.running
        if self._arriving_seconds <= self._flights.cycle:
            self._arriving.clear()  # they are there when the cycle beside them is
        if self._arriving:
            others = [request for request in running if request not in self._arriving]
            if others:
                running = others
            else:  # nobody to run beside
                self._arriving.clear()
        if self._batch.gains(running):
            self._beside.join()
        self._batch.become(running)

    def _gathered(self) -> bool:
        """Whether to begin with those that wait now.

        On a GPU a forward for one prompt takes as long as for many, and to let somebody join costs
        the host as much as many: a few wait for each other.
        """
        running = len(self._scheduler.running)
        could = min(len(self._scheduler.waiting), self.max_batch - running)
        self._gathering = self._gathering + 1 if could > 0 else 0
        few = could < min(running / (GATHER_ALONG if self._went_along else GATHER), ENOUGH)
        if self._ahead and few and self._gathering <= GATHER_STEPS:
            return False
        self._gathering = 0
        return True

    def _taken_along(self) -> list[Request]:
        """Prompts that the next cycle takes along; their requests run from then on."""
        along = list[Request]()
        rows = 0
        while (request := self._scheduler.prefilling) and self._goes_along(request):
            rows += _rows(request)
            if rows > self._along_rows:
                break
            self._scheduler.prefilled(request)
            along.append(request)
            self._scheduler.admit()
        self._went_along = bool(along) or self._went_along
        return along

    def _goes_along(self, request: Request) -> bool:
        """Whether a cycle can take the prompt of ``request`` along: now, or the next one."""
        fresh = not (request.scoring or request.token_ids)
        few = _rows(request) <= self._along_rows
        return fresh and few and not self._batch.idle and self._batch.takes_along(request)

    def _runs_texts(self) -> bool:
        """Whether a prompt has to run by itself."""
        request = self._scheduler.prefilling
        return request is not None and not self._goes_along(request)

    def _decode(self, batch: Batch, along: Sequence[Request] = ()) -> Sequence[Request]:
        """A forward of ``batch``; who of ``along`` was not part of it."""
        requests = batch.requests
        try:
            return self._launch(batch, along)
        except Exception as error:
            self._failed_forwards += 1
            self._beside.mark()  # nothing runs beside what is left of it
            self._read_all()  # what came before it counts
            if len(requests) == 1:
                self._fail(requests[0], error)
                return along
            logger.warning("A forward of %d requests failed; each is tried alone.", len(requests))
            batches = [alone for alone in batch.alone() if not alone.requests[0].finished]
            for alone in batches:
                self._decode(alone)
                alone.keep()
            batch.join(batches)
            return along

    def _launch(self, batch: Batch, along: Sequence[Request]) -> Sequence[Request]:
        """Begin a forward of ``batch``, by the plan that is best for it; see `_decode`."""
        size = len(batch.requests)
        method = self._plans.choose(size)
        if along:
            self._beside.join()  # these may share blocks with prompts that still run
        start = time.perf_counter()
        launch, begun = batch.launch(method, along)
        if begun is not None:
            self._begin_answers(along, begun)
            self._beside.mark()  # others may share their blocks
            along = ()
        self._flights.add(batch.requests, launch, first=False)
        self._plans.took(size, method.layout, launch, start, alone=begun is None)
        return along

    def _run_texts(self, whole: Sequence[Request]) -> list[Request]:
        """Run a chunk of what is not cached; whose text is cached decodes from then on.

        Of ``whole`` prompts all is run, whatever the size of the chunk.
        """
        self._plans.interrupt()
        self._went_along = False
        if not self._arriving:
            self._arriving_seconds = 0.0
        moved, whole = list(whole), list(whole)
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
        self._arriving_seconds = math.inf
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
        self._arriving.update(requests)
        self._arriving_seconds += launch.seconds or math.inf
        self._begin_answers(requests, launch)

    def _begin_answers(self, requests: Sequence[Request], launch: Launch) -> None:
        """Let the answers of ``requests``, its rows, begin with what ``launch`` brings."""
        self._flights.add(requests, launch, first=True)
        for row, request in enumerate(requests):
            request.place = Place(launch.state, row)
            self._keep(request, request.num_tokens)

    def _first_method(self) -> Method:
        """What prompts run with: no proposals where the others have none either.

        With graphs, where they cost little, all prompts share those of one layout.
        """
        return self.method if self._ahead else self._plans.current(len(self._scheduler.running))

    def _read(self, *, all: bool) -> None:
        """Give requests what has come (``all``: will come) of launches, or keep it for them."""
        for commit, packed_BX in self._flights.land(all=all):
            if commit.first:
                self._read_first(commit, packed_BX[:, 0].tolist())
                continue
            news = self._news_for(commit)
            rows = news.add(packed_BX)
            self._scheduler.committed(commit.stride)
            for row, tokens, forwards in news.portions(rows):
                self._give(commit, row, tokens, forwards)
                if news.requests[row].finished:
                    news.end(row)

    def _read_first(self, commit: Commit, tokens: list[int]) -> None:
        """Give requests the first token of their answers."""
        self._scheduler.committed(1)
        forwards = Forwards(bytes(2), 0.0, commit.rows)  # no draft was tested, none stood
        for row, (request, token) in enumerate(zip(commit.requests, tokens, strict=True)):
            if not request.finished:
                self._give(commit, row, [token], forwards)
        self._arriving.difference_update(commit.requests)

    def _give(self, commit: Commit, row: int, tokens: list[int], forwards: Forwards) -> None:
        """Let the request at ``row`` take its tokens, and forget it if it ends by them."""
        request = commit.requests[row]
        try:
            request.logprobs += commit.logprobs(row, len(tokens), self.tokenizer)
            request.take(tokens, forwards)
        except Exception as error:
            self._blame(request, error)
        if request.finished:
            self._scheduler.remove(request)

    def _news_for(self, commit: Commit) -> News:
        """Where to keep what ``commit`` brings."""
        if self._news is None or not self._news.takes(commit):
            self._hand_out()
            self._news = News(commit, self.method.decoder.config.vocab_size)
        return self._news

    def _read_all(self) -> None:
        """Give requests all that was launched."""
        self._read(all=True)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give requests what is kept for them, and tell the policy how their drafts went."""
        if self._news is not None:
            self._news.hand_out()
            self._plans.saw(self._news)
            self._news = None

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
            self._beside.join()
            request.fail(error)
            self._scheduler.remove(request)


def _rows(request: Request) -> int:
    """That its prompt, or what is not cached of it, takes beside those of a cycle."""
    return -(-(request.num_tokens - request.cached) // LEAST_TEXT)
