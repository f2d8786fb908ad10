"""On-policy training text: the base model writes user turns and answers itself."""

from __future__ import annotations

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from idlm.errors import InvalidRequestError
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training.data import (
    HELDOUT,
    HELDOUT_SHARE,
    MIN_ANSWER,
    SPLITS,
    TRAIN,
    Corpus,
    Document,
    write_shard,
)
from idlm.training.parallel import ALONE, Parallel
from idlm.training.sampler import BatchSampler, Limits, Script
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
# An answer is a loop if more than this share of its 8-grams has occurred before in it.
LOOP_NGRAM = 8
LOOP_SHARE = 0.5
# Odd constants that turn an 8-gram into one number (mod 2**64).
GRAM_KEYS = np.random.default_rng(0).integers(1, 2**62, LOOP_NGRAM) * 2 + 1
SHARD_TOKENS = 4_000_000
SECONDS_PER_REPORT = 10.0


@dataclass(frozen=True)
class SynthesisConfig:
    """How much to write and within which limits.

    Attributes:
        tokens: tokens of kept documents, prompts included.
        seed: of scripts and sampling; every resumption uses another stream of it.
        slots: conversations sampled at once.
        limits: longest document, user turn and answer.
    """

    tokens: int
    seed: int = 0
    slots: int = 1024
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.slots < 1:
            raise InvalidRequestError("--tokens and --slots must be 1 or more.")
        if not 1 <= self.limits.answer < self.limits.length or self.limits.user < 1:
            raise InvalidRequestError(
                "--max-answer must be at least 1 and below --max-length, --max-user at least 1."
            )


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


