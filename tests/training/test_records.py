"""Data sets in files: formats, parts and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idlm.errors import InvalidRequestError
from idlm.training.records import DataFiles, Record, read_records

CONVERSATIONS: list[Record] = [
    [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": "So."}]
    for i in range(5)
]
TEXTS: list[Record] = ["The fox.", "The hen.\nThe sun.", ""]


def columns(records: list[Record]) -> dict[str, Any]:
    name = "text" if isinstance(records[0], str) else "messages"
    return {"id": list(range(len(records))), name: records}


def write_json_lines(path: Path, records: list[Record]) -> None:
    name = "text" if isinstance(records[0], str) else "messages"
    path.write_text("\n".join(json.dumps({"id": 1, name: record}) for record in records) + "\n\n")


def write_parquet(path: Path, records: list[Record]) -> None:
    pq.write_table(pa.table(columns(records)), path, row_group_size=2)


def write_arrow_stream(path: Path, records: list[Record]) -> None:
    """What `datasets` writes."""
    table = pa.table(columns(records))
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_file(path: Path, records: list[Record]) -> None:
    table = pa.table(columns(records))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "a.jsonl": write_json_lines,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_stream,
    "b.arrow": write_arrow_file,
}


@pytest.mark.parametrize("records", [CONVERSATIONS, TEXTS])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_records(name: str, records: list[Record], tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, records)
    assert list(read_records(tmp_path / name)) == records
    assert DataFiles.find(tmp_path / name) == DataFiles([tmp_path / name], [], [])


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The fox.\n\nÉté 漢\n", encoding="utf-8")
    assert list(read_records(tmp_path / "a.txt")) == ["The fox.\n\nÉté 漢\n"]


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_parts_are_told_by_names_of_files_and_folders(tmp_path: Path) -> None:
    hub = touch(
        tmp_path / "hub",
        *("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        *("data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        *("README.txt", ".cache/train-0.parquet"),
    )
    files = DataFiles.find(tmp_path / "hub")
    assert files == DataFiles(hub[:2], [hub[2]], ["test", "README.txt"])

    lines = touch(tmp_path / "lines", "train.jsonl", "test.jsonl")
    assert DataFiles.find(tmp_path / "lines") == DataFiles([lines[0]], [lines[1]], [])

    # The name of a text file says what it is about.
    texts = touch(tmp_path / "texts", "a/test.txt", "b.txt", "train.txt")
    assert DataFiles.find(tmp_path / "texts") == DataFiles(texts, [], [])


def test_a_saved_data_set(tmp_path: Path) -> None:
    """`DatasetDict.save_to_disk`, with a cache that an earlier computation left there."""
    train, _, heldout = touch(
        tmp_path,
        *("train/data-00000-of-00001.arrow", "train/cache-0123456789abcdef.arrow"),
        "test/data-00000-of-00001.arrow",
    )
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for file in (train, heldout):
        state = {"_data_files": [{"filename": file.name}], "_split": file.parent.name}
        (file.parent / "state.json").write_text(json.dumps(state))
    assert DataFiles.find(tmp_path) == DataFiles([train], [heldout], [])
    assert DataFiles.find(tmp_path / "train") == DataFiles([train], [], [])
    (tmp_path / "train" / "state.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match=r"state\.json is damaged.*save the data set"):
        DataFiles.find(tmp_path)


def test_what_is_no_data(tmp_path: Path) -> None:
    touch(tmp_path, "empty/notes.md", "parts/test.jsonl", "parts/dev.jsonl", "model.bin")
    for name, message in {
        "gone": "There is no data at .*gone; give a file or a folder",
        "model.bin": r"model\.bin is no data that can be read; give .*\.jsonl",
        "empty": r"empty is no data that can be read; give .*\.jsonl",
        "parts": r"has the parts dev, test and none named 'train'",
    }.items():
        with pytest.raises(InvalidRequestError, match=message):
            DataFiles.find(tmp_path / name)


def _not_json(path: Path) -> str:
    path.with_suffix(".jsonl").write_text('{"text": "a"}\n{"text": \n')
    return r"Line 2 of .*\.jsonl is not JSON .*one object a line"


def _a_list(path: Path) -> str:
    path.with_suffix(".jsonl").write_text('["a"]\n')
    return r"Line 1 of .*\.jsonl is not a JSON object; give one a line"


def _other_fields(path: Path) -> str:
    path.with_suffix(".jsonl").write_text('{"conversations": [], "id": 3}\n')
    return r"Line 1 of .* has 'conversations', 'id', and neither 'messages'"


def _latin_1(path: Path) -> str:
    path.with_suffix(".txt").write_bytes("été".encode("latin-1"))
    return r"\.txt cannot be read .*in UTF-8"


def _no_parquet(path: Path) -> str:
    path.with_suffix(".parquet").write_bytes(b"PAR1 no")
    return r"\.parquet cannot be read"


def _cut_arrow(path: Path) -> str:
    write_arrow_stream(path.with_suffix(".arrow"), CONVERSATIONS)
    whole = path.with_suffix(".arrow").read_bytes()
    path.with_suffix(".arrow").write_bytes(whole[: len(whole) // 2])
    return r"\.arrow cannot be read"


def _empty_arrow(path: Path) -> str:
    path.with_suffix(".arrow").touch()
    return r"\.arrow cannot be read"


def _other_columns(path: Path) -> str:
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), path.with_suffix(".parquet"))
    return r"\.parquet has 'prompt', 'chosen', and neither 'messages'"


def _text_of_another_type(path: Path) -> str:
    path.with_suffix(".jsonl").write_text('{"text": null}\n{"text": 3}\n')
    return r"Line 2 of .* has 'text' of type int; it must be a string"


def _messages_as_a_string(path: Path) -> str:
    records = {"messages": ['[{"role": "user", "content": "Why?"}]']}
    pq.write_table(pa.table(records), path.with_suffix(".parquet"))
    return r"\.parquet has 'messages' of type str; it must be a list of \{"


@pytest.mark.parametrize(
    "damage",
    [
        *(_not_json, _a_list, _other_fields, _latin_1),
        *(_text_of_another_type, _messages_as_a_string),
        *(_no_parquet, _cut_arrow, _empty_arrow, _other_columns),
    ],
)
def test_damage_is_told(damage: Callable[[Path], str], tmp_path: Path) -> None:
    expected = damage(tmp_path / "data")
    (path,) = tmp_path.iterdir()
    with pytest.raises(InvalidRequestError, match=f"(?s){expected}"):
        list(read_records(path))
