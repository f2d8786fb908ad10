"""Shards, packing and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm.errors import InvalidRequestError
from idlm.training.data import Corpus, Document, Loader, pack, write_shard

DOCUMENTS = [
    Document([9, 8, 7, 1, 2, 3, 4, 5], [(3, 8)], 0.0, False),
    Document([9, 1, 2, 3, 8, 8, 4, 5, 6, 7], [(1, 4), (6, 10)], 1.0, True),
    Document([9, 1, 2], [(1, 3)], 0.7, False),
]


def write(folder: Path) -> Corpus:
    write_shard(folder / "train-00000.parquet", DOCUMENTS[:2])
    write_shard(folder / "train-00001.parquet", DOCUMENTS[2:])
    return Corpus.read(folder, "train")


def test_shards_round_trip(tmp_path: Path) -> None:
    corpus = write(tmp_path)
    assert len(corpus) == 3
    for index, document in enumerate(DOCUMENTS):
        read = corpus.document(index)
        assert (read.token_ids, read.answers) == (document.token_ids, document.answers)
        assert read.temperature == pytest.approx(document.temperature)
    part = corpus.select(corpus.temperatures > 0.5)
    assert [part.document(i).answers for i in range(2)] == [d.answers for d in DOCUMENTS[1:]]


def test_every_answer_token_after_the_first_has_its_blocks(tmp_path: Path) -> None:
    """The first anchor is the last token before the answer, and no target lies outside."""
    block = 3
    loader = Loader(write(tmp_path), batch=1, length=32, anchors=12, block_size=block, seed=0)
    batch = loader.batch(0)
    tokens, anchors, places = batch.tokens_BT[0], batch.anchors_BA[0], batch.places_BA[0]
    used = anchors[places > 0].tolist()
    assert used == sorted(set(used))
    blocks = {
        tuple(tokens[b + 1 : b + 2 + n].tolist())
        for b, n in zip(used, places.tolist(), strict=False)
    }
    # Per anchor: the token that the model samples itself, then the targets of its masks.
    expected = {(1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5), (4, 5)}
    expected |= {(1, 2, 3), (2, 3), (4, 5, 6, 7), (5, 6, 7), (6, 7)}
    assert blocks | {(1, 2)} == expected | {(1, 2)}


def test_batches_are_a_function_of_the_step(tmp_path: Path) -> None:
    corpus = write(tmp_path)
    options: dict[str, Any] = {"batch": 2, "length": 12, "anchors": 4, "block_size": 3, "seed": 5}
    ahead, again = Loader(corpus, **options), Loader(corpus, **options)
    batches = [ahead.batch(step) for step in range(6)]
    for step in (4, 1):
        for name in batches[0].__dataclass_fields__:
            assert (getattr(again.batch(step), name) == getattr(batches[step], name)).all()


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    capacity=st.integers(20, 50),
    seed=st.integers(0, 100),
)
def test_packing_keeps_every_document_once(lengths: list[int], capacity: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack(np.array(lengths), order, capacity)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    sizes = [sum(lengths[d] for d in row) for row in rows]
    assert max(sizes) <= capacity
    # Best fit leaves at most one row less than half full.
    assert sum(size * 2 <= capacity for size in sizes) <= 1


def test_positions_and_documents_restart(tmp_path: Path) -> None:
    batch = Loader(write(tmp_path), batch=1, length=32, anchors=1, block_size=3, seed=0).batch(0)
    starts, positions = batch.documents_BT[0], batch.positions_BT[0]
    real = sum(len(d.token_ids) for d in DOCUMENTS)
    assert (starts[:real] + positions[:real]).tolist() == list(range(real))
    assert starts[real:].tolist() == [real] * (32 - real)
    assert len(set(starts.tolist())) == 4


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="idlm synthesize"):
        Corpus.read(tmp_path, "train")
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidRequestError, match="damaged"):
        Corpus.read(tmp_path, "train")
    write_shard(tmp_path / "train-00000.parquet", [Document([1, 2, 3], [(1, 5)], 0.0, False)])
    with pytest.raises(InvalidRequestError, match="outside"):
        Corpus.read(tmp_path, "train")
    write_shard(tmp_path / "train-00000.parquet", [Document([1, 2, 3], [], 0.0, False)])
    with pytest.raises(InvalidRequestError, match="nothing to train on"):
        Corpus.read(tmp_path, "train")
    corpus = write(tmp_path)
    with pytest.raises(InvalidRequestError, match="length"):
        Loader(corpus, batch=1, length=9, anchors=1, block_size=3, seed=0)