def read_document(
    script: Script, token_ids: Sequence[int], pieces: ChatPieces | None, stop_ids: frozenset[int]
) -> Document | None:
    """Find the answers in a sampled conversation; None if it has none.

    What follows the last answer (an unfinished user turn) is cut off.
    """
    at, answering = len(script.prefix), script.answering
    answers: list[tuple[int, int]] = []
    truncated = False
    while at < len(token_ids):
        if answering:
            ends = (i for i in range(at, len(token_ids)) if token_ids[i] in stop_ids)
            end = next(ends, None)
            truncated = end is None
            answers.append((at, len(token_ids) if end is None else end + 1))
            if end is None or pieces is None:
                break
            at = end + len(pieces.to_user)
        else:
            assert pieces is not None
            try:
                end = token_ids.index(pieces.to_answer[0], at)
            except ValueError:
                break
            at = end + len(pieces.to_answer)
        answering = not answering
    if not answers:
        return None
    return Document(token_ids[: answers[-1][1]], answers, script.temperature, truncated)


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether most 8-grams of an answer have occurred in it before."""
    if len(token_ids) < 2 * LOOP_NGRAM:
        return False
    grams = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids), LOOP_NGRAM)
    return len(grams) - len(np.unique(grams @ GRAM_KEYS)) > LOOP_SHARE * len(grams)


class Collector:
    """Keeps, drops and counts documents, and writes them as shards.

    The documents of existing shards count and are not written again.
    """

    def __init__(
        self,
        folder: Path,
        special_ids: frozenset[int],
        parallel: Parallel = ALONE,
    ) -> None:
        self.folder, self._special_ids, self._parallel = folder, special_ids, parallel
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._waiting: dict[str, list[Document]] = {split: [] for split in SPLITS}
        self._waiting_tokens: Counter[str] = Counter()
        self.shards = 0
        for split in SPLITS:
            if paths := list(folder.glob(f"{split}-*.parquet")):
                self.shards += len(paths)
                corpus = Corpus.read(folder, split)
                self.counts["tokens"] += len(corpus.tokens)
                self._seen.update(_key(corpus.document(i)) for i in range(len(corpus)))

    def add(self, document: Document | None, user: Sequence[int]) -> None:
        """Keep a document, or count why not.

        Args:
            document: None: the conversation has no answer.
            user: what the model wrote of the first user turn.
        """
        if document is None:
            self.counts["dropped: no answer"] += 1
            return
        if reason := self._reason_to_drop(document, user):
            self.counts[f"dropped: {reason}"] += 1
            return
        key, length = _key(document), len(document.token_ids)
        self._seen.add(key)
        self.counts["documents"] += 1
        self.counts["truncated"] += document.truncated
        self.counts["tokens"] += length
        self.counts["answer tokens"] += sum(end - start for start, end in document.answers)
        split = HELDOUT if key % 1000 < 1000 * HELDOUT_SHARE else TRAIN
        self._waiting[split].append(document)
        self._waiting_tokens[split] += length
        if self._waiting_tokens[split] >= SHARD_TOKENS:
            self._flush(split)

    def close(self) -> None:
        """Write what is still waiting; a small folder gets a held-out document too."""
        if self._waiting[TRAIN][1:] and not list(self.folder.glob(f"{HELDOUT}-*.parquet")):
            self._waiting[HELDOUT].append(self._waiting[TRAIN].pop())
        for split in SPLITS:
            self._flush(split)

    def _flush(self, split: str) -> None:
        documents, self._waiting[split] = self._waiting[split], []
        self._waiting_tokens[split] = 0
        if documents:
            own = f"{split}-{self._parallel.rank}"
            number = len(list(self.folder.glob(f"{own}-*.parquet")))
            write_shard(self.folder / f"{own}-{number:05d}.parquet", documents)

    def _reason_to_drop(self, document: Document, user: Sequence[int]) -> str | None:
        if self._special_ids.intersection(user):
            return "special token in the user turn"
        answers = [document.token_ids[start:end] for start, end in document.answers]
        if max(map(len, answers)) < MIN_ANSWER:
            return "answer too short"
        if any(map(is_loop, answers)):
            return "loop"
        return "duplicate" if _key(document) in self._seen else None


def synthesize(
    decoder: Decoder,
    tokenizer: Tokenizer,
    folder: Path,
    config: SynthesisConfig,
    parallel: Parallel = ALONE,
) -> Counter[str]:
    """Write train and held-out shards into ``folder`` until it holds ``config.tokens`` tokens.

    Several processes write equal shares of what is missing, each from a stream of its own;
    duplicates between their shares are not looked for.

    Returns:
        counts of documents and tokens kept, and of documents dropped by reason.

    Raises:
        InvalidRequestError: the documents would not fit the model's context.
    """
    check_context(decoder, config.limits.length)
    collector = Collector(folder, tokenizer.special_ids, parallel)
    parallel.wait()  # all have read the folder before one writes
    at_start = collector.counts["tokens"]
    target = at_start + -(-(config.tokens - at_start) // parallel.world)
    # A resumed synthesis draws from another stream than what is there already.
    seed = (config.seed, collector.shards, parallel.rank)
    writer = ScriptWriter(tokenizer, decoder.config.eos_token_ids, seed)
    pieces = writer.pieces
    sampler = BatchSampler(
        decoder,
        pieces.to_answer if pieces else (),
        pieces.to_user if pieces else (),
        sorted(writer.stop_ids),
        slots=config.slots,
        limits=config.limits,
        seed=hash(seed) % 2**63,
    )
    report = _Report(collector.counts, target)
    for ended in sampler.run(iter(writer)):
        for script, token_ids in ended:
            document = read_document(script, token_ids, pieces, writer.stop_ids)
            first = document.answers[0][0] if document else 0
            last = first - len(pieces.to_answer) if pieces else first
            collector.add(document, token_ids[len(script.prefix) : last])
        if parallel.main:
            report.update()
        if collector.counts["tokens"] >= target:
            break
    collector.close()
    if parallel.main:
        report.finish()
    return collector.counts


def check_context(decoder: Decoder, length: int) -> None:
    """Refuse documents that the model cannot see as a whole.

    Raises:
        InvalidRequestError: longer than the context or the sliding window.
    """
    c = decoder.config
    context = min(c.max_position_embeddings, c.sliding_window or c.max_position_embeddings)
    if length > context:
        raise InvalidRequestError(
            f"Documents of up to {length} tokens do not fit the model's context or sliding "
            f"window of {context}; set a smaller --max-length."
        )


class _Report:
    """A line on stderr every few seconds, and one at the end: of this process's share."""

    def __init__(self, counts: Counter[str], target: int) -> None:
        self._counts, self._target = counts, target
        self._at_start = counts["tokens"]
        self._start = self._last = time.monotonic()

    def update(self) -> None:
        now = time.monotonic()
        if now - self._last >= SECONDS_PER_REPORT:
            self._last = now
            self._line(now)

    def finish(self) -> None:
        self._line(time.monotonic())
        for name, count in sorted(self._counts.items()):
            print(f"  {name}: {count}", file=sys.stderr)

    def _line(self, now: float) -> None:
        tokens = self._counts["tokens"]
        rate = (tokens - self._at_start) / max(now - self._start, 1e-9)
        print(
            f"{tokens / 1e6:.2f}M of {self._target / 1e6:.2f}M tokens "
            f"({100 * tokens / self._target:.0f}%), {rate / 1e3:.1f}k tokens/s",
            file=sys.stderr,
            flush=True,
        )


def _key(document: Document) -> int:
    """What makes a document a duplicate: all before the first answer, and the temperature."""
    before = np.asarray(document.token_ids[: document.answers[0][0]], dtype=np.int32)
    text = before.tobytes() + np.float32(document.temperature).tobytes()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
