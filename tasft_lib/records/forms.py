"""Rows of any accepted form, as training rows (prompt, completion, label) or as evaluation prompts.

`label` is True for benign rows and False for unsafe ones: TRL's unpaired preference format, so one data set feeds
TA-SFT and KTO alike. Row numbers in messages count data rows from 1.
"""

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from ..text import is_whole, shown
from . import messages
from .sources import Source, column_names, file_format, is_table, like_names, read_file, read_rows
from .templates import Template, format_prompt

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
    """Rows of any accepted form as `prompt`, `completion` and `label`, each row checked by itself.

    The forms: `prompt` and `completion`, text or lists of messages (see `messages.read`); Alpaca's `instruction`,
    `output` and (optional) `input`, put into `template`; a conversation in `messages` or `conversations`, whose last
    turn is the completion. Template "chat" makes messages of every text. Of messages the columns `tools` and
    `chat_template_kwargs` are kept, which the chat template reads; of all `recovery`, a safe answer in an unsafe row.

    `label` is given to every row; with None it is read from the rows' own `label` column. Only booleans are labels,
    except in a CSV file, which has none: there true, false, 1 and 0 (any case) are read. `drop_empty` leaves out rows
    without an answer and logs how many. `with_place` adds a column `place`, "<source>: row <number>", by which `check`
    names a row and `row_numbers` finds it; `draw` takes it away.

    Raises:
        ValueError: missing column, text that is not text, label that is no boolean or contradicts `label`, empty row.
    """
    rows = rows.with_format(None)
    question, answer = _form(rows)
    _need(rows, (*dict.fromkeys((question, answer)), *["label"] * (label is None)), source)
    labels = _labels(rows, label, source, as_text=is_table(source))
    prompts, completions = _pairs(rows, question, answer, source)

    _refuse_empty(prompts, question, source)
    filled = [i for i, completion in enumerate(completions) if not _is_empty(completion)]
    if not drop_empty:
        _refuse_empty(completions, answer, source, remedy="fill it, remove the row or set drop_empty")
    elif n_empty := len(rows) - len(filled):
        logger.warning("%s: left out %d of %d rows, their %s is empty", source, n_empty, len(rows), answer)
    has_text = not any(isinstance(prompt, list) for prompt in prompts)

    if question == "instruction":
        inputs = rows["input"][:] if "input" in rows.column_names else [""] * len(rows)
        bare = "none" if template == "chat" else template
        prompts = [format_prompt(p, i or "", bare) for p, i in zip(prompts, inputs, strict=True)]
    if template == "chat":
        has_text = False
        prompts = [messages.of_text(p, "user") if isinstance(p, str) else p for p in prompts]
        completions = [messages.of_text(c, "assistant") if isinstance(c, str) else c for c in completions]
    columns = {"prompt": prompts, "completion": completions, "label": labels}
    if "recovery" in rows.column_names:
        columns["recovery"] = _recoveries(rows, source, as_messages=not has_text)
    if with_place:
        columns["place"] = [f"{source}: row {i + 1}" for i in range(len(rows))]
    if not has_text:
        columns |= _for_the_template(rows, source)
    features = {"label": Value("bool"), "place": Value("string"), "tools": Json(), "chat_template_kwargs": Json()}
    text = Value("string") if has_text else List(Json())  # Json: each message keeps its own keys
    return Dataset.from_dict(
        {name: [values[i] for i in filled] for name, values in columns.items()},
        features=Features({name: features.get(name, text) for name in columns}),
    )


def read_training_rows(
    source: Source,
    *,
    label: bool | None,
    template: Template = "alpaca",
    split: str | None = None,
    revision: str | None = None,
    name: str | None = None,
    **options,
) -> Dataset:
    """What `read_rows` reads, as `to_training_rows` makes it with its `options`."""
    rows = read_rows(source, split=split, revision=revision, name=name)
    return to_training_rows(rows, label=label, template=template, source=source, **options)


