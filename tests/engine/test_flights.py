"""Which launches a step waits for, and in which order they are read."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from idlm.engine import flights
from idlm.engine.commit import SLOTS, Landing, Launch
from idlm.engine.flights import Flights


class Air:
    """Flights of which prompts land when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, late: bool = False) -> None:
        self._landed: set[int] = set()
        monkeypatch.setattr(Landing, "done", property(self._done))
        monkeypatch.setattr(flights, "LATE", 0.0 if late else 1e9)
        self._flights = Flights(torch.device("cpu"), 3)

    def _done(self, landing: Landing) -> bool:
        return int(landing.wait()[0, 0]) in self._landed

    def step(self, *, cycles: list[int], prompts: list[int], landed: list[int]) -> list[int]:
        """Launch these, each of which brings its number; what is read then."""
        self._flights.begin_step()
        for numbers, first in ((cycles, False), (prompts, True)):
            for number in numbers:
                self._flights.add([], launch_of(number), first=first)
        self._landed.update(landed)
        return [int(results_BX[0, 0]) for _, results_BX in self._flights.land(all=False)]

    def rest(self) -> list[int]:
        """What is read if everything is."""
        return [int(results_BX[0, 0]) for _, results_BX in self._flights.land(all=True)]


def launch_of(number: int) -> Launch:
    state: Any = None
    return Launch(state, torch.full((1, 3), number), 1, None, 1.0)


def test_cycles_are_read_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    air = Air(monkeypatch)
    read = [air.step(cycles=[n], prompts=[], landed=[]) for n in range(4)]
    assert read == [[], [0], [1], [2]] and air.rest() == [3]
    assert air.step(cycles=[], prompts=[], landed=[]) == []


def test_two_steps_later_where_the_host_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    air = Air(monkeypatch, late=True)
    read = [air.step(cycles=[n], prompts=[], landed=[]) for n in range(4)]
    assert read == [[], [], [0], [1]]
    assert air.step(cycles=[], prompts=[], landed=[]) == [2, 3]  # else they would never be


def test_prompts_are_read_when_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    air = Air(monkeypatch)
    assert air.step(cycles=[0], prompts=[10, 11], landed=[10]) == []  # not of the same step
    assert air.step(cycles=[1], prompts=[], landed=[]) == [10, 0]  # before what may come of them
    assert air.step(cycles=[2], prompts=[12], landed=[]) == [1]
    assert air.step(cycles=[3], prompts=[], landed=[12]) == [2]  # 11 comes first
    assert air.step(cycles=[4], prompts=[], landed=[11]) == [11, 12, 3]


def test_prompts_are_waited_for_where_no_cycle_is(monkeypatch: pytest.MonkeyPatch) -> None:
    air = Air(monkeypatch)
    assert air.step(cycles=[], prompts=[10], landed=[]) == []  # the next step launches a cycle
    assert air.step(cycles=[0], prompts=[11], landed=[]) == [10]
    assert air.rest() == [0, 11]


@pytest.mark.parametrize("first", [True, False])
def test_what_the_next_launches_write_over_is_kept(first: bool) -> None:
    """Results of a graph stay for a few launches only; here nobody reads them for many."""
    ring = np.zeros((SLOTS, 1, 3), np.int64)
    air, state = Flights(torch.device("cpu"), 3), cast(Any, None)
    air.begin_step()
    for number in range(3 * SLOTS):
        ring[number % SLOTS] = number
        packed = torch.full((1, 3), number)
        launch = Launch(state, packed, 1, None, 1.0, ring[number % SLOTS])
        air.add([], launch, first=first)
    assert [int(results_BX[0, 0]) for _, results_BX in air.land(all=True)] == list(range(3 * SLOTS))
