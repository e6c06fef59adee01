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
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from ..text import is_whole, normalise, shown
from . import messages
from .sources import Source, column_names, file_format, is_table, like_names, read_file, read_rows
from .templates import Template, format_prompt, questions, template_errors

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
    `chat_template_kwargs` are kept, which the chat template reads.

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


def row_numbers(rows: Dataset) -> list[int]:
    """Of rows made `with_place`, the number of each in its file, from 1."""
    return [int(place.rpartition(": row ")[2]) for place in rows["place"][:]]


def places(rows: Dataset, source: Source | None = None, *, first: int = 1) -> list[str]:
    """What names each row in a message: its own file and number where made `with_place`, else numbers from `first`."""
    if "place" in rows.column_names:
        return rows["place"][:]
    return [f"{source}: row {i}" if source else f"row {i}" for i in range(first, first + len(rows))]


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


def clean(rows: Dataset, evaluation_prompts: Iterable[str] = ()) -> Dataset:
    """Training rows without those that repeat an earlier one and those that ask an evaluation prompt."""
    return drop_leaks(deduplicate(rows)[0], evaluation_prompts)[0]


def draw(
    benign: Dataset,
    unsafe: Dataset | None,
    *,
    n_benign: int | None = None,
    n_unsafe: int | None = None,
    unsafe_visits: int = 1,
    seed: int,
    source: Source,
    evaluation_prompts: Iterable[str] = (),
    tokenizer: Any = None,
    max_length: int | None = None,
    with_place: bool = False,
) -> Dataset:
    """The rows of one run, as `mix` draws and shuffles them, checked (see `check`); without `unsafe` benign ones alone.

    It is the last step of a row's way: `read_rows`, `to_training_rows`, `clean` (or a refusal here), `draw`. With
    `tokenizer` prompts lose a BOS that it adds itself (see `without_bos`).
    """
    other = benign.select([]) if unsafe is None else unsafe
    if tokenizer is not None:
        if twice := len(begin_with_bos(benign, tokenizer)) + len(begin_with_bos(other, tokenizer)):
            what = "prompts begin with the tokenizer's own BOS, which it adds; each is trained on with one"
            logger.warning("%s: %d %s", source, twice, what)
        benign, other = (without_bos(side, tokenizer) for side in (benign, other))
    drawn = {"n_benign": n_benign, "n_unsafe": n_unsafe, "seed": seed}
    rows = mix(benign, other, **drawn)
    check(
        rows,
        source=source,
        require_unsafe=unsafe is not None,
        evaluation_prompts=evaluation_prompts,
        tokenizer=tokenizer,
        max_length=max_length,
    )
    if unsafe_visits > 1:
        rows = mix(benign, other, **drawn, unsafe_visits=unsafe_visits)
    return rows.remove_columns("place") if "place" in rows.column_names and not with_place else rows


