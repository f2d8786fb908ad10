"""What sampled conversations begin with: drawn at random, or prompts that a user has."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from idlm.errors import InvalidRequestError, first_words
from idlm.model.tokenizer import Tokenizer
from idlm.training.prompts import Prompt
from idlm.training.sampler import MIN_ANSWER_ROOM, Script
from idlm.training.seeds import OPENERS, SYSTEM_PROMPTS, TEXT_SEEDS, TOPIC_OPENERS
from idlm.training.template import ChatPieces

DEFAULT_SYSTEM_SHARE = 0.7
OPENER_SHARE = 0.3
TOPIC_SHARE = 0.5
# Tokens that can begin a word of a topic: a space and lower-case letters.
TOPIC_TOKEN = re.compile(r" [a-z]{4,}")
TWO_TURN_SHARE = 0.2
USER_TEMPERATURES = (0.8, 1.0)
# Temperatures of the answers and their shares.
TEMPERATURES = ((0.0, 0.45), (0.7, 0.2), (1.0, 0.35))


class ScriptWriter:
    """Beginnings of conversations (or of plain texts), drawn at random."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: tuple[int, ...], seed: Sequence[int]) -> None:
        self._random = random.Random(repr(tuple(seed)))
        self.pieces: ChatPieces | None = None
        if tokenizer.has_chat_template:
            self.pieces = ChatPieces.of(tokenizer, SYSTEM_PROMPTS, eos_ids)
            self.stop_ids = self.pieces.stop_ids
            beginnings: tuple[str, ...] = OPENERS
        else:
            self.stop_ids = frozenset((*eos_ids, *tokenizer.eos_token_ids))
            beginnings = TEXT_SEEDS
        special = self.pieces is None
        self._beginnings = [tuple(tokenizer.encode(text, special)) for text in beginnings]
        self._topic_openers = [tuple(tokenizer.encode(text, False)) for text in TOPIC_OPENERS]
        self._topics = [
            token
            for token in range(tokenizer.backend.get_vocab_size())
            if TOPIC_TOKEN.fullmatch(tokenizer.token_text(token))
        ]

    def __iter__(self) -> Iterator[Script]:
        while True:
            yield self._next()

    def _next(self) -> Script:
        draw = self._random
        values, shares = zip(*TEMPERATURES, strict=True)
        (temperature,) = draw.choices(values, shares)
        user_temperature = draw.uniform(*USER_TEMPERATURES)
        beginning = draw.choice(self._beginnings)
        if self.pieces is None:
            return Script(beginning, True, 0, temperature, user_temperature)
        default, *others = self.pieces.prefixes
        prefix = default if draw.random() < DEFAULT_SYSTEM_SHARE else draw.choice(others)
        kind = draw.random()
        if kind < OPENER_SHARE:
            prefix = (*prefix, *beginning)
        elif kind < OPENER_SHARE + TOPIC_SHARE and self._topics:
            prefix = (*prefix, *draw.choice(self._topic_openers), draw.choice(self._topics))
        turns = 1 if draw.random() < TWO_TURN_SHARE else 0
        return Script(prefix, False, turns, temperature, user_temperature)


class PromptWriter(ScriptWriter):
    """A user's prompts in random order, again and again, for the model to answer.

    Prompts without a system message get one now and then. None is answered greedily twice.

    Args:
        length: longest conversation, in tokens.

    Attributes:
        counts: of the prompts that are left out.

    Raises:
        InvalidRequestError: no prompt can be used.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...],
        seed: Sequence[int],
        length: int,
    ) -> None:
        super().__init__(tokenizer, eos_ids, seed)
        self._tokenizer, self._longest = tokenizer, length - MIN_ANSWER_ROOM
        self.counts: Counter[str] = Counter()
        self._prompts = [prompt for prompt in prompts if self._usable(prompt)]
        if not self._prompts:
            reasons = ", ".join(f"{name} ({n})" for name, n in self.counts.items())
            raise InvalidRequestError(
                f"None of the prompts can be used: {reasons}; give other ones, or a larger "
                "--max-length."
            )
        self._order: list[Prompt] = []
        self._greedy: set[tuple[int, ...]] = set()

    def _next(self) -> Script:
        draw = self._random
        if not self._order:
            self._order = draw.sample(self._prompts, len(self._prompts))
        prompt = self._order.pop()
        prefix = self._prefix(prompt)
        if self.pieces is not None and draw.random() >= DEFAULT_SYSTEM_SHARE:
            prefix = self._with_system(prompt, draw.choice(SYSTEM_PROMPTS)) or prefix
        chances = [pair for pair in TEMPERATURES if pair[0] > 0 or prefix not in self._greedy]
        values, shares = zip(*chances, strict=True)
        (temperature,) = draw.choices(values, shares)
        if temperature == 0:
            self._greedy.add(prefix)
        return Script(prefix, True, 0, temperature, 1.0, source=repr(prompt))

    def _with_system(self, prompt: Prompt, system: str) -> tuple[int, ...] | None:
        """The prompt after a system message; None if it has one, or cannot have this one."""
        if prompt[0].get("role") == "system":
            return None
        try:
            prefix = self._prefix(({"role": "system", "content": system}, *prompt))
        except InvalidRequestError:  # the template knows no system role
            return None
        return prefix if len(prefix) <= self._longest else None

    def _prefix(self, prompt: Prompt) -> tuple[int, ...]:
        if self.pieces is not None:
            return tuple(self._tokenizer.apply_chat_template(prompt))
        if len(prompt) > 1:
            raise InvalidRequestError("A conversation needs a model with a chat template.")
        return tuple(self._tokenizer.encode(prompt[0]["content"]))

    def _usable(self, prompt: Prompt) -> bool:
        try:
            prefix = self._prefix(prompt)
        except InvalidRequestError as error:
            self.counts[f"prompts left out: {first_words(error)}"] += 1
            return False
        if not 0 < len(prefix) <= self._longest:
            self.counts[f"prompts left out: longer than {self._longest} tokens"] += 1
            return False
        return True
