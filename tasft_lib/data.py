"""Training rows (prompt, completion, label) and evaluation prompts, from a file to the rows of a run.

A row goes one way: `read_rows` -> `to_training_rows` (template, label, nothing empty) -> `clean` (repeats, leaks) ->
`draw` (draw, shuffle, check).

`label` is True for benign rows and False for unsafe ones: TRL's unpaired preference format, so one data set feeds
TA-SFT and KTO alike. Row numbers in messages count data rows from 1.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value, concatenate_datasets

from .sources import Source, column_names, file_format, read_file, read_rows
from .templates import Template, format_prompt, questions
from .text import normalise, shown

logger = logging.getLogger(__name__)
_PROMPT_COLUMNS = ("prompt", "instruction", "Goal", "goal")
_CSV_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def to_training_rows(
    rows: Dataset,
    *,
    label: bool | None,
    template: Template = "alpaca",
    source: Source,
    drop_empty: bool = False,
    with_place: bool = False,
) -> Dataset:
    """Rows of either accepted form as `prompt`, `completion` and `label`, each row checked by itself.

    The forms: `prompt` and `completion`, text or lists of {role, content} messages, passed on untouched; or Alpaca's
    `instruction`, `output` and (optional) `input`, put into `template`. `label` is given to every row; with None it is
    read from the rows' own `label` column. Only booleans are labels, except in a CSV file, which has none: there true,
    false, 1 and 0 (any case) are read. `drop_empty` leaves out rows without an answer and logs how many.
    `with_place` adds a column `place`, "<source>: row <number>", by which `check` names a row; `draw` takes it away.

    Raises:
        ValueError: missing column, text that is not text, label that is no boolean or contradicts `label`, empty row.
    """
    question, answer = form(rows)
    is_alpaca = question == "instruction"
    _need(rows, (question, answer, *["label"] * (label is None)), source)
    has_messages = _is_messages(rows, question, source)
    if _is_messages(rows, answer, source) != has_messages or (has_messages and is_alpaca):
        raise ValueError(f"{source}: {question} and {answer} mix text and messages; use text, or prompt and completion")

    places = [f"{source}: row {i + 1}" for i in range(len(rows))]
    labels = _labels(rows, label, source, as_text=file_format(Path(source)) == ".csv")
    _check_filled(rows, question, source)
    dropped = set(empty(rows, answer))
    if dropped and drop_empty:
        logger.warning("%s: left out %d of %d rows, their %s is empty", source, len(dropped), len(rows), answer)
        filled = [i for i in range(len(rows)) if i not in dropped]
        rows, labels, places = rows.select(filled), [labels[i] for i in filled], [places[i] for i in filled]
    _check_filled(rows, answer, source, remedy="fill it, remove the row or set drop_empty")

    if has_messages:
        training_rows = rows.select_columns(["prompt", "completion"]).add_column("label", labels)
    else:
        prompts = rows[question][:]  # [:] reads a column at once, iterating it decodes row by row
        if is_alpaca:
            inputs = rows["input"][:] if "input" in rows.column_names else [""] * len(rows)
            prompts = [format_prompt(p, i or "", template) for p, i in zip(prompts, inputs, strict=True)]
        training_rows = Dataset.from_dict({"prompt": prompts, "completion": rows[answer][:], "label": labels})
    return training_rows.add_column("place", places) if with_place else training_rows


def form(rows: Dataset) -> tuple[str, str]:
    """The columns of question and answer: Alpaca's `instruction` and `output`, or `prompt` and `completion`."""
    is_alpaca = "instruction" in rows.column_names and "completion" not in rows.column_names
    return ("instruction", "output") if is_alpaca else ("prompt", "completion")


def empty(rows: Dataset, column: str) -> list[int]:
    """The rows (from 0) whose text or messages in `column` hold nothing but white space."""
    texts = ([v] if isinstance(v, str) else [message["content"] for message in v or []] for v in rows[column][:])
    return [i for i, parts in enumerate(texts) if not any(part and part.strip() for part in parts)]


def read_prompts(
    source: Source, *, split: str = "train", revision: str | None = None, name: str | None = None
) -> list[str]:
    """Evaluation prompts, bare (no template), in file order and with their repetitions.

    Reads STL's evaluation JSON (an object with `instructions`), a JSON list of strings (HarmfulQ), and whatever
    `read_rows` reads with a `prompt`, `instruction`, `Goal` or `goal` column. A non-empty `input` follows its
    instruction after an empty line, as in AlpacaEval.
    """
    path = Path(source).expanduser()
    content = read_file(path) if file_format(path) == ".json" else None
    if isinstance(content, dict) and content.get("instructions"):
        prompts = content["instructions"]
    elif isinstance(content, list) and any(isinstance(entry, str) for entry in content):
        prompts = content
    else:
        rows = read_rows(source, split=split, revision=revision, name=name)
        column = next((column for column in _PROMPT_COLUMNS if column in rows.column_names), None)
        if column is None:
            needs = f"one of {', '.join(_PROMPT_COLUMNS)}; rename one"
            raise ValueError(f"{source}: has the columns {column_names(rows)}; needs {needs}")
        prompts = rows[column][:]
        if column == "instruction" and "input" in rows.column_names:
            prompts = [format_prompt(p or "", i or "", "none") for p, i in zip(prompts, rows["input"][:], strict=True)]
    for row, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{source}: row {row}: the prompt is {shown(prompt)}; give non-empty text")
    return prompts


