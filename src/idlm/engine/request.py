"""One request on its way through the engine."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
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


# Drafts that a forward tested, those that stood, their overlap, and its rows: what
# `DecodeStats.forward` counts.
Forward = tuple[int, int, float, int]


class Place(NamedTuple):
    """One of the requests that ``state`` is of."""

    state: State
    row: int


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and all that has come of it so far.

    Attributes:
        prompt_logprobs: as far as they are known, if they were asked for; None for the first token.
        priority: lower ones run first.
        error: what ended it, if its finish reason is ``error``.
        started: `time.perf_counter` at its first admission; 0: not yet.
        lease: its blocks of the KV cache.
        cached: tokens of prompt and output whose keys and values are in them.
        place: what it decodes on from, while it is not in a batch; None before its first token.
        prefix_hit_tokens: tokens of the prompt that were cached when it was first admitted.
        preemptions: how often it had to leave and come back.
        by_hand: whether the host takes part in its forwards.
        host_bound: whether its next forward needs the last one's tokens on the host.
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
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    started: float = 0.0
    lease: Lease = field(default_factory=Lease)
    cached: int = 0
    place: Place | None = None
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    by_hand: bool = field(init=False)
    host_bound: bool = field(init=False)
    _forwards: list[Forward] = field(default_factory=list)  # not in sources and stats yet
    _sources: list[Source] = field(default_factory=list)
    _stats: DecodeStats = field(default_factory=DecodeStats)
    _text: str = ""
    _held: str = ""
    _decoded: int = 0  # tokens that are in the text, or held back from it

    def __post_init__(self) -> None:
        params = self.params
        self.by_hand = params.constrained or params.logprobs is not None
        self.host_bound = self.by_hand or params.penalised

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

    def take(
        self,
        tokens: Sequence[int],
        forward: Forward,
        logprobs: Sequence[dict[int, Logprob]] | None = None,
    ) -> None:
        """Take what ``forward`` committed, up to a token that ends the request."""
        self._forwards.append(forward)
        if logprobs is not None:
            self.logprobs += logprobs
        # Only where a stop string or a grammar may end it does each token have to be looked at.
        if (
            len(self.token_ids) + len(tokens) < self.max_tokens
            and self.stop_token_ids.isdisjoint(tokens)
            and not self.params.stop
            and self.grammar is None
        ):
            self.token_ids += tokens
            return
        for token in tokens:
            self.token_ids.append(token)
            self._look_at(token)
            if self.finished:
                return

    def abort(self) -> None:
        """End the request where it stands."""
        self._end(FinishReason.ABORT)

    def fail(self, error: Exception) -> None:
        """End the request because of ``error``."""
        self.error = error
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
        elif len(self.token_ids) >= self.max_tokens:
            self._end(FinishReason.LENGTH)

    def _end(self, reason: FinishReason) -> None:
        """Finish with all text that is still held."""
        stopped = reason is FinishReason.STOP  # by a token that stands for no text
        self._decode(len(self.token_ids) - stopped)
        self._held += self.detokenizer.flush()
        if self._release():
            reason = FinishReason.STOP
        self._text += self._held
        self._finish(reason)

    def _decode(self, count: int | None = None) -> bool:
        """Bring the text up to the first ``count`` tokens; whether a stop string is complete."""
        if self.finished:
            return False
        new = self.token_ids[self._decoded : count]
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
        self._stats.tokens = len(self.token_ids)
        del self.logprobs[len(self.token_ids) :]
        self.place = None
        if self.started:
            self._stats.seconds = time.perf_counter() - self.started

    def _count(self) -> None:
        """Bring sources and stats up to date; seldom asked for while forwards are many."""
        for drafted, accepted, overlap, rows in self._forwards:
            self._stats.forward(drafted, accepted, overlap, rows)
            last = Source.CORRECTION if accepted < drafted else Source.SAMPLED
            self._sources += [*[Source.DRAFT] * accepted, last]
        self._forwards.clear()
        del self._sources[len(self.token_ids) :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
