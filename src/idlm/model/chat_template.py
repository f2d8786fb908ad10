"""Chat templates: Jinja text from a model's files, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from idlm.errors import CheckpointError, InvalidRequestError


class ChatTemplate:
    """A chat template with the names that `transformers` offers to it.

    Args:
        source: the Jinja text.
        special_tokens: `bos_token` and so on, as text.

    Raises:
        CheckpointError: the text is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(
                f"The model's chat template is damaged ({error}); fetch the model again."
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            InvalidRequestError: a message is malformed, or the template rejects the conversation.
        """
        _check(messages)
        # A template is a program: a conversation that it did not expect can fail in any way.
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:
            raise InvalidRequestError(
                f"The model's chat template rejects the conversation: {error}. Check the roles, "
                "their order and that every content is text."
            ) from error


class _Generation(Extension):
    """``{% generation %}`` marks what the model wrote; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InvalidRequestError("The conversation is empty; give at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"Message {index} is not a mapping with 'role' and 'content'; write it as "
                '{"role": "user", "content": "..."}.'
            )
        if "content" not in message:
            raise InvalidRequestError(f"Message {index} has no 'content'; give its text.")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which the models have not seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