def read_prompts(
    source: Source, *, split: str | None = None, revision: str | None = None, name: str | None = None
) -> list[str]:
    """Evaluation prompts, bare (no template), in file order and with their repetitions.

    Reads STL's evaluation JSON (an object with `instructions`), a JSON list of strings (HarmfulQ), and whatever
    `read_rows` reads with a `prompt`, `instruction`, `Goal` or `goal` column. A non-empty `input` follows its
    instruction after an empty line, as in AlpacaEval; of a prompt in messages one user's turn is read.
    """
    path = Path(source).expanduser()
    content = read_file(path) if file_format(path) == ".json" and not path.is_dir() else None
    if isinstance(content, dict) and content.get("instructions"):
        prompts = content["instructions"]
    elif isinstance(content, list) and any(isinstance(entry, str) for entry in content):
        prompts = content
    else:
        rows = read_rows(source, split=split, revision=revision, name=name)
        column = next((column for column in _PROMPT_COLUMNS if column in rows.column_names), None)
        if column is None:
            if likely := like_names(rows, _PROMPT_COLUMNS):
                raise ValueError(f"{source}: {likely}")
            needs = f"one of {', '.join(_PROMPT_COLUMNS)}; rename one"
            raise ValueError(f"{source}: has the columns {column_names(rows)}; needs {needs}")
        prompts = rows[column][:]
        if column == "instruction" and "input" in rows.column_names:
            prompts = [format_prompt(p or "", i or "", "none") for p, i in zip(prompts, rows["input"][:], strict=True)]
    return [_prompt(prompt, f"{source}: row {row}") for row, prompt in enumerate(prompts, start=1)]


def row_numbers(rows: Dataset) -> list[int]:
    """Of rows made `with_place`, the number of each in its file, from 1."""
    return [int(place.rpartition(": row ")[2]) for place in rows["place"][:]]


def places(rows: Dataset, source: Source | None = None, *, first: int = 1) -> list[str]:
    """What names each row in a message: its own file and number where made `with_place`, else numbers from `first`."""
    if "place" in rows.column_names:
        return rows["place"][:]
    return [f"{source}: row {i}" if source else f"row {i}" for i in range(first, first + len(rows))]


def is_chat(rows: Dataset) -> bool:
    """Whether training rows are messages, not text."""
    return isinstance(rows.features["prompt"], List)


def list_places(places: list[str], indices: list[int]) -> str:
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


def _need(rows: Dataset, columns: Iterable[str], source: Source) -> None:
    if missing := [column for column in columns if column not in rows.column_names]:
        if likely := like_names(rows, missing):
            raise ValueError(f"{source}: {likely}")
        what = f"has the columns {column_names(rows)}; lacks {', '.join(missing)}"
        raise ValueError(f"{source}: {what}; add or rename (prompt and completion, or instruction and output; label)")


def _form(rows: Dataset) -> tuple[str, str]:
    """The columns of question and answer; one twice where it holds whole conversations."""
    names = set(rows.column_names)
    if "completion" not in names:
        if "instruction" in names:
            return "instruction", "output"
        for column in ("messages", "conversations"):
            if column in names:
                return column, column
    return "prompt", "completion"


def _pairs(rows: Dataset, question: str, answer: str, source: Source) -> tuple[list, list]:
    """Prompts and completions, bare: texts, or lists of messages."""
    if question == answer:
        pairs = []
        for row, conversation in enumerate(_column(rows, question, source, as_messages=True), start=1):
            try:
                pairs.append(messages.split(conversation))
            except ValueError as error:
                raise ValueError(f"{source}: row {row}: {question} {error}") from error
        return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    prompts, completions = (_column(rows, column, source) for column in (question, answer))
    kinds = [type(column[0]) if column else str for column in (prompts, completions)]
    if kinds[0] != kinds[1]:
        text, other = (question, answer) if kinds[0] is str else (answer, question)
        raise ValueError(f"{source}: {text} is text and {other} is messages; write both as text or both as messages")
    if question == "instruction" and kinds[0] is list:
        raise ValueError(f"{source}: instruction and output are messages; name them prompt and completion")
    return prompts, completions


