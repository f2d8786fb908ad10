"""The engine's thread: lanes, cancelling, sharing the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from idlm import LLM, SamplingParams
from idlm.engine.engine import Engine
from idlm.engine.request import Request
from idlm.errors import InvalidRequestError
from idlm.server.errors import ApiError
from idlm.server.worker import Inbox, Job, MethodKey, Update, Worker
from tests.server.live import until

QUADRATIC = MethodKey("quadratic", 4, "rejection")
AR = MethodKey("ar", 1, "rejection")


@pytest.fixture
def ended() -> list[Job]:
    return []


@pytest.fixture
def worker(tiny_llm: LLM, ended: list[Job]) -> Iterator[Worker]:
    worker = Worker(tiny_llm, 100, ended.append)
    worker.start()
    yield worker
    worker.stop()


def job(tokens: int, method: MethodKey = QUADRATIC, inbox: Inbox | None = None, **p: int) -> Job:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **p)  # type: ignore[arg-type]
    return Job(0, [5, 6, 7], params, method, inbox or Inbox(asyncio.new_event_loop()))


def test_methods_have_lanes_of_their_own_while_they_have_jobs(
    worker: Worker, ended: list[Job], tiny_llm: LLM
) -> None:
    methods = [QUADRATIC, AR, MethodKey("quadratic", 2, "coupled"), AR]
    jobs = [job(40, method, seed=n) for n, method in enumerate(methods)]
    worker.submit(jobs)
    until(lambda: len(ended) == 4)
    for n, each in enumerate(jobs):
        m = each.method
        llm = tiny_llm.with_layout(m.layout, m.stride, m.verification)
        assert each.sent == llm.generate([5, 6, 7], each.params)[0].token_ids, n
    load = worker.load()
    assert (load.running, load.waiting, load.kv_tokens) == (0, 0, 0)
    assert len(worker._lanes) == 1  # what other methods needed is free again


def test_time_is_shared_by_request(worker: Worker, ended: list[Job]) -> None:
    """One request of another method does not take half of the machine from three."""
    jobs = [job(400), job(400), job(400), job(400, AR)]
    worker.submit(jobs)
    until(lambda: len(jobs[3].sent) > 40 or bool(ended))
    clocks = [lane.clock for lane in list(worker._lanes) if lane.jobs]
    assert len(clocks) == 2 and max(clocks) < 2 * min(clocks) + 1
    worker.cancel(jobs)
    until(lambda: len(ended) == 4)


def test_cancelling_running_waiting_and_finished_jobs(worker: Worker, ended: list[Job]) -> None:
    running = [job(400) for _ in range(4)]
    waiting = [job(400) for _ in range(3)]
    worker.submit([*running, *waiting])
    until(lambda: len(running[3].sent) > 0)
    assert worker.load().waiting == 3
    worker.cancel([waiting[1], running[0]])
    until(lambda: len(ended) == 2 and len(waiting[0].sent) > 0)
    worker.cancel([*running, *waiting])
    worker.cancel([*running, *waiting])
    until(lambda: len(ended) == 7)
    assert worker.step_failures == 0
    assert worker.load().running == worker.load().waiting == 0
    last = job(3)
    worker.submit([last])
    until(lambda: len(ended) == 8)
    assert len(last.sent) == 3


def test_a_failing_abort_harms_nobody(
    worker: Worker, ended: list[Job], tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(engine: Engine, request: Request) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Engine, "abort", failing)
    left, other = job(400), job(100, seed=3)
    worker.submit([left, other])
    until(lambda: len(other.sent) > 0)
    worker.cancel([left])
    until(lambda: len(ended) == 2)
    assert worker.step_failures == 1 and other.error is None
    monkeypatch.undo()
    assert other.sent == tiny_llm.generate([5, 6, 7], other.params)[0].token_ids


class AtOnce:
    """A loop that calls what it is told to call."""

    def call_soon_threadsafe(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)


class Noted(Inbox):
    """Keeps what is put into it."""

    def __init__(self) -> None:
        super().__init__(cast(asyncio.AbstractEventLoop, AtOnce()))
        self.updates: list[Update] = []

    def put(self, update: Update) -> None:
        self.updates.append(update)


@pytest.mark.parametrize("most", [1e-3, 1e9])
def test_streams_are_told_no_more_often_than_they_can_be(
    worker: Worker, ended: list[Job], monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    """Of the first token and the end they are told at once, and of all that came in between."""
    monkeypatch.setattr("idlm.server.worker.MOST_EVENTS", most)
    inboxes = [Noted(), Noted()]
    jobs = [job(60, inbox=inbox, seed=n) for n, inbox in enumerate(inboxes)]
    jobs[1].detailed = False
    worker.submit(jobs)
    until(lambda: all(i.updates and i.updates[-1].last for i in inboxes))
    for one, inbox in zip(jobs, inboxes, strict=True):
        updates = inbox.updates
        assert len(updates) == 2 if most < 1 else len(updates) > 4
        assert [t for update in updates for t in update.token_ids] == one.sent
        assert len(one.sent) == 60
        assert all((u.progress is not None) == (one.detailed or u.last) for u in updates)
        assert sum(len(update.sources) for update in updates) == (60 if one.detailed else 0)


def test_all_jobs_of_a_request_are_taken_or_none(tiny_llm: LLM) -> None:
    worker = Worker(tiny_llm, 2, lambda job: None)  # not started: everything waits
    worker.submit([job(1) for _ in range(tiny_llm.max_batch + 1)])
    with pytest.raises(ApiError, match="waiting"):
        worker.submit([job(1), job(1)])
    worker.submit([job(1)])


def test_updates_reach_the_event_loop_in_order(worker: Worker) -> None:
    async def run() -> tuple[Job, list[int]]:
        one = job(50, inbox=Inbox(asyncio.get_running_loop()))
        worker.submit([one])
        tokens: list[int] = []
        while True:
            for update in await one.inbox.get():
                tokens += update.token_ids
                if update.last:
                    return one, tokens

    one, tokens = asyncio.run(run())
    assert tokens == one.sent and len(tokens) == 50


def test_what_is_not_streamed_comes_at_the_end(worker: Worker, tiny_llm: LLM) -> None:
    async def run() -> tuple[Job, list[list[int]]]:
        one = job(50, inbox=Inbox(asyncio.get_running_loop()), seed=4)
        one.streamed = False
        worker.submit([one])
        pieces: list[list[int]] = []
        while True:
            for update in await one.inbox.get():
                pieces.append(list(update.token_ids))
                if update.last:
                    return one, pieces

    one, pieces = asyncio.run(run())
    assert len(pieces) == 2 and one.submitted < one.first_token < one.ended
    assert [*pieces[0], *pieces[1]] == tiny_llm.generate([5, 6, 7], one.params)[0].token_ids


def test_a_loop_that_is_gone_is_no_trouble(worker: Worker, ended: list[Job]) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    worker.submit([job(5, inbox=Inbox(loop))])
    until(lambda: len(ended) == 1)
    worker.submit([job(5)])
    until(lambda: len(ended) == 2)


def test_a_bad_job_fails_alone(worker: Worker, ended: list[Job]) -> None:
    bad, good = job(5), job(5)
    bad.prompt_token_ids = []
    worker.submit([bad, good])
    until(lambda: len(ended) == 2)
    assert isinstance(bad.error, InvalidRequestError) and good.error is None
