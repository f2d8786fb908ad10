"""Responses and stream events of the two endpoints, built from the updates of their choices."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel

import idlm
from idlm.engine.request import FinishReason, Logprob
from idlm.model.tokenizer import Tokenizer
from idlm.server.generation import Generation, Prompt
from idlm.server.protocol import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionBody,
    ChatCompletionChunk,
    ChatLogprobs,
    ChosenLogprob,
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Details,
    Finish,
    GenerationBody,
    Run,
    TokenLogprob,
    Usage,
)
from idlm.server.tokens import Token, TokenTexts
from idlm.server.worker import Progress, Update

FINGERPRINT = f"idlm-{idlm.__version__}"


@dataclass
class Part:
    """A choice, or what is new of it."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    progress: Progress | None = None
    finish_reason: Finish | None = None

    def add(self, other: Part) -> None:
        """Append what came next."""
        self.text += other.text
        self.tokens += other.tokens
        self.progress, self.finish_reason = other.progress, other.finish_reason


class Replies(ABC):
    """Builds the responses to one body."""

    prefix: str

    def __init__(self, body: GenerationBody, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._details = bool(body.return_details)
        options = body.stream_options
        self._usage = bool(options and options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._texts: dict[int, TokenTexts] = {}
        self._begun: set[int] = set()

    @property
    @abstractmethod
    def logprobs(self) -> bool:
        """Whether they were asked for."""

    @property
    def detailed(self) -> bool:
        """Whether each token is looked at by itself."""
        return self.logprobs or self._details

    @abstractmethod
    def whole(self, parts: Sequence[Part], generation: Generation) -> BaseModel:
        """The response to a body without ``stream``; ``parts`` are whole choices."""

    @abstractmethod
    def event(self, part: Part, generation: Generation) -> BaseModel:
        """The event that tells of ``part``."""

    @abstractmethod
    def usage_event(self, usage: Usage) -> BaseModel:
        """The last event, if the usage was asked for."""

    def part(self, update: Update) -> Part:
        """What ``update`` brings to its choice."""
        index = update.job.index
        part = Part(index, update.text, progress=update.progress)
        if self.detailed:
            texts = self._texts.setdefault(index, TokenTexts(self._tokenizer))
            part.tokens = texts.push(update)
        if update.finish_reason is not None:
            assert update.finish_reason is not FinishReason.ABORT
            part.finish_reason = cast(Finish, update.finish_reason.value)
        return part

    def events(self, update: Update, generation: Generation) -> list[BaseModel]:
        """The events of a stream that ``update`` gives: one, or none while text is held back."""
        part = self.part(update)
        if not (part.text or part.tokens or part.finish_reason):
            return []
        return [self.event(part, generation)]

    def last_events(self, generation: Generation) -> list[BaseModel]:
        """The events after the last update."""
        return [self.usage_event(generation.usage)] if self._usage else []

    def _first(self, part: Part) -> bool:
        """Whether ``part`` is the first of its choice; asked once for each."""
        first = part.index not in self._begun
        self._begun.add(part.index)
        return first

    def _details_of(self, part: Part) -> Details | None:
        if not self._details or part.progress is None:
            return None
        return Details(
            runs=[Run(text=t.text, source=t.source.value, token_id=t.id) for t in part.tokens],
            tokens=part.progress.tokens,
            forwards=part.progress.forwards,
            accepted_by_place=part.progress.accepted,
            reached_by_place=part.progress.reached,
            seconds=part.progress.seconds,
        )

    def _bytes(self, token_id: int, text: str) -> list[int]:
        whole = self._tokenizer.token_bytes(token_id) if self._tokenizer.is_byte_level else None
        return list(text.encode() if whole is None else whole)


class ChatReplies(Replies):
    """Responses of ``/v1/chat/completions``."""

    prefix = "chatcmpl"

    def __init__(self, body: ChatCompletionBody, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(body, model, tokenizer)
        self._top = (body.top_logprobs or 0) if body.logprobs else None

    @property
    def logprobs(self) -> bool:
        return self._top is not None

    def whole(self, parts: Sequence[Part], generation: Generation) -> ChatCompletion:
        choices = []
        for part in parts:
            assert part.finish_reason is not None
            choices.append(
                ChatChoice(
                    index=part.index,
                    message=Answer(content=part.text),
                    logprobs=self._logprobs_of(part),
                    finish_reason=part.finish_reason,
                    details=self._details_of(part),
                )
            )
        return ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=generation.usage
        )

    def event(self, part: Part, generation: Generation) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=part.index,
            delta=Delta(
                role="assistant" if self._first(part) else None,
                content=part.text,
            ),
            logprobs=self._logprobs_of(part),
            finish_reason=part.finish_reason,
            details=self._details_of(part),
        )
        return ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[choice])

    def usage_event(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            **self._head, object="chat.completion.chunk", choices=[], usage=usage
        )

    def _logprobs_of(self, part: Part) -> ChatLogprobs | None:
        if self._top is None:
            return None
        return ChatLogprobs(content=[self._chosen(token, self._top) for token in part.tokens])

    def _chosen(self, token: Token, top: int) -> ChosenLogprob:
        own = token.logprobs[token.id]
        return ChosenLogprob(
            token=own.decoded_token,
            logprob=own.logprob,
            bytes=self._bytes(token.id, own.decoded_token),
            top_logprobs=[
                TokenLogprob(
                    token=entry.decoded_token,
                    logprob=entry.logprob,
                    bytes=self._bytes(id_, entry.decoded_token),
                )
                for id_, entry in _best(token.logprobs, top)
            ],
        )


