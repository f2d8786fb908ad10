"""Synthetic documents: form, sampling, filters and resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from idlm.errors import InvalidRequestError
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import load_decoder
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training.data import Corpus
from idlm.training.sampler import USER_MIN_P, Limits, Script, _choose
from idlm.training.seeds import SYSTEM_PROMPTS
from idlm.training.synthesis import SynthesisConfig, is_loop, read_document, synthesize
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


@torch.no_grad()
def test_greedy_answers_are_greedy_decoding(decoder: Decoder, data_dir: Path) -> None:
    (corpus, _) = both(data_dir)
    greedy = np.flatnonzero(corpus.temperatures == 0)
    assert 0.2 < len(greedy) / len(corpus) < 0.7
    wrong = []
    for index in map(int, greedy[:10]):
        document = corpus.document(index)
        positions = torch.arange(len(document.token_ids))[None]
        tokens = torch.tensor([document.token_ids])
        hidden = decoder(tokens, positions, CausalAttention(positions))[0]
        best = decoder.logits(hidden).argmax(-1)
        for start, end in document.answers:
            assert torch.equal(best[start - 1 : end - 1], tokens[0, start:end])
            wrong.append(0)
    assert len(wrong) >= 10
    sampled = corpus.document(int(np.flatnonzero(corpus.temperatures == 1)[0]))
    start, end = sampled.answers[0]
    positions = torch.arange(end)[None]
    tokens = torch.tensor([sampled.token_ids[:end]])
    best = decoder.logits(decoder(tokens, positions, CausalAttention(positions))[0]).argmax(-1)
    assert not torch.equal(best[start - 1 : end - 1], tokens[0, start:end])


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
        config = SynthesisConfig(tokens=1000, seed=seed, slots=8, limits=LIMITS)
        synthesize(decoder, tokenizer, tmp_path / name, config)
        texts.append(Corpus.read(tmp_path / name, "train").tokens.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_a_folder_is_continued(decoder: Decoder, model_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    for tokens in (1000, 2500):
        config = SynthesisConfig(tokens=tokens, slots=8, limits=LIMITS)
        counts = synthesize(decoder, tokenizer, tmp_path, config)
    first, *more = sorted(tmp_path.glob("train-*.parquet"))
    assert more
    total = sum(len(Corpus.read(tmp_path, s).tokens) for s in ("train", "heldout"))
    assert total == counts["tokens"] >= 2500
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


def test_documents_must_fit_the_context(decoder: Decoder, model_dir: Path, tmp_path: Path) -> None:
    config = SynthesisConfig(tokens=10, limits=Limits(length=4096))
    with pytest.raises(InvalidRequestError, match="--max-length"):
        synthesize(decoder, Tokenizer.load(model_dir), tmp_path, config)
