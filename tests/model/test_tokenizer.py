"""Text to ids and back, chat templates, and text that grows token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from idlm.errors import CheckpointError, InvalidRequestError
from idlm.model.tokenizer import Detokenizer, Tokenizer
from tests.support.tiny import tiny_model, tiny_sentencepiece_tokenizer, tiny_tokenizer

TEXTS = st.text() | st.text(" ' \n\tthefoxdg0123<|im_end|>é漢🙂\u200d")
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Why is the sky <|im_end|> 12 blue?"},
    {"role": "assistant", "content": "Rayleigh: 漢字 🙂"},
    {"role": "user", "content": "  Thanks.\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(
    scope="module",
    params=[None, decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never")],
    ids=["llama", "metaspace", "metaspace-never"],
)
def sentencepiece(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return Tokenizer.load(tiny_sentencepiece_tokenizer(folder, request.param))


@pytest.fixture(scope="module")
def default_pair(default_model_dir: Path) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    return Tokenizer.load(default_model_dir), AutoTokenizer.from_pretrained(default_model_dir)


def _edit(folder: Path, **fields: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


# --- encode and decode


@given(TEXTS)
def test_same_ids_and_text_as_transformers(
    default_pair: tuple[Tokenizer, PreTrainedTokenizerBase], text: str
) -> None:
    ours, theirs = default_pair
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@given(TEXTS)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_framing_is_that_of_transformers(tmp_path: Path) -> None:
    """`tokenizer.json` says how a text begins and ends, `tokenizer_config.json` does not."""
    framed = tokenizers.Tokenizer.from_file(str(tiny_tokenizer(tmp_path) / "tokenizer.json"))
    framed.post_processor = TemplateProcessing(
        single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)]
    )
    framed.save(str(tmp_path / "tokenizer.json"))
    _edit(tmp_path, add_bos_token=False, add_eos_token=True)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    plain = ours.encode("the fox", add_special_tokens=False)
    assert ours.encode("the fox") == theirs("the fox")["input_ids"] == [1, *plain]
    assert plain == theirs("the fox", add_special_tokens=False)["input_ids"]


def test_special_tokens_in_text_are_tokens_and_skipped_in_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the <|im_end|> fox")
    assert 2 in ids
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode(ids) == "the  fox"
    assert tokenizer.token_text(2) == "<|im_end|>"


def test_token_text_keeps_spaces(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    for kind in (tokenizer, sentencepiece):
        ids = kind.encode("the fox the fox")
        assert "".join(kind.token_text(i) for i in ids).lstrip() == "the fox the fox"
        assert kind.token_text(ids[-1])[-1] == "x"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([71, 5000]) == tokenizer.decode([71])
    assert tokenizer.token_text(5000) == ""


@pytest.mark.parametrize(
    "text", ["\ud800", "caf\udce9", b"\xff\xfe".decode("utf-8", "surrogateescape")]
)
def test_text_that_was_not_utf8(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"not valid Unicode.*convert the input to UTF-8"):
        tokenizer.encode(text)
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        tokenizer.apply_chat_template([{"role": "user", "content": text}])


# --- chat templates


def test_default_chat_template_is_rendered_as_by_transformers(
    default_pair: tuple[Tokenizer, PreTrainedTokenizerBase],
) -> None:
    ours, theirs = default_pair
    for messages in (CONVERSATION, CONVERSATION[1:2], CONVERSATION[:3]):
        for prompt in (True, False):
            text = theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.apply_chat_template(messages, prompt) == expected


LOOP = "{% for m in messages %}"
TEMPLATES = {
    "spaces are trimmed as in training": """
        {%- for m in messages %}
            {{- bos_token }}
            {% if m.role == 'user' %}
        {{ m.content | trim }}
            {% endif %}
        {%- endfor %}
    """,
    "generation tag": LOOP + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": LOOP + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "undefined names": "{{ tools is none }}{{ documents is none }}{{ no is defined }}{{ no }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "namespaces": "{% set ns = namespace(n=0) %}"
    + LOOP
    + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(tmp_path: Path, name: str) -> None:
    _edit(tiny_tokenizer(tmp_path), chat_template=TEMPLATES[name])
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True
    )
    ours = Tokenizer.load(tmp_path)
    ids = ours.apply_chat_template(CONVERSATION)
    assert ours.decode(ids, skip_special_tokens=False) == expected
    assert expected


def test_template_may_ask_for_the_date(tmp_path: Path) -> None:
    _edit(tiny_tokenizer(tmp_path), chat_template="{{ strftime_now('%Y') }}")
    ours = Tokenizer.load(tmp_path)
    year = datetime.now().year
    assert int(ours.decode(ours.apply_chat_template(CONVERSATION))) in (year, year + 1)


def test_template_in_a_file_of_its_own_and_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "the fox"}]
    _edit(tiny_tokenizer(tmp_path), chat_template=named)
    ours = Tokenizer.load(tmp_path)
    assert ours.decode(ours.apply_chat_template(CONVERSATION)) == "the fox"
    (tmp_path / "chat_template.jinja").write_text("the dog")
    ours = Tokenizer.load(tmp_path)
    assert ours.decode(ours.apply_chat_template(CONVERSATION)) == "the dog"


def test_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
    _edit(tiny_tokenizer(tmp_path), chat_template=escape)
    with pytest.raises(InvalidRequestError, match="unsafe"):
        Tokenizer.load(tmp_path).apply_chat_template(CONVERSATION)


def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_edit(tiny_tokenizer(tmp_path), chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"no chat template; give a plain prompt"):
        tokenizer.apply_chat_template(CONVERSATION)


def test_template_that_rejects(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer.load(_edit(tiny_tokenizer(tmp_path), chat_template=template))
    assert tokenizer.has_chat_template
    with pytest.raises(
        InvalidRequestError, match=r"rejects the conversation: roles must alternate"
    ):
        tokenizer.apply_chat_template(CONVERSATION)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        (["hello"], "Message 0 is not a mapping"),
        ([CONVERSATION[0], {"content": "x"}], "Message 1 is not a mapping with 'role'"),
        ([{"role": 3, "content": "x"}], "Message 0 is not a mapping with 'role'"),
        ([{"role": "user"}], "Message 0 has no 'content'"),
    ],
)
def test_malformed_conversation(tokenizer: Tokenizer, messages: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        tokenizer.apply_chat_template(messages)


# --- growing text


def _pieces(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    growing = Detokenizer(tokenizer, skip_special_tokens)
    return [*(growing.push(i) for i in ids), growing.flush()]


@given(st.lists(st.integers(0, 325)), st.booleans())
def test_byte_level_pieces_join_to_the_text(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    assert "".join(_pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


# Few different ids, so that runs of bytes, special tokens and leading spaces are common.
SENTENCEPIECE_IDS = st.lists(
    st.sampled_from([0, 1, 2, 3 + 0x0A, 3 + 0x20, 3 + 0xC3, 3 + 0xA9, 3 + 0xE6])
    | st.integers(0, 330)
)


@given(SENTENCEPIECE_IDS, st.booleans())
def test_sentencepiece_pieces_join_to_the_text(
    sentencepiece: Tokenizer, ids: list[int], skip: bool
) -> None:
    assert "".join(_pieces(sentencepiece, ids, skip)) == sentencepiece.decode(ids, skip)


@given(TEXTS)
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = _pieces(tokenizer, tokenizer.encode(text), skip_special_tokens=False)
    assert "".join(pieces) == text
    assert pieces[-1] == ""  # all characters were complete before the flush
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_pieces_come_as_soon_as_characters_are_complete(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert _pieces(tokenizer, tokenizer.encode("é!")) == ["", "é", "!", ""]
    spm = Tokenizer.load(tiny_sentencepiece_tokenizer(tmp_path))
    # Whether bytes are a character is known only when their run is over.
    assert [p for p in _pieces(spm, spm.encode("the é")) if p] == ["the ", "é"]


def test_work_per_token_is_constant(
    sentencepiece: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    ids = sentencepiece.encode("the fox é and the dog " * 20)
    _pieces(sentencepiece, ids)
    assert sum(decoded) < 3 * len(ids)


# --- files


def test_vocabulary_files_without_tokenizer_json(tmp_path: Path) -> None:
    """What older checkpoints hold instead."""
    fields = json.loads((tiny_model(tmp_path, "qwen2") / "tokenizer.json").read_text())
    expected = Tokenizer.load(tmp_path).encode("the fox jumps over 12 dogs")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(fields["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in fields["model"]["merges"])
    (tmp_path / "merges.txt").write_text(merges + "\n")
    _edit(tmp_path, tokenizer_class="Qwen2Tokenizer")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the fox jumps over 12 dogs") == expected
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.has_chat_template


def test_special_tokens_may_be_written_with_options(tmp_path: Path) -> None:
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}
    assert Tokenizer.load(_edit(tiny_tokenizer(tmp_path), eos_token=eos)).eos_token_ids == (2,)


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_model(tmp_path, vocab_size=61)
    with pytest.raises(CheckpointError, match=r"No usable tokenizer in .*add the model's"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", '{"version": "1.0", "model"', "[]"])
def test_damaged_files(tmp_path: Path, file: str, content: str) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=r"fetch the model again"):
        Tokenizer.load(tmp_path)


def test_damaged_template(tmp_path: Path) -> None:
    _edit(tiny_tokenizer(tmp_path), chat_template="{% for m in %}")
    with pytest.raises(CheckpointError, match=r"chat template is damaged"):
        Tokenizer.load(tmp_path)


def test_loading_imports_nothing_slow(tmp_path: Path) -> None:
    """Importing these takes longer than loading the default model."""
    script = f"""
import sys, torch
from idlm.model.checkpoint import load_decoder, resolve
from idlm.model.tokenizer import Tokenizer
folder = resolve({str(tiny_model(tmp_path))!r})
load_decoder(folder, device="cpu", dtype=torch.bfloat16)
Tokenizer.load(folder).apply_chat_template([{{"role": "user", "content": "hi"}}])
slow = {{"transformers", "gguf", "huggingface_hub.hf_api", "sympy", "torch._dynamo"}}
print(sorted(slow & sys.modules.keys()))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
