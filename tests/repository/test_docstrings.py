"""A docstring that names a function of the package names one that is there."""

import ast
import pkgutil
import re
from pathlib import Path

import tasft_lib

# `module.name`, and no file's name.
NAME = re.compile(r"`((?:[a-z_]\w*\.)+(?!(?:json|jsonl|html|md|py)\b)\w+)")
# In docstrings these are objects too: an arm's or a notebook's.
OBJECTS = ("config", "settings")


def is_there(place: str, name: str) -> bool:
    try:
        pkgutil.resolve_name(f"{place}.{name}")
    except (ImportError, AttributeError):
        return False
    return True


def test_what_a_docstring_names_is_there():
    places: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(tasft_lib.__path__, "tasft_lib."):
        package, _, name = module.name.rpartition(".")
        if package != "tasft_lib.commands" and name not in OBJECTS:
            places.setdefault(name, []).append(package)
    for path in Path(tasft_lib.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            for name in NAME.findall(ast.get_docstring(node) or "" if is_documented else ""):
                rooms = places.get(name.partition(".")[0])
                assert not rooms or any(is_there(room, name) for room in rooms), f"{path}: `{name}`"
