"""What `tasft filter` and `tasft train` do with SAFT: rows in; files and a page, or labels out. Both resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from datasets import Dataset

from ..records import data
from ..storage import files, integrity
from . import report
from .activations import context_length, token_lengths
from .filter import SAFTFilter
from .find import Search, find_harmful

Load = Callable[[], tuple]  # gives (model, tokenizer), which are loaded no sooner than they are needed


def filter_rows(
    rows: Dataset,
    texts: Dataset,
    search: Search,
    load: Load,
    *,
    output: report.Output,
    draw: Callable[[pd.DataFrame, SAFTFilter], None],
    source: str,
    model_name: str,
    model_revision: str | None = None,
    harmful: list[bool] | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    activations: Path | None = None,
) -> str:
    """Write what a filter leaves of `rows` into the output folder, the manifest last; returns the page on it.

    Args:
        texts: the same rows as `prompt` and `completion`.
        draw: draws `report.histogram` into the folder.
        source, model_name: names that may stand in the page.
        harmful: what each row is known to be; it is compared with the result and has no part in it.
        activations: folder that keeps them, by default in the output folder.
    """
    output.begin()
    model, tokenizer = load()
    folder = activations or output.folder / "activations"
    reading = {"max_length": max_length, "batch_size": batch_size, "folder": folder}
    saft, scores = find_harmful(model, tokenizer, texts, search, **reading)
    kept, dropped = saft.filter(rows, scores)
    for part, path in zip((kept, dropped), output.parts, strict=True):
        report.save_rows(part, path)
    saft.save(output.folder)
    draw(report.histogram(scores, saft.threshold, harmful), saft)
    page = report.page(
        saft,
        scores,
        texts,
        token_lengths(tokenizer, texts),
        source=source,
        model=model_name + (f" at {model_revision}" if model_revision else ""),
        max_length=max_length or context_length(model),
        contamination=search.contamination,
        harmful=harmful,
    )
    files.write_text(output.folder / "report.md", page)
    counts = {"rows": data.fingerprint(texts), "n_rows": len(rows), "n_dropped": len(dropped), "batch_size": batch_size}
    output.finish(saft, {"data": source, "model": model_name} | counts)
    return page


def label_rows(
    rows: Dataset,
    search: Search,
    load: Load,
    *,
    folder: Path,
    source: str,
    model_name: str,
    identity: Any,
    max_length: int | None = None,
) -> Dataset:
    """`rows` with `label` False for those that SAFT finds harmful.

    The first process finds them and leaves the labels and a page in `folder`; the others, and a run that is resumed,
    read them there. `identity` tells one model and its reading from another.

    Raises `ValueError` for rows of which some are labelled False already.
    """
    if not all(rows["label"][:]):
        raise ValueError(f"{source}: has rows labelled false already; remove them, or do without SAFT.")
    search.check(len(rows))
    columns = ("prompt", "completion", "label", "tools", "chat_template_kwargs", "place")
    texts = rows.select_columns([name for name in columns if name in rows.column_names])
    validation = search.validation and data.fingerprint(search.validation)
    name = files.content_hash([data.fingerprint(texts), validation, search.contamination, identity, max_length])
    file = folder / f"verdicts-{name}.json"
    with PartialState().main_process_first():
        if not integrity.keep_if_whole(file):
            model, tokenizer = load()
            saft, scores = find_harmful(model, tokenizer, texts, search, max_length=max_length, folder=folder)
            page = report.page(
                saft,
                scores,
                texts,
                token_lengths(tokenizer, texts),
                source=Path(source).name,
                model=model_name,
                max_length=max_length,
                contamination=search.contamination,
            )
            files.write_text(folder / "report.md", page)
            files.write_json(file, saft.drops(scores).tolist())
            integrity.seal(file)
            print(page)
            del model
    dropped = files.read_json(file)
    return rows.remove_columns("label").add_column("label", [not row for row in dropped])
