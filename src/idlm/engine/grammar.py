"""Constrained texts: which tokens a JSON schema or regular expression lets come next.

Only the model's own distributions are restricted, by `Sampling.allowed_BNV`. A draft that the
grammar forbids has probability 0 there and is rejected like any other bad draft, so the text has
exactly the distribution of the restricted model, and drafting need not know of grammars at all.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
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


class Grammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    def advance(self, token_id: int) -> None:
        """Take a token of the text.

        Raises:
            InvalidRequestError: the grammar is too costly to follow.
        """
        if not self.matcher.consume_token(token_id):
            reason = self.matcher.get_error().partition("\n")[0]
            raise InvalidRequestError(
                f"The grammar could not be followed ({reason}); make it simpler."
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
            InvalidRequestError: the schema or expression is wrong or too complex.
            ResourceError: the library is not installed.
        """
        if not params.constrained:
            return None
        schema = None if params.json_schema is None else json.dumps(params.json_schema)
        with self._lock:  # the copied matcher may be asked for by several threads
            return Grammar(self._compile(schema, params.regex or "").deep_copy())

    def allowed(
        self, grammars: Sequence[Grammar | None], drafts: Sequence[Sequence[int]], rows: int
    ) -> torch.Tensor:
        """Tokens that may come after the text and after each of its drafts.

        Args:
            drafts: for each text; fewer than ``rows``.
        Returns:
            ``[B, rows, V]``, bool. Rows that no text can reach, and texts without a grammar, allow
            everything.
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
                source = LLMatcher.grammar_from_regex(regex)
            else:
                source = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        except ValueError as error:
            raise InvalidRequestError(f"The {name} cannot be used: {error}.") from error
        matcher = LLMatcher(self._library_tokenizer, source, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0]
            raise InvalidRequestError(f"The {name} cannot be used: {reason}.")
        return matcher


@lru_cache(maxsize=4)
def grammars_of(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> Grammars:
    """The one `Grammars` of a model, whatever engines it has."""
    return Grammars(tokenizer, vocab_size, eos_token_ids)
