"""The mini-world is a guest with two doors: nobody else imports it, and nobody asks whether it is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("evaluation/worlds.py", "judges/miniworld.py")


def others() -> list[Path]:
    library = ROOT / "tasft_lib"
    inside = {library / door for door in DOORS} | set((library / "miniworld").rglob("*.py"))
    return sorted(set(library.rglob("*.py")) - inside)


def test_no_branch_asks_for_the_mini_world():
    branch = re.compile(r"\b(if|elif|case|assert|while)\b.*mini_?world", re.IGNORECASE)
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in (*others(), *notebooks):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not branch.search(line), f"{path}:{number}: ask evaluation.worlds or the judge instead"


def test_nobody_but_the_two_doors_imports_the_mini_world():
    for path in others():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                named = {part for name in names for part in name.split(".")}
                # The loader of judges opens one of the doors.
                assert "miniworld" not in named or path.name == "load.py", path
