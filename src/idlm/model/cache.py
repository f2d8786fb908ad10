"""The cache folder; models in it are built once, whole or not at all, whoever asks first."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from idlm.errors import ResourceError

# Raise when the conversion changes, so that models in the cache are converted again.
CONVERSION_VERSION = 2


def cache_folder() -> Path:
    """``$IDLM_CACHE``, by default ``~/.cache/idlm``; need not exist yet."""
    folder = os.environ.get("IDLM_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "idlm"


def models_folder() -> Path:
    """Where converted models are kept; need not exist yet."""
    return cache_folder() / "models"


def folder_name(file_name: str, identity: str) -> str:
    """Name of the folder for a converted file; changes with the conversion's version too."""
    digest = hashlib.sha256(f"{CONVERSION_VERSION}:{identity}".encode()).hexdigest()
    return f"{Path(file_name).stem}-{digest[:12]}"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return ``target``, first letting ``build`` fill it if it is not there.

    ``build`` fills a temporary folder beside ``target``, which is renamed at the end: a reader
    sees all of it or nothing. Other processes that want the same target wait for the first.

    Raises:
        ResourceError: the cache cannot be written.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                _build(target, build)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {error.filename or target}: {error.strerror or error}. Free space "
            "there, or set IDLM_CACHE to a folder that can be written."
        ) from error
    return target


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of ``folder`` has ``needed_bytes`` free.

    Raises:
        ResourceError: it has not.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"No space to convert the model: {folder} has {free_bytes / 1e9:.2f} GB free and "
            f"{needed_bytes / 1e9:.2f} GB are needed. Free space there, or set IDLM_CACHE to a "
            "folder on another disk."
        )


def _build(target: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{target.name}.part-"
    # We hold the lock, so whatever lies here was left by a process that was killed.
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
        result = Path(folder) / "model"
        result.mkdir()
        build(result)
        os.replace(result, target)
