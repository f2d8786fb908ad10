"""One request on its way through the engine."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from idlm.decoding.cycle import State
from idlm.decoding.metrics import DecodeStats
from idlm.decoding.params import SamplingParams
from idlm.engine.blocks import Lease
from idlm.engine.grammar import Grammar
from idlm.model.tokenizer import Detokenizer, Tokenizer


class Phase(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Source(enum.StrEnum):
    """How a token came to be: sampled after all drafts stood, an accepted draft, or a
    correction in place of a rejected one."""

    SAMPLED = "sampled"
    DRAFT = "draft"
    CORRECTION = "correction"


class FinishReason(enum.StrEnum):
    """Why a request ended: an end token or stop string, the limit on tokens or context, or from
    outside; or its forward failed."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the base model, its rank (1: likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str


class Forwards(NamedTuple):
    """How some forwards went for one request.

    Attributes:
        outcomes: of each, drafts that it tested and those that stood: two bytes.
        overlap, rows: over all of them, as `DecodeStats` counts them.
    """

    outcomes: bytes
    overlap: float
    rows: int


class Place(NamedTuple):
    """One of the requests that ``state`` is of."""

    state: State
    row: int


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and all that has come of it so far.

    Attributes:
        prompt_logprobs: as far as they are known, if they were asked for; None for the first token.
        priority: lower ones run first.
        error: what ended it, if its finish reason is ``error``.
        started: `time.perf_counter` at its first admission; 0: not yet.
        lease: its blocks of the KV cache.
        place: what it decodes on from, while it is not in a batch; None before its first token.
        prefix_hit_tokens: tokens of the prompt that were cached when it was first admitted.
        preemptions: how often it had to leave and come back.
        by_hand: whether the host takes part in its forwards, for which it needs all tokens before.
        watched: whether each forward has to be looked at, as only that tells if it has ended.
        catch_up: brings to it what was read for it and is kept elsewhere.
    """

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    detokenizer: Detokenizer
    grammar: Grammar | None = None
    priority: int = 0
    phase: Phase = Phase.WAITING
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    started: float = 0.0
    lease: Lease = field(default_factory=Lease)
    place: Place | None = None
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    by_hand: bool = field(init=False)
    watched: bool = field(init=False)
    catch_up: Callable[[], None] = _nothing
    _token_ids: list[int] = field(default_factory=list)
    _cached: int = 0
    _outcomes: bytearray = field(default_factory=bytearray)  # not in sources and stats yet
    _sources: list[Source] = field(default_factory=list)
    _stats: DecodeStats = field(default_factory=DecodeStats)
    _text: str = ""
    _held: str = ""
    _decoded: int = 0  # tokens that are in the text, or held back from it

    def __post_init__(self) -> None:
        params = self.params
        self.by_hand = params.constrained or params.logprobs is not None
        self.watched = self.by_hand or bool(params.stop)

    @classmethod
    def create(
        cls,
        id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        context: int,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Request:
        """A waiting request; ``context`` is the longest prompt and output together."""
        room = context - len(prompt_token_ids)
        own_stops = frozenset(params.stop_token_ids or ())
        request = cls(
            id=id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            seed=seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_token_ids=own_stops if params.ignore_eos else own_stops | eos_token_ids,
            detokenizer=Detokenizer(tokenizer),
            grammar=grammar,
            priority=priority,
        )
        if params.prompt_logprobs is not None:
            request.score(0, [None])
        return request

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.phase is Phase.FINISHED

    @property
    def token_ids(self) -> list[int]:
        """Its output so far."""
        self.catch_up()
        return self._token_ids

    def follow(self, catch_up: Callable[[], None]) -> int:
        """Let ``catch_up`` bring what will be read for it; how many tokens may still come."""
        self.catch_up = catch_up
        return self.max_tokens - len(self._token_ids)

    @property
    def cached(self) -> int:
        """Tokens of prompt and output whose keys and values are in its blocks."""
        self.catch_up()
        return self._cached

    @cached.setter
    def cached(self, tokens: int) -> None:
        self._cached = tokens

    @property
    def scoring(self) -> bool:
        """Whether the logits of its prompt are still wanted, all of which have to be computed."""
        wanted = self.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def prefill_end(self) -> int:
        """Tokens to cache before it can decode: all but the pending one, which comes with it."""
        return self.num_tokens - 1 if self.token_ids else self.num_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens ``start`` to ``stop - 1`` of prompt and output."""
        prompt = len(self.prompt_token_ids)
        return (
            self.prompt_token_ids[start:stop]
            + self.token_ids[max(start - prompt, 0) : max(stop - prompt, 0)]
        )

    def score(self, first: int, entries: Sequence[dict[int, Logprob] | None]) -> None:
        """Take the log-probabilities of the prompt's tokens from ``first`` on.

        One that wants no tokens is finished by the last of them.
        """
        self.prompt_logprobs[first:] = entries
        if self.max_tokens == 0 and not self.scoring:
            self._end(FinishReason.LENGTH)

    @property
    def text(self) -> str:
        """Complete UTF-8 without stop strings.

        What may still become part of a stop string is held back until it is decided.
        """
        self.catch_up()
        self._decode()
        return self._text

    @property
    def sources(self) -> list[Source]:
        """How each of its tokens came to be."""
        self._count()
        return self._sources

    @property
    def stats(self) -> DecodeStats:
        """Counts over its forwards."""
        self._count()
        return self._stats

    def append(self, tokens: Sequence[int], forwards: Forwards) -> None:
        """Take what ``forwards`` committed and what does not end it.

        All tokens but the last are cached by then.
        """
        self._outcomes += forwards.outcomes
        self._stats.overlap += forwards.overlap
        self._stats.rows += forwards.rows
        self._token_ids += tokens
        self._cached = len(self.prompt_token_ids) + len(self._token_ids) - 1

    def take(self, tokens: Sequence[int], forwards: Forwards) -> None:
        """Take what ``forwards`` committed, up to a token of the last one that ends the request."""
        last = forwards.outcomes[-1] + 1
        self.append(tokens[:-last], forwards)
        for token in tokens[-last:]:
            self._token_ids.append(token)
            self._look_at(token)
            if self.finished:
                break
        self._cached = len(self.prompt_token_ids) + len(self._token_ids) - 1

    def abort(self) -> None:
        """End the request where it stands."""
        self.catch_up()
        self._end(FinishReason.ABORT)

    def fail(self, error: Exception) -> None:
        """End the request because of ``error``."""
        self.error = error
        self.catch_up()
        self._decode()
        self._finish(FinishReason.ERROR)

    def _look_at(self, token: int) -> None:
        """Finish if the last token ends the request."""
        if token in self.stop_token_ids:
            self._end(FinishReason.STOP)
            return
        if self.grammar is not None:
            self.grammar.advance(token)
        if self.params.stop and self._decode():
            self._finish(FinishReason.STOP)
        elif len(self._token_ids) >= self.max_tokens:
            self._end(FinishReason.LENGTH)

    def _end(self, reason: FinishReason) -> None:
        """Finish with all text that is still held."""
        stopped = reason is FinishReason.STOP  # by a token that stands for no text
        self._decode(len(self._token_ids) - stopped)
        self._held += self.detokenizer.flush()
        if self._release():
            reason = FinishReason.STOP
        self._text += self._held
        self._finish(reason)

    def _decode(self, count: int | None = None) -> bool:
        """Bring the text up to the first ``count`` tokens; whether a stop string is complete."""
        if self.finished:
            return False
        new = self._token_ids[self._decoded : count]
        self._decoded += len(new)
        self._held += self.detokenizer.push_all(new)
        return self._release()

    def _release(self) -> bool:
        """Move text that no stop string can claim any more from held to the text.

        Returns whether a stop string is complete; the text then ends before it.
        """
        if not self.params.stop:
            self._text, self._held = self._text + self._held, ""
            return False
        stops = self.params.stop_strings
        found = [at for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._text += self._held[: min(found)]
            self._held = ""
            return True
        release = len(self._held) - max((_overlap(self._held, stop) for stop in stops), default=0)
        self._text += self._held[:release]
        self._held = self._held[release:]
        return False

    def _finish(self, reason: FinishReason) -> None:
        self.phase = Phase.FINISHED
        self.finish_reason = reason
        self._stats.tokens = len(self._token_ids)
        del self.logprobs[len(self._token_ids) :]
        self.place, self.catch_up = None, _nothing
        if self.started:
            self._stats.seconds = time.perf_counter() - self.started

    def _count(self) -> None:
        """Bring sources and stats up to date; seldom asked for while forwards are many."""
        self.catch_up()
        outcomes = list(zip(self._outcomes[::2], self._outcomes[1::2], strict=True))
        self._outcomes.clear()
        self._stats.outcomes.update(outcomes)
        for drafted, accepted in outcomes:
            last = Source.CORRECTION if accepted < drafted else Source.SAMPLED
            self._sources += [*[Source.DRAFT] * accepted, last]
        del self._sources[len(self._token_ids) :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
