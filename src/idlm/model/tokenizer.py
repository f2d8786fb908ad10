"""Text to token ids and back, by the `tokenizers` library and the model's own chat template.

`transformers` is imported only for models without a `tokenizer.json`: importing it takes seconds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from idlm.errors import CheckpointError, InvalidRequestError
from idlm.model.chat_template import ChatTemplate

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of one model.

    Args:
        backend: the tokenizer proper.
        config: the fields of `tokenizer_config.json`.

    Attributes:
        eos_token_ids: ids that end a text, as the tokenizer says; `ModelConfig` may name more.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self.backend = backend
        special = {name: _content(config.get(name)) for name in SPECIAL_NAMES}
        self._special = {name: token for name, token in special.items() if token is not None}
        template = _default_template(config.get("chat_template"))
        self._template = None if template is None else ChatTemplate(template, self._special)
        eos_id = backend.token_to_id(self._special.get("eos_token", ""))
        self.eos_token_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a model folder.

        Raises:
            CheckpointError: its files are missing or damaged.
        """
        config = _read_config(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            return cls(_convert_other_form(folder), config)
        # The library raises a bare Exception, whatever the cause.
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path} is damaged ({error}); fetch the model again.") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. The text of a special token in it becomes that token.

        Args:
            add_special_tokens: frame the text as the model expects, such as by a BOS token.

        Raises:
            InvalidRequestError: the text has lone surrogates (it was read from bytes that are
                not UTF-8).
        """
        return list(self._encode(text, add_special_tokens).ids)

    def encode_with_ends(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids of ``text``, and for each the index of the character it ends before.

        Args and errors as `encode`; tokens that frame the text end at 0.
        """
        encoding = self._encode(text, add_special_tokens)
        return list(encoding.ids), [end for _, end in encoding.offsets]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self._template is not None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: mappings with ``role`` and ``content``.
            add_generation_prompt: end with the header of the answer.

        Raises:
            InvalidRequestError: the model has no chat template, or it rejects the conversation.
        """
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; arguments and errors as `apply_chat_template`."""
        if self._template is None:
            raise InvalidRequestError(
                "The model has no chat template; give a plain prompt, or use an instruct model."
            )
        return self._template.render(messages, add_generation_prompt)

    def token_text(self, token_id: int) -> str:
        """Text of one token within a text, special tokens included."""
        if self.is_byte_level:
            return self.token_bytes(token_id).decode("utf-8", errors="replace")
        return self.decode_inside([token_id])

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for a string of bytes, and a text for their sequence."""
        return isinstance(self.backend.decoder, decoders.ByteLevel)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes, maybe half a character, of a token of a byte-level vocabulary."""
        return self.bytes_of[token_id]

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """`token_bytes` of all tokens, each found when it is first asked for."""
        return _TokenBytes(self.backend)

    def decode_inside(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` where other text stands before them, special tokens included."""
        anchor_id, anchor = self._anchor
        return self.decode([anchor_id, *ids], skip_special_tokens=False)[len(anchor) :]

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The text is not valid Unicode (character {error.start} is half of a pair or a "
                "byte that is not UTF-8); convert the input to UTF-8."
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token with a text of its own, to stand before others."""
        for token_id in range(self.backend.get_vocab_size()):
            token = self.backend.id_to_token(token_id)
            if token is None or token_id in self.special_ids or BYTE_TOKEN.fullmatch(token):
                continue
            if text := self.decode([token_id]):
                return token_id, text
        raise CheckpointError("The tokenizer has no ordinary token; fetch the model again.")


class _TokenBytes(dict[int, bytes]):
    """Bytes of the tokens of a byte-level vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token, alphabet = self._backend.id_to_token(token_id) or "", _byte_alphabet()
        if all(character in alphabet for character in token):
            found = bytes(alphabet[character] for character in token)
        else:
            found = token.encode("utf-8")
        self[token_id] = found
        return found


class Detokenizer:
    """Text of a token sequence that grows by one token at a time.

    The texts returned by `push` and, at the end, `flush` join to `Tokenizer.decode` of all ids,
    and none holds a half of a character. Constant time a token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[int] = []  # byte tokens, which stand for text only as a whole run
        self._started = False

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; often one word, sometimes nothing."""
        if token_id in self._skipped:
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return ""
        if BYTE_TOKEN.fullmatch(token):
            self._held.append(token_id)
            return ""
        return self._release() + self._decode([token_id])

    def push_all(self, token_ids: Sequence[int]) -> str:
        """What pushing ``token_ids`` one by one gives."""
        if not self._tokenizer.is_byte_level:
            return "".join(map(self.push, token_ids))
        if not self._skipped.isdisjoint(token_ids):
            token_ids = [t for t in token_ids if t not in self._skipped]
        return self._utf8.decode(b"".join(map(self._tokenizer.bytes_of.__getitem__, token_ids)))

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._utf8.decode(b"", final=True) + self._release()

    def _release(self) -> str:
        held, self._held = self._held, []
        return self._decode(held) if held else ""

    def _decode(self, ids: list[int]) -> str:
        # Decoding drops a space before the first word of a text, and there only.
        if self._started:
            return self._tokenizer.decode_inside(ids)
        self._started = True
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the chat template that may have a file of its own."""
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(config, dict):
            raise ValueError(f"{path.name} is not a JSON object")
        template = folder / "chat_template.jinja"
        if template.exists():
            config["chat_template"] = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The tokenizer files in {folder} cannot be read ({error}); fetch the model again."
        ) from error
    return config


def _convert_other_form(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder with SentencePiece or vocabulary files only."""
    from transformers import AutoTokenizer

    # Which files are needed, and what goes wrong without them, is different for every class.
    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"No usable tokenizer in {folder}: there is no tokenizer.json, and the other files "
            f"cannot be converted ({reason}); add the model's tokenizer.json."
        ) from error


def _content(token: Any) -> str | None:
    """The text of a special token, which may be written with its options."""
    return token["content"] if isinstance(token, Mapping) else token


def _default_template(template: Any) -> str | None:
    """A model may have several named templates."""
    if isinstance(template, list):
        return {item["name"]: item["template"] for item in template}.get("default")
    return template
