"""What the commands print: text as it comes, coloured by the source of its tokens, and figures."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from idlm.decoding.metrics import DecodeStats
    from idlm.llm import Delta, RequestOutput
    from idlm.model.tokenizer import Tokenizer

# ANSI "select graphic rendition" codes.
CODES = {"draft": "32", "correction": "1;33", "bold": "1", "dim": "2"}

# A model's text must not steer the terminal: control characters become visible pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


class Terminal:
    """Writes to a stream: styled if it is a terminal that shows colours, else as it is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.coloured = self.is_terminal and not plain

    def style(self, text: str, name: str) -> str:
        """``text`` in the style ``name``; as it is where there are no colours or no such style."""
        code = CODES.get(name)
        return f"\x1b[{code}m{text}\x1b[0m" if self.coloured and code and text else text

    def write(self, text: str) -> None:
        """Write at once, without a line break."""
        self._stream.write(text)
        self._stream.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """Write a line."""
        self.write(self.style(text, style) + "\n")

    def model_text(self, text: str) -> str:
        """``text`` of a model, harmless to a terminal and unchanged for a file or pipe."""
        return text.translate(VISIBLE) if self.is_terminal else text


class SourceColours:
    """Splits a stream of deltas into runs of text by the source of their tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from idlm.model.tokenizer import Detokenizer

        self._detokenizer = Detokenizer(tokenizer)
        # One source per character that was decoded and is not out yet: text lags behind tokens
        # where a character takes several of them or a stop string may have begun.
        self._sources: deque[str] = deque()

    def runs(self, delta: Delta) -> Iterable[tuple[str, str]]:
        """``(text, source)`` of consecutive characters; the texts add up to ``delta.text``."""
        for token, source in zip(delta.token_ids, delta.sources, strict=True):
            self._sources.extend([source] * len(self._detokenizer.push(token)))
        # The end of a text may hold a cut character, which no token completed.
        marked = [(self._sources.popleft() if self._sources else "", c) for c in delta.text]
        for source, characters in groupby(marked, key=lambda pair: pair[0]):
            yield "".join(c for _, c in characters), source


def print_stream(
    deltas: Iterable[Delta], terminal: Terminal, colours: SourceColours | None = None
) -> RequestOutput:
    """Print text as it comes, ending with a line break.

    Returns:
        The output that the last delta carries.
    """
    output = None
    for delta in deltas:
        runs = colours.runs(delta) if colours is not None else [(delta.text, "")]
        terminal.write("".join(terminal.style(terminal.model_text(t), s) for t, s in runs))
        output = delta.output
    assert output is not None  # the last delta carries it
    if not output.text.endswith("\n"):
        terminal.line()
    return output


def last_output(deltas: Iterable[Delta]) -> RequestOutput:
    """The output at the end of a stream."""
    *_, last = deltas
    assert last.output is not None
    return last.output


def legend(terminal: Terminal) -> str:
    """What the colours of `SourceColours` mean."""
    draft = terminal.style("accepted draft", "draft")
    correction = terminal.style("correction of a rejected draft", "correction")
    return f"{draft}  {correction}  plain: sampled after the drafts"


def figures(stats: DecodeStats) -> str:
    """One line: tokens, speed, tokens per forward and acceptance."""
    parts = [
        f"{stats.tokens} token{'' if stats.tokens == 1 else 's'}",
        f"{stats.tokens_per_second:.1f} tokens/s",
        f"{stats.tokens_per_forward:.2f} tokens per forward",
    ]
    if stats.drafted:
        parts.append(f"{stats.acceptance_rate:.0%} of drafts accepted")
    return ", ".join(parts)


def to_dict(output: RequestOutput) -> dict[str, object]:
    """The JSON object of one output."""
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stats": output.stats.to_dict(),
    }
