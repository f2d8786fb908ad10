"""What goes to a terminal and what to a pipe."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm.cli.render import SourceColours, Terminal
from idlm.engine.request import Source
from idlm.llm import Delta
from idlm.model.tokenizer import Detokenizer, Tokenizer


class ColourTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(default_model_dir)


@given(
    deltas=st.lists(
        st.lists(st.tuples(st.integers(0, 2000), st.sampled_from(Source)), max_size=5), max_size=8
    )
)
def test_runs_add_up_to_the_text(
    deltas: list[list[tuple[int, Source]]], tokenizer: Tokenizer
) -> None:
    colours, detokenizer = SourceColours(tokenizer), Detokenizer(tokenizer)
    for tokens in deltas:
        text = "".join(detokenizer.push(token) for token, _ in tokens)
        runs = list(colours.runs(Delta(text, [t for t, _ in tokens], [s for _, s in tokens])))
        assert "".join(run for run, _ in runs) == text
    rest = detokenizer.flush()
    assert "".join(run for run, _ in colours.runs(Delta(rest, [], []))) == rest


def test_runs_carry_the_source_of_held_back_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello there, world")
    sources = [Source.DRAFT, *[Source.CORRECTION] * (len(ids) - 1)]
    colours = SourceColours(tokenizer)
    assert list(colours.runs(Delta("Hel", ids, sources))) == [("Hel", "draft")]
    assert list(colours.runs(Delta("lo there", [], []))) == [
        ("lo", "draft"),
        (" there", "correction"),
    ]


def test_model_text_cannot_steer_a_terminal(tmp_path: Path) -> None:
    text = "a\x1b[2Jb\r\tc\n"
    assert Terminal(ColourTerminal()).model_text(text) == "a\u241b[2Jb\u240d\tc\n"
    with (tmp_path / "out").open("w") as file:
        assert Terminal(file).model_text(text) == text


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_unwanted(
    variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Terminal(ColourTerminal()).style("x", "draft") == "\x1b[32mx\x1b[0m"
    assert Terminal(io.StringIO()).style("x", "draft") == "x"
    monkeypatch.setenv(*variable)
    assert Terminal(ColourTerminal()).style("x", "draft") == "x"
