"""Constrained texts: which tokens a JSON schema or regular expression lets come next.

Only the model's own distributions are restricted, by `Sampling.allowed_BNV`. A draft that the
grammar forbids has probability 0 there and is rejected like any other bad draft, so the text has
exactly the distribution of the restricted model, and drafting need not know of grammars at all.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from idlm.decoding.params import SamplingParams
from idlm.errors import InvalidRequestError, ResourceError
from idlm.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance
    from llguidance._lib import JsonCompileOptions

# As `json.dumps` writes it: what models expect, and no endless white space.
JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
NO_TEXT = "NoExtensionBias"  # llguidance: there is no token that could come next


class Grammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    def advance(self, token_id: int) -> None:
        """Take a token of the text.

        Raises:
            InvalidRequestError: see `check`.
        """
        self.matcher.consume_token(token_id)
        self.check()

    def check(self) -> None:
        """See whether the text can go on.

        Raises:
            InvalidRequestError: it has come to where only characters fit that no token of the model
                has, or the grammar is too costly to follow.
        """
        if self.matcher.is_error():
            raise InvalidRequestError(
                "The text cannot go on: its json_schema or regex allows no token of this model "
                f"here, or is too costly to follow ({_reason(self.matcher)}). Allow other texts, "
                "or make it simpler."
            )


class Grammars:
    """Compiles grammars for one tokenizer, and asks several of them at once."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos_token_ids
        self._lock = threading.Lock()
        self._compile = lru_cache(maxsize=64)(self._compiled)

    def start(self, params: SamplingParams) -> Grammar | None:
        """The grammar of a request at the beginning of its text; None: it has none.

        Raises:
            InvalidRequestError: the schema or expression is wrong or too complex, or no text of
                this model's tokens fits it.
            ResourceError: the library is not installed.
        """
        if not params.constrained:
            return None
        schema = None if params.json_schema is None else json.dumps(params.json_schema)
        matcher = self._compile(schema, params.regex or "")  # takes a second, at worst
        with self._lock:  # several threads may ask for it
            return Grammar(matcher.deep_copy())

    def allowed(
        self, grammars: Sequence[Grammar | None], drafts: Sequence[Sequence[int]], rows: int
    ) -> torch.Tensor:
        """Tokens that may come after the text and after each of its drafts.

        Args:
            drafts: for each text; fewer than ``rows``.
        Returns:
            ``[B, rows, V]``, bool. Rows that no text can reach, and texts without a grammar, allow
            everything.

        Raises:
            InvalidRequestError: one of the texts cannot go on.
        """
        from llguidance.numpy import (
            fill_next_token_bitmask,
            fill_next_token_bitmask_par_with_draft_tokens,
        )

        words = -(-self._vocab_size // 32)
        bits_XW = np.full((len(grammars) * rows, words), -1, dtype=np.int32)
        for index, (grammar, tokens) in enumerate(zip(grammars, drafts, strict=True)):
            if grammar is None:
                continue
            first = index * rows
            if tokens:
                fill_next_token_bitmask_par_with_draft_tokens(
                    self._executor, [(grammar.matcher, first, list(tokens))], bits_XW
                )
            else:
                fill_next_token_bitmask(grammar.matcher, bits_XW, first)
            grammar.check()  # else an end token would be all that is allowed
        bits_XWb = (torch.from_numpy(bits_XW)[..., None] >> torch.arange(32)) & 1
        allowed_XV = bits_XWb.flatten(1)[:, : self._vocab_size].bool()
        return allowed_XV.unflatten(0, (len(grammars), rows))

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        import llguidance

        return llguidance.LLExecutor(num_threads=1)

    @cached_property
    def _library_tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        return llguidance.LLTokenizer(
            self._tokenizer.backend.to_str(),
            n_vocab=self._vocab_size,
            eos_token=sorted(self._eos),
        )

    def _compiled(self, schema: str | None, regex: str) -> llguidance.LLMatcher:
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            raise ResourceError(
                "Constrained texts need llguidance: pip install 'idlm[guided]'."
            ) from error
        if not self._eos:
            raise InvalidRequestError("The model has no end token; a grammar cannot end its texts.")
        name = "regex" if schema is None else "json_schema"
        try:
            if schema is None:
                source = LLMatcher.grammar_from_lark(_lark(regex))
            else:
                source = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        except ValueError as error:
            raise InvalidRequestError(f"The {name} cannot be used: {error}.") from error
        matcher = self._matcher(source)
        if self._fits_nothing(matcher, regex if schema is None else None):
            raise InvalidRequestError(
                f"The {name} cannot be used: no text of this model's tokens fits it."
            )
        if matcher.is_error():
            raise InvalidRequestError(f"The {name} cannot be used: {_reason(matcher)}.")
        return matcher

    def _fits_nothing(self, matcher: llguidance.LLMatcher, regex: str | None) -> bool:
        """Whether it is clear from the start that no text of this model's tokens fits.

        Args:
            regex: what ``matcher`` is of; None: of a schema.
        """
        if _reason(matcher) == NO_TEXT:
            return True
        if regex is None or not self._missing_characters:
            return not self._missing_bytes.isdisjoint(matcher.compute_ff_bytes())
        # Without what the model cannot write. Only asked whether anything is left: the library
        # follows such an intersection at a far greater cost than the expression alone.
        rest = self._matcher(f"{_lark(regex)} & /[^{self._missing_characters}]*/")
        return _reason(rest) == NO_TEXT

    def _matcher(self, source: str) -> llguidance.LLMatcher:
        """A matcher of this grammar, after a look at its first tokens; it may have an error."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._library_tokenizer, source, log_level=0)
        matcher.compute_bitmask()
        return matcher

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        """Bytes of no token at all."""
        tokens = self._library_tokenizer.decode_bytes(list(range(self._vocab_size)))
        return frozenset(range(256)) - frozenset(tokens)

    @cached_property
    def _missing_characters(self) -> str:
        """Those that begin with such bytes in UTF-8, as ranges of a character class."""
        pages = [(c, c) for c in range(0x80)]  # of one first byte each
        pages += [(c, c + 63) for c in range(0x80, 0x110000, 64) if not 0xD800 <= c < 0xE000]
        ranges = ""
        for first_byte, group in groupby(pages, key=lambda page: chr(page[0]).encode()[0]):
            if first_byte in self._missing_bytes:
                alike = list(group)
                ranges += f"\\x{{{alike[0][0]:x}}}-\\x{{{alike[-1][1]:x}}}"
        return ranges


def _lark(regex: str) -> str:
    """The grammar of texts that match ``regex``.

    Raises:
        InvalidRequestError: it ends amid an escape, which would reach into the grammar.
    """
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise InvalidRequestError("The regex cannot be used: a backslash ends it; write two.")
    # A slash would end it, too. Escaped pairs are passed over.
    escaped = re.sub(r"(?s)\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], regex)
    return f"start: TEXT\nTEXT: /{escaped or '()'}/"


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why a matcher is in an error state; empty if it is not."""
    return matcher.get_error().partition("\n")[0]


@lru_cache(maxsize=4)
def grammars_of(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> Grammars:
    """The one `Grammars` of a model, whatever engines it has."""
    return Grammars(tokenizer, vocab_size, eos_token_ids)
