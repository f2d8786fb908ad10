"""Foreign data as documents: every token once, nothing lost without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer
from idlm.training.corpus_reader import read_corpus
from idlm.training.data import Corpus, Document, Loader, write_shard
from tests.support.tiny import tiny_tokenizer
from tests.training.test_conversation import conversation

VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, *records: object) -> Path:
    name = "text" if isinstance(records[0], str) else "messages"
    path.write_text("".join(json.dumps({name: record}) + "\n" for record in records))
    return path


def documents(corpus: Corpus) -> list[Document]:
    return [corpus.document(i) for i in range(len(corpus))]


def test_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [conversation(f"Why {i}?", f"The fox {i}.", "So?", "Yes.") for i in range(300)]
    path = write(tmp_path / "chat.jsonl", *records)
    train, heldout, counts = read_corpus(path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert counts["records"] == counts["documents"] == len(train) + len(heldout) == 300
    assert 1 <= len(heldout) == counts["documents held out"] < 15
    assert counts["tokens"] == len(train.tokens) + len(heldout.tokens)
    given = {d.token_ids[0]: d for d in documents(train) + documents(heldout)}
    assert set(given) == {tokenizer.encode("<|im_start|>")[0]}
    texts = set()
    for document in documents(train) + documents(heldout):
        assert document.temperature == 1.0
        answers = [tokenizer.decode(document.token_ids[a:b]) for a, b in document.answers]
        assert len(answers) == 2 and answers[1] == "Yes."
        texts.add(answers[0])
    assert texts == {f"The fox {i}." for i in range(300)}
    # The same documents are held out if there are more of them.
    path = write(tmp_path / "more.jsonl", *records, *[conversation("?", str(i)) for i in range(99)])
    _, more, _ = read_corpus(path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert {tuple(d.token_ids) for d in documents(heldout)} <= {
        tuple(d.token_ids) for d in documents(more)
    }


@given(
    texts=st.lists(st.text("abc d\n", min_size=2, max_size=80), min_size=2, max_size=6),
    length=st.integers(4, 30),
)
def test_every_token_of_a_text_is_trained_on_once(
    texts: list[str], length: int, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in enumerate(texts):
        (folder / f"{name}.txt").write_text(text)
    ids = [tokenizer.encode(path.read_text()) for path in sorted(folder.iterdir())]
    if max(map(len, ids)) < 5:
        return
    try:
        train, heldout, counts = read_corpus(
            folder, tokenizer, length=length, vocab_size=VOCABULARY
        )
    except InvalidRequestError as error:  # all that is left for one of the parts is too short
        assert "3 tokens or more" in str(error) or "one document" in str(error)
        return
    found = documents(train) + documents(heldout)
    assert all(len(d.token_ids) <= length for d in found)
    trained = sorted(token for d in found for a, b in d.answers for token in d.token_ids[a:b])
    assert trained == sorted(token for text in ids for token in text[1:])
    assert counts["texts split"] == sum(len(text) > length for text in ids)
    assert counts["dropped: text of less than 2 tokens"] == sum(len(text) < 2 for text in ids)


def test_pieces_of_a_text_follow_each_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 9
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer.encode(text)
    train, heldout, _ = read_corpus(tmp_path, tokenizer, length=20, vocab_size=VOCABULARY)
    # A single text has its end held out.
    pieces = [d.token_ids for d in documents(train) + documents(heldout)]
    assert len(heldout) == 1 and len(pieces) > 4
    assert [*pieces[0], *(token for piece in pieces[1:] for token in piece[1:])] == ids
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_parts_of_a_data_set_stay_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[f"The fox number {i}." for i in range(9)])
    write(tmp_path / "validation.jsonl", "The hen in the garden.")
    write(tmp_path / "test.jsonl", "The sun.")
    (tmp_path / "notes.txt").write_text("Not data.")
    train, heldout, counts = read_corpus(tmp_path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert len(train) == 9
    assert tokenizer.decode(heldout.document(0).token_ids) == "The hen in the garden."
    assert counts["not used: test"] == counts["not used: notes.txt"] == 1


def test_what_does_not_fit_or_has_no_answer_is_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = "The quick brown fox jumps over the lazy dog. " * 5
    path = write(
        tmp_path / "chat.jsonl",
        *[conversation(f"Why {i}?", "The fox jumps.") for i in range(20)],
        conversation("Why?", "The fox.", "And?", long),
        conversation(long, "The fox."),
        conversation("Why?"),
        conversation("Why?", "The sun.", "So?"),
        [{"role": "assistant", "content": "Hello."}],
        conversation("\ud800", "x"),
        None,
    )
    train, heldout, counts = read_corpus(path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert max(train.lengths.max(), heldout.lengths.max()) == 64
    ids = tokenizer.apply_chat_template(conversation("Why?", "The fox.", "And?", long), False)
    over = len(ids) - 1 - 64  # without the line break after the last turn
    question = tokenizer.apply_chat_template(conversation(long, "The fox."), False)
    assert {name: n for name, n in counts.items() if "token" not in name} == {
        "records": 27,
        "documents": 22,
        "conversations cut": 1,
        "conversations with turns after the last answer, left out": 1,
        "documents held out": len(heldout),
        "dropped: no answer": 2,
        "dropped: question longer than a row": 1,
        "dropped: The conversation begins with an answer": 1,
        "dropped: The text is not valid Unicode": 1,
    }
    assert counts["tokens cut off"] == over
    assert counts["tokens dropped"] == len(question) - 1


def test_fields_that_a_message_does_not_have(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In a column all messages have the same fields, some of them empty."""
    records = [
        [{**m, "name": None, "tool_calls": None} for m in conversation(f"Why {i}?", "The fox.")]
        for i in range(9)
    ]
    records.append([{"role": "user", "content": "?"}, {"role": "assistant", "content": None}])
    pq.write_table(pa.table({"messages": records}), tmp_path / "a.parquet")
    train, heldout, counts = read_corpus(tmp_path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert len(train) + len(heldout) == 9
    assert counts["dropped: Message 1 has no 'content'"] == 1


def test_shards_are_taken_as_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = [Document([9, i % 7, 1, 2, 3], [(1, 5)], 0.7, False) for i in range(400)]
    write_shard(tmp_path / "train-00000.parquet", shard)
    train, heldout, _ = read_corpus(tmp_path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert len(train) + len(heldout) == 400 and len(heldout) > 0
    assert {tuple(d.token_ids) for d in documents(train)}.isdisjoint(
        tuple(d.token_ids) for d in documents(heldout)
    )
    write_shard(tmp_path / "heldout-00000.parquet", shard[:3])
    train, heldout, _ = read_corpus(tmp_path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert (len(train), len(heldout)) == (400, 3)
    with pytest.raises(InvalidRequestError, match="token 9, which is not in the model's vocab"):
        read_corpus(tmp_path, tokenizer, length=64, vocab_size=9)
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidRequestError, match="is damaged"):
        read_corpus(tmp_path, tokenizer, length=64, vocab_size=VOCABULARY)


def test_short_answers_give_no_masks_and_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [conversation("Why?", "") for _ in range(3)]
    path = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(InvalidRequestError, match="3 tokens or more"):
        read_corpus(path, tokenizer, length=64, vocab_size=VOCABULARY)
    write(tmp_path / "train.jsonl", *records, conversation("Why?", "The fox jumps."))
    write(tmp_path / "test.jsonl", conversation("So?", "The hen jumps."))
    path.unlink()
    train, _, counts = read_corpus(tmp_path, tokenizer, length=64, vocab_size=VOCABULARY)
    assert len(train) == 4
    assert counts["documents without an answer of 3 tokens: no masks"] == 3
    batch = Loader(train, batch=1, length=128, anchors=32, block_size=3, seed=0).batch(0)
    assert 0 < int((batch.places_BA > 0).sum()) < 32


def test_nothing_to_train_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, message in (
        ("", r"Nothing in .*a\.jsonl can be trained on: it is empty; give texts"),
        ('{"messages": []}\n', r"can be trained on: dropped: no answer \(1\), records \(1\)"),
        ('{"text": ""}\n', r"dropped: text of less than 2 tokens \(1\)"),
        ('{"text": "The fox jumps over."}\n', "gives one document.*give more data"),
    ):
        path.write_text(content)
        with pytest.raises(InvalidRequestError, match=f"(?s){message}"):
            read_corpus(path, tokenizer, length=64, vocab_size=VOCABULARY)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    path = write(tmp_path / "chat.jsonl", conversation("Why?", "So."))
    with pytest.raises(InvalidRequestError, match=r"the model has no chat template.*plain texts"):
        read_corpus(path, Tokenizer.load(folder), length=64, vocab_size=VOCABULARY)
