"""Documents on disk and the packed batches made of them.

A document is a token sequence with *answer spans*, the parts that the base model wrote and that
are trained on. An *anchor* is a clean row after which a mask block stands: it runs from the last
token before an answer (so that the block begins with the answer) to the third-last token of the
answer, the last whose block has a place with a target inside the answer.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idlm.errors import InvalidRequestError, ResourceError
from idlm.model.files import replacing
from idlm.training.parallel import ALONE, Parallel

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
# Of documents that come without a part of their own to be held out.
HELDOUT_SHARE = 0.01

# Shorter answers have no place with a target.
MIN_ANSWER = 3

# Rows still open for another document while packing; more pack tighter and take longer.
OPEN_ROWS = 512


def import_pyarrow() -> Any:
    """The library, which only training needs.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ResourceError(
            "Training data is kept as parquet, which needs pyarrow; install the extra: "
            "pip install 'idlm[train]'."
        ) from error
    return pyarrow


@dataclass(frozen=True)
class Document:
    """One text of the base model.

    Attributes:
        token_ids: the whole text.
        answers: ``(start, end)`` of each answer, end exclusive, the end-of-turn token included.
        temperature: that the answers were sampled at; 0: greedy.
        truncated: the last answer was cut by the length limit.
    """

    token_ids: Sequence[int]
    answers: Sequence[tuple[int, int]]
    temperature: float
    truncated: bool


