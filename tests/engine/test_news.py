"""What requests get from many forwards at once is what they would get one by one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm import SamplingParams
from idlm.decoding.metrics import DecodeStats
from idlm.engine.news import FORWARDS, News
from idlm.engine.request import FinishReason, Request, Source
from idlm.model.tokenizer import Tokenizer
from tests.support.tiny import TOKENIZER_SIZE, tiny_tokenizer

EOS = 2


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(Path(mkdtemp())))


def request_of(id: int, tokens: int, **params: Any) -> Request:
    own = SamplingParams(max_tokens=tokens, **params)
    return Request.create(id, [5], own, 0, tokenizer(), frozenset({EOS}), 10_000)


def one_by_one(request: Request, packed_FX: list[list[int]], rows: int) -> tuple[Any, ...]:
    """Tokens, finish reason, sources and statistics of ``packed``, by the definition."""
    N = (len(packed_FX[0]) - 1) // 2
    tokens, sources, stats, reason = list[int](), list[Source](), DecodeStats(), None
    for packed_X in packed_FX:
        accepted, drafted = packed_X[N], packed_X[N + 1]
        stats.outcomes[drafted, accepted] += 1
        stats.rows += rows
        overlap_M = np.array(packed_X[N + 2 :], np.int32).view(np.float32)
        stats.overlap += float(overlap_M[: min(accepted + 1, drafted)].sum())
        for place, token in enumerate(packed_X[: accepted + 1]):
            last = Source.CORRECTION if accepted < drafted else Source.SAMPLED
            tokens.append(token)
            sources.append(Source.DRAFT if place < accepted else last)
            if token in request.stop_token_ids:
                reason = FinishReason.STOP
            elif len(tokens) == request.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                return tokens, reason, sources, stats
    return tokens, reason, sources, stats


@given(
    stride=st.integers(1, 4),
    forwards=st.integers(1, FORWARDS),
    limits=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    asked=st.sets(st.tuples(st.integers(0, FORWARDS), st.integers(0, 4))),
    ignored=st.sets(st.integers(0, 4)),
    followed=st.sets(st.tuples(st.integers(0, FORWARDS), st.integers(0, 4))),
)
def test_requests_get_what_forwards_brought(
    stride: int,
    forwards: int,
    limits: list[int],
    seed: int,
    asked: set[tuple[int, int]],
    ignored: set[int],
    followed: set[tuple[int, int]],
) -> None:
    """Whoever asks in between, and whenever; some end early, some by a token that others ignore.

    Rows of those that have ended are others' later on.
    """
    random, B, N = np.random.default_rng(seed), len(limits), stride
    drafted_FB = random.integers(0, N, (forwards, B))
    accepted_FB = random.integers(0, drafted_FB + 1)
    packed_FBX = np.concatenate(
        (
            random.integers(EOS, 40, (forwards, B, N)),
            np.stack((accepted_FB, drafted_FB), axis=2),
            random.random((forwards, B, N - 1), np.float32).view(np.int32),
        ),
        axis=2,
    ).astype(np.int64)
    requests = [
        request_of(i, limit, ignore_eos=i in ignored, stop_token_ids=[3 + i] if i % 2 else None)
        for i, limit in enumerate(limits)
    ]
    first: Any = SimpleNamespace(requests=requests, stride=N, rows=7)
    news, begun = News(first, TOKENIZER_SIZE), [0] * B
    cases = list[tuple[Request, list[list[int]]]]()
    for f, packed_BX in enumerate(packed_FBX):
        now = list(requests)
        for row, request in enumerate(requests):
            if request.finished and (f, row) in followed:
                cases.append((request, packed_FBX[begun[row] : f, row].tolist()))
                now[row], begun[row] = request_of(10 + f, limits[row]), f
        if now != requests:
            requests = now
            again: Any = SimpleNamespace(requests=requests, stride=N, rows=7)
            assert news.takes(again)
        for row, tokens, own in news.portions(news.add(packed_BX)):
            requests[row].take(tokens, own)
            if requests[row].finished:
                news.end(row)
        for row in range(B):
            if (f, row) in asked:
                own_FX = packed_FBX[begun[row] : f + 1, row].tolist()
                so_far, *_ = one_by_one(requests[row], own_FX, 7)
                assert requests[row].token_ids == so_far
    cases += [(r, packed_FBX[begun[row] :, row].tolist()) for row, r in enumerate(requests)]
    tested, stood = np.zeros(N - 1, np.int64), np.zeros(N - 1, np.int64)
    for request, packed_FX in cases:
        tokens, reason, sources, stats = one_by_one(request, packed_FX, 7)
        assert request.token_ids == tokens and request.sources == sources
        assert request.finish_reason is reason
        assert request.cached == len(tokens)
        assert (request.stats.outcomes, request.stats.rows) == (stats.outcomes, stats.rows)
        assert request.stats.overlap == pytest.approx(stats.overlap, rel=1e-5)
        for place in range(1, N):
            tested[place - 1] += stats.reached_at[place]
            stood[place - 1] += stats.accepted_at[place]
    assert news.tested() == (tested.tolist(), stood.tolist())


def test_rows_that_are_somebody_elses_while_theirs_goes_on_are_not_taken() -> None:
    requests = [request_of(0, 50), request_of(1, 50)]
    first: Any = SimpleNamespace(requests=requests, stride=1, rows=1)
    news = News(first, TOKENIZER_SIZE)
    for others in (requests[::-1], requests[:1], [requests[0], request_of(2, 50)]):
        commit: Any = SimpleNamespace(requests=others, stride=1, rows=1)
        assert not news.takes(commit)


def test_each_token_is_looked_at_where_only_the_text_tells_the_end() -> None:
    requests = [request_of(0, 50), request_of(1, 50, stop=["zzz"])]
    first: Any = SimpleNamespace(requests=requests, stride=1, rows=1)
    news = News(first, TOKENIZER_SIZE)
    assert news.add(np.array([[9, 0, 0], [9, 0, 0]])) == [1]
    assert [row for row, *_ in news.portions([1])] == [1]
    assert news.add(np.array([[9, 0, 0], [EOS, 0, 0]])) == [1]
