"""On-policy training text: the base model writes user turns and answers itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from rich.console import Console

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
from idlm.training.progress import TokenProgress, report_counts
from idlm.training.prompts import Prompt
from idlm.training.sampler import BatchSampler, Limits, Script
from idlm.training.scripts import PromptWriter, ScriptWriter
from idlm.training.template import ChatPieces

# An answer is a loop if more than this share of its 8-grams has occurred before in it.
LOOP_NGRAM = 8
LOOP_SHARE = 0.5
# Odd constants that turn an 8-gram into one number (mod 2**64).
GRAM_KEYS = np.random.default_rng(0).integers(1, 2**62, LOOP_NGRAM) * 2 + 1
SHARD_TOKENS = 4_000_000
# A synthesis ends when this many conversations a slot, one after the other, gave nothing new.
FRUITLESS = 20


@dataclass(frozen=True)
class SynthesisConfig:
    """How much to write and within which limits.

    Attributes:
        tokens: tokens of kept documents, prompts included.
        seed: of scripts and sampling; every resumption uses another stream of it.
        slots: conversations sampled at once.
        limits: longest document, user turn and answer.
        prompts: what is to be answered; empty: the model writes the user turns too.
    """

    tokens: int
    seed: int = 0
    slots: int = 1024
    limits: Limits = field(default_factory=Limits)
    prompts: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.slots < 1:
            raise InvalidRequestError("--tokens and --slots must be 1 or more.")
        if not 1 <= self.limits.answer < self.limits.length or self.limits.user < 1:
            raise InvalidRequestError(
                "--max-answer must be at least 1 and below --max-length, --max-user at least 1."
            )


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


def user_turns(
    script: Script, document: Document, pieces: ChatPieces | None
) -> list[Sequence[int]]:
    """What the model wrote itself before each answer: nothing before one to a given prompt."""
    if pieces is None:
        return []
    starts = [len(script.prefix), *(end - 1 + len(pieces.to_user) for _, end in document.answers)]
    ends = [start - len(pieces.to_answer) for start, _ in document.answers]
    return [document.token_ids[start:end] for start, end in zip(starts, ends, strict=False)]


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether most 8-grams of an answer have occurred in it before."""
    if len(token_ids) < 2 * LOOP_NGRAM:
        return False
    grams = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids), LOOP_NGRAM)
    return len(grams) - len(np.unique(grams @ GRAM_KEYS)) > LOOP_SHARE * len(grams)


