"""Answers side by side, for people: one page that needs no network, and a table in a notebook.

Texts are hidden until asked for. `answers.html` beside this file is the page without its answers.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from ..storage import files


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
