"""Any file or hub data set as rows, or one line that names file and row. What the rows mean is `data`'s to say."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..text import shown, shown_name

Source = str | Path
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_TABLES = (".csv", ".tsv")
# What may stand between the cells of a .csv file; spreadsheets write ; where the comma is the decimal point.
_DELIMITERS = ",;\t|"
_MAX_INTEGER = 4000  # digits; Python refuses to read an integer of more than 4,300
csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, which a long text exceeds


def read_rows(
    source: Source, *, split: str | None = None, revision: str | None = None, name: str | None = None
) -> Dataset:
    """Rows of a .json (list of objects), .jsonl, .csv, .tsv or .parquet file, a `save_to_disk` folder or a hub set.

    A text file may be compressed (.gz, .bz2, .xz, or .zip with one file in it). Every CSV cell is text; its cells are
    parted by commas, semicolons, tabs or bars, as its header has them. `split` (by default "train") chooses within a
    hub data set or a saved DatasetDict, `name` is a hub data set's configuration, and a hub id needs `revision`, the
    commit to read. What a source does not have can't be asked of it.

    Raises:
        ValueError: missing, empty or malformed source, a row that is not an object, an unpinned hub id, a split,
            configuration or revision of a file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_hub_options(source, "folder", configuration=name, revision=revision)
        rows = _read_folder(path, split)
    elif file_format(path) in _SUFFIXES:
        # "train" is the usual default of programs, and what a file is.
        asked = None if split == "train" else split
        _refuse_hub_options(source, "file", split=asked, configuration=name, revision=revision)
        rows = _table(read_file(path), path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.exists():
        rows = _read_hub(str(source), split or "train", revision, name)
    else:
        kinds = f"a {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} file, nor a save_to_disk folder, nor a hub id"
        raise ValueError(f"{source}: neither {kinds} (owner/name); check the path")
    if len(rows) == 0:
        raise ValueError(f"{source}: has no rows; give at least one")
    return rows.with_format(None)


def column_names(rows: Dataset) -> str:
    """The names of all columns, for a message."""
    return ", ".join(map(shown_name, rows.column_names))


def like_names(rows: Dataset, wanted: Iterable[str]) -> str:
    """What to tell of columns that are named nearly as `wanted`, but for capitals, spaces and marks; "" without one."""

    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", "", name).casefold()

    for name in wanted:
        if like := [column for column in rows.column_names if plain(column) == plain(name)]:
            return f"the column {like[0]!r} must be named {name}; rename it"
    return ""


def read_file(path: Path) -> Any:
    """What a .json file holds, or the list of rows of a .jsonl, .csv, .tsv or .parquet file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; give at least one row")
    suffix, line, rows, text = file_format(path), 0, [], ""
    try:
        if suffix == ".parquet":
            return Dataset(pq.read_table(path)).to_list()  # with its features: JSON is read
        opened = _COMPRESSED.get(path.suffix.lower(), open)
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            if suffix in _TABLES:
                for row in _reader(file, suffix, path):
                    rows.append(row)
                return rows
            # hh-rlhf's red_team_attempts.jsonl.gz is one JSON list, whatever its name says.
            if suffix == ".json" or _begins_a_list(file):
                text = file.read()
                return _parsed(text)
            for line, text in enumerate(file, start=1):  # noqa: B007, the message below names it
                if text.strip():
                    rows.append(_parsed(text))
            return rows
    except json.JSONDecodeError as error:
        remedy = "name it .jsonl if each line is a row" if error.msg == "Extra data" and not line else "correct it"
        raise ValueError(f"{path}: line {line or error.lineno}: malformed JSON ({error.msg}); {remedy}") from error
    except RecursionError as error:
        row = len(rows) + 1 if line else _deep_row(text)
        raise ValueError(f"{path}: row {row}: lists or objects nested too deep to read; flatten the row") from error
    except csv.Error as error:
        raise ValueError(f"{path}: row {len(rows) + 1}: malformed CSV ({error}); correct its quotes") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({str(error)!r:.120}); save it as utf-8") from error
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no right to read it, say; bz2 has an OSError of its own, without a number
        raise ValueError(f"{path}: not a readable {suffix} file ({str(error)!r:.120}); save it again") from error


def file_format(path: Path) -> str:
    """The suffix that tells the format, below the one of a compression."""
    suffix = path.suffix.lower()
    if suffix not in _COMPRESSED:
        return suffix
    inner = Path(path.stem).suffix.lower()
    return inner if inner or suffix != ".zip" or not path.is_file() else Path(_zipped(path)).suffix.lower()


def is_table(source: Source) -> bool:
    """Whether it is a CSV file, in which everything is text."""
    return file_format(Path(source)) in _TABLES


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote that folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _open_zip(path: Path, mode: str, **options) -> TextIO:
    return io.TextIOWrapper(zipfile.ZipFile(path).open(_zipped(path)), **options)


def _zipped(path: Path) -> str:
    """The name of the one file in an archive; what a Mac puts beside it does not count."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.startswith("__MACOSX/") and name[-1] != "/"]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a readable .zip file ({error}); save it again") from error
    if len(names) != 1:
        raise ValueError(f"{path}: holds {len(names)} files; zip one, or give the file itself")
    return names[0]


_COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zip": _open_zip}
# What those and pyarrow raise for torn bytes; RuntimeError: a zip with a password.
_BROKEN = (pa.ArrowException, lzma.LZMAError, zlib.error, EOFError, zipfile.BadZipFile, RuntimeError)


def _reader(file: TextIO, suffix: str, path: Path) -> csv.DictReader:
    """The rows of a CSV file by its header, which tells what parts its cells: the mark that parts most names."""
    header = file.readline()
    told = re.fullmatch(r"sep=(.)\s*", header)  # Excel's first line
    header = file.readline() if told else header
    marks = told[1] if told else f"\t{_DELIMITERS}" if suffix == ".tsv" else _DELIMITERS
    delimiter = max(marks, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    file.seek(0)
    if told:
        file.readline()
    reader = csv.DictReader(file, strict=True, delimiter=delimiter)
    names = reader.fieldnames or []
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{path}: has the column {shown_name(twice[0])} twice; rename one")
    return reader


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    # Any integer beyond 64 bits is refused by its row, so of one that Python would not read the beginning will do.
    return int(digits[:_MAX_INTEGER])


def _deep_row(text: str) -> int:
    """The row (from 1) of a JSON list in which the nesting is deepest."""
    depth, deepest, row, deep_row = 0, 0, 1, 1
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{},]', text):
        mark = token[0]
        depth += (mark in "[{") - (mark in "]}")
        row += mark == "," and depth == 1
        if depth > deepest:
            deepest, deep_row = depth, row
    return deep_row


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
        return _stored(columns)
    except tuple(_UNSTORABLE):
        raise ValueError(f"{source}: {_first_unstorable(columns)}") from None


def _stored(columns: dict[str, list]) -> Dataset:
    # Objects with other keys than the row above (messages, tools) keep their own: Arrow would fill in nulls.
    return Dataset.from_dict(columns, on_mixed_types="use_json")


# What Arrow can't hold, and what to do about it.
_UNSTORABLE = {
    UnicodeEncodeError: "half a character (a lone surrogate); mend the text",
    OverflowError: "an integer of more than 64 bits; write it as text",
    RecursionError: "lists or objects nested too deep; flatten it",
    pa.ArrowException: "another inner structure than the rows above; align them",
    TypeError: "another inner structure than the rows above; align them",
}


def _first_unstorable(columns: dict[str, list]) -> str:
    """The first row that can't be stored, by bisection, and what is wrong with it."""
    for name, values in columns.items():
        fits, fails, problem = 0, len(values) + 1, None
        while fails - fits > 1:
            n = (fits + fails) // 2
            try:
                _stored({"column": values[:n]})
                fits = n
            except tuple(_UNSTORABLE) as error:
                fails, problem = n, error
        if problem is not None:
            what = next(what for kind, what in _UNSTORABLE.items() if isinstance(problem, kind))
            return f"row {fails}: {_safe_name(name)} holds {what}"
    return "a column's name holds half a character (a lone surrogate); rename it"


def _safe_name(name: str) -> str:
    return shown_name(name.encode(errors="replace").decode())


def _refuse_hub_options(source: Source, kind: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{source}: a {kind} has no {name} to choose ({shown_name(value)} was asked); leave it out"
            )


def _read_folder(path: Path, split: str | None) -> Dataset:
    if not is_saved(path):
        raise ValueError(f"{path}: a folder save_to_disk did not write; give a file in it instead")
    try:
        rows = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable save_to_disk folder ({str(error)!r:.120}); save it again") from error
    if not isinstance(rows, DatasetDict):
        _refuse_hub_options(path, "folder without splits", split=None if split == "train" else split)
        return rows
    if (split or "train") not in rows:
        raise ValueError(f"{path}: has no split {split or 'train'!r}; choose its split, one of {', '.join(rows)}")
    return rows[split or "train"]


def _read_hub(source: str, split: str, revision: str | None, name: str | None) -> Dataset:
    if revision in (None, "main"):
        raise ValueError(f"{source}: no such file, and a hub id needs a revision; give the commit to read")
    try:
        return load_dataset(source, name, split=split, revision=revision)
    except (OSError, ValueError) as error:
        remedy = "check id, split, configuration, revision and network, or give a downloaded file"
        if "gated" in str(error):
            remedy = f"accept its terms at https://huggingface.co/datasets/{source} and log in (hf auth login)"
        raise ValueError(f"{source}: the hub gave no rows ({str(error)!r:.120}); {remedy}") from error