def write_shard(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as one parquet file (zstd), atomically."""
    pa = import_pyarrow()
    rows = list(documents)
    table = pa.table(
        {
            "token_ids": pa.array([d.token_ids for d in rows], pa.list_(pa.int32())),
            "answer_spans": pa.array(
                [[i for span in d.answers for i in span] for d in rows], pa.list_(pa.int32())
            ),
            "temperature": pa.array([d.temperature for d in rows], pa.float32()),
            "truncated": pa.array([d.truncated for d in rows], pa.bool_()),
        }
    )
    with replacing(path) as temporary:
        pa.parquet.write_table(table, temporary, compression="zstd", compression_level=9)


@dataclass(frozen=True)
class Corpus:
    """Documents, flat in memory.

    Attributes:
        tokens: all token ids, int32.
        offsets: document ``d`` is ``tokens[offsets[d] : offsets[d + 1]]``, int64.
        spans: ``[spans, 2]`` answers, counted from the start of their document, int64.
        span_offsets: the spans of document ``d``, as ``offsets``.
        temperatures: one per document, float32.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    span_offsets: np.ndarray
    temperatures: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Corpus:
        """Documents that come one by one."""
        tokens, spans, temperatures = [], [], []
        for document in documents:
            tokens.append(np.asarray(document.token_ids, np.int32))
            spans.append(np.asarray(document.answers, np.int64).reshape(-1, 2))
            temperatures.append(document.temperature)
        return cls(
            np.concatenate([np.zeros(0, np.int32), *tokens]),
            np.cumsum([0, *map(len, tokens)]),
            np.concatenate([np.zeros((0, 2), np.int64), *spans]),
            np.cumsum([0, *map(len, spans)]),
            np.array(temperatures, np.float32),
        )

    @classmethod
    def read(cls, folder: Path, split: str) -> Corpus:
        """All shards ``<split>-*.parquet`` of a folder.

        Raises:
            InvalidRequestError: no shard, a damaged one, or spans outside their document.
        """
        pa = import_pyarrow()
        paths = sorted(folder.glob(f"{split}-*.parquet"))
        if not paths:
            raise InvalidRequestError(
                f"No {split}-*.parquet in {folder}; make the data with `idlm synthesize MODEL "
                f"-o {folder}`."
            )
        try:
            table = pa.concat_tables([pa.parquet.read_table(p) for p in paths]).combine_chunks()
            tokens, offsets = _flatten(table["token_ids"])
            spans, span_offsets = _flatten(table["answer_spans"])
            temperatures = table["temperature"].to_numpy().astype(np.float32)
        except (pa.ArrowException, KeyError, OSError) as error:
            raise InvalidRequestError(
                f"The shards in {folder} are damaged or of another format ({error}); make them "
                "again with `idlm synthesize`."
            ) from error
        corpus = cls(
            tokens.astype(np.int32),
            offsets,
            spans.astype(np.int64).reshape(-1, 2),
            span_offsets // 2,
            temperatures,
        )
        corpus.check(folder)
        return corpus

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def select(self, keep: np.ndarray) -> Corpus:
        """The documents where ``keep`` (bool, one per document) holds; at least one."""
        chosen = np.flatnonzero(keep)
        tokens = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        spans = [self.answers(int(i)) for i in chosen]
        return Corpus(
            np.concatenate(tokens),
            np.cumsum([0, *map(len, tokens)]),
            np.concatenate(spans),
            np.cumsum([0, *map(len, spans)]),
            self.temperatures[chosen],
        )

    def document(self, index: int) -> Document:
        """Document ``index``; whether it was truncated is not kept in memory."""
        token_ids = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        answers = [(int(a), int(b)) for a, b in self.answers(index)]
        return Document(token_ids.tolist(), answers, float(self.temperatures[index]), False)

    def answers(self, index: int) -> np.ndarray:
        """``[n, 2]`` answer spans of a document."""
        return self.spans[self.span_offsets[index] : self.span_offsets[index + 1]]

    def check(self, path: Path) -> None:
        """Refuse documents (from ``path``) that nothing can be trained on.

        Raises:
            InvalidRequestError: spans outside their document, or no answer of `MIN_ANSWER` tokens.
        """
        ends = np.repeat(self.lengths, np.diff(self.span_offsets))
        starts = self.spans[:, 0]
        if (starts < 1).any() or (self.spans[:, 1] > ends).any():
            raise InvalidRequestError(
                f"An answer span in {path} lies outside its document; make the data again."
            )
        if len(self.spans) == 0 or (self.spans[:, 1] - starts).max() < MIN_ANSWER:
            raise InvalidRequestError(
                f"No document in {path} has an answer of {MIN_ANSWER} tokens or more, so there is "
                "nothing to train on; give data with longer answers."
            )


@dataclass(frozen=True)
class Batch:
    """Packed rows, on any device; ``T`` tokens and ``A`` anchors per row.

    Attributes:
        tokens_BT: token ids, int64; 0 in the padding.
        positions_BT: position inside the document, int64.
        documents_BT: index in the row at which the token's document begins, int64; padding is
            one document of its own.
        answers_BT: whether the token belongs to an answer, bool.
        anchors_BA: index of the anchor in the row, ascending, int64.
        places_BA: places of the anchor's block that have a target, int64; 0: unused anchor.
    """

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    documents_BT: torch.Tensor
    answers_BT: torch.Tensor
    anchors_BA: torch.Tensor
    places_BA: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, copied without waiting."""
        tensors = [getattr(self, name) for name in self.__dataclass_fields__]
        if device.type == "cuda":
            tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        return Batch(*tensors)

    def split(self, parts: int) -> list[Batch]:
        """``parts`` batches of equally many rows."""
        tensors = [getattr(self, name).chunk(parts) for name in self.__dataclass_fields__]
        return [Batch(*part) for part in zip(*tensors, strict=True)]


class Loader:
    """Batches as a pure function of the step, so that a run can be resumed anywhere.

    Every epoch shuffles the documents and packs them into rows of ``length`` tokens. Anchors are
    drawn at random from the answers of a row, or (not ``spread``) are its first ones without gaps.

    Raises:
        InvalidRequestError: a document is longer than a row.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch: int,
        length: int,
        anchors: int,
        block_size: int,
        seed: int,
        spread: bool = True,
        parallel: Parallel = ALONE,
    ) -> None:
        longest = int(corpus.lengths.max())
        if longest > length:
            raise InvalidRequestError(
                f"The longest document has {longest} tokens, a row only {length}; set length to "
                f"{longest} or more."
            )
        self.corpus, self.seed, self.parallel = corpus, seed, parallel
        self.batch_size, self.length = batch, length
        self.anchors, self.block_size, self.spread = anchors, block_size, spread
        self._epoch = 0
        self._rows = self._pack(0)
        # The same for every epoch, whatever its packing gives, so that steps map to epochs.
        self.batches_per_epoch = max(1, len(self._rows) // batch)

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that is padding."""
        return 1.0 - len(self.corpus.tokens) / (len(self._rows) * self.length)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step, on the CPU."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._pack(epoch)
        first = index * self.batch_size
        return _stack(
            [
                self._row(
                    self._rows[(first + i) % len(self._rows)],
                    np.random.default_rng((self.seed, 1, step, i)),
                )
                for i in self.parallel.share(self.batch_size)
            ]
        )

    def _pack(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, 0, epoch))
        rows = pack(self.corpus.lengths, rng.permutation(len(self.corpus)), self.length)
        return [rows[i] for i in rng.permutation(len(rows))]

    def _row(self, documents: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
        corpus, T = self.corpus, self.length
        tokens, positions, starts = np.zeros((3, T), np.int64)
        answers = np.zeros(T, np.bool_)
        candidates, ends = [], []
        at = 0
        for document in documents:
            begin, end = corpus.offsets[document : document + 2]
            n = end - begin
            tokens[at : at + n] = corpus.tokens[begin:end]
            positions[at : at + n] = np.arange(n)
            starts[at : at + n] = at
            for first, last in corpus.answers(document):
                answers[at + first : at + last] = True
                span = np.arange(at + first - 1, at + last - 2)
                candidates.append(span)
                ends.append(np.full(len(span), at + last))
            at += n
        starts[at:] = at
        candidate, end = np.concatenate(candidates), np.concatenate(ends)
        chosen = np.arange(min(len(candidate), self.anchors))
        if self.spread:
            chosen = np.sort(rng.permutation(len(candidate))[: self.anchors])
        anchors, places = np.zeros((2, self.anchors), np.int64)
        anchors[: len(chosen)] = candidate[chosen]
        places[: len(chosen)] = np.minimum(
            end[chosen] - 2 - anchors[: len(chosen)], self.block_size
        )
        return [tokens, positions, starts, answers, anchors, places]


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Documents into rows of ``capacity`` tokens: best fit among the open rows.

    Args:
        lengths: tokens of each document, none above ``capacity``.
        order: the documents to pack, in this order.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for document in order.tolist():
        n = int(lengths[document])
        at = bisect.bisect_left(open_rows, (n, -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
            if len(open_rows) >= OPEN_ROWS:
                open_rows.pop(0)
        rows[row].append(document)
        bisect.insort(open_rows, (free - n, row))
    return rows


def _stack(rows: list[list[np.ndarray]]) -> Batch:
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _flatten(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column, rebased to begin at 0."""
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    if hasattr(array, "chunk"):
        array = array.chunk(0)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.flatten().to_numpy(), offsets - offsets[0]
