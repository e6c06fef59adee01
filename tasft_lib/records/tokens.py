"""Training rows in tokens, counted as TRL counts them: what is too long, and a BOS that would be there twice."""

import logging
from typing import Any

from datasets import Dataset

from .forms import is_chat, places
from .sources import Source
from .templates import template_errors

logger = logging.getLogger(__name__)


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