def read_training_rows(
    source: Source,
    *,
    label: bool | None,
    template: Template = "alpaca",
    split: str = "train",
    revision: str | None = None,
    **options,
) -> Dataset:
    """What `read_rows` reads, as `to_training_rows` makes it with its `options`."""
    rows = read_rows(source, split=split, revision=revision)
    return to_training_rows(rows, label=label, template=template, source=source, **options)


def clean(rows: Dataset, evaluation_prompts: Iterable[str] = ()) -> Dataset:
    """Training rows without those that repeat an earlier one and those that ask an evaluation prompt."""
    return drop_leaks(deduplicate(rows)[0], evaluation_prompts)[0]


def draw(
    benign: Dataset,
    unsafe: Dataset | None,
    *,
    n_benign: int | None = None,
    n_unsafe: int | None = None,
    seed: int,
    source: Source,
    evaluation_prompts: Iterable[str] = (),
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Dataset:
    """The rows of one run, as `mix` draws and shuffles them, checked (see `check`); without `unsafe` benign ones alone.

    It is the last step of a row's way: `read_rows`, `to_training_rows`, `clean` (or a refusal here), `draw`.
    """
    other = benign.select([]) if unsafe is None else unsafe
    rows = mix(benign, other, n_benign=n_benign, n_unsafe=n_unsafe, seed=seed)
    check(
        rows,
        source=source,
        require_unsafe=unsafe is not None,
        evaluation_prompts=evaluation_prompts,
        tokenizer=tokenizer,
        max_length=max_length,
    )
    return rows.remove_columns("place") if "place" in rows.column_names else rows


def mix(
    benign: Dataset, unsafe: Dataset, *, n_benign: int | None = None, n_unsafe: int | None = None, seed: int
) -> Dataset:
    """`n_benign` and `n_unsafe` rows (None: all) drawn without replacement by `seed`, put together and shuffled by it.

    Draws are nested: with one seed, the 100 rows of n=100 are the first 100 drawn for n=300, so sizes can be compared.
    """
    if benign.features != unsafe.features:
        raise ValueError("mix: benign and unsafe rows differ in columns or types; pass both through to_training_rows")
    parts = []
    for stream, (rows, n, side) in enumerate([(benign, n_benign, "benign"), (unsafe, n_unsafe, "unsafe")]):
        n = len(rows) if n is None else n
        if not 0 <= n <= len(rows):
            raise ValueError(f"n_{side}={n}, but there are {len(rows)} {side} rows; ask for 0 to {len(rows)}")
        parts.append(rows.select(np.random.default_rng([seed, stream]).permutation(len(rows))[:n]))
    both = concatenate_datasets(parts)
    return both.select(np.random.default_rng([seed, 2]).permutation(len(both)))


def by_label(rows: Dataset) -> tuple[Dataset, Dataset]:
    """The (benign, unsafe) rows, each in their order."""
    labels = np.array(rows["label"][:], dtype=bool)
    return rows.select(np.flatnonzero(labels)), rows.select(np.flatnonzero(~labels))


def check(
    rows: Dataset,
    *,
    source: Source,
    require_unsafe: bool = True,
    require_benign: bool = True,
    evaluation_prompts: Iterable[str] = (),
    tokenizer: Any = None,
    max_length: int | None = None,
) -> None:
    """Refuse, in one line, training rows that together would mislead; `source` names them in the message.

    What one row must be `to_training_rows` has seen to. With `tokenizer` and `max_length` also a row whose prompt alone
    fills `max_length`: TRL drops those in silence.

    Raises:
        ValueError: one-sided data, a row that is repeated, leaked or cut away.
    """
    labels = rows["label"][:]
    if require_unsafe and all(labels):
        raise ValueError(f"{source}: has no unsafe row (label false), so nothing to penalise; add some")
    if require_benign and not any(labels):
        raise ValueError(f"{source}: has no benign row (label true), so nothing to learn; add some")
    places = rows["place"][:] if "place" in rows.column_names else [f"{source}: row {i + 1}" for i in range(len(rows))]
    first_seen: dict[str, int] = {}
    for i, text in enumerate(_texts(rows)):
        j = first_seen.setdefault(text, i)
        if labels[i] != labels[j]:
            raise ValueError(f"{_list(places, [j, i])}: same text, labels contradict; remove the wrong one")
        if j != i:
            raise ValueError(f"{_list(places, [j, i])}: same text; remove one of them")
    if leaks := _leaks(rows, evaluation_prompts):
        what = "the prompt is an evaluation prompt; remove the row"
        raise ValueError(f"{_list(places, leaks)}: {what}")
    if tokenizer is not None and max_length is not None and (full := _full(rows["prompt"][:], tokenizer, max_length)):
        what = f"the prompt alone fills max_length={max_length}, the completion is cut away"
        raise ValueError(f"{_list(places, full)}: {what}; raise max_length or remove the row")


def deduplicate(rows: Dataset) -> tuple[Dataset, int]:
    """Without the rows that repeat an earlier one's texts (`text.normalise`) and label, and how many those were."""
    first_seen: dict[tuple[str, bool], int] = {}
    for i, row in enumerate(zip(_texts(rows), rows["label"][:], strict=True)):
        first_seen.setdefault(row, i)
    return rows.select(list(first_seen.values())), len(rows) - len(first_seen)


def drop_leaks(rows: Dataset, evaluation_prompts: Iterable[str]) -> tuple[Dataset, int]:
    """Without the rows that ask an evaluation prompt (`text.normalise`), and how many those were.

    The instruction is compared inside our templates (with and without its input) and inside chat messages; any other
    prompt as a whole and line by line, `Speaker:` removed.
    """
    leaks = set(_leaks(rows, evaluation_prompts))
    return rows.select([i for i in range(len(rows)) if i not in leaks]), len(leaks)


def fingerprint(rows: Dataset) -> str:
    """SHA-256 of the rows in order: the same on every machine, whatever file or cache they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _need(rows: Dataset, columns: Iterable[str], source: Source) -> None:
    if missing := [column for column in columns if column not in rows.column_names]:
        what = f"has the columns {column_names(rows)}; lacks {', '.join(missing)}"
        raise ValueError(f"{source}: {what}; add or rename (prompt and completion, or instruction and output; label)")


def _is_messages(rows: Dataset, column: str, source: Source) -> bool:
    feature = rows.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return False
    message = feature.feature if isinstance(feature, List) else None
    if isinstance(message, dict) and message.get("role") == message.get("content") == Value("string"):
        return True
    raise ValueError(
        f"{source}: row 1: {column} is {shown(rows[0][column])}; write text or a list of {{role, content}} messages"
    )


def _labels(rows: Dataset, label: bool | None, source: Source, *, as_text: bool = False) -> list[bool]:
    if "label" not in rows.column_names:
        return [label] * len(rows)
    values = rows["label"][:]
    if as_text:
        values = [_CSV_BOOLEANS.get(str(value).lower(), value) for value in values]
    for row, value in enumerate(values, start=1):
        if not isinstance(value, bool):
            raise ValueError(f"{source}: row {row}: label is {shown(value)}; write true (benign) or false (unsafe)")
        if label not in (None, value):
            raise ValueError(f"{source}: row {row}: label is {value}, {label} was said; correct the row or say nothing")
    return values


def _check_filled(rows: Dataset, column: str, source: Source, *, remedy: str = "fill it or remove the row") -> None:
    if indices := empty(rows, column):
        places = [f"{source}: row {i + 1}" for i in range(len(rows))]
        raise ValueError(f"{_list(places, indices)}: {column} is empty; {remedy}")


def _texts(rows: Dataset) -> Iterator[str]:
    """Prompt and completion of each row in one, equal where both are the same text."""
    for pair in zip(rows["prompt"][:], rows["completion"][:], strict=True):
        # Of messages the roles and contents, in their order.
        parts = (
            [part] if isinstance(part, str) else [m[k] or "" for m in part for k in ("role", "content")]
            for part in pair
        )
        yield json.dumps([[normalise(text) for text in texts] for texts in parts])


def _full(prompts: list, tokenizer: Any, max_length: int) -> list[int]:
    """The prompts (from 0) of at least `max_length` tokens."""
    if isinstance(prompts[0], str):
        encoded = tokenizer(prompts)
    else:
        encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
    return [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]


def _leaks(rows: Dataset, evaluation_prompts: Iterable[str]) -> list[int]:
    held_out = {normalise(questions(prompt)[0]) for prompt in evaluation_prompts} - {""}
    prompts = rows["prompt"][:] if held_out else []
    return [i for i, prompt in enumerate(prompts) if any(normalise(q) in held_out for q in questions(prompt))]


def _list(places: list[str], indices: list[int]) -> str:
    """The first five rows at those indices, by source and in its order, and how many more there are."""
    numbers: dict[str, list[int]] = {}
    for i in indices:
        source, _, number = places[i].rpartition(": row ")
        numbers.setdefault(source, []).append(int(number))
    parts, left = [], 5
    for source, of_source in numbers.items():
        if left > 0:
            first = sorted(of_source)[:left]
            parts.append(f"{source}: row{'s' * (len(first) > 1)} {', '.join(map(str, first))}")
            left -= len(first)
    more = len(indices) - 5
    return " and ".join(parts) + (f" and {more} more" if more > 0 else "")
