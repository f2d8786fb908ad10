"""The tokens of a growing text, each with its piece of the text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from idlm.engine.request import Logprob, Source
from idlm.model.tokenizer import Detokenizer, Tokenizer
from idlm.server.worker import Update


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        text: its piece of the text; empty for all but the last token of a split character.
        offset: characters of the text before it.
        logprobs: token id to `Logprob`, the token's own among them; empty if not asked for.
    """

    id: int
    text: str
    offset: int
    source: Source
    logprobs: dict[int, Logprob]


class TokenTexts:
    """Gives out the tokens of a choice as their text comes out.

    Text lags behind tokens where a character takes several of them or a stop string may have
    begun. A token that a stop string cut off, or that ends the text, is never given out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._held: deque[tuple[int, int, Source, dict[int, Logprob]]] = deque()  # end, id, ...
        self._text = ""  # came out and belongs to no token yet
        self._decoded = self._offset = 0

    def push(self, update: Update) -> list[Token]:
        """Take what is new and return the tokens that are complete by it."""
        logprobs = update.logprobs or [{}] * len(update.token_ids)
        for id_, source, entry in zip(update.token_ids, update.sources, logprobs, strict=True):
            self._decoded += len(self._detokenizer.push(id_))
            self._held.append((self._decoded, id_, source, entry))
        self._text += update.text
        out = self._offset + len(self._text)
        tokens: list[Token] = []
        while self._held and (self._held[0][0] <= out or update.last):
            if update.last and self._offset >= out:
                break
            end, id_, source, entry = self._held.popleft()
            # A character that is cut at the end of the text was decoded by no token.
            end = out if update.last and not self._held else min(end, out)
            text, self._text = self._text[: end - self._offset], self._text[end - self._offset :]
            tokens.append(Token(id_, text, self._offset, source, entry))
            self._offset = end
        return tokens