def _recoveries(rows: Dataset, source: Source, *, as_messages: bool) -> list:
    """The column `recovery` in the form of the completions; None in rows without one."""
    recoveries = _column(rows, "recovery", source)
    if not as_messages and any(isinstance(recovery, list) and recovery for recovery in recoveries):
        raise ValueError(f"{source}: recovery is messages and the completion text; write both as text")
    made = [messages.of_text(r, "assistant") if as_messages and r and isinstance(r, str) else r for r in recoveries]
    return [recovery or None for recovery in made]


def _column(rows: Dataset, column: str, source: Source, *, as_messages: bool = False) -> list:
    """A column of texts, or of lists of messages; an absent one is empty."""
    values = rows[column][:]  # [:] reads a column at once, iterating it decodes row by row
    as_messages = as_messages or any(isinstance(value, (list, dict)) for value in values)
    by_arrow = "Json(" not in repr(rows.features[column])
    result = []
    for row, value in enumerate(values, start=1):
        place = f"{source}: row {row}: {column}"
        if value is None:
            result.append([] if as_messages else "")
        elif as_messages:
            try:
                result.append(messages.read(value, by_arrow=by_arrow))
            except ValueError as error:
                raise ValueError(f"{place} {error}") from error
        elif not isinstance(value, str):
            raise ValueError(f"{place} is {shown(value)}; write text or a list of {{role, content}} messages")
        elif messages.are_text(value):
            raise ValueError(f"{place} is messages written as text; save the rows as .jsonl, with lists of messages")
        else:
            result.append(value)
    return result


def _for_the_template(rows: Dataset, source: Source) -> dict[str, list]:
    """The columns `tools` and `chat_template_kwargs` of messages, where any row has them."""
    columns = {}
    for column, kind, wanted, nothing in (
        ("tools", list, "a list of tools", None),
        ("chat_template_kwargs", dict, "an object", {}),
    ):
        if column not in rows.column_names or not any(values := rows[column][:]):
            continue
        columns[column] = []
        for row, value in enumerate(values, start=1):
            if isinstance(value, str):
                with suppress(ValueError):  # no JSON is refused below, as any other text
                    value = json.loads(value)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{source}: row {row}: {column} is {shown(value)}; write {wanted}")
            if "Json(" not in repr(rows.features[column]):
                value = messages.without_nulls(value)
            columns[column].append(value or nothing)
    return columns


def _labels(rows: Dataset, label: bool | None, source: Source, *, as_text: bool = False) -> list[bool]:
    if "label" not in rows.column_names:
        return [label] * len(rows)
    values = rows["label"][:]
    if as_text:
        values = [_CSV_BOOLEANS.get(str(value).strip().lower(), value) for value in values]
    for row, value in enumerate(values, start=1):
        if not isinstance(value, bool):
            raise ValueError(f"{source}: row {row}: label is {shown(value)}; write true (benign) or false (unsafe)")
        if label not in (None, value):
            raise ValueError(f"{source}: row {row}: label is {value}, {label} was said; correct the row or say nothing")
    return values


def _prompt(prompt: Any, place: str) -> str:
    if isinstance(prompt, (list, dict)):
        try:
            turns = messages.read(prompt)
        except ValueError as error:
            raise ValueError(f"{place}: the prompt {error}") from error
        if [turn["role"] for turn in turns] != ["user"]:
            raise ValueError(f"{place}: the prompt has {len(turns)} turns; give one of the user, or text")
        prompt = turns[0]["content"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place}: the prompt is {shown(prompt)}; give non-empty text")
    if not is_whole(prompt):
        raise ValueError(f"{place}: the prompt holds half a character (a lone surrogate); mend the text")
    return prompt


def _is_empty(value: str | list[dict]) -> bool:
    return not value.strip() if isinstance(value, str) else messages.is_empty(value)


def _refuse_empty(values: list, column: str, source: Source, *, remedy: str = "fill it or remove the row") -> None:
    if indices := [i for i, value in enumerate(values) if _is_empty(value)]:
        places = [f"{source}: row {i + 1}" for i in range(len(values))]
        raise ValueError(f"{list_places(places, indices)}: {column} is empty; {remedy}")
