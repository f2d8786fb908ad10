"""The command as a whole: help, version, exit statuses and errors before any work."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import idlm
from idlm.cli.main import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"idlm {idlm.__version__}\n"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from idlm.cli.main import build_parser; build_parser().format_help();"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "hi", "--temperature", "nan"], "temperature"),
        (["generate", "hi", "--top-p", "0"], "top_p"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens"),
        (["generate", "hi", "--stride", "0"], "stride"),
        (["generate", "hi", "--stride", "17"], "stride"),
        (["generate", "hi", "--stop", ""], "stop"),
        (["generate", "hi", "--device", "toaster"], "toaster"),
        (["generate", "hi", "--model", "/nonexistent/model"], "/nonexistent/model"),
        (["generate", "hi", "--adapter", "/nonexistent/adapter"], "/nonexistent/adapter"),
        (["generate", "hi", "--compare", "--adapter", "none"], "--adapter none"),
        (["generate", "hi", "--compare", "--layout", "ar"], "--layout ar"),
        (["generate", "hi", "--compare", "--stride", "1"], "--stride 1"),
        (
            ["generate", "hi", "--compare", "--temperature", "1", "--verification", "rejection"],
            "coupled",
        ),
        (["chat", "--top-k", "-2"], "top_k"),
        (["info", "/nonexistent/model"], "/nonexistent/model"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and cause in err


@pytest.mark.parametrize("prompt", ["-", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_prompt_must_be_utf8(
    prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    assert main(["generate", prompt]) == 2
    assert "not UTF-8 (byte 0xe9 at offset 3)" in capsys.readouterr().err


def test_empty_folder_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
