"""The tokenizer inside a GGUF file, written as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from idlm.errors import UnsupportedModelError
from idlm.model.files import write_json

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """How text is cut before byte-pair merging, for one value of `tokenizer.ggml.pre`.

    Attributes:
        pattern: regular expression of a piece; None: GPT-2's.
        digits: cut out every digit first.
        nfc: normalise to NFC.
        whole_words: a piece that is in the vocabulary is one token whatever the merges say.
        add_bos: default of `tokenizer.ggml.add_bos_token`.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        if self.pattern is not None:
            split = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([split, byte_level])
        if self.digits:
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, ByteLevel(add_prefix_space=False)])
        return ByteLevel(add_prefix_space=False)


_GPT2 = _Split()
_SMOLLM = _Split(digits=True)
_LLAMA3 = _Split(rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}", whole_words=True, add_bos=True)
_QWEN2 = _Split(rf"{LETTERS}|\p{{N}}|{REST}", nfc=True)
_TEKKEN = _Split(TEKKEN, whole_words=True, add_bos=True)
SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


def write_tokenizer(gguf: Path, fields: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer of a GGUF file with metadata ``fields`` into ``folder``.

    Raises:
        UnsupportedModelError: the kind of tokenizer or its way to split text is unknown.
    """
    kind = fields["tokenizer.ggml.model"]
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(fields), _split(fields).add_bos
    elif kind == "llama":
        tokenizer, add_bos = _sentence_piece(gguf), True
    else:
        raise UnsupportedModelError(
            f"tokenizer {kind!r} is not supported; use the safetensors form of the model."
        )
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = fields["tokenizer.ggml.tokens"][token_id]
    tokenizer.post_processor = _frame(
        tokenizer,
        config.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        config.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token") else None,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def _frame(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> TemplateProcessing:
    """What puts ``bos`` before and ``eos`` after a text."""
    parts = [part for part in (bos, "$A", eos) if part is not None]
    special = [(token, tokenizer.token_to_id(token)) for token in parts if token != "$A"]
    return TemplateProcessing(single=parts, special_tokens=special)


def _byte_level(fields: Mapping[str, Any]) -> Tokenizer:
    split = _split(fields)
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole_words))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(tokens, types, CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, USER_DEFINED, special=False))
    return tokenizer


def _split(fields: Mapping[str, Any]) -> _Split:
    name = fields.get("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise UnsupportedModelError(
            f"the way its tokenizer splits text (tokenizer.ggml.pre {name!r}) is unknown; use the "
            "safetensors form of the model."
        )
    return SPLITS[name]


def _added(tokens: list[str], types: list[int], kind: int, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type == kind
    ]


def _sentence_piece(gguf: Path) -> Tokenizer:
    # transformers derives the merges from the scores, as it does for SentencePiece files.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"its tokenizer cannot be converted ({reason}); use the safetensors form of the model."
        ) from error
