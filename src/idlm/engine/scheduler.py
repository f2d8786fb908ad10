"""Whose turn it is: first come, first served, by priority.

Requests wait in the order of (priority, arrival). The first one is admitted as soon as there are
blocks for its text and the rows of one forward; nobody overtakes it. Its text is run in chunks,
then it decodes with the others. When a running request needs a block and there is none, the last
one in that order has to leave; it waits again, and its text is recomputed when it comes back. So
the first one always gets on, and with equal priorities everybody becomes first.
"""

from __future__ import annotations

import time
from bisect import insort

from idlm.engine.blocks import BlockPool
from idlm.engine.request import Phase, Request


class Scheduler:
    """Decides who runs; accounts for blocks through ``pool``.

    Args:
        max_batch: requests that run at once.
        num_rows: in-flight rows of one forward, and tokens of those that are launched ahead; a
            request holds blocks for them too.
        at_once: tokens for which those that run get blocks beyond what they need, all at the same
            time, while there are plenty.
    Attributes:
        waiting: in the order in which they will be admitted.
        prefilling: the one whose text is being run.
        running: those that decode, first come first.
    """

    def __init__(self, pool: BlockPool, max_batch: int, num_rows: int, at_once: int) -> None:
        self.pool, self.max_batch, self.num_rows = pool, max_batch, num_rows
        self.at_once = at_once
        self.waiting: list[Request] = []
        self.prefilling: Request | None = None
        self.running: list[Request] = []
        self.preemptions = self.prefix_hit_tokens = 0
        self._spare = 0  # tokens that everybody who runs has blocks for beyond ``num_rows``

    def add(self, request: Request) -> None:
        """Let ``request`` wait."""
        insort(self.waiting, request, key=_order)

    def remove(self, request: Request) -> None:
        """Forget a request that has ended, wherever it is."""
        if request is self.prefilling:
            self.prefilling = None
        elif request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pool.commit(request.lease, request.tokens, request.cached)
        self._release(request)

    def clear(self) -> None:
        """Forget all requests."""
        for request in [*self.waiting, *self.running, *filter(None, [self.prefilling])]:
            self.remove(request)

    def grow(self) -> bool:
        """Make room for the next forward of those that run; whether there is room for all."""
        if self._spare >= 0:
            return True
        # All at the same time: whatever blocks change, the device has to be told.
        more = self.at_once if self._plenty else 0
        if not all(self._has_room(request, more) for request in self.running):
            return False
        self._spare = min((self._spare_of(r, r.cached) for r in self.running), default=0)
        return True

    def committed(self, tokens: int) -> None:
        """Note that those that run have got up to so many tokens each."""
        self._spare -= tokens

    def preempt(self) -> None:
        """Let requests leave until there is room for the next forward of those that run.

        They go on later from the tokens that they have now.
        """
        for request in list(self.running):
            while request.phase is Phase.RUNNING and not self._has_room(request):
                self._preempt_last()

    def admit(self) -> None:
        """Begin with those that wait, until one of them has text to be run."""
        while self.waiting and self.prefilling is None and len(self.running) < self.max_batch:
            if not self._lease(self.waiting[0]):
                return
            self._begin(self.waiting.pop(0))

    def prefilled(self, request: Request) -> None:
        """The text of ``request`` is cached: it decodes from now on."""
        self.prefilling = None
        request.phase = Phase.RUNNING
        self._spare = min(self._spare, self._spare_of(request, request.num_tokens))
        insort(self.running, request, key=_order)

    @property
    def _plenty(self) -> bool:
        """Whether blocks may be given for `at_once` tokens."""
        wanted = (len(self.running) + 1) * (self.num_rows + self.at_once)
        return self.pool.available * self.pool.block_tokens > 2 * wanted

    def _spare_of(self, request: Request, cached: int) -> int:
        """Tokens beyond ``num_rows`` that it has blocks for."""
        return len(request.lease.ids) * self.pool.block_tokens - cached - self.num_rows

    def _has_room(self, request: Request, more: int = 0) -> bool:
        return self.pool.grow(request.lease, request.cached + self.num_rows + more)

    def _lease(self, request: Request) -> bool:
        """Give ``request`` its blocks, those of others that are the same first."""
        pool, lease = self.pool, request.lease
        # The last token's row is computed in any case: what follows it is wanted.
        most = 0 if request.scoring else (request.num_tokens - 1) // pool.block_tokens
        request.cached = pool.share(lease, request.tokens, most)
        wanted = request.num_tokens + self.num_rows
        # Those that run will need a block each before long.
        if pool.grow(lease, wanted, spare=len(self.running)):
            if self._plenty:
                pool.grow(lease, wanted + self.at_once)
            return True
        self._release(request)
        return False

    def _release(self, request: Request) -> None:
        self.pool.release(request.lease)
        request.cached = 0

    def _begin(self, request: Request) -> None:
        if not request.started:
            request.started = time.perf_counter()
            request.prefix_hit_tokens = request.cached
            self.prefix_hit_tokens += request.cached
        if request.cached == request.prefill_end:
            self.prefilled(request)
        else:
            request.phase, self.prefilling = Phase.PREFILL, request

    def _preempt_last(self) -> None:
        candidates = [*self.running, *([self.prefilling] if self.prefilling else [])]
        request = max(candidates, key=_order)
        self.remove(request)
        request.phase = Phase.PREEMPTED
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)


def _order(request: Request) -> tuple[int, int]:
    return request.priority, request.id
