"""The one thread that owns the engines; everybody else talks to it through messages.

Requests of one method (stride and verification) share a lane, which is an engine with its batch.
Lanes take turns by the time they had per request, so that methods compete fairly.

An engine ends a request that makes a forward fail; that job fails alone. A step that raises all the
same does not say whose fault it was. All requests of the lane then start again, each
in a lane of its own: seeds make the text the same, so what was sent already is skipped, and the
request that fails alone is the one to blame. Nobody else notices more than a delay.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from idlm.decoding.params import SamplingParams
from idlm.engine.engine import Engine
from idlm.engine.request import FinishReason, Logprob, Request, Source
from idlm.errors import InvalidRequestError
from idlm.llm import LLM
from idlm.server.errors import queue_full, shutting_down

logger = logging.getLogger(__name__)

# Updates of all streams together a second. A GPU brings tens of thousands, and to send them keeps
# the processor from launching its forwards.
MOST_EVENTS = 2000


@dataclass(frozen=True)
class MethodKey:
    """How a request wants to be decoded, as `LLM.with_layout` takes it."""

    layout: str
    stride: int | Literal["auto"]
    verification: str

    @classmethod
    def of(cls, llm: LLM) -> MethodKey:
        """How ``llm`` decodes."""
        return cls(llm.layouts, "auto" if llm.auto else llm.layout.stride, llm.verification)


@dataclass(frozen=True)
class Progress:
    """Counts of a request since its beginning; lists are by place in the block, from 1."""

    tokens: int
    forwards: int
    accepted: list[int]
    reached: list[int]
    seconds: float

    @classmethod
    def of(cls, request: Request) -> Progress:
        """The counts now."""
        stats = request.stats
        accepted_at, reached_at = stats.accepted_at, stats.reached_at
        places = sorted(reached_at)
        return cls(
            len(request.token_ids),
            stats.forwards,
            [accepted_at[j] for j in places],
            [reached_at[j] for j in places],
            time.perf_counter() - request.started,
        )


@dataclass(frozen=True)
class Update:
    """What is new of a job; the last one has a finish reason or an error.

    Attributes:
        prompt_logprobs: all of them, in the first one.
    """

    job: Job
    prompt_logprobs: Sequence[dict[int, Logprob] | None] = ()
    text: str = ""
    token_ids: Sequence[int] = ()
    sources: Sequence[Source] = ()
    logprobs: Sequence[dict[int, Logprob]] = ()
    progress: Progress | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing more will come of the job."""
        return self.finish_reason is not None or self.error is not None


