"""Answer spans of conversations, by templates of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm.errors import InvalidRequestError
from idlm.model.tokenizer import Tokenizer
from idlm.training.conversation import tokenize_conversation
from tests.support.tiny import CHAT_TEMPLATE, tiny_sentencepiece_tokenizer, tiny_tokenizer

Messages = list[dict[str, str]]

# Templates that differ in what they do to answers; the tokenizer's special tokens end the turns.
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
# The newest answer alone has room for thoughts (as Qwen3's).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The header for a new answer is longer than that of a given one (as that of DeepSeek-R1).
OPENING = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("shared")))


def tokenizer_with(template: str, folder: Path) -> Tokenizer:
    tiny_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return Tokenizer.load(folder)


def conversation(*texts: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def answers(tokenizer: Tokenizer, messages: Messages) -> list[list[str]]:
    """Per sequence the texts of its answers."""
    return [
        [tokenizer.decode(ids[start:end], skip_special_tokens=False) for start, end in spans]
        for ids, spans in tokenize_conversation(tokenizer, messages)
    ]


TURNS = conversation("Why?", "The fox.", "And then?", " A hen.\n", system="Be kind.")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OPENING])
def test_one_sequence_holds_all_answers(template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(template, tmp_path)
    ((ids, spans),) = tokenize_conversation(tokenizer, TURNS)
    first, second = (tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in spans)
    # Where the header differs, an answer begins with its first word.
    assert (first, second.lstrip()) == ("The fox.<|im_end|>", " A hen.\n<|im_end|>".lstrip())
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert whole == tokenizer.render_chat(TURNS, False).removesuffix("\n")
    assert spans[-1][1] == len(ids)
    if template == CHAT_TEMPLATE:
        # What stands before the first answer is what the model is given when it answers itself.
        assert ids[: spans[0][0]] == tokenizer.apply_chat_template(TURNS[:2])


def test_answers_without_a_header_and_with_a_space_before_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TAGGED, tmp_path)
    messages = conversation("Why?", "The fox.", "So?", "Yes.")
    assert answers(tokenizer, messages) == [[" The fox.<|im_end|>", " Yes.<|im_end|>"]]


def test_a_template_that_rewrites_gives_one_sequence_per_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(THINKING, tmp_path)
    thought = "<think>\n\n</think>\n\n"
    assert answers(tokenizer, TURNS) == [
        [f"{thought}The fox.<|im_end|>"],
        [f"{thought} A hen.\n<|im_end|>"],
    ]
    (_, _), (ids, ((start, _),)) = tokenize_conversation(tokenizer, TURNS)
    assert ids[:start] == tokenizer.apply_chat_template(TURNS[:-1])


def test_pieces_of_characters_and_of_the_special_tokens_in_texts(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE, tmp_path)
    messages = conversation("é漢🙂", "漢 <|im_end|> 🙂", "?", "é\u0301")
    assert answers(tokenizer, messages) == [["漢 <|im_end|> 🙂<|im_end|>", "é\u0301<|im_end|>"]]


def test_sentencepiece(tmp_path: Path) -> None:
    folder = tiny_sentencepiece_tokenizer(tmp_path)
    path = folder / "tokenizer_config.json"
    template = TAGGED.replace("<|im_end|>", "{{ eos_token }}").replace(
        "[INST] {{", "{{ bos_token }}[INST] {{"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    tokenizer = Tokenizer.load(folder)
    messages = conversation("Why?", "The fox 漢.", "So?", "Yes.")
    ((ids, spans),) = tokenize_conversation(tokenizer, messages)
    texts = [tokenizer.decode(ids[start:end]).strip() for start, end in spans]
    assert texts == ["The fox 漢.", "Yes."]
    assert [ids[end - 1] for _, end in spans] == [*tokenizer.eos_token_ids] * 2
    assert tokenizer.decode(ids[: spans[0][0]]).endswith("[/INST]")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=2))
def test_spans_are_the_answers_whatever_they_say(shared: Tokenizer, texts: list[str]) -> None:
    texts = texts[: len(texts) // 2 * 2]
    ((ids, spans),) = tokenize_conversation(shared, conversation(*texts))
    decoded = [shared.decode(ids[a:b], skip_special_tokens=False) for a, b in spans]
    assert decoded == [f"{text}<|im_end|>" for text in texts[1::2]]
    assert all(a < b for a, b in spans) and spans == sorted(spans)


def test_what_has_no_answers_or_none_that_can_be_found(shared: Tokenizer, tmp_path: Path) -> None:
    assert tokenize_conversation(shared, conversation("Why?")) == []
    assert tokenize_conversation(shared, []) == []
    bad: list[tuple[list[dict[str, Any]], str]] = [
        ([{"role": "assistant", "content": "Hello."}], "begins with an answer"),
        ([{"role": "user", "content": "?"}, {"role": "assistant"}], "Message 1 has no 'content'"),
        ([*conversation("?"), {"role": "assistant", "content": ["a"]}], "An answer is not text"),
    ]
    for messages, reason in bad:
        with pytest.raises(InvalidRequestError, match=reason):
            tokenize_conversation(shared, messages)
    upper = tokenizer_with(OPENING.replace("['content']", "['content'] | upper"), tmp_path)
    with pytest.raises(InvalidRequestError, match="changes an answer"):
        tokenize_conversation(upper, conversation("Why?", "So."))
