"""The bar on a terminal and the lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from idlm.training import progress
from idlm.training.progress import TokenProgress, report_counts

LINE = re.compile(r"20\.0M of 40\.0M tokens \(50%\), [\d.]+[kM]? tokens/s")


def run(console: Console | None) -> None:
    with TokenProgress(9_999, 40_000_000, console) as tokens:
        tokens.update(1_500_000)
        tokens.update(20_000_000)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    run(Console(file=out, force_terminal=False))
    assert [bool(LINE.fullmatch(line)) for line in out.getvalue().splitlines()] == [True]
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    out = io.StringIO()
    run(Console(file=out, force_terminal=False))
    first, second, last = out.getvalue().splitlines()
    assert (
        first.startswith("1.5M of 40.0M tokens (4%)")
        and LINE.fullmatch(second)
        and LINE.fullmatch(last)
    )


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    run(Console(file=out, force_terminal=True, width=120))
    assert "━" in out.getvalue() and "50%" in out.getvalue()
    assert LINE.search(out.getvalue().splitlines()[-1])


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    run(None)
    report_counts({"a": 1}, None)
    assert capfd.readouterr() == ("", "")


def test_counts() -> None:
    out = io.StringIO()
    report_counts({"dropped: [loop]": 2, "documents": 10}, Console(file=out, width=20))
    assert out.getvalue() == "  documents: 10\n  dropped: [loop]: 2\n"
