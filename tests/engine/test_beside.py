"""Which of two streams waits for which, told by streams that only write it down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from idlm.engine.beside import Beside


class Stream:
    """In place of CUDA's: a list of what it waits for."""

    def __init__(self, *device: object) -> None:
        self.waits: list[object] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)

    def wait_event(self, event: object) -> None:
        self.waits.append(event)


class Event:
    """In place of CUDA's."""

    def record(self, stream: Stream) -> None:
        pass


@pytest.fixture
def cycles(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream that is current outside of `Beside.prompts`."""
    current = [Stream()]

    @contextmanager
    def stream(inner: Stream) -> Iterator[None]:
        current.append(inner)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    return current[0]


@pytest.fixture
def beside(cycles: Stream) -> Beside:
    beside = Beside(torch.device("cuda"))
    beside.mark()
    return beside


def test_cycles_wait_for_prompts_once_and_only_if_there_are_any(
    beside: Beside, cycles: Stream
) -> None:
    beside.join()
    assert cycles.waits == []
    with beside.prompts():
        pass
    beside.join()
    beside.join()
    assert cycles.waits == [beside._stream]


def test_who_joins_amid_prompts_lets_the_cycles_wait(beside: Beside, cycles: Stream) -> None:
    """A prompt that fails gives its blocks back there, and others' prompts follow it."""
    with beside.prompts():
        beside.join()
        assert cycles.waits == [beside._stream]
    beside.join()
    assert cycles.waits == [beside._stream] * 2
