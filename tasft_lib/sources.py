"""Any file or hub data set as rows, or one line that names file and row. What the rows mean is `data`'s to say."""

import csv
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .text import shown, shown_name

Source = str | Path
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}


def read_rows(source: Source, *, split: str = "train", revision: str | None = None, name: str | None = None) -> Dataset:
    """Rows of a .json (list of objects), .jsonl, .csv or .parquet file, a `save_to_disk` folder or a hub data set.

    A .json, .jsonl or .csv file may be compressed (.gz, .xz). Every CSV cell is text. `split` chooses within a hub data
    set or a saved DatasetDict, `name` is a hub data set's configuration, and a hub id needs `revision`, the commit to
    read.

    Raises:
        ValueError: missing, empty or malformed source, a row that is not an object, an unpinned hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _read_folder(path, split)
    elif file_format(path) in (".json", ".jsonl", ".csv", ".parquet"):
        rows = _table(read_file(path), path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.exists():
        rows = _read_hub(str(source), split, revision, name)
    else:
        kinds = "a .json, .jsonl, .csv or .parquet file, nor a save_to_disk folder, nor a hub id (owner/name)"
        raise ValueError(f"{source}: neither {kinds}; check the path")
    if len(rows) == 0:
        raise ValueError(f"{source}: has no rows; give at least one")
    return rows


def column_names(rows: Dataset) -> str:
    """The names of all columns, for a message."""
    return ", ".join(map(shown_name, rows.column_names))


def read_file(path: Path) -> Any:
    """What a .json file holds, or the list of rows of a .jsonl, .csv or .parquet file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; give at least one row")
    suffix, line, rows = file_format(path), 0, []
    try:
        if suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        opened = _COMPRESSED.get(path.suffix.lower(), open)
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            # hh-rlhf's red_team_attempts.jsonl.gz is one JSON list, whatever its name says.
            if suffix == ".json" or (suffix == ".jsonl" and _begins_a_list(file)):
                return json.load(file)
            if suffix == ".csv":
                for row in csv.DictReader(file, strict=True):
                    rows.append(row)
                return rows
            for line, text in enumerate(file, start=1):  # noqa: B007, the message below names it
                if text.strip():
                    rows.append(json.loads(text))
            return rows
    except json.JSONDecodeError as error:
        remedy = "name it .jsonl if each line is a row" if error.msg == "Extra data" and not line else "correct it"
        raise ValueError(f"{path}: line {line or error.lineno}: malformed JSON ({error.msg}); {remedy}") from error
    except csv.Error as error:
        raise ValueError(f"{path}: row {len(rows) + 1}: malformed CSV ({error}); correct its quotes") from error
    except (UnicodeDecodeError, pa.ArrowException, gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a readable {suffix} file ({str(error)!r:.120}); save it again") from error


def file_format(path: Path) -> str:
    """The suffix that tells the format, below the one of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def _begins_a_list(file: TextIO) -> bool:
    start = file.read(64).lstrip()
    file.seek(0)
    return start.startswith("[")


def _table(records: Any, source: Path) -> Dataset:
    """`Dataset.from_list` that keeps columns the first row lacks and says which row breaks a column's type."""
    if not isinstance(records, list):
        raise ValueError(f"{source}: holds one {type(records).__name__}; write a list of rows [{{column: value}}, ...]")
    for row, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{source}: row {row} is {shown(record)}; write an object {{column: value}}")
        if None in record:  # where csv puts the cells it has no header for
            raise ValueError(f"{source}: row {row} has more cells than the header; quote cells that hold commas")
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    for name, values in columns.items():
        first = next((type(value) for value in values if value is not None), None)
        for row, value in enumerate(values, start=1):
            if value is not None and type(value) is not first and {type(value), first} != {int, float}:
                what = f"{shown_name(name)} is {shown(value)}, rows above have {first.__name__}"
                raise ValueError(f"{source}: row {row}: {what}; use one type in a column")
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{source}: rows differ in the inner structure of their columns; align them") from error


def _read_folder(path: Path, split: str) -> Dataset:
    try:
        rows = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: a folder save_to_disk did not write; give a file in it instead") from error
    if isinstance(rows, DatasetDict) and split not in rows:
        raise ValueError(f"{path}: has no split {split!r}; choose one of {', '.join(rows)}")
    return rows[split] if isinstance(rows, DatasetDict) else rows


def _read_hub(source: str, split: str, revision: str | None, name: str | None) -> Dataset:
    if revision in (None, "main"):
        raise ValueError(f"{source}: no such file, and a hub id needs a revision; give the commit to read")
    try:
        return load_dataset(source, name, split=split, revision=revision)
    except (OSError, ValueError) as error:
        remedy = "check id, split, revision and network, or give a downloaded file"
        if "gated" in str(error):
            remedy = f"accept its terms at https://huggingface.co/datasets/{source} and log in (hf auth login)"
        raise ValueError(f"{source}: the hub gave no rows ({str(error)!r:.120}); {remedy}") from error
