"""Conversations as token ids, and where the answers stand in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer

Span = tuple[int, int]
ANSWERER = "assistant"


def tokenize_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
) -> list[tuple[list[int], list[Span]]]:
    """The conversation as the chat template writes it, up to the last answer.

    One sequence holds all answers if the template only ever adds to what it wrote before. If it
    changes earlier turns (drops their thoughts, for instance), there is one sequence for every
    answer, each with what the model would have been given before it.

    Returns:
        token ids, and the spans of the answers that they are to be trained on, each with the
        token that ends the turn; nothing without an answer.

    Raises:
        InvalidRequestError: the template rejects the conversation or changes its answers.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == ANSWERER]
    if not turns:
        return []
    if turns[0] == 0:
        raise InvalidRequestError("The conversation begins with an answer.")
    if not all(isinstance(messages[i].get("content", ""), str) for i in turns):
        raise InvalidRequestError("An answer is not text.")
    texts = [tokenizer.render_chat(messages[: i + 1], False) for i in turns]
    starts = [
        _start(tokenizer, messages[: i + 1], text) for i, text in zip(turns, texts, strict=True)
    ]
    spans = [(start, len(text)) for start, text in zip(starts, texts, strict=True)]
    if all(texts[-1].startswith(text) for text in texts):
        return [_tokens(tokenizer, texts[-1], spans)]
    return [_tokens(tokenizer, text, [span]) for text, span in zip(texts, spans, strict=True)]


def _start(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], text: str) -> int:
    """Where the answer, the last of the messages, begins in their ``text``."""
    before = tokenizer.render_chat(messages[:-1], True)
    if text.startswith(before):
        return len(before)
    # The header for a new answer is not the one that a given answer gets.
    given, content = tokenizer.render_chat(messages[:-1], False), messages[-1]["content"]
    start = text.find(content.strip(), len(given)) if text.startswith(given) else -1
    if start < 0:
        raise InvalidRequestError("The chat template changes an answer or what stands before it.")
    return start


def _tokens(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Ids of ``text``, and ``spans`` of its characters as spans of tokens.

    A token that lies partly inside a span belongs to it. What follows the token that ends a turn
    is left out.
    """
    ids, ends = tokenizer.encode_with_ends(text)
    stops = tokenizer.special_ids | set(tokenizer.eos_token_ids)
    found = []
    for start, end in spans:
        first, last = max(1, bisect_right(ends, start)), bisect_right(ends, end)
        stop = next((i for i in reversed(range(first, last)) if ids[i] in stops), None)
        if stop is not None and not tokenizer.decode(ids[stop + 1 : last]).strip():
            last = stop + 1
        if first < last:
            found.append((first, last))
    return ids[: found[-1][1] if found else 0], found
