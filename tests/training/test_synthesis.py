"""Synthetic documents: form, sampling, filters and resumption."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from idlm.errors import InvalidRequestError
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import load_decoder
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training.data import Corpus, Document
from idlm.training.sampler import USER_MIN_P, BatchSampler, Limits, Script, _choose
from idlm.training.seeds import SYSTEM_PROMPTS
from idlm.training.synthesis import (
    Collector,
    SynthesisConfig,
    is_loop,
    read_document,
    synthesize,
    user_turns,
)
from idlm.training.template import ChatPieces
from tests.support.tiny import tiny_model
from tests.training.conftest import LIMITS


def both(data_dir: Path) -> list[Corpus]:
    return [Corpus.read(data_dir, split) for split in ("train", "heldout")]


def test_documents_parse_back_into_template_and_answers(model_dir: Path, data_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    pieces = ChatPieces.of(tokenizer, SYSTEM_PROMPTS, (2,))
    assert tokenizer.decode(pieces.to_answer, skip_special_tokens=False) == (
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = set()
    for corpus in both(data_dir):
        for index in range(len(corpus)):
            document = corpus.document(index)
            ids = list(document.token_ids)
            prefixes = [p for p in pieces.prefixes if ids[: len(p)] == list(p)]
            assert prefixes
            at = max(map(len, prefixes))
            for number, (start, end) in enumerate(document.answers):
                assert tuple(ids[start - len(pieces.to_answer) : start]) == pieces.to_answer
                assert ids.index(pieces.to_answer[0], at) == start - len(pieces.to_answer)
                assert 1 <= end - start <= LIMITS.answer
                assert pieces.to_user[0] not in ids[start : end - 1]
                if number + 1 < len(document.answers):
                    assert tuple(ids[end - 1 :][: len(pieces.to_user)]) == pieces.to_user
                    at = end - 1 + len(pieces.to_user)
            assert end == len(ids) <= LIMITS.length
            turns.add(len(document.answers))
    assert turns == {1, 2}


def greedy_continuation(decoder: Decoder, prefix: Sequence[int], count: int) -> list[int]:
    ids = list(prefix)
    for _ in range(count):
        positions = torch.arange(len(ids))[None]
        hidden = decoder(torch.tensor([ids]), positions, CausalAttention(positions))
        ids.append(int(decoder.logits(hidden[0, -1]).argmax()))
    return ids[len(prefix) :]


@torch.no_grad()
def test_greedy_answers_are_greedy_decoding(decoder: Decoder) -> None:
    """Slots of different lengths, restarted at different times, beside sampled ones."""
    sampler = BatchSampler(decoder, (), (), [2], slots=4, limits=Limits(40, 10, 20), seed=0)
    scripts = (
        Script(tuple(range(5, 8 + i % 6)), True, 0, temperature=(i % 3) / 2, user_temperature=1.0)
        for i in itertools.count()
    )
    ended = [pair for group in itertools.islice(sampler.run(scripts), 12) for pair in group]
    greedy = [(s, ids) for s, ids in ended if s.temperature == 0]
    assert len(greedy) >= 4 and len({len(s.prefix) for s, _ in greedy}) >= 2
    for script, ids in greedy:
        answer = ids[len(script.prefix) :]
        assert tuple(ids[: len(script.prefix)]) == script.prefix
        assert answer == greedy_continuation(decoder, script.prefix, len(answer))
        assert len(answer) == 20 or answer[-1] == 2
    sampled = next((s, ids) for s, ids in ended if s.temperature == 1)
    answer = sampled[1][len(sampled[0].prefix) :]
    assert answer != greedy_continuation(decoder, sampled[0].prefix, len(answer))


def test_noise_gives_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    n = 20_000
    noise = torch.empty(n, 4).exponential_()
    everywhere = torch.ones(n)
    for temperature in (0.7, 1.0):
        chosen = _choose(logits.expand(n, 4), noise, temperature * everywhere, everywhere < 0)
        shares = torch.bincount(chosen, minlength=4) / n
        assert (shares - (logits / temperature).softmax(-1)).abs().max() < 0.015
    greedy = _choose(logits.expand(n, 4), noise, 0 * everywhere, everywhere < 0)
    assert greedy.unique().tolist() == [0]
    floored = _choose(logits.expand(n, 4), noise, everywhere, everywhere > 0)
    ratios = logits.softmax(-1) / logits.softmax(-1).max()
    assert floored.unique().tolist() == (ratios >= USER_MIN_P).nonzero()[:, 0].tolist()


def test_another_seed_writes_other_documents_and_the_same_seed_the_same(
    decoder: Decoder, model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(model_dir)
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = SynthesisConfig(tokens=500, seed=seed, slots=16, limits=LIMITS)
        synthesize(decoder, tokenizer, tmp_path / name, config)
        texts.append(Corpus.read(tmp_path / name, "train").tokens.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_a_folder_is_continued(decoder: Decoder, model_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    for tokens in (500, 1000):
        config = SynthesisConfig(tokens=tokens, slots=16, limits=LIMITS)
        counts = synthesize(decoder, tokenizer, tmp_path, config)
    assert len(list(tmp_path.glob("train-*.parquet"))) == 2
    total = sum(len(Corpus.read(tmp_path, s).tokens) for s in ("train", "heldout"))
    assert total == counts["tokens"] >= 1000
    corpus = Corpus.read(tmp_path, "train")
    texts = {tuple(corpus.document(i).token_ids) for i in range(len(corpus))}
    assert len(texts) == len(corpus)


def test_plain_text_without_a_chat_template(model_dir: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    decoder = load_decoder(folder, device="cpu", dtype=torch.float32)
    config = SynthesisConfig(tokens=500, slots=8, limits=Limits(60, 10, 40))
    synthesize(decoder, Tokenizer.load(folder), tmp_path / "data", config)
    corpus = Corpus.read(tmp_path / "data", "train")
    for index in range(len(corpus)):
        (start, end), *_ = corpus.answers(index)
        assert 0 < start < 20
        assert end == corpus.lengths[index]


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        (list(range(100)), False),
        ([5] * 100, True),
        (list(range(20)) * 5, True),
        (list(range(60)) + list(range(30)), False),
        ([1] * 12, False),
    ],
)
def test_loops(ids: list[int], loop: bool) -> None:
    assert is_loop(ids) is loop


def test_unfinished_user_turn_is_cut_and_truncation_recorded() -> None:
    pieces = ChatPieces(((7,),), to_answer=(2, 8), to_user=(2, 9), stop_ids=frozenset({2}))
    script = Script((7,), False, 1, 1.0, 0.9)
    document = read_document(script, [7, 30, 2, 8, 31, 32, 2, 9, 33], pieces, pieces.stop_ids)
    assert document is not None
    assert (document.token_ids, document.answers) == ([7, 30, 2, 8, 31, 32, 2], [(4, 7)])
    assert not document.truncated
    document = read_document(script, [7, 30, 2, 8, 31, 32], pieces, pieces.stop_ids)
    assert document is not None and document.truncated and document.answers == [(4, 6)]
    assert read_document(script, [7, 30, 31], pieces, pieces.stop_ids) is None


def test_later_user_turns_are_looked_at_too(tmp_path: Path) -> None:
    pieces = ChatPieces(((7,),), to_answer=(2, 8), to_user=(2, 9), stop_ids=frozenset({2}))
    script = Script((7, 20), False, 1, 1.0, 0.9)
    answers = [31, 32, 33, 2]
    for second, reason in (
        ([40, 41], "documents"),
        ([40, 5], "dropped: special token in a user turn"),
        ([], "dropped: empty user turn"),
    ):
        ids = [7, 20, 30, 2, 8, *answers, 9, *second, 2, 8, *answers]
        document = read_document(script, ids, pieces, pieces.stop_ids)
        assert document is not None and len(document.answers) == 2
        turns = user_turns(script, document, pieces)
        assert turns == [[30], second]
        collector = Collector(tmp_path, frozenset({2, 5, 8, 9}))
        collector.add(document, turns)
        assert collector.counts[reason] == 1
    given = Script((7, 20, 2, 8), True, 0, 1.0, 0.9)
    document = read_document(given, [7, 20, 2, 8, *answers], pieces, pieces.stop_ids)
    assert document is not None and user_turns(given, document, pieces) == [[]]


def test_answers_to_one_prompt_stay_in_one_split(tmp_path: Path) -> None:
    collector = Collector(tmp_path, frozenset(), repeat=True)
    for i in range(3000):
        answer = [i % 100 + 3, i // 100 + 3, 1, 2]
        document = Document([7, *answer], [(1, 5)], 1.0, False)
        collector.add(document, source=str(i % 300))
        collector.add(document, source=str(i % 300))
    assert collector.counts["documents"] == collector.counts["dropped: duplicate"] == 3000
    collector.close()
    parts = []
    for split in ("train", "heldout"):
        corpus = Corpus.read(tmp_path, split)
        documents = [corpus.document(i).token_ids for i in range(len(corpus))]
        parts.append({(ids[1] - 3 + 100 * (ids[2] - 3)) % 300 for ids in documents})
    assert parts[1] and parts[0].isdisjoint(parts[1])
    # A resumed synthesis knows what is there.
    again = Collector(tmp_path, frozenset(), repeat=True)
    again.add(Document([7, 3, 3, 1, 2], [(1, 5)], 1.0, False), source="0")
    assert again.counts["dropped: duplicate"] == 1


def test_documents_must_fit_the_context(decoder: Decoder, model_dir: Path, tmp_path: Path) -> None:
    config = SynthesisConfig(tokens=10, limits=Limits(length=4096))
    with pytest.raises(InvalidRequestError, match="--max-length"):
        synthesize(decoder, Tokenizer.load(model_dir), tmp_path, config)
