"""From training rows to the rows of a run: repeats and leaks dropped, drawn, mixed, checked.

A row goes one way: `sources.read_rows` -> `forms.to_training_rows` (template, label, nothing empty) -> `clean`
(repeats, leaks) -> `draw` (draw, shuffle, check).
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..text import normalise
from . import messages
from .forms import is_chat, list_places, places
from .sources import Source
from .templates import questions
from .tokens import begin_with_bos, prompt_lengths, without_bos

logger = logging.getLogger(__name__)


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


def require_recoveries(unsafe: Dataset) -> None:
    """Refuse, by its `place`, an unsafe row that lacks the `recovery` which penalty `recover` learns (`ValueError`)."""
    recoveries = unsafe["recovery"][:] if "recovery" in unsafe.column_names else [None] * len(unsafe)
    if place := next((p for p, told in zip(unsafe["place"][:], recoveries, strict=True) if not told), None):
        what = "no recovery, a safe answer to its prompt, which penalty recover needs"
        raise ValueError(f"{place}: {what}; add a column, or run `tasft harvest --recoveries`")


def check(
    rows: Dataset,
    *,
    source: Source,
    require_unsafe: bool = True,
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
    if not any(labels):
        raise ValueError(f"{source}: has no benign row (label true), so nothing to learn; add some")
    row_places = places(rows, source)
    first_seen: dict[str, int] = {}
    for i, text in enumerate(_texts(rows)):
        j = first_seen.setdefault(text, i)
        if labels[i] != labels[j]:
            raise ValueError(f"{list_places(row_places, [j, i])}: same text, labels contradict; remove the wrong one")
        if j != i:
            raise ValueError(f"{list_places(row_places, [j, i])}: same text; remove one of them")
    if leaks := _leaks(rows, evaluation_prompts):
        what = "the prompt is an evaluation prompt; remove the row"
        raise ValueError(f"{list_places(row_places, leaks)}: {what}")
    if tokenizer is not None and (max_length is not None or is_chat(rows)):
        lengths = prompt_lengths(rows, tokenizer, source=source)
        if full := [i for i, length in enumerate(lengths) if max_length is not None and length >= max_length]:
            what = f"the prompt alone fills max_length={max_length}, the completion is cut away"
            remedy = "raise max_length, remove the row or set drop_long"
            raise ValueError(f"{list_places(row_places, full)}: {what}; {remedy}")


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
    for row in rows.remove_columns("place") if "place" in rows.column_names else rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _texts(rows: Dataset) -> Iterator[str]:
    """Prompt and completion of each row in one, equal where both are the same text."""
    tools = rows["tools"][:] if "tools" in rows.column_names else [None] * len(rows)
    for prompt, completion, of_row in zip(rows["prompt"][:], rows["completion"][:], tools, strict=True):
        parts = [[part] if isinstance(part, str) else messages.parts(part) for part in (prompt, completion)]
        parts += [[json.dumps(of_row, sort_keys=True)]] if of_row else []
        yield json.dumps([[normalise(text) for text in texts] for texts in parts])


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
    features = benign.features | unsafe.features
    for column, nothing in (("tools", "null"), ("chat_template_kwargs", "{}"), ("recovery", None)):
        if (column in benign.column_names) != (column in unsafe.column_names):
            benign, unsafe = (
                side
                if column in side.column_names
                else side.add_column(column, [nothing] * len(side), feature=features[column])
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