def mix(
    benign: Dataset,
    unsafe: Dataset,
    *,
    n_benign: int | None = None,
    n_unsafe: int | None = None,
    unsafe_visits: int = 1,
    seed: int,
) -> Dataset:
    """`n_benign` and `n_unsafe` rows (None: all) drawn without replacement by `seed`, put together and shuffled by it.

    Draws are nested: with one seed, the 100 rows of n=100 are the first 100 drawn for n=300, so sizes can be compared.
    Each unsafe row is there `unsafe_visits` times, so that an epoch has as many visits of it.
    """
    if unsafe_visits < 1:
        raise ValueError(f"unsafe_visits={unsafe_visits} would leave out every unsafe row; give 1 or more")
    parts = []
    for stream, (rows, n, side) in enumerate([(benign, n_benign, "benign"), (unsafe, n_unsafe, "unsafe")]):
        n = len(rows) if n is None else n
        if not 0 <= n <= len(rows):
            raise ValueError(f"n_{side}={n}, but there are {len(rows)} {side} rows; ask for 0 to {len(rows)}")
        drawn = np.random.default_rng([seed, stream]).permutation(len(rows))[:n]
        parts.append(rows.select(np.tile(drawn, unsafe_visits if side == "unsafe" else 1)))
    both = concatenate_datasets(_in_one_form(*parts))
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

    What one row must be `to_training_rows` has seen to. With `tokenizer` also messages that its chat template can't
    read, and with `max_length` a row whose prompt alone fills it: TRL drops those in silence.

    Raises:
        ValueError: one-sided data, a row that is repeated, leaked or cut away.
    """
    labels = rows["label"][:]
    if require_unsafe and all(labels):
        raise ValueError(f"{source}: has no unsafe row (label false), so nothing to penalise; add some")
    if require_benign and not any(labels):
        raise ValueError(f"{source}: has no benign row (label true), so nothing to learn; add some")
    row_places = places(rows, source)
    first_seen: dict[str, int] = {}
    for i, text in enumerate(_texts(rows)):
        j = first_seen.setdefault(text, i)
        if labels[i] != labels[j]:
            raise ValueError(f"{_list(row_places, [j, i])}: same text, labels contradict; remove the wrong one")
        if j != i:
            raise ValueError(f"{_list(row_places, [j, i])}: same text; remove one of them")
    if leaks := _leaks(rows, evaluation_prompts):
        what = "the prompt is an evaluation prompt; remove the row"
        raise ValueError(f"{_list(row_places, leaks)}: {what}")
    if tokenizer is not None and (max_length is not None or is_chat(rows)):
        lengths = prompt_lengths(rows, tokenizer, source=source)
        if full := [i for i, length in enumerate(lengths) if max_length is not None and length >= max_length]:
            what = f"the prompt alone fills max_length={max_length}, the completion is cut away"
            raise ValueError(f"{_list(row_places, full)}: {what}; raise max_length, remove the row or set drop_long")


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


def prompt_lengths(rows: Dataset, tokenizer: Any, *, source: Source) -> list[int]:
    """Tokens of each prompt, as TRL reads it: messages in the chat template, with tools and the opening of the answer.

    Raises `ValueError`, with the row, where the template can't read the messages.
    """
    if not len(rows):
        return []
    if not is_chat(rows):
        return [len(ids) for ids in tokenizer(rows["prompt"][:])["input_ids"]]
    return [len(chat_ids(row, tokenizer, place)[0]) for place, row in zip(places(rows, source), rows, strict=True)]


def chat_ids(row: dict[str, Any], tokenizer: Any, place: str) -> tuple[list[int], list[int]]:
    """Token ids of (the prompt, the whole row) of messages, with the row's tools and options, as TRL reads them.

    Raises `ValueError`, which begins with `place`, where the chat template can't read them.
    """
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    if getattr(tokenizer, "chat_template", None) is None:
        what = "messages, and the tokenizer has no chat template"
        raise ValueError(f"{place}: {what}; use the tokenizer of a chat model, or write text")
    with template_errors(f"{place}: ", remedy="write them as it wants them"):
        prompt, whole = (
            tokenizer.apply_chat_template(part, add_generation_prompt=begins, return_dict=True, **options)["input_ids"]
            for part, begins in ((row["prompt"], True), (row["prompt"] + row["completion"], False))
        )
    if any(message.get("tool_calls") for message in row["completion"]):
        bare = [{name: message[name] for name in ("role", "content")} for message in row["completion"]]
        if tokenizer.apply_chat_template(row["prompt"] + bare, return_dict=True, **options)["input_ids"] == whole:
            what = "the answer calls a tool, and the chat template passes over calls"
            raise ValueError(f"{place}: {what}; use a model whose template writes them, or remove the row")
    return prompt, whole


def token_counts(rows: Dataset, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the prompts and of the whole rows, as TRL counts them: text rows are closed by EOS."""
    if not len(rows):
        return [], []
    if is_chat(rows):
        ids = [chat_ids(row, tokenizer, place) for row, place in zip(rows, places(rows), strict=True)]
        return tuple([len(part) for part in parts] for parts in zip(*ids, strict=True))
    end = tokenizer.eos_token or ""
    rows = without_bos(rows, tokenizer)
    pairs = zip(rows["prompt"][:], rows["completion"][:], strict=True)
    whole = [p + (c if end and c.endswith(end) else c + end) for p, c in pairs]
    return tuple([len(ids) for ids in tokenizer(texts)["input_ids"]] for texts in (rows["prompt"][:], whole))


