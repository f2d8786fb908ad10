"""The requests that decode together, and what they carry from one forward to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from idlm.decoding.cycle import Method, State
from idlm.decoding.sampling import Sampling
from idlm.engine.blocks import BlockPool
from idlm.engine.commit import Launch
from idlm.engine.request import Place, Request
from idlm.engine.runner import Runner
from idlm.model.transfer import upload

# Rows of requests for each row that may be nobody's: to arrange a batch anew takes the host as long
# as a forward of a small model takes the device.
SPARE = 8


class Batch:
    """Row ``i`` of its state belongs to ``requests[i]``.

    The state is that after the last launch, of which the host may not know the tokens yet.

    Attributes:
        requests: never changed in place: what was launched refers to it.
        by_hand: whether the host takes part in the forwards of one of them.
    """

    def __init__(self, runner: Runner) -> None:
        self.requests: list[Request] = []
        self.by_hand = False
        self._runner = runner
        self._wanted: list[Request] = []  # what it was last told to be, if it still is
        self._state: State | None = None
        self._sampling: Sampling | None = None
        self._table: Table | None = None

    def gains(self, requests: Sequence[Request]) -> bool:
        """Whether there is anybody among ``requests`` who is not in the batch yet."""
        return requests != self._wanted and not set(requests) <= set(self.requests)

    def become(self, requests: Sequence[Request]) -> None:
        """Let ``requests`` be the batch; who leaves unfinished takes its state along."""
        if requests != self._wanted:
            self._arrange(requests)
            self._wanted = list(requests)

    def _arrange(self, requests: Sequence[Request]) -> None:
        wanted, present = set(requests), set(self.requests)
        gone = [request for request in self.requests if request not in wanted]
        if wanted <= present and (not gone or self._may_keep(gone)):
            return
        stay = [row for row, request in enumerate(self.requests) if request in wanted]
        joining = [request for request in requests if request not in present]
        states = self._states([Place(self._state, row) for row in stay] if self._state else [])
        for row, request in enumerate(self.requests):
            if request not in wanted and not request.finished:
                request.place = Place(self._select([row]), 0)
        states += self._states([request.place for request in joining if request.place])
        for request in joining:
            request.place = None
        self._set([self.requests[row] for row in stay] + joining, states)

    def _may_keep(self, gone: Sequence[Request]) -> bool:
        """Whether those who have left may keep their rows for a while."""
        few = len(gone) * (SPARE + 1) <= len(self.requests)
        finished = all(request.finished for request in gone)
        return few and finished and self._runner.takes_nobody(self.requests)

    def launch(self, method: Method) -> Launch:
        """Begin one forward of all; the batch goes on from what it will bring."""
        assert self._state is not None
        if self._sampling is None or self._table is None:
            self._sampling = self._runner.sampling(self.requests, self._state)
            self._table = Table(self.requests, self._runner.pool, self._runner.device)
        table_BP = self._table.now()
        launch = self._runner.decode(
            method, self.requests, table_BP, self._state, self._sampling, self.by_hand
        )
        # Where the device counts on; what the host may know is a forward behind.
        self._state, self._sampling.counts_BV = launch.state, launch.state.counts_BV
        return launch

    def alone(self) -> list[Batch]:
        """Batches of one request each, in the same states, after a forward that failed.

        It may have counted its tokens: the host counts again, which has to know them all.
        """
        batches = []
        for row, request in enumerate(self.requests):
            batch, state = Batch(self._runner), self._select([row])
            batch._set([request], [replace(state, counts_BV=None, prompt_BV=None)])
            batches.append(batch)
        return batches

    def keep(self) -> None:
        """Hold a state of its own, as a graph of others may overwrite the one that it has."""
        self._state = self._select(list(range(len(self.requests))))

    def join(self, batches: Sequence[Batch]) -> None:
        """Be what ``batches`` are together."""
        requests = [request for batch in batches for request in batch.requests]
        self._set(requests, [batch._state for batch in batches if batch._state is not None])

    def _states(self, places: Sequence[Place]) -> list[State]:
        """The states at ``places``, in order; what can stay together is not taken apart."""
        states = []
        for _, group in groupby(places, lambda place: id(place.state)):
            together = list(group)
            state, rows = together[0].state, [place.row for place in together]
            whole = rows == list(range(len(state.pending_B)))
            states.append(state if whole else self._runner.select(state, rows))
        return states

    def _select(self, rows: list[int]) -> State:
        assert self._state is not None
        return self._runner.select(self._state, rows)

    def _set(self, requests: list[Request], states: list[State]) -> None:
        self.requests, self.by_hand = requests, any(request.by_hand for request in requests)
        self._state = State.cat(states) if states else None
        self._sampling = self._table = None
        self._wanted = []


class Table:
    """``table_BP`` of some requests, whose leases grow."""

    def __init__(self, requests: Sequence[Request], pool: BlockPool, device: torch.device) -> None:
        self._leases, self._pool, self._device = [r.lease for r in requests], pool, device
        self._changes = -1  # of the pool, when the table was last made
        self._lengths_B = np.zeros(len(requests), np.int64)
        self._host_BP = np.zeros((len(requests), 0), np.int32)
        self._table_BP: torch.Tensor | None = None

    def now(self) -> torch.Tensor:
        """The blocks of each request, int32, filled up with block 0; new only if one has grown."""
        if self._table_BP is not None and self._changes == self._pool.changes:
            return self._table_BP
        self._changes = self._pool.changes
        lengths_B = np.array([len(lease.ids) for lease in self._leases])
        changed = (lengths_B != self._lengths_B).nonzero()[0].tolist()
        if self._table_BP is not None and not changed:
            return self._table_BP
        most, width = int(lengths_B.max()), self._host_BP.shape[1]
        if most > width:
            self._host_BP = np.pad(self._host_BP, ((0, 0), (0, 2 * most - width)))
        for row in changed:
            before, now = self._lengths_B[row], lengths_B[row]
            self._host_BP[row, before:now] = self._leases[row].ids[before:]
            self._host_BP[row, now:before] = 0
        self._lengths_B = lengths_B
        self._table_BP = upload(self._host_BP[:, :most], self._device)
        return self._table_BP
