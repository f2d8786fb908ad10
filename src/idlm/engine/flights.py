"""Launches whose results are on their way to the host, the oldest first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from idlm.engine.commit import SLOTS, Commit, Landing, Launch
from idlm.engine.request import Request

# The host's part of a step, over a cycle's time on the device, from which on a cycle more is
# launched before results are read. It costs each request that ends one more cycle.
LATE = 0.5
MOST_HOST = 4.0  # cycles that a step counts for at most: more is a disturbance
WEIGHT = 0.1  # of a step among those before it


class Flights:
    """Cycles are read in their order, prompts as soon as they are there.

    A cycle in which a request takes part after its prompt lands after that.

    Args:
        numbers: that a launch brings at most.
    Attributes:
        waited: seconds that the host had nothing to do but to wait.
        cycle: seconds that the last cycle takes the device; 0: not known.
    """

    def __init__(self, device: torch.device, numbers: int) -> None:
        self._device, self._numbers = device, numbers
        self._cycles: deque[Commit] = deque()
        self._prompts: deque[Commit] = deque()
        self._landings: list[Landing] = []  # that no flight needs
        self._new, self._earlier = 0, 0  # cycles of this step, prompts of those before
        self._host = 0.0  # seconds of a step, lately
        self._began, self._waited_before = 0.0, 0.0
        self.waited, self.cycle = 0.0, 0.0

    def __len__(self) -> int:
        return len(self._cycles) + len(self._prompts)

    def begin_step(self) -> None:
        """Note how long the last one took, and that what comes now belongs to the next."""
        now = time.perf_counter()
        host = now - self._began - (self.waited - self._waited_before)
        self._host += WEIGHT * (min(host, MOST_HOST * self.cycle) - self._host)
        self._began, self._waited_before = now, self.waited
        self._new, self._earlier = 0, len(self._prompts)

    def add(self, requests: Sequence[Request], launch: Launch, *, first: bool) -> None:
        """Let what ``launch`` brings come to the host; ``first``: of prompts."""
        landings = self._landings or [Landing(self._device, self._numbers)]
        commit = Commit(requests, launch, landings.pop(), first)
        queue = self._prompts if first else self._cycles
        queue.append(commit)
        if len(queue) >= SLOTS:  # the next launch may write over its results
            queue[-SLOTS].landing.hold()
        if not first:
            self._new, self.cycle = self._new + 1, launch.seconds or 0.0

    def land(self, *, all: bool) -> Iterator[tuple[Commit, npt.NDArray[np.int64]]]:
        """What was launched before this step, or before the last; ``all``: whatever there is."""
        due = len(self._cycles) - (0 if all else self._kept)
        for _ in range(due):
            cycle = self._cycles.popleft()
            packed_BX = self._wait(cycle)
            yield from self._landed_prompts()
            yield from self._hand(cycle, packed_BX)
        yield from self._landed_prompts()
        # With no cycle to wait for, prompts are: those of this step have time until the next.
        waited = len(self._prompts) if all else 0 if due else self._earlier
        for _ in range(min(waited, len(self._prompts))):
            prompts = self._prompts.popleft()
            yield from self._hand(prompts, self._wait(prompts))

    @property
    def _kept(self) -> int:
        """Cycles that this step leaves alone: its own, and one more if the host is slow."""
        late = self._host > LATE * self.cycle and self.cycle > 0
        return min(self._new + late, len(self._cycles)) if self._new else 0

    def clear(self) -> None:
        """Forget them all."""
        self._cycles.clear()
        self._prompts.clear()

    def _landed_prompts(self) -> Iterator[tuple[Commit, npt.NDArray[np.int64]]]:
        while min(self._earlier, len(self._prompts)) and self._prompts[0].landing.done:
            self._earlier -= 1
            prompts = self._prompts.popleft()
            yield from self._hand(prompts, prompts.landing.wait())

    def _hand(
        self, commit: Commit, packed_BX: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Commit, npt.NDArray[np.int64]]]:
        yield commit, packed_BX
        self._landings.append(commit.landing)

    def _wait(self, commit: Commit) -> npt.NDArray[np.int64]:
        start = time.perf_counter()
        packed_BX = commit.landing.wait()
        self.waited += time.perf_counter() - start
        return packed_BX
