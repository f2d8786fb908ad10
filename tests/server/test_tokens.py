"""Pieces of text and the tokens that they belong to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from idlm import SamplingParams
from idlm.engine.request import Forwards, Request
from idlm.model.tokenizer import Tokenizer
from idlm.server.tokens import Token, TokenTexts
from idlm.server.worker import Inbox, Job, MethodKey, Update
from tests.support.tiny import TOKENIZER_SIZE, tiny_tokenizer

EOS = 2


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(Path(mkdtemp())))


def updates(tokens: list[int], groups: list[int], stop: list[str]) -> tuple[Request, list[Update]]:
    """A request that gets ``tokens``, as many at a time as ``groups`` say, and its updates."""
    params = SamplingParams(max_tokens=len(tokens), stop=stop)
    request = Request.create(0, [5], params, 0, tokenizer(), frozenset({EOS}), 10_000)
    inbox = cast(Inbox, None)  # nothing is sent
    job = Job(0, [5], params, MethodKey("ar", 1, "rejection"), inbox, request=request)
    given_out: list[Update] = []
    rest = list(tokens)
    for size in [*groups, len(tokens)]:
        own = rest[:size]
        if own:
            request.logprobs += [{}] * len(own)
            request.take(own, Forwards(bytes((len(own), len(own) - 1)), 0.0, 1))
        rest = rest[size:]
        update = job.news()
        if update is not None:
            given_out.append(update)
        if request.finished:
            return request, given_out
    raise AssertionError("the last group holds all that is left")


TOKENS = st.lists(st.integers(3, TOKENIZER_SIZE - 1) | st.just(EOS), min_size=1, max_size=30)


@given(
    TOKENS,
    st.lists(st.integers(1, 4), max_size=20),
    st.lists(st.sampled_from(["e", "th", "\ufffd", " do"]), max_size=2),
)
def test_pieces_join_to_the_text(tokens: list[int], groups: list[int], stop: list[str]) -> None:
    request, news = updates(tokens, groups, stop)
    assert "".join(update.text for update in news) == request.text
    assert [t for update in news for t in update.token_ids] == request.token_ids
    texts = TokenTexts(tokenizer())
    out: list[Token] = []
    released = 0
    for update in news:
        released += len(update.text)
        out += texts.push(update)
        # Never more than the text shows: no stop string leaks through its tokens.
        assert sum(len(token.text) for token in out) <= released
    assert "".join(token.text for token in out) == request.text
    assert [token.id for token in out] == request.token_ids[: len(out)]
    offsets: list[Any] = [token.offset for token in out]
    assert offsets == sorted(offsets)
    for token in out:
        assert request.text[token.offset :].startswith(token.text)


@given(TOKENS)
def test_every_token_of_a_text_is_given_out_but_its_end(tokens: list[int]) -> None:
    request, news = updates(tokens, [], [])
    texts = TokenTexts(tokenizer())
    out = [token for update in news for token in texts.push(update)]
    expected = [t for t in request.token_ids if t != EOS]
    shown = [t for t in expected if t not in tokenizer().special_ids]
    assert [t.id for t in out if t.id not in tokenizer().special_ids] == shown
