"""The pieces of a chat template, found by rendering it with marker strings."""

from __future__ import annotations

from dataclasses import dataclass

from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer

# Ordinary text that no template contains.
MARKERS = ("Q0Z7first", "Q0Z7answer", "Q0Z7second")


@dataclass(frozen=True)
class ChatPieces:
    """Token ids between the texts of a conversation.

    Attributes:
        prefixes: up to the first user turn; one per system prompt that was asked for.
        to_answer: from the end of a user turn to the start of the answer. Its first token is
            the one that ends a user turn.
        to_user: from the end of an answer to the start of the next user turn; likewise.
        stop_ids: tokens that end an answer.
    """

    prefixes: tuple[tuple[int, ...], ...]
    to_answer: tuple[int, ...]
    to_user: tuple[int, ...]
    stop_ids: frozenset[int]

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, system_prompts: tuple[str | None, ...], eos_ids: tuple[int, ...]
    ) -> ChatPieces:
        """Take the template apart.

        Args:
            system_prompts: None: no system message, so that the template's default applies.
            eos_ids: the model's own tokens that end a text.

        Raises:
            InvalidRequestError: the template does not keep the texts of a conversation, or its
                turns do not end with a token of their own.
        """
        default = _render(tokenizer, None)
        prefixes = [default[0]]
        for prompt in system_prompts:
            if prompt is None:
                continue
            try:
                prefixes.append(_render(tokenizer, prompt)[0])
            except InvalidRequestError:
                prefixes.append(default[0])  # the template knows no system role
        _, to_answer, to_user = default
        if not to_answer or not to_user:
            raise InvalidRequestError(
                "The chat template puts nothing between two turns, so their ends cannot be "
                "found; give training data of your own with --data."
            )
        stop_ids = frozenset((to_user[0], *eos_ids, *tokenizer.eos_token_ids))
        return cls(tuple(prefixes), to_answer, to_user, stop_ids)


def _render(tokenizer: Tokenizer, system: str | None) -> tuple[tuple[int, ...], ...]:
    """Ids before the first marker, between the first two, and between the last two."""
    first, answer, second = MARKERS
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    ids = tokenizer.apply_chat_template(messages)
    pieces = []
    rest = tokenizer.decode(ids, skip_special_tokens=False)
    for marker in MARKERS:
        piece, found, rest = rest.partition(marker)
        if not found:
            raise InvalidRequestError(
                "The chat template drops or changes the text of a conversation; give training "
                "data of your own with --data."
            )
        pieces.append(tuple(tokenizer.encode(piece, add_special_tokens=False)))
    return tuple(pieces)