class Collector:
    """Keeps, drops and counts documents, and writes them as shards.

    The documents of existing shards count and are not written again.

    Args:
        repeat: a prompt may be answered more than once, but not twice alike.

    Attributes:
        counts: of documents and tokens kept, and of documents dropped by reason.
        fruitless: documents dropped since the last one was kept.
    """

    def __init__(
        self,
        folder: Path,
        special_ids: frozenset[int],
        *,
        repeat: bool = False,
        parallel: Parallel = ALONE,
    ) -> None:
        self.folder, self._special_ids, self._parallel = folder, special_ids, parallel
        self._repeat = repeat
        self.counts: Counter[str] = Counter()
        self.fruitless = 0
        self._seen: set[int] = set()
        self._waiting: dict[str, list[tuple[Document, str]]] = {split: [] for split in SPLITS}
        self._waiting_tokens: Counter[str] = Counter()
        self.shards = 0
        for split in SPLITS:
            if paths := list(folder.glob(f"{split}-*.parquet")):
                self.shards += len(paths)
                corpus = Corpus.read(folder, split)
                self.counts["tokens"] += len(corpus.tokens)
                self._seen.update(self._key(corpus.document(i)) for i in range(len(corpus)))

    def add(
        self, document: Document | None, turns: Sequence[Sequence[int]] = (), source: str = ""
    ) -> None:
        """Keep a document, or count why not.

        Args:
            document: None: the conversation has no answer.
            turns: what the model wrote of the user turns (`user_turns`).
            source: documents with the same source, if any, belong to the same split.
        """
        if document is None:
            self._drop("no answer")
            return
        if reason := self._reason_to_drop(document, turns):
            self._drop(reason)
            return
        key, length = self._key(document), len(document.token_ids)
        self._seen.add(key)
        self.fruitless = 0
        self.counts["documents"] += 1
        self.counts["truncated"] += document.truncated
        self.counts["tokens"] += length
        self.counts["answer tokens"] += sum(end - start for start, end in document.answers)
        chance = _hash(source.encode()) if source else key
        split = HELDOUT if chance % 1000 < 1000 * HELDOUT_SHARE else TRAIN
        self._waiting[split].append((document, source))
        self._waiting_tokens[split] += length
        if self._waiting_tokens[split] >= SHARD_TOKENS:
            self._flush(split)

    def close(self) -> None:
        """Write what is still waiting; a small folder gets a held-out source or document too."""
        train = self._waiting[TRAIN]
        held_out = self._waiting[HELDOUT] or any(self.folder.glob(f"{HELDOUT}-*.parquet"))
        if train[1:] and not held_out:
            last = train[-1][1]
            if any(source != last for _, source in train):
                self._waiting[HELDOUT] = [pair for pair in train if pair[1] == last]
                self._waiting[TRAIN] = [pair for pair in train if pair[1] != last]
            else:
                self._waiting[HELDOUT].append(train.pop())
        for split in SPLITS:
            self._flush(split)

    def _flush(self, split: str) -> None:
        documents = [document for document, _ in self._waiting[split]]
        self._waiting[split] = []
        self._waiting_tokens[split] = 0
        if documents:
            own = f"{split}-{self._parallel.rank}"
            number = len(list(self.folder.glob(f"{own}-*.parquet")))
            write_shard(self.folder / f"{own}-{number:05d}.parquet", documents)

    def _drop(self, reason: str) -> None:
        self.counts[f"dropped: {reason}"] += 1
        self.fruitless += 1

    def _reason_to_drop(self, document: Document, turns: Sequence[Sequence[int]]) -> str | None:
        if any(self._special_ids.intersection(turn) for turn in turns):
            return "special token in a user turn"
        if not all(turns[1:]):  # the first one may be all in what was given
            return "empty user turn"
        answers = [document.token_ids[start:end] for start, end in document.answers]
        if max(map(len, answers)) < MIN_ANSWER:
            return "answer too short"
        if any(map(is_loop, answers)):
            return "loop"
        return "duplicate" if self._key(document) in self._seen else None

    def _key(self, document: Document) -> int:
        """What makes a duplicate: the temperature, and all before the first answer (or all)."""
        end = len(document.token_ids) if self._repeat else document.answers[0][0]
        text = np.asarray(document.token_ids[:end], dtype=np.int32).tobytes()
        return _hash(text + np.float32(document.temperature).tobytes())


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


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
        InvalidRequestError: the documents would not fit the model's context, or none could be
            kept.
    """
    check_context(decoder, config.limits.length)
    collector = Collector(
        folder, tokenizer.special_ids, repeat=bool(config.prompts), parallel=parallel
    )
    parallel.wait()  # all have read the folder before one writes
    at_start = collector.counts["tokens"]
    target = at_start + -(-(config.tokens - at_start) // parallel.world)
    # A resumed synthesis draws from another stream than what is there already.
    seed = (config.seed, collector.shards, parallel.rank)
    eos_ids, limits = decoder.config.eos_token_ids, config.limits
    writer = ScriptWriter(tokenizer, eos_ids, seed)
    if config.prompts:
        writer = PromptWriter(config.prompts, tokenizer, eos_ids, seed, limits.length)
        collector.counts.update(writer.counts)
    pieces = writer.pieces
    sampler = BatchSampler(
        decoder,
        pieces.to_answer if pieces else (),
        pieces.to_user if pieces else (),
        sorted(writer.stop_ids),
        slots=config.slots,
        limits=limits,
        seed=hash(seed) % 2**63,
    )
    console = Console(stderr=True) if parallel.main else None
    with TokenProgress(at_start, target, console) as progress:
        for ended in sampler.run(iter(writer)):
            for script, token_ids in ended:
                document = read_document(script, token_ids, pieces, writer.stop_ids)
                turns = user_turns(script, document, pieces) if document else []
                collector.add(document, turns, script.source)
            progress.update(collector.counts["tokens"])
            if collector.counts["tokens"] >= target:
                break
            if collector.fruitless >= FRUITLESS * config.slots:
                collector.counts["stopped: conversations without anything new"] = (
                    collector.fruitless
                )
                break
    collector.close()
    report_counts(collector.counts, console)
    if not collector.counts["tokens"]:
        raise InvalidRequestError(
            "Nothing that the model wrote could be kept (the reasons are above); give another "
            "model, other prompts or larger limits."
        )
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
