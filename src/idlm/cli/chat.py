"""`idlm chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from typing import TYPE_CHECKING

from idlm.cli import options
from idlm.cli.render import Terminal, figures
from idlm.errors import IdlmError, InvalidRequestError

if TYPE_CHECKING:
    from idlm import LLM, SamplingParams

HELP = """/exit   leave (so does ctrl-d)
/clear  forget the conversation so far
/help   this list
ctrl-c  stop the answer"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model that has a chat template.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_model_options(parser)
    options.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        IdlmError: bad input, or a model that cannot be loaded or has no chat template.
    """
    params = options.sampling_params(args)
    llm = options.load_llm(args)
    if not llm.tokenizer.has_chat_template:
        raise InvalidRequestError(
            "The model has no chat template; use an instruct model, or `idlm generate --raw`."
        )
    Chat(llm, params, args.system, Terminal(sys.stdout)).loop()


class Chat:
    """The conversation and the loop of question and answer."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, terminal: Terminal
    ) -> None:
        self._llm, self._params, self._terminal = llm, params, terminal
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)

    def loop(self) -> None:
        """Read and answer until the end of the input or `/exit`."""
        if self._terminal.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and history for input()
            self._terminal.line("/help lists the commands.", "dim")
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A line that is not UTF-8 becomes an error of its turn, not the end of the chat.
            sys.stdin.reconfigure(errors="surrogateescape")
        while True:
            try:
                line = input("> " if self._terminal.is_terminal else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._terminal.line()
                continue
            if line == "/exit":
                return
            self._obey(line)

    def _obey(self, line: str) -> None:
        if line == "/clear":
            self._messages = list(self._opening)
        elif line == "/help":
            self._terminal.line(HELP)
        elif line.startswith("/"):
            self._terminal.line(f"There is no command {line.split()[0]}.\n{HELP}")
        elif line:
            try:
                self._answer(line)
            except IdlmError as error:
                print(f"error: {error}", file=sys.stderr)

    def _answer(self, question: str) -> None:
        """Stream the answer; a turn that fails is not part of the conversation."""
        messages = [*self._messages, {"role": "user", "content": question}]
        answer, stats = "", None
        try:
            for delta in self._llm.stream_chat(messages, self._params):
                answer += delta.text
                self._terminal.write(self._terminal.model_text(delta.text))
                if delta.output is not None:
                    stats = delta.output.stats
        except KeyboardInterrupt:
            pass  # what has been said stays in the conversation
        self._terminal.line()
        self._terminal.line("stopped" if stats is None else figures(stats), "dim")
        self._messages = [*messages, {"role": "assistant", "content": answer}]
