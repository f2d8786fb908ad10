"""Files appear whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from idlm.errors import ResourceError
from idlm.model.files import replacing, write_json, write_safetensors


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.arange(3.0)})
    finally:
        os.umask(umask)
    assert [oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == ["0o644"] * 2
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0.0, 1.0, 2.0]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "1" in (tmp_path / "a.json").read_text()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (
        lambda: write_json(tmp_path / "file" / "a.json", {}),
        lambda: write_safetensors(tmp_path / "file" / "a.safetensors", {}),
    ):
        with pytest.raises(ResourceError, match=r"Cannot write .*free space or choose another"):
            write()


def test_full_disk(tmp_path: Path) -> None:
    """A disk that takes 1 MB: neither safetensors nor a half-written file may get through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(ResourceError, match=r"Cannot write .*free space"):
            write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
