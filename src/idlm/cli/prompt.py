"""The prompt of a command and the stream that it starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from idlm.errors import InvalidRequestError

if TYPE_CHECKING:
    from idlm import LLM, SamplingParams
    from idlm.llm import Delta


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin's text (less one last newline) for ``-``.

    Raises:
        InvalidRequestError: it is empty or not UTF-8.
    """
    if prompt == "-":
        raw = sys.stdin.buffer.read()
    else:
        raw = prompt.encode("utf-8", errors="surrogateescape")  # the bytes of the command line
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"The prompt is not UTF-8 (byte {raw[error.start]:#04x} at offset {error.start}); "
            "convert it first, for example with iconv."
        ) from error
    if prompt == "-":
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InvalidRequestError("The prompt is empty; give some text.")
    return text


def stream(llm: LLM, prompt: str, params: SamplingParams, *, raw: bool) -> Iterator[Delta]:
    """The deltas for a prompt, which is a user's message where that makes sense."""
    if raw or not llm.tokenizer.has_chat_template:
        return llm.stream(prompt, params)
    return llm.stream_chat([{"role": "user", "content": prompt}], params)
