"""The requests that decode together, and what they carry from one forward to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from idlm.decoding.cycle import Method, State
from idlm.decoding.sampling import Sampling, kind_of
from idlm.engine.commit import Launch
from idlm.engine.inputs import Seats
from idlm.engine.kind import FOR_EVERY_TOKEN, SlabState
from idlm.engine.request import Place, Request
from idlm.engine.runner import Runner
from idlm.engine.table import Table


class Batch:
    """Row ``i`` of its state belongs to ``requests[i]``.

    The state is that after the last launch, of which the host may not know the tokens yet. With
    graphs it lies in their inputs, where those who come take the rows of those who have ended.

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
        self._seats: Seats | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody in it goes on."""
        return not self._wanted

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
        joining = [request for request in requests if request not in present]
        if self._reseat(requests, wanted, joining):
            return
        stay = [row for row, request in enumerate(self.requests) if request in wanted]
        states = self._states([Place(self._state, row) for row in stay] if self._state else [])
        for row, request in enumerate(self.requests):
            if request not in wanted and not request.finished:
                request.place = Place(self._select([row]), 0)
        states += self._states([request.place for request in joining if request.place])
        for request in joining:
            request.place = None
        self._set([self.requests[row] for row in stay] + joining, states)

    def _reseat(
        self, requests: Sequence[Request], wanted: set[Request], joining: Sequence[Request]
    ) -> bool:
        """Let who joins have the row of one who has ended, or the next; whether that can be."""
        seats, table = self._seats, self._table
        if seats is None or table is None or not seats.taken or (joining and not seats.open):
            return False
        free = [row for row, request in enumerate(self.requests) if request not in wanted]
        if not all(self.requests[row].finished for row in free):
            return False
        more = max(0, len(joining) - len(free))
        rows = [*free, *range(len(self.requests), len(self.requests) + more)][: len(joining)]
        idle = max(0, len(free) - len(joining))
        wants = self._kind(seats, requests, joining)
        if wanted and not seats.suits(len(self.requests) + more, idle, wants):
            return False
        places = [request.place for request in joining]
        states = [(p.state, p.row) for p in places if p and isinstance(p.state, SlabState)]
        if len(states) < len(joining) or any(request.by_hand for request in joining):
            return False
        if joining:
            self.requests = [*self.requests, *joining[len(joining) - more :]]
            for row, request in zip(rows, joining, strict=True):
                self.requests[row], request.place = request, None
                table.replace(row, request)
            self._runner.replace(seats, rows, joining, states, table.moved())
            self._state = seats.state
        elif ended := table.leave(free):
            seats.leave(ended)
        return True

    def _kind(
        self, seats: Seats, requests: Sequence[Request], joining: Sequence[Request]
    ) -> frozenset[str]:
        """`kind_of` all ``requests``, of whom those on the ``seats`` want no more than is there.

        One who wants all of it mostly stands at the beginning, so few are looked at.
        """
        kind = seats.inputs.kind.wants
        if all(r.params.wants <= kind for r in joining):  # noqa: SIM102
            if any(r.params.wants == kind for r in requests):
                return kind
        return kind_of(r.params for r in requests)

    def takes_along(self, request: Request) -> bool:
        """Whether the prompt of ``request`` could be part of a forward of all."""
        if self.by_hand or request.by_hand or not (self.requests and self._runner.takes_along):
            return False
        if self._seats is not None and self._seats.taken:
            wants = self._seats.inputs.kind.wants
        else:
            wants = kind_of(r.params for r in self.requests)
        return wants.isdisjoint(FOR_EVERY_TOKEN) and request.params.wants <= wants

    def launch(self, method: Method, along: Sequence[Request] = ()) -> tuple[Launch, Launch | None]:
        """Begin one forward of all; the batch goes on from what it will bring.

        Args:
            along: those whose prompts are to be part of it (`takes_along`).
        Returns:
            The forward, and what it brings to those, or None: they are not part of it.
        """
        assert self._state is not None
        if self._table is None:
            self._table = Table(self.requests, self._runner.pool)
        found = None if self.by_hand else self._replay(method, self._table, self._state, along)
        if found is None:
            if self._sampling is None:
                self._sampling = self._runner.sampling(self.requests, self._state)
            given = self.requests, self._table, self._state, self._sampling
            found = self._runner.decode(method, *given), None
            self._seats = None  # the state lies somewhere else from now on
            # Where the device counts on; what the host may know is a forward behind.
            self._sampling.counts_BV = found[0].state.counts_BV
        self._state = found[0].state
        return found

    def _replay(
        self, method: Method, table: Table, state: State, along: Sequence[Request]
    ) -> tuple[Launch, Launch | None] | None:
        """By a graph, if there are any."""
        if self._seats is None or not self._seats.taken:
            self._seats = self._runner.seat(self.requests, table, state)
        elif (moved := table.moved()) is not None:
            self._seats.grow(moved)
        if self._seats is None:
            return None
        if along:
            return self._runner.replay_with(method, self._seats, along)
        launch = self._runner.replay(method, self._seats)
        return None if launch is None else (launch, None)

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
        self._sampling = self._table = self._seats = None
        self._wanted = []
