"""Options of `idlm serve` that are wrong are refused before a model is loaded."""

from __future__ import annotations

import socket

import pytest

from idlm.cli.main import main
from idlm.cli.serve import model_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch", "0"], "--max-batch must be above 0"),
        (["--max-body", "-1"], "--max-body must be above 0"),
        (["--timeout", "nan"], "--timeout must be above 0"),
        (["--max-waiting", "-1"], "--max-waiting must be at least 0"),
        (["--port", "99999"], "--port must be between 0 and 65535"),
        (["--host", "no.such.host.invalid"], "choose another --host or --port"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", "/nothing", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "--model", "/nothing", "--port", port]) == 2
    assert f"Cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "smollm2-135m-instruct"),
        ("org/Model-1.5B", "Model-1.5B"),
        ("/models/a model/", "a-model"),
        ("tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("/", "model"),
    ],
)
def test_model_names(model: str | None, name: str) -> None:
    assert model_name(model) == name
