"""The state of a run on disk: one folder per checkpoint, of which the newest is kept.

Every process writes what it holds of the (maybe sharded) tensors into a safetensors file of its
own, by torch's distributed checkpointing; any number of processes can read them again.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from idlm.errors import CheckpointError
from idlm.model.files import write_json
from idlm.training.parallel import Parallel

FACTS_FILE = "state.json"
PREFIX = "checkpoint-"
# Renamed when it is complete; no name that `newest` finds.
PARTIAL = ".unfinished-checkpoint"


def save(
    out: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
    parallel: Parallel,
) -> None:
    """Write the checkpoint of ``step`` into ``out``, atomically, and delete older ones.

    Called by all processes.

    Args:
        facts: JSON-compatible, the same in all processes.
    """
    folder, partial = out / f"{PREFIX}{step:09d}", out / PARTIAL
    if parallel.main:
        shutil.rmtree(partial, ignore_errors=True)
    parallel.wait()
    if not folder.exists():
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with _quiet():
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    parallel.wait()
    if parallel.main:
        if partial.exists():
            write_json(partial / FACTS_FILE, facts)
            os.replace(partial, folder)
        else:  # the same step again: only the facts can have changed
            write_json(folder / FACTS_FILE, facts)
        for other in out.glob(f"{PREFIX}*"):
            if other != folder:
                shutil.rmtree(other)
    parallel.wait()


def newest(out: Path) -> Path | None:
    """The folder of the last checkpoint in ``out``."""
    return max(out.glob(f"{PREFIX}*"), default=None)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts saved with a checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    return facts


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read the tensors of a checkpoint into ``tensors``, in place. Called by all processes.

    Raises:
        CheckpointError: it is damaged.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise _damaged(folder, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{folder} is damaged ({reason}); delete it to begin again.")
