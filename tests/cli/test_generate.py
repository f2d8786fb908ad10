"""`idlm generate` on the default model."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from idlm.cli.compare import first_difference
from idlm.cli.main import main
from tests.support.command import start_idlm

PROMPT = "Count from one to ten."


class ColourTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def generate(*arguments: str) -> list[str]:
    """At a given stride: what is chosen depends on how busy the machine is."""
    return ["generate", PROMPT, "--max-tokens", "16", "--stride", "4", *arguments]


def printed_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def test_text_then_one_line_of_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = generate()
    result = printed_json(arguments, capsys)
    assert main([*arguments, "--show"]) == 0
    text, figures, rest = capsys.readouterr().out.rsplit("\n", 2)
    assert text == result["text"]
    assert "16 tokens, " in figures and "tokens/s" in figures and "of drafts accepted" in figures
    assert rest == ""


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed_json(generate("--adapter", "none"), capsys)
    assert set(result) == {"text", "token_ids", "finish_reason", "stats"}
    assert len(result["token_ids"]) == result["stats"]["tokens"] == 16
    assert result["finish_reason"] == "length"
    assert result["stats"]["tokens_per_forward"] == 1


def test_raw_continues_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    raw = ["generate", "The capital of France is", "--raw", "--adapter", "none"]
    result = printed_json([*raw, "--max-tokens", "4"], capsys)
    assert "Paris" in result["text"]
    stopped = printed_json([*raw, "--max-tokens", "4", "--stop", "Paris"], capsys)
    assert stopped["text"] + "Paris" == result["text"][: len(stopped["text"]) + 5]
    assert stopped["finish_reason"] == "stop"


def test_stdin_gives_the_same_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = printed_json(generate("--adapter", "none"), capsys)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    options = ["--max-tokens", "16", "--adapter", "none"]
    assert printed_json(["generate", "-", *options], capsys)["text"] == expected["text"]


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8", "--top-p", "0.9"]])
def test_compare(sampling: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = printed_json(generate("--compare", *sampling), capsys)
    assert set(result) == {"ar", "idlm", "identical", "speedup"}
    assert result["identical"] is True
    assert result["ar"]["token_ids"] == result["idlm"]["token_ids"]
    assert result["ar"]["text"] == result["idlm"]["text"]
    assert result["ar"]["stats"]["drafted"] == 0 < result["idlm"]["stats"]["accepted"]
    ratio = result["idlm"]["tokens_per_second"] / result["ar"]["tokens_per_second"]
    assert result["speedup"] == pytest.approx(ratio)


def test_stride_that_follows_cost_and_gain(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed_json(generate("--compare", "--stride", "auto"), capsys)
    assert result["identical"] is True
    assert len(result["idlm"]["token_ids"]) == 16


def test_compare_prints_texts_figures_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate("--compare")) == 0
    out = capsys.readouterr().out
    assert out.count("\n16 tokens, ") == 2
    assert "Identical: all 16 tokens." in out and "x as fast" in out


def test_compare_needs_an_adapter(
    default_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(generate("--model", str(default_model_dir), "--compare")) == 2
    assert "--adapter" in capsys.readouterr().err


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0


def test_show_colours_drafts_on_a_terminal_only_if_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = generate("--show")
    monkeypatch.setenv("TERM", "xterm")
    outputs = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stdout", terminal := ColourTerminal())
        assert main(arguments) == 0
        outputs[no_color] = terminal.getvalue()
    text, legend, _ = outputs[""].removesuffix("\n").rsplit("\n", 2)
    assert "\x1b[32m" in text and "\x1b[32maccepted draft" in legend
    assert "\x1b" not in outputs["1"] and "accepted draft" not in outputs["1"]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    options = ["--adapter", "none", "--max-tokens", "2000", *arguments]
    return start_idlm("generate", "Tell a long story.", *options)


def test_interrupt_is_quiet() -> None:
    process = start()
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b""


def test_closed_pipe_is_quiet() -> None:
    process = start()
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    process.wait(timeout=60)
    with process.stderr as stderr:
        assert stderr.read() == b""
