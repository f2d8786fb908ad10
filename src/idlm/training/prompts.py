"""Prompts that a user has, for a model to answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlm.errors import InvalidRequestError
from idlm.training.records import field_of, json_objects, readable

# A conversation that ends with a user turn.
Prompt = tuple[Mapping[str, Any], ...]


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts in a file, each once.

    A `.txt` file has one per line; `.jsonl` has objects with ``prompt`` (a text) or ``messages``
    (a conversation, of which all up to its last user turn is the prompt).

    Raises:
        InvalidRequestError: no such file, of another format, damaged or without prompts.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise InvalidRequestError(f"{path} is no .txt or .jsonl file; give prompts in one of them.")
    with readable(path):
        prompts = _lines(path) if path.suffix == ".txt" else _objects(path)
    if not prompts:
        raise InvalidRequestError(f"There are no prompts in {path}; give one a line.")
    return tuple({repr(prompt): prompt for prompt in prompts}.values())


def _lines(path: Path) -> list[Prompt]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_said(line.strip()) for line in lines if line.strip()]


def _objects(path: Path) -> list[Prompt]:
    prompts = []
    for where, fields in json_objects(path):
        name = field_of(fields, ("prompt", "messages"), where)
        value = fields[name]
        prompt = _said(value) if name == "prompt" else _up_to_last_user(value)
        if not prompt or not all(isinstance(m.get("content"), str) for m in prompt):
            raise InvalidRequestError(
                f"{where} has no user turn, or one that is not text; write it as "
                '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'
            )
        prompts.append(prompt)
    return prompts


def _said(text: Any) -> Prompt:
    return ({"role": "user", "content": text},)


def _up_to_last_user(messages: Any) -> Prompt:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return ()
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    return tuple(messages[: users[-1] + 1]) if users else ()
