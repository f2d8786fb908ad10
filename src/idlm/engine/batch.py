"""The requests that decode together, and what they carry from one forward to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from idlm.decoding.cycle import Method, State
from idlm.decoding.sampling import Sampling
from idlm.engine.commit import Commit
from idlm.engine.request import Place, Request
from idlm.engine.runner import Runner
from idlm.model.transfer import upload

# Rows of requests for each row that may be nobody's: to arrange a batch anew takes the host as long
# as a forward of a small model takes the device.
SPARE = 8


class Batch:
    """Row ``i`` of its state belongs to ``requests[i]``.

    The state is that after the last launch, of which the host may not know the tokens yet.
    """

    def __init__(self, runner: Runner) -> None:
        self.requests: list[Request] = []
        self._runner = runner
        self._state: State | None = None
        self._sampling: Sampling | None = None
        self._table: Table | None = None

    def become(self, requests: Sequence[Request]) -> None:
        """Let ``requests`` be the batch; who leaves unfinished takes its state along."""
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

    def launch(self, method: Method) -> Commit:
        """Begin one forward of all; the batch goes on from what it will bring."""
        assert self._state is not None
        if self._sampling is None or self._table is None:
            self._sampling = self._runner.sampling(self.requests)
            self._table = Table(self.requests, self._runner.device)
        launch = self._runner.decode(
            method, self.requests, self._table.now(), self._state, self._sampling
        )
        self._state = launch.state
        return Commit(self.requests, launch)

    def alone(self) -> list[Batch]:
        """Batches of one request each, in the same states."""
        batches = []
        for row, request in enumerate(self.requests):
            batch = Batch(self._runner)
            batch._set([request], [self._select([row])])
            batches.append(batch)
        return batches

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
        self.requests = requests
        self._state = State.cat(states) if states else None
        self._sampling = self._table = None


class Table:
    """``table_BP`` of some requests, whose leases grow."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._leases, self._device = [r.lease for r in requests], device
        self._lengths = [0] * len(requests)
        self._host_BP = np.zeros((len(requests), 0), np.int32)
        self._table_BP: torch.Tensor | None = None

    def now(self) -> torch.Tensor:
        """The blocks of each request, int32, filled up with block 0; new only if one has grown."""
        lengths = [len(lease.ids) for lease in self._leases]
        if self._table_BP is not None and lengths == self._lengths:
            return self._table_BP
        most = max(lengths)
        if most > self._host_BP.shape[1]:
            self._host_BP = np.pad(self._host_BP, ((0, 0), (0, most - self._host_BP.shape[1])))
        for row, (before, now) in enumerate(zip(self._lengths, lengths, strict=True)):
            if now != before:
                self._host_BP[row, before:now] = self._leases[row].ids[before:]
                self._host_BP[row, now:before] = 0
        self._lengths = lengths
        self._table_BP = upload(self._host_BP, self._device)
        return self._table_BP
