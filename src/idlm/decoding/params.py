"""How one request wants its tokens chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from idlm.errors import InvalidRequestError

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; names and meanings as in vLLM.

    Attributes:
        temperature: 0 is greedy; at most 1e6.
        top_k: keep the ``k`` likeliest tokens; 0: all.
        top_p: keep the likeliest tokens that together reach this probability; 1: all.
        min_p: drop tokens below this share of the likeliest token's probability; 0: none.
        repetition_penalty: > 1 divides positive (multiplies negative) logits of tokens that
            stand in the prompt or the output; in [0.01, 100].
        presence_penalty: subtracted from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: the same, times the number of occurrences.
        logit_bias: token id to a bias added to its logit, in [-100, 100].
        seed: the same seed gives the same text; None: a new one each time.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end the text, besides the model's own end tokens.
        ignore_eos: go on past the model's own end tokens.
        max_tokens: tokens to generate at most; None: up to the end of the context; 0, with
            ``prompt_logprobs`` only: none.
        logprobs: return the log-probabilities of the chosen token and of this many likeliest
            ones, under the model's own distribution (before any of the above); None: none.
        prompt_logprobs: the same for the tokens of the prompt; the first one has none.
        json_schema: the text is JSON of this schema, in the form of `json.dumps`.
        regex: the text as a whole matches this regular expression.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0, 1e6)  # beyond its bounds and the penalty's, sums overflow
        self._integer("top_k", -1, math.inf)
        self._number("top_p", 0, 1, open_below=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0.01, 100)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1 if self.prompt_logprobs is None else 0, math.inf)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0, 100)
        for token, bias in (self.logit_bias or {}).items():
            if isinstance(token, bool) or not isinstance(token, int) or not -100 <= bias <= 100:
                raise InvalidRequestError(
                    f"logit_bias maps token ids to numbers in [-100, 100], not {token!r}: {bias!r}."
                )
        if any(not isinstance(s, str) or not s for s in self.stop_strings):
            raise InvalidRequestError("stop takes one or more non-empty strings.")
        if self.json_schema is not None and self.regex is not None:
            raise InvalidRequestError("Give json_schema or regex, not both.")
        if self.constrained and self.ignore_eos:
            raise InvalidRequestError("A text with a json_schema or regex must end: no ignore_eos.")

    @cached_property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @cached_property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @cached_property
    def constrained(self) -> bool:
        """Whether a grammar says which tokens may come."""
        return self.json_schema is not None or self.regex is not None

    @cached_property
    def wants(self) -> frozenset[str]:
        """What it takes to choose a token, without how much of it.

        ``greedy`` or ``sampled``; ``top_k``, ``top_p``, ``min_p``, ``penalties``, ``bias``. The
        distribution of a greedy request is the same with and without truncation.
        """
        sampled = not self.greedy
        asked = {
            "greedy": self.greedy,
            "sampled": sampled,
            "top_k": sampled and self.top_k > 0,
            "top_p": sampled and self.top_p < 1,
            "min_p": sampled and self.min_p > 0,
            "penalties": self.penalised,
            "bias": bool(self.logit_bias),
        }
        return frozenset(name for name, value in asked.items() if value)

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _integer(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidRequestError(
                f"{name} must be a whole number {_span(low, high)}, not {value!r}."
            )

    def _number(self, name: str, low: float, high: float, *, open_below: bool = False) -> None:
        value: Any = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise InvalidRequestError(f"{name} must be a number {_span(low, high)}, not {value!r}.")
        if open_below and value == low:
            raise InvalidRequestError(f"{name} must be above {low}, not {value!r}.")


def _span(low: float, high: float) -> str:
    return f"of at least {low}" if high == math.inf else f"between {low} and {high}"
