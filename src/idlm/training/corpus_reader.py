"""Training data of any kind that can be read, as documents that fit into a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from idlm.errors import InvalidRequestError, first_words
from idlm.model.tokenizer import Tokenizer
from idlm.training.conversation import ANSWERER, Span, tokenize_conversation
from idlm.training.data import (
    HELDOUT,
    HELDOUT_SHARE,
    MIN_ANSWER,
    TRAIN,
    Corpus,
    Document,
    import_pyarrow,
)
from idlm.training.records import DataFiles, Record, read_records

# Token ids that fit into a row, the answers in them, and whether something was cut off.
Fitting = tuple[list[int], list[Span], bool]

# Of text from elsewhere, which no temperature is known for.
TEMPERATURE = 1.0


def read_corpus(
    path: Path, tokenizer: Tokenizer, *, length: int, vocab_size: int
) -> tuple[Corpus, Corpus, Counter[str]]:
    """The documents at ``path``: to be trained on, held out, and a report.

    Either shards of `idlm synthesize`, which are taken as they are, or `.jsonl`, `.parquet`,
    `.arrow` or `.txt` files with conversations (``messages``) or plain texts (``text``). Of a
    conversation the answers are trained on, of a text all but its first token. A text longer
    than a row becomes several documents; each begins with the last token of the one before, so
    that every token is trained on once. A longer conversation is cut.

    Args:
        length: tokens of a row.
        vocab_size: of the model.

    Returns:
        documents to train on; held-out ones (a part of the data set, or `HELDOUT_SHARE` of the
        records by a hash); counts of what was read, split, cut, dropped and not used.

    Raises:
        InvalidRequestError: unreadable or without anything to train on, or conversations for a
            model without a chat template.
    """
    counts: Counter[str] = Counter()
    heldout: Corpus | None = None
    if _are_shards(path):
        train = Corpus.read(path, TRAIN)
        if any(path.glob(f"{HELDOUT}-*.parquet")):
            heldout = Corpus.read(path, HELDOUT)
        keys = [] if heldout else [_key(train.document(i).token_ids) for i in range(len(train))]
    else:
        files, reader = DataFiles.find(path), _Reader(tokenizer, length, counts)
        train, keys = reader.corpus(files.train, path)
        if files.heldout:
            heldout, _ = reader.corpus(files.heldout, path)
        counts.update(f"not used: {name}" for name in files.unused)
    if heldout is None:
        held = _held_out(np.array(keys, np.uint64), path)
        train, heldout = train.select(~held), train.select(held)
    for corpus in (train, heldout):
        corpus.check(path)
        if (highest := int(corpus.tokens.max())) >= vocab_size:
            raise InvalidRequestError(
                f"{path} has the token {highest}, which is not in the model's vocabulary (0 to "
                f"{vocab_size - 1}); give data that was made for this model."
            )
    counts["documents held out"] = len(heldout)
    return train, heldout, counts


class _Reader:
    """Turns records into documents of at most ``length`` tokens; counts what becomes of them."""

    def __init__(self, tokenizer: Tokenizer, length: int, counts: Counter[str]) -> None:
        self.tokenizer, self.length, self.counts = tokenizer, length, counts

    def corpus(self, files: Sequence[Path], path: Path) -> tuple[Corpus, list[int]]:
        """All documents of some files, and for each the key of the record that it comes from."""
        keys: list[int] = []
        corpus = Corpus.of(self._documents(files, keys))
        if len(corpus) == 0:
            reasons = ", ".join(f"{name} ({n})" for name, n in sorted(self.counts.items()))
            raise InvalidRequestError(
                f"Nothing in {path} can be trained on: {reasons or 'it is empty'}; give texts, or "
                "conversations with answers of the assistant."
            )
        return corpus, keys

    def _documents(self, files: Iterable[Path], keys: list[int]) -> Iterator[Document]:
        for file in files:
            for record in read_records(file):
                self.counts["records"] += 1
                for ids, answers, cut in self._fitting(record):
                    keys.append(_key(record))
                    self._count(ids, answers)
                    yield Document(ids, answers, TEMPERATURE, cut)

    def _fitting(self, record: Record) -> Iterator[Fitting]:
        """Token ids and answers of what a record gives, and whether it was cut."""
        if not isinstance(record, str) and not self.tokenizer.has_chat_template:
            raise InvalidRequestError(
                "The data holds conversations ('messages'), and the model has no chat template to "
                "write them by; give plain texts ('text'), or use an instruct model."
            )
        try:
            if isinstance(record, str):
                yield from self._pieces(record)
            else:
                yield from self._conversation(record)
        except InvalidRequestError as error:
            self._drop(first_words(error))

    def _conversation(self, messages: list[dict[str, Any]]) -> Iterator[Fitting]:
        sequences = tokenize_conversation(self.tokenizer, messages)
        if not sequences:
            self._drop("no answer")
        elif messages[-1]["role"] != ANSWERER:
            self.counts["conversations with turns after the last answer, left out"] += 1
        for ids, answers in sequences:
            yield from self._cut(ids, answers)

    def _pieces(self, text: str) -> Iterator[Fitting]:
        """A text in pieces of like length, each but the first with a token of the one before."""
        ids = self.tokenizer.encode(text)
        if len(ids) < 2:
            self._drop("text of less than 2 tokens")
            return
        count = -(-(len(ids) - 1) // (self.length - 1))
        if count > 1:
            self.counts["texts split"] += 1
        for number in range(count):
            start, end = ((len(ids) - 1) * i // count for i in (number, number + 1))
            yield ids[start : end + 1], [(1, end + 1 - start)], False

    def _cut(self, ids: list[int], answers: list[Span]) -> Iterator[Fitting]:
        """A conversation of at most a row; nothing if that holds no answer."""
        kept = [(start, min(end, self.length)) for start, end in answers if start < self.length]
        if not answers:
            self._drop("empty answer")
        elif not kept:
            self._drop("question longer than a row")
            self.counts["tokens dropped"] += len(ids)
        elif len(ids) <= self.length:
            yield ids, answers, False
        else:
            self.counts["conversations cut"] += 1
            self.counts["tokens cut off"] += len(ids) - kept[-1][1]
            yield ids[: kept[-1][1]], kept, True

    def _count(self, ids: Sequence[int], answers: Sequence[Span]) -> None:
        lengths = [end - start for start, end in answers]
        self.counts["documents"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["answer tokens"] += sum(lengths)
        if max(lengths) < MIN_ANSWER:
            self.counts[f"documents without an answer of {MIN_ANSWER} tokens: no masks"] += 1

    def _drop(self, reason: str) -> None:
        self.counts[f"dropped: {reason}"] += 1


def _are_shards(path: Path) -> bool:
    """Whether ``path`` is a folder of what `idlm.training.data.write_shard` writes."""
    shard = next(path.glob(f"{TRAIN}-*.parquet"), None)
    if shard is None:
        return False
    pa = import_pyarrow()
    try:
        return "token_ids" in pa.parquet.read_schema(shard).names
    except (pa.ArrowException, OSError) as error:
        raise InvalidRequestError(
            f"{shard} is damaged ({error}); make or fetch the data again."
        ) from error


def _key(record: object) -> int:
    """A hash of what a document was made of."""
    return int.from_bytes(blake2b(repr(record).encode(), digest_size=8).digest(), "little")


def _held_out(keys: np.ndarray, path: Path) -> np.ndarray:
    """Which documents are held out: all of a record or none; at least one document.

    Raises:
        InvalidRequestError: there is only one.
    """
    held: np.ndarray = keys % 1000 < 1000 * HELDOUT_SHARE
    if not held.any() or held.all():
        held = keys == keys.min()
    if held.all():  # one record: the end of its text
        held = np.arange(len(keys)) == len(keys) - 1
    if held.all():
        raise InvalidRequestError(
            f"{path} gives one document, and one is needed to train on and one to be held out; "
            "give more data."
        )
    return held
