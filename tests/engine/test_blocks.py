"""The block pool's books: no leak, no shared write, whatever comes in whatever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from idlm.engine.blocks import BlockPool, Lease

T = 4


class Text:
    """What a request would write, and what it holds."""

    def __init__(self, tokens: list[int]) -> None:
        self.all, self.lease, self.cached = tokens, Lease(), 0

    def tokens(self, start: int, stop: int) -> list[int]:
        return self.all[start:stop]


class Pool(RuleBasedStateMachine):
    """Requests that come, write, end and come back.

    ``memory`` is what the blocks hold: a key depends on all tokens up to its own.
    """

    @initialize(num_blocks=st.integers(2, 14))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, T)
        self.memory: list[list[list[int]]] = [[[]] * T for _ in range(num_blocks)]
        self.running: list[Text] = []
        self.gone: list[Text] = []

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        rows=st.integers(1, 6),
        spare=st.integers(0, 2),
    )
    def arrive(self, tokens: list[int], rows: int, spare: int) -> None:
        self._admit(Text(tokens), rows, spare)

    @rule(rows=st.integers(1, 6), which=st.integers(0, 50))
    def come_back(self, rows: int, which: int) -> None:
        if self.gone:
            self._admit(self.gone.pop(which % len(self.gone)), rows, 0)

    def _admit(self, text: Text, rows: int, spare: int) -> None:
        available = self.pool.available
        hit = self.pool.share(text.lease, text.tokens, (len(text.all) - 1) // T)
        assert hit % T == 0 and hit < len(text.all)
        for index in range(hit):
            assert self._at(text, index) == text.all[: index + 1], "another text's block"
        if not self.pool.grow(text.lease, len(text.all) + rows, spare):
            self.pool.release(text.lease)
            assert self.pool.available == available
            return
        text.cached = hit
        self._write(text, len(text.all) - 1)
        self.running.append(text)

    @rule(
        which=st.integers(0, 50),
        more=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        rows=st.integers(1, 6),
    )
    def step(self, which: int, more: list[int], rows: int) -> None:
        """Rows in flight are written, some of them stay."""
        if not self.running:
            return
        text = self.running[which % len(self.running)]
        held = list(text.lease.ids)
        if not self.pool.grow(text.lease, text.cached + max(rows, len(more)) + 1):
            assert text.lease.ids == held
            return
        for index in range(text.cached, text.cached + rows):
            self._put(text, index, [])  # rejected drafts and masks
        text.all += more
        self._write(text, len(text.all) - 1)

    @rule(which=st.integers(0, 50), back=st.booleans())
    def leave(self, which: int, back: bool) -> None:
        if self.running:
            text = self.running.pop(which % len(self.running))
            self.pool.release(text.lease)
            self.gone += [text] if back else []

    def _write(self, text: Text, length: int) -> None:
        for index in range(text.cached, length):
            self._put(text, index, text.all[: index + 1])
        text.cached = max(text.cached, length)
        self.pool.commit(text.lease, text.tokens, text.cached)

    def _at(self, text: Text, index: int) -> list[int]:
        return self.memory[text.lease.ids[index // T]][index % T]

    def _put(self, text: Text, index: int, key: list[int]) -> None:
        block = text.lease.ids[index // T]
        assert index // T >= text.lease.shareable, "a block that others may hold is written"
        assert sum(block in other.lease.ids for other in self.running if other is not text) == 0
        self.memory[block][index % T] = key

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = [block for text in self.running for block in text.lease.ids]
        assert 0 not in held
        assert self.pool.held == len(set(held))
        assert self.pool.held + self.pool.available == self.pool.num_blocks - 1
        for text in self.running:
            assert len(text.lease.ids) == len(set(text.lease.ids))
            assert len(text.lease.ids) * T >= text.cached
            for index in range(text.cached):
                assert self._at(text, index) == text.all[: index + 1], "a key was overwritten"

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for text in self.running:
                self.pool.release(text.lease)
            assert self.pool.available == self.pool.num_blocks - 1
            everything = Lease()
            assert self.pool.grow(everything, self.pool.capacity)
            assert sorted(everything.ids) == list(range(1, self.pool.num_blocks))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def text_of(tokens: list[int]) -> Any:
    return lambda start, stop: tokens[start:stop]


def filled(pool: BlockPool, tokens: list[int]) -> Lease:
    lease = Lease()
    assert pool.grow(lease, len(tokens))
    pool.commit(lease, text_of(tokens), len(tokens))
    return lease


def test_equal_beginnings_are_shared_and_counted_once() -> None:
    pool = BlockPool(10, T)
    first = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = Lease()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    assert pool.share(second, text_of(tokens), 3) == 8
    assert second.ids == first.ids[:2] and pool.held == 3
    pool.release(first)
    assert pool.held == 2
    pool.release(second)
    assert pool.held == 0


def test_a_block_counts_with_all_that_stands_before_it() -> None:
    pool = BlockPool(10, T)
    filled(pool, [1, 1, 1, 1, 2, 2, 2, 2])
    filled(pool, [3, 3, 3, 3, 4, 4, 4, 4])
    assert pool.share(Lease(), text_of([1, 1, 1, 1, 4, 4, 4, 4]), 2) == 4


@pytest.mark.parametrize("again", ["first", "second"])
def test_what_was_let_go_first_is_evicted_first(again: str) -> None:
    pool = BlockPool(5, T)
    texts = {"first": [1] * 4, "second": [2] * 4}
    for tokens in texts.values():
        pool.release(filled(pool, tokens))
    used = Lease()
    pool.share(used, text_of(texts[again]), 1)
    pool.release(used)
    assert pool.grow(Lease(), 3 * T) and pool.evictions == 1
    for name, tokens in texts.items():
        assert pool.share(Lease(), text_of(tokens), 1) == (T if name == again else 0)


def test_the_end_of_a_text_goes_before_its_beginning() -> None:
    pool = BlockPool(4, T)
    tokens = list(range(12))
    pool.release(filled(pool, tokens))
    assert pool.grow(Lease(), T)
    assert pool.share(Lease(), text_of(tokens), 3) == 2 * T