class CompletionReplies(Replies):
    """Responses of ``/v1/completions``."""

    prefix = "cmpl"

    def __init__(self, body: CompletionBody, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(body, model, tokenizer)
        self._top, self._echo = body.logprobs, bool(body.echo)
        self._prompt_logprobs: dict[int, Sequence[dict[int, Logprob] | None]] = {}

    @property
    def logprobs(self) -> bool:
        return self._top is not None

    def part(self, update: Update) -> Part:
        if update.prompt_logprobs:
            self._prompt_logprobs[update.job.index] = update.prompt_logprobs
        return super().part(update)

    def whole(self, parts: Sequence[Part], generation: Generation) -> Completion:
        choices = [self._choice(part, generation) for part in parts]
        return self._completion(choices, generation.usage)

    def event(self, part: Part, generation: Generation) -> Completion:
        return self._completion([self._choice(part, generation)], None)

    def usage_event(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(**self._head, object="text_completion", choices=choices, usage=usage)

    def _choice(self, part: Part, generation: Generation) -> CompletionChoice:
        prompt = generation.plan.prompts[part.index // generation.plan.n]
        echoing = self._echo and self._first(part)
        return CompletionChoice(
            index=part.index,
            text=(prompt.text if echoing else "") + part.text,
            logprobs=self._logprobs_of(part, prompt, echoing),
            finish_reason=part.finish_reason,
            details=self._details_of(part),
        )

    def _logprobs_of(self, part: Part, prompt: Prompt, echoing: bool) -> CompletionLogprobs | None:
        if self._top is None:
            return None
        start = len(prompt.text) if self._echo else 0
        ids = [token.id for token in part.tokens]
        logprobs: list[dict[int, Logprob] | None] = [token.logprobs for token in part.tokens]
        offsets = [start + token.offset for token in part.tokens]
        if echoing:
            ids = prompt.token_ids + ids
            logprobs = [*self._prompt_logprobs.pop(part.index), *logprobs]
            offsets = prompt.offsets + offsets
        top = [None if e is None else _by_text(_best(e, self._top)) for e in logprobs]
        places = list(zip(ids, logprobs, strict=True))
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(id_) for id_ in ids],
            token_logprobs=[None if e is None else e[id_].logprob for id_, e in places],
            top_logprobs=top if self._top else None,
            text_offset=offsets,
        )


def _by_text(entries: list[tuple[int, Logprob]]) -> dict[str, float]:
    return {entry.decoded_token: entry.logprob for _, entry in entries}


def _best(logprobs: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` likeliest tokens of a place, likeliest first."""
    return sorted(logprobs.items(), key=lambda item: item[1].rank)[:count]