class Inbox:
    """Updates of the jobs of one HTTP request, on the event loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._updates: deque[Update] = deque()
        self._arrived = asyncio.Event()

    def put(self, update: Update) -> None:
        """Take one update."""
        self._updates.append(update)
        self._arrived.set()

    async def get(self) -> list[Update]:
        """All that has come since the last call; waits until there is something."""
        await self._arrived.wait()
        updates = list(self._updates)
        self._updates.clear()
        self._arrived.clear()
        return updates


@dataclass(eq=False)
class Job:
    """One choice of an HTTP request: what to generate and where its news go.

    ``params`` need a seed if a failed step is to be survived.

    Attributes:
        streamed: whether its news are wanted as they come; else they come at its end, but for the
            first, which say when it began.
        detailed: whether it is wanted how each token came to be.
        submitted, first_token, ended: `time.perf_counter`; 0: not yet.
        sent: token ids that went to the inbox.
        due: `time.perf_counter` from which on there may be news of a stream again.
    """

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    method: MethodKey
    inbox: Inbox
    streamed: bool = True
    detailed: bool = True
    submitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    sent: list[int] = field(default_factory=list)
    sent_characters: int = 0
    due: float = 0.0
    request: Request | None = None
    error: Exception | None = None
    _repeats: bool = False

    def begin(self, request: Request) -> None:
        """Let ``request`` be what it comes from; not the first one says what it said again."""
        self.request, self._repeats = request, bool(self.sent)

    def quiet(self, now: float) -> bool:
        """Whether nobody wants to know yet what came of it."""
        assert self.request is not None
        wanted = now >= self.due if self.streamed else not self.first_token
        return not wanted and not self.request.finished

    def news(self) -> Update | None:
        """What came of the request since the last time; None: nothing.

        Raises:
            RuntimeError: a request that started again took another way.
            Exception: what the request ended with.
        """
        assert self.request is not None
        request, done = self.request, len(self.sent)
        if request.error is not None:
            raise request.error
        if len(request.token_ids) <= done and not request.finished:
            return None
        if self._repeats and request.token_ids[:done] != self.sent:
            raise RuntimeError("A repeated request gave other tokens than at first.")
        self._repeats = False
        new = slice(done, len(request.token_ids))
        update = Update(
            self,
            () if done else request.prompt_logprobs,
            request.text[self.sent_characters :],
            request.token_ids[new],
            request.sources[new] if self.detailed else (),
            request.logprobs[new],
            Progress.of(request) if self.detailed or request.finished else None,
            request.finish_reason,
        )
        self.sent += update.token_ids
        self.sent_characters = len(request.text)
        return update


@dataclass(eq=False)
class Lane:
    """An engine, its jobs and the time it had; a ``shared`` lane takes more jobs."""

    method: MethodKey
    engine: Engine
    shared: bool
    clock: float = 0.0
    jobs: list[Job] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """How busy the worker is.

    Attributes:
        kv_tokens, kv_capacity: tokens of the blocks that running requests hold, and of all blocks
            set aside for keys and values.
        kv_evictions: blocks of ended requests that were given to others, since the start.
        plans: forwards for which layout and stride (``quadratic:4``) were chosen, since the start.
    """

    running: int
    waiting: int
    kv_tokens: int
    kv_capacity: int
    kv_evictions: int
    plans: dict[str, int]


class Worker:
    """Runs jobs; all public methods may be called from any thread.

    Args:
        llm: the model, and the method of jobs that ask for no other.
        max_waiting: jobs that may wait besides those that run.
        on_end: called on the worker's thread with every job that ends, however it does.
    """

    def __init__(self, llm: LLM, max_waiting: int, on_end: Callable[[Job], None]) -> None:
        self.llm, self.max_running, self.max_waiting = llm, llm.max_batch, max_waiting
        self.method = MethodKey.of(llm)
        self.step_failures = 0
        self._on_end = on_end
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._lanes = [self._new_lane(self.method, shared=True)]
        if llm.device.type == "cuda":
            self._lanes[0].engine.warm_up()  # before there is anybody to wait for it
        self._news: list[Update] = []
        self._live, self._live_lock = 0, threading.Lock()
        self._deadline: float | None = None
        self._stopping, self._ended = False, threading.Event()

    def start(self) -> None:
        """Start a thread that runs."""
        threading.Thread(target=self.run, name="engine", daemon=True).start()

    def run(self) -> None:
        """Run jobs until `stop`; all engines then belong to the calling thread."""
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:  # a mistake of ours; the server has to live on
                logger.exception("the engine thread failed")
                self._fail_all(error)
            self._send()
        self._ended.set()

    def end(self) -> None:
        """End every job, and `run`."""
        self._commands.put(self._stop)

    def stop(self) -> None:
        """The same, and wait for it."""
        self.end()
        self._ended.wait()

    @property
    def draining(self) -> bool:
        """Whether no new jobs are taken."""
        return self._deadline is not None

    def drain(self, seconds: float) -> None:
        """Take no new jobs; after ``seconds`` end those that are left. Safe in a signal handler."""
        self._deadline = time.monotonic() + seconds
        self._commands.put(lambda: None)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of ``jobs`` or none.

        Raises:
            ApiError: too many wait already, or the server is shutting down.
        """
        if self.draining:
            raise shutting_down()
        with self._live_lock:
            if self._live + len(jobs) > self.max_running + self.max_waiting:
                raise queue_full()
            self._live += len(jobs)
        for job in jobs:
            job.submitted = time.perf_counter()
            if job.params.seed is None:
                job.params = replace(job.params, seed=secrets.randbits(63))
            self._commands.put(partial(self._waiting.append, job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End those of ``jobs`` that have not ended, before the next step."""
        for job in jobs:
            self._commands.put(partial(self._cancel, job))

    def load(self) -> Load:
        """How busy the worker is; a snapshot."""
        lanes = list(self._lanes)
        jobs = [job for lane in lanes for job in list(lane.jobs)]
        stats = lanes[0].engine.stats  # all lanes share cache and policy
        with self._live_lock:
            live = self._live
        return Load(
            running=len(jobs),
            waiting=max(live - len(jobs), 0),
            kv_tokens=stats.kv_tokens,
            kv_capacity=stats.kv_capacity,
            kv_evictions=stats.evictions,
            plans=stats.plans,
        )

    # What follows runs on the worker's thread.

    def _turn(self) -> None:
        """Obey what was asked, then run one step of one lane."""
        busy = bool(self._waiting) or any(lane.jobs for lane in self._lanes)
        if not busy:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._fail_all(shutting_down())
        self._admit()
        ready = [lane for lane in self._lanes if lane.jobs]
        if ready:
            self._step(min(ready, key=lambda lane: lane.clock))

    def _admit(self) -> None:
        running = sum(len(lane.jobs) for lane in self._lanes)
        for job in itertools.islice(list(self._waiting), max(self.max_running - running, 0)):
            self._waiting.popleft()
            self._place(job, shared=True)

    def _place(self, job: Job, *, shared: bool) -> None:
        """Start ``job`` in the lane of its method, or in one of its own."""
        found = [lane for lane in self._lanes if shared and lane.shared]
        lane = next((lane for lane in found if lane.method == job.method), None)
        try:
            if lane is None:
                lane = self._new_lane(job.method, shared=shared)
                self._lanes.append(lane)
            if not lane.jobs:
                clocks = [other.clock for other in self._lanes if other.jobs]
                lane.clock = min(clocks, default=0.0)
            job.begin(lane.engine.add(job.prompt_token_ids, job.params))
            lane.jobs.append(job)
        except Exception as error:
            self._fail(job, error)

    def _new_lane(self, method: MethodKey, *, shared: bool) -> Lane:
        llm = self.llm.with_layout(method.layout, method.stride, method.verification)
        return Lane(method, llm.new_engine(), shared)

    def _step(self, lane: Lane) -> None:
        start, size = time.perf_counter(), len(lane.jobs)
        try:
            moved = lane.engine.step()
        except Exception as error:
            self._isolate(lane, error)
            return
        now = time.perf_counter()
        lane.clock += (now - start) / size
        if not moved:  # the others hold all blocks: theirs is the next turn
            lane.clock = max(other.clock for other in self._lanes)
        for job in [job for job in lane.jobs if not job.quiet(now)]:
            self._report(lane, job, now)
        if not lane.jobs:
            self._close_if_extra(lane)

    def _report(self, lane: Lane, job: Job, now: float) -> None:
        """Note what a step brought for ``job``, which may have ended by it."""
        assert job.request is not None
        try:
            update = job.news()
        except Exception as error:
            own = isinstance(error, InvalidRequestError)  # a grammar that leads nowhere
            self.step_failures += job.request.error is error and not own
            lane.jobs.remove(job)
            lane.engine.abort(job.request)
            self._fail(job, error)
            return
        if update is None:
            return
        if update.token_ids and not job.first_token:
            job.first_token = now
        job.due = now + len(lane.jobs) / MOST_EVENTS
        self._news.append(update)
        if update.last:
            lane.jobs.remove(job)
            self._end(job)

    def _isolate(self, lane: Lane, error: Exception) -> None:
        """Start the jobs of a lane that failed again, each alone; one that was alone fails."""
        jobs = self._discard(lane, error)
        if len(jobs) == 1:
            self._fail(jobs[0], error)
            return
        for job in jobs:
            self._place(job, shared=False)

    def _discard(self, lane: Lane, error: Exception) -> list[Job]:
        """Drop a lane that failed, with all the state that it may have damaged; its jobs."""
        self.step_failures += 1
        logger.error("a lane of %d requests failed", len(lane.jobs), exc_info=error)
        lane.engine.close()
        others = [other for other in self._lanes if other is not lane]
        if lane.shared and lane.method == self.method:
            others.insert(0, self._new_lane(lane.method, shared=True))
        self._lanes = others  # all at once: `load` reads them on other threads
        return lane.jobs

    def _close_if_extra(self, lane: Lane) -> None:
        """Only the lane of the server's own method keeps its memory without jobs."""
        if not lane.shared or lane.method != self.method:
            self._lanes.remove(lane)

    def _cancel(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
            self._end(job)
            return
        for lane in self._lanes:
            if job in lane.jobs:
                assert job.request is not None
                lane.jobs.remove(job)
                self._end(job)
                try:
                    lane.engine.abort(job.request)
                except Exception as error:
                    for other in self._discard(lane, error):  # none of them is to blame
                        self._place(other, shared=False)
                    return
                if not lane.jobs:
                    self._close_if_extra(lane)
                return

    def _fail(self, job: Job, error: Exception) -> None:
        job.error = error
        self._news.append(Update(job, error=error))
        self._end(job)

    def _fail_all(self, error: Exception) -> None:
        jobs = [*self._waiting, *(job for lane in self._lanes for job in lane.jobs)]
        self._waiting.clear()
        if jobs:
            for lane in self._lanes:
                lane.engine.close()
            self._lanes = [self._new_lane(self.method, shared=True)]
        for job in jobs:
            self._fail(job, error)

    def _end(self, job: Job) -> None:
        job.ended = time.perf_counter()
        with self._live_lock:
            self._live -= 1
        self._on_end(job)

    def _stop(self) -> None:
        self._fail_all(shutting_down())
        self._stopping = True

    def _send(self) -> None:
        """Hand the news to the event loops, all at once for each."""
        news, self._news = self._news, []
        for loop, updates in itertools.groupby(news, key=lambda update: update.job.inbox.loop):
            try:
                loop.call_soon_threadsafe(_deliver, list(updates))
            except RuntimeError:
                logger.debug("the event loop is closed; %d updates dropped", len(news))


def _deliver(updates: list[Update]) -> None:
    for update in updates:
        update.job.inbox.put(update)
