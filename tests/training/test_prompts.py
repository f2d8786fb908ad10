"""Synthesis from a user's prompts."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from idlm.errors import InvalidRequestError
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training import synthesis
from idlm.training.data import Corpus, Document
from idlm.training.prompts import read_prompts
from idlm.training.sampler import Limits, Script
from idlm.training.scripts import PromptWriter
from idlm.training.seeds import SYSTEM_PROMPTS
from idlm.training.synthesis import SynthesisConfig, synthesize
from tests.support.tiny import tiny_tokenizer
from tests.training.test_conversation import conversation

SYSTEM_MESSAGES: list[list[dict[str, str]]] = [
    [],
    *([{"role": "system", "content": text}] for text in SYSTEM_PROMPTS),
]
LIMITS = Limits(length=120, user=20, answer=30)


def test_prompts_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Why?\n\n  Tell me. \nWhy?\n")
    assert read_prompts(path) == tuple(tuple(conversation(t)) for t in ("Why?", "Tell me."))


def test_prompts_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    several = conversation("Why?", "So.", "And?", "Well.", system="Be kind.")
    path.write_text(f'{{"prompt": "Why\\nnot?"}}\n{json.dumps({"messages": several})}\n')
    assert read_prompts(path) == (tuple(conversation("Why\nnot?")), tuple(several[:-1]))


def test_bad_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", b"Why?", r"no \.txt or \.jsonl file"),
        ("a.txt", b" \n", "There are no prompts in .*give one a line"),
        ("b.txt", b"\xff\xfe", r"b\.txt cannot be read"),
        ("c.jsonl", b'{"text": "Why?"}', "Line 1 of .* has 'text', and neither 'prompt' nor"),
        ("d.jsonl", b'{"prompt": 3}', "Line 1 of .* has no user turn, or one that is not text"),
        ("e.jsonl", b'{"messages": [{"role": "system", "content": "x"}]}', "has no user turn"),
        ("f.jsonl", b'{"messages": ["Why?"]}', "has no user turn"),
        ("g.jsonl", b"Why?", "Line 1 of .* is not JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidRequestError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(InvalidRequestError, match=r"gone\.txt cannot be read"):
        read_prompts(tmp_path / "gone.txt")


def prompts(*texts: str) -> tuple[tuple[dict[str, str], ...], ...]:
    return tuple(tuple(conversation(text)) for text in texts)


def scripts(writer: PromptWriter, count: int) -> list[Script]:
    return list(itertools.islice(writer, count))


def test_all_prompts_are_answered_before_any_is_repeated(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path))
    texts = [f"Why {i}?" for i in range(8)]
    writer = PromptWriter(prompts(*texts), tokenizer, (2,), (0,), length=200)
    drawn = scripts(writer, 400)
    for start in range(0, 400, 8):
        said = {script.source for script in drawn[start : start + 8]}
        assert len(said) == 8
    # Every prefix is what the chat template makes of the prompt, with or without a system message.
    expected = {
        tuple(tokenizer.apply_chat_template([*system, *conversation(text)]))
        for text in texts
        for system in SYSTEM_MESSAGES
    }
    prefixes = {script.prefix for script in drawn}
    assert prefixes <= expected and len(prefixes) > 20
    assert {script.temperature for script in drawn} == {0.0, 0.7, 1.0}
    greedy = [script.prefix for script in drawn if script.temperature == 0]
    assert len(greedy) == len(set(greedy))
    assert all(script.answering and script.more_turns == 0 for script in drawn)


def test_a_prompt_keeps_its_own_system_message_and_earlier_turns(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path))
    own = tuple(conversation("Why?", "So.", "And?", system="Be kind."))
    writer = PromptWriter([own], tokenizer, (2,), (0,), length=200)
    assert {s.prefix for s in scripts(writer, 50)} == {tuple(tokenizer.apply_chat_template(own))}


def test_prompts_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path))
    writer = PromptWriter(prompts("Why?", "long " * 60), tokenizer, (2,), (0,), length=100)
    assert writer.counts == {"prompts left out: longer than 68 tokens": 1}
    assert max(len(s.prefix) for s in scripts(writer, 50)) <= 68
    with pytest.raises(InvalidRequestError, match=r"None of the prompts .*longer than 8 tokens"):
        PromptWriter(prompts("Why?"), tokenizer, (2,), (0,), length=40)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    base = Tokenizer.load(tmp_path)
    (script,) = scripts(PromptWriter(prompts("The fox"), base, (2,), (0,), length=100), 1)
    assert script.prefix == tuple(base.encode("The fox"))
    with pytest.raises(InvalidRequestError, match="needs a model with a chat template"):
        PromptWriter([tuple(conversation("a", "b", "c"))], base, (2,), (0,), length=100)


def say_only(decoder: Decoder, token_id: int) -> None:
    def logits(hidden: torch.Tensor) -> torch.Tensor:
        z = hidden.new_zeros(*hidden.shape[:-1], decoder.config.vocab_size)
        z[..., token_id] = 50.0
        return z

    vars(decoder)["logits"] = logits


def test_the_model_writes_the_answers_only(
    decoder: Decoder, model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(model_dir)
    given = prompts(*(f"Tell me about the fox number {i}." for i in range(12)))
    config = SynthesisConfig(4000, slots=16, limits=LIMITS, prompts=given)
    counts = synthesize(decoder, tokenizer, tmp_path, config)
    assert counts["tokens"] >= 4000 > 12 * LIMITS.length  # prompts had to be repeated
    parts: list[list[Document]] = []
    for split in ("train", "heldout"):
        corpus = Corpus.read(tmp_path, split)
        parts.append([corpus.document(i) for i in range(len(corpus))])
    # All answers to a prompt are in one part.
    numbers = [
        {re.findall(r"number (\d+)\.", tokenizer.decode(d.token_ids))[0] for d in part}
        for part in parts
    ]
    assert numbers[1] and numbers[0].isdisjoint(numbers[1])
    documents = parts[0] + parts[1]
    texts = set()
    for document in documents:
        ((start, end),) = document.answers
        assert end == len(document.token_ids)
        assert any(
            tuple(tokenizer.apply_chat_template([*system, *prompt]))
            == tuple(document.token_ids[:start])
            for prompt in given
            for system in SYSTEM_MESSAGES
        )
        texts.add((tuple(document.token_ids), document.temperature))
    assert len(texts) == len(documents)
    assert {round(t, 2) for _, t in texts} >= {0.7, 1.0}


def test_a_model_without_anything_new_to_say_is_not_asked_for_ever(
    decoder: Decoder, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_only(decoder, 7)
    monkeypatch.setattr(synthesis, "FRUITLESS", 2)
    config = SynthesisConfig(
        100_000, slots=16, limits=Limits(80, 20, 10), prompts=prompts("Why?", "So?")
    )
    counts = synthesize(decoder, Tokenizer.load(model_dir), tmp_path, config)
    assert counts["stopped: conversations without anything new"] >= 2 * 16
    assert 0 < counts["documents"] <= 2 * len(SYSTEM_MESSAGES) * 3


def test_nothing_that_can_be_kept(
    decoder: Decoder, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_only(decoder, 2)  # the end of the turn
    monkeypatch.setattr(synthesis, "FRUITLESS", 1)
    config = SynthesisConfig(1000, slots=8, limits=Limits(80, 20, 10), prompts=prompts("Why?"))
    with pytest.raises(InvalidRequestError, match="Nothing that the model wrote could be kept"):
        synthesize(decoder, Tokenizer.load(model_dir), tmp_path, config)
    assert not list(tmp_path.iterdir())
