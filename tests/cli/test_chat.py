"""`idlm chat` on the default model."""

import io
import signal
import sys

import pytest

from idlm.cli.main import main
from tests.support.command import start_idlm

OPTIONS = ["chat", "--adapter", "none", "--max-tokens", "10"]


def chat(
    lines: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(OPTIONS) == 0
    return capsys.readouterr()


def test_turns_build_on_each_other_until_cleared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = b"What is two plus two?\n"
    out, err = chat(question * 2 + b"/clear\n" + question + b"/exit\nHi\n", monkeypatch, capsys)
    answers = out.splitlines()[::2]
    assert len(answers) == 3 and err == ""
    assert answers[0] == answers[2] != answers[1]


def test_commands_and_errors_do_not_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = chat(b"/help\n/nonsense\n\n\xff\n", monkeypatch, capsys)
    assert out.count("/clear  forget") == 2 and "no command /nonsense" in out
    assert err.startswith("error: ") and err.count("\n") == 1


def test_interrupt_stops_the_answer_only() -> None:
    process = start_idlm(*OPTIONS[:-1], "2000")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Tell a long story.\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/help\n/exit\n", timeout=60)
    assert process.returncode == 0 and err == b""
    assert b"\nstopped\n/exit" in out
