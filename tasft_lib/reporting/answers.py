"""Answers side by side, for people: one page that needs no network, and a table in a notebook.

Texts are hidden until asked for. `answers.html` beside this file is the page without its answers.
"""

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from typing import Any

from ..storage import files
from ..text import redact


def page(table: dict[str, Any], title: str) -> str:
    """An HTML page of `side_by_side.side_by_side`; `title` stands above it.

    Answers stand in it as JSON, which no browser runs, and become text by `textContent` alone. Its policy allows its
    own script (by hash) and nothing else: no network, no handler in an answer.
    """
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # "<" alone could end the element that holds it, or open a comment.
    content = json.dumps(table | {"title": title}).replace("<", "\\u003c")
    return template.replace("SCRIPT_HASH", f"sha256-{digest}").replace("ANSWERS", content)


def write_page(table: dict[str, Any], file: Path) -> Path:
    """`page` in a file, whole or not at all; returns its path. Raises `ValueError` unless it is called .html."""
    if file.suffix != ".html" or file.is_dir():
        raise ValueError(f"{file}: is no name for a page; give one that ends in .html.")
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, page(table, " · ".join(table["names"])))
    return file


def interactive(table: dict[str, Any], *, in_full: bool = False) -> Any:
    """The same as a table in a notebook: panes choose benchmark and verdicts, a click on a row shows its texts below.

    What is shown before that, and so what a notebook that was saved without a click holds, is redacted (unless
    `in_full`, for an invented world). Texts come from the kernel; no network is used.
    """
    import pandas as pd
    from ipywidgets import HTML, VBox
    from itables.widget import ITable

    names, rows = table["names"], table["rows"]
    prompts = [row["prompt"] if in_full else redact(row["prompt"]) for row in rows]
    shown = pd.DataFrame({"benchmark": [row["benchmark"] for row in rows], "prompt": prompts})
    for judge in table["judges"]:
        for arm, name in enumerate(names):
            said = [row["answers"][arm] and row["answers"][arm]["verdicts"].get(judge) for row in rows]
            column = name if len(table["judges"]) == 1 else f"{name} ({judge})"
            shown[column] = [verdict or "-" for verdict in said]
    chosen = [i for i, name in enumerate(shown.columns) if name != "prompt"]
    panes = {"columns": chosen, "layout": "columns-3", "cascadePanes": True, "initCollapsed": True}
    text = HTML()
    view = ITable(shown, select=True, showIndex=False, maxBytes=0, layout={"top1": "searchPanes"}, searchPanes=panes)

    def show(change) -> None:
        text.value = "<hr>".join(_texts(rows[i], names) for i in change["new"])

    view.observe(show, "selected_rows")
    return VBox([view, text])


def _texts(row: dict[str, Any], names: list[str]) -> str:
    """A row's texts in HTML, escaped."""
    answers = {name: answer["response"] for name, answer in zip(names, row["answers"], strict=True) if answer}
    parts = {"prompt": row["prompt"]} | answers
    style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4"
    return "".join(f'<div style="{style}"><b>{escape(n)}</b>\n{escape(text)}</div>' for n, text in parts.items())
