"""The requests that decode together, and what they carry from one forward to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from idlm.decoding.cycle import Outcome, State
from idlm.decoding.sampling import Sampling
from idlm.engine.request import Request
from idlm.engine.runner import Runner


class Batch:
    """Row ``i`` of its state belongs to ``requests[i]``."""

    def __init__(self, runner: Runner) -> None:
        self.requests: list[Request] = []
        self._runner = runner
        self._state: State | None = None
        self._sampling: Sampling | None = None
        self._table_BP: torch.Tensor | None = None
        self._num_blocks: list[int] = []

    def become(self, requests: Sequence[Request]) -> None:
        """Let ``requests`` be the batch; who leaves unfinished takes its state along."""
        if set(requests) == set(self.requests):
            return
        stay = [row for row, request in enumerate(self.requests) if request in requests]
        for row, request in enumerate(self.requests):
            if row not in stay and not request.finished:
                request.state = self._select([row])
        joining = [request for request in requests if request not in self.requests]
        states = [self._select(stay)] if stay else []
        for request in joining:
            assert request.state is not None
            states.append(request.state)
            request.state = None
        self._set([self.requests[row] for row in stay] + joining, states)

    def decode(self) -> Outcome:
        """One forward of all; `advance` makes its result the batch's state."""
        assert self._state is not None
        if self._sampling is None:
            self._sampling = self._runner.sampling(self.requests)
        num_blocks = [len(request.lease.ids) for request in self.requests]
        if self._table_BP is None or num_blocks != self._num_blocks:
            self._table_BP = self._runner.table(self.requests)
            self._num_blocks = num_blocks
        return self._runner.decode(self.requests, self._table_BP, self._state, self._sampling)

    def advance(self, outcome: Outcome) -> None:
        """Go on from ``outcome``."""
        self._state = outcome.state

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

    def _select(self, rows: list[int]) -> State:
        assert self._state is not None
        return self._runner.select(self._state, rows)

    def _set(self, requests: list[Request], states: list[State]) -> None:
        self.requests = requests
        self._state = State.cat(states) if states else None
        self._sampling = self._table_BP = None
