"""Records of a data set as they stand in files: conversations and plain texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm.errors import InvalidRequestError
from idlm.training.data import HELDOUT, TRAIN, import_pyarrow

# A list of messages, or a text.
Record = list[dict[str, Any]] | str

# A conversation, and a text.
COLUMNS = ("messages", "text")
# Names that data sets give to documents that are not trained on, in the order of preference.
HELDOUT_NAMES = (HELDOUT, "validation", "valid", "val", "dev", "test", "eval")
# What Hugging Face `datasets` writes beside its arrow files.
STATE_FILE = "state.json"
ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class DataFiles:
    """The files of a data set.

    Attributes:
        train, heldout: to be trained on and to be held out; ``heldout`` is empty if the data set
            has no such part.
        unused: names of further parts, and of files in other formats.
    """

    train: Sequence[Path]
    heldout: Sequence[Path]
    unused: Sequence[str]

    @classmethod
    def find(cls, path: Path) -> DataFiles:
        """The files at ``path``: one file, or all below a folder.

        The part that a file belongs to is the name of its folder or the first word of its own
        name, if that is ``train`` or one of `HELDOUT_NAMES`.

        Raises:
            InvalidRequestError: nothing is there, or nothing that can be read.
        """
        if path.is_file():
            if path.suffix not in READERS:
                raise _unknown(path)
            return cls([path], [], [])
        if not path.is_dir():
            raise InvalidRequestError(f"There is no data at {path}; give a file or a folder.")
        by_format = {suffix: _of_format(path, suffix) for suffix in READERS}
        chosen = next((suffix for suffix, files in by_format.items() if files), None)
        if chosen is None:
            raise _unknown(path)
        others = [p.name for s, files in by_format.items() if s != chosen for p in files]
        parts: dict[str, list[Path]] = {}
        for file in by_format[chosen]:
            parts.setdefault(_part(file, path), []).append(file)
        if set(parts) == {""}:
            return cls(parts[""], [], others)
        if TRAIN not in parts:
            raise InvalidRequestError(
                f"{path} has the parts {_names(parts)} and none named {TRAIN!r}; give one of its "
                f"folders or files, or name one {TRAIN}."
            )
        heldout = next((name for name in HELDOUT_NAMES if name in parts), TRAIN)
        unused = parts.keys() - {TRAIN, heldout}
        return cls(
            parts[TRAIN],
            parts[heldout] if heldout != TRAIN else [],
            [*(_names(unused).split(", ") if unused else []), *others],
        )


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file.

    Raises:
        InvalidRequestError: it is damaged, or has neither ``messages`` nor ``text``.
    """
    with readable(path):
        yield from READERS[path.suffix](path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says of what goes wrong meanwhile that ``path`` cannot be read.

    Raises:
        InvalidRequestError: so it is.
    """
    try:
        yield
    except InvalidRequestError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's and Unicode's are ValueErrors
        raise InvalidRequestError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); give a whole file in UTF-8 "
            "or of the format that its name says."
        ) from error


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one a line, each with the words for where it stands.

    Raises:
        InvalidRequestError: a line is no JSON object.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"Line {number} of {path}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise InvalidRequestError(
                    f"{where} is not JSON ({error}); give one object a line."
                ) from error
            if not isinstance(fields, dict):
                raise InvalidRequestError(f"{where} is not a JSON object; give one a line.")
            yield where, fields


def field_of(given: Iterable[str], known: Sequence[str], where: str) -> str:
    """The first of the ``known`` fields that is ``given``.

    Raises:
        InvalidRequestError: none is.
    """
    names = list(given)
    for field in known:
        if field in names:
            return field
    raise InvalidRequestError(
        f"{where} has {', '.join(map(repr, names)) or 'no fields'}, and neither "
        f"{' nor '.join(map(repr, known))}; rename what is to be read."
    )


def _text(path: Path) -> Iterator[Record]:
    yield path.read_text(encoding="utf-8")


def _json_lines(path: Path) -> Iterator[Record]:
    for where, fields in json_objects(path):
        column = field_of(fields, COLUMNS, where)
        yield _record(column, fields[column], where)


def _parquet(path: Path) -> Iterator[Record]:
    pa = import_pyarrow()
    with pa.parquet.ParquetFile(path) as file:
        column = field_of(file.schema_arrow.names, COLUMNS, str(path))
        for batch in file.iter_batches(columns=[column]):
            yield from (_record(column, v, str(path)) for v in batch.column(column).to_pylist())


def _arrow(path: Path) -> Iterator[Record]:
    pa = import_pyarrow()
    with pa.memory_map(str(path)) as file:
        if path.open("rb").read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = batches = pa.ipc.open_stream(file)  # what `datasets` writes
        column = field_of(reader.schema.names, COLUMNS, str(path))
        for batch in batches:
            yield from (_record(column, v, str(path)) for v in batch.column(column).to_pylist())


# By the end of the name; in a folder the first format that occurs is read.
READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".arrow": _arrow,
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".txt": _text,
}


def _record(column: str, value: Any, where: str) -> Record:
    """``value`` of a column, if it is what the column should hold; nothing is an empty one.

    Raises:
        InvalidRequestError: it is not.
    """
    if column == "text" and isinstance(value, (str, type(None))):
        return value or ""
    if column == "messages" and isinstance(value, (list, type(None))):
        messages = value or []
        if all(isinstance(message, dict) for message in messages):
            # In a table every message has the fields that any message has.
            return [{k: v for k, v in m.items() if v is not None} for m in messages]
    raise InvalidRequestError(
        f"{where} has {column!r} of type {type(value).__name__}; it must be "
        + ("a string." if column == "text" else 'a list of {"role": ..., "content": ...}.')
    )


def _of_format(folder: Path, suffix: str) -> list[Path]:
    """Files of one format below ``folder``, without hidden and temporary ones."""
    files = []
    for path in sorted(folder.rglob(f"*{suffix}")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name in _listed(path):
            files.append(path)
    return files


def _listed(path: Path) -> set[str]:
    """Names of the data files in the folder of ``path``; others there are caches."""
    state = path.parent / STATE_FILE
    if path.suffix != ".arrow" or not state.exists():
        return {path.name}
    try:
        return {file["filename"] for file in json.loads(state.read_text())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{state} is damaged ({error}); save the data set again."
        ) from error


def _part(file: Path, root: Path) -> str:
    """``train``, one of `HELDOUT_NAMES`, or nothing."""
    words = [folder.name for folder in file.relative_to(root).parents]
    if file.suffix != ".txt":  # there a file is one document, with a name of its own
        words.insert(0, re.split(r"[-_.]", file.name)[0])
    return next((word for word in words if word == TRAIN or word in HELDOUT_NAMES), "")


def _names(parts: Iterable[str]) -> str:
    return ", ".join(sorted(name or "(unnamed)" for name in parts))


def _unknown(path: Path) -> InvalidRequestError:
    return InvalidRequestError(
        f"{path} is no data that can be read; give shards of `idlm synthesize`, or a file or "
        f"folder of {', '.join(READERS)}."
    )