def drop_truncated(rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Without the rows that `max_length` would cut: prompt in its template, answer and its end have more tokens."""
    _, whole = token_counts(rows, tokenizer)
    return rows.select([i for i, length in enumerate(whole) if length <= max_length])


def drop_long(rows: Dataset, tokenizer: Any, max_length: int | None, *, source: Source) -> Dataset:
    """Without the rows whose prompt alone fills `max_length`, of which nothing would be learnt; logs how many."""
    if max_length is None:
        return rows
    lengths = prompt_lengths(rows, tokenizer, source=source)
    fitting = [i for i, length in enumerate(lengths) if length < max_length]
    if dropped := len(rows) - len(fitting):
        what = "left out %d of %d rows, their prompt alone fills max_length=%d"
        logger.warning(f"%s: {what}", source, dropped, len(rows), max_length)
    return rows.select(fitting)


def begin_with_bos(rows: Dataset, tokenizer: Any) -> list[int]:
    """The rows (from 0) whose text begins with the BOS that the tokenizer puts before every text: there are two."""
    bos = getattr(tokenizer, "bos_token", None)
    if not bos or not len(rows) or is_chat(rows) or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return []
    return [i for i, prompt in enumerate(rows["prompt"][:]) if prompt.startswith(bos)]


def without_bos(rows: Dataset, tokenizer: Any) -> Dataset:
    """The rows with one BOS each: text loses the one that the tokenizer adds (see `begin_with_bos`)."""
    if not begin_with_bos(rows, tokenizer):
        return rows
    bare = [prompt.removeprefix(tokenizer.bos_token) for prompt in rows["prompt"][:]]
    return rows.remove_columns("prompt").add_column("prompt", bare).select_columns(rows.column_names)


def fingerprint(rows: Dataset) -> str:
    """SHA-256 of the rows in order: the same on every machine, whatever file or cache they came from."""
    digest = hashlib.sha256()
    for row in rows.remove_columns("place") if "place" in rows.column_names else rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


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
        raise ValueError(f"{_list(places, indices)}: {column} is empty; {remedy}")


def _texts(rows: Dataset) -> Iterator[str]:
    """Prompt and completion of each row in one, equal where both are the same text."""
    tools = rows["tools"][:] if "tools" in rows.column_names else [None] * len(rows)
    for prompt, completion, of_row in zip(rows["prompt"][:], rows["completion"][:], tools, strict=True):
        parts = [[part] if isinstance(part, str) else messages.parts(part) for part in (prompt, completion)]
        parts += [[json.dumps(of_row, sort_keys=True)]] if of_row else []
        yield json.dumps([[normalise(text) for text in texts] for texts in parts])


def is_chat(rows: Dataset) -> bool:
    """Whether training rows are messages, not text."""
    return isinstance(rows.features["prompt"], List)


def _in_one_form(benign: Dataset, unsafe: Dataset) -> tuple[Dataset, Dataset]:
    """Both sides with the same columns, text or messages; or a refusal that names them."""
    if not (len(benign) and len(unsafe)):
        return (benign, benign.select([])) if len(benign) else (unsafe.select([]), unsafe)
    names = [
        side["place"][0].rpartition(": row ")[0] if "place" in side.column_names else f"the {name} rows"
        for side, name in ((benign, "benign"), (unsafe, "unsafe"))
    ]
    if is_chat(benign) != is_chat(unsafe):
        text, chat = reversed(names) if is_chat(benign) else names
        what = f"has text, {chat} messages, and what is asked in one form is not unlearnt in the other"
        raise ValueError(f"{text}: {what}; set prompt_template to chat, which makes messages of text")
    for column, nothing in (("tools", None), ("chat_template_kwargs", {})):
        if (column in benign.column_names) != (column in unsafe.column_names):
            benign, unsafe = (
                side
                if column in side.column_names
                else side.add_column(column, [json.dumps(nothing)] * len(side), feature=Json())
                for side in (benign, unsafe)
            )
    if benign.features != unsafe.features:
        other = sorted(set(benign.column_names) ^ set(unsafe.column_names)) or benign.column_names
        raise ValueError(f"{names[0]} and {names[1]}: differ in columns or types ({', '.join(other)}); align them")
    return benign, unsafe.select_columns(benign.column_names)


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
