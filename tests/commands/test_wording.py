"""All messages of the package: a remedy is one that the command has, in words that a user of the command line knows."""

import argparse
import ast
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from tasft_lib import cli

PACKAGE = Path(cli.__file__).parent
COMMANDS = list(cli.COMMANDS)
# Words with an underscore that are no options: columns of data, names of files and what stands in them.
OTHER_WORDS = {
    "save_to_disk", "original_label", "is_safe", "output_1", "output_2", "adapter_config", "api_key", "max_tokens",
    "lm_head", "llm_int8_skip_modules", "modules_to_not_convert", "fn_completions", "model_type",
}  # fmt: skip
# Names of parts of messages, which are put together later.
PARTS = ("what", "remedy", "problem", "needs")
# Rooms for Python and notebooks, whose remedies are arguments of theirs or settings of a profile.
PYTHON_ROOMS = ("experiments", "reporting", "bench")


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}


def imported(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    package = (
        module.split(".") if (PACKAGE / module.replace(".", "/") / "__init__.py").exists() else module.split(".")[:-1]
    )
    names = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
    return names & set(MODULES)


@cache
def reached(command: str) -> set[str]:
    """The modules that a command may run."""
    found, left = set(), {f"commands.{command}"}
    while left:
        module = left.pop()
        found.add(module)
        left |= imported(module) - found
    return found


@cache
def options(command: str) -> frozenset[str]:
    """The options of a command, without dashes."""
    if command == "train":
        from trl import ModelConfig, ScriptArguments

        from tasft_lib.commands.train_options import DataArguments
        from tasft_lib.config import TASFTConfig

        kinds = (DataArguments, TASFTConfig, ModelConfig, ScriptArguments)
        return frozenset({field.name for kind in kinds for field in fields(kind)} | {"config", "help_all"})

    class Parsed(Exception):
        pass

    def parse_args(parser, *_):
        raise Parsed(frozenset(name.lstrip("-") for action in parser._actions for name in action.option_strings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed) as parsed:
            import_module(f"tasft_lib.commands.{command}").main([])
    return parsed.value.args[0]


def texts(node: ast.AST) -> list[str]:
    """The texts in an expression, an f-string as one with … for what is put in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        inner = [text for part in node.values if isinstance(part, ast.FormattedValue) for text in texts(part.value)]
        return ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values), *inner]
    return [text for child in ast.iter_child_nodes(node) for text in texts(child)]


def messages() -> list[tuple[str, str]]:
    """(module, text) of what is raised or warned of, and of the parts that are named on the way there."""
    found = []
    for module, tree in MODULES.items():
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        writers = {
            getattr(node.func, "id", "") for exc in raised for node in ast.walk(exc) if isinstance(node, ast.Call)
        }
        found += [(module, text) for exc in raised for text in texts(exc)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in writers:
                returned = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
                found += [(module, text) for value in returned for text in texts(value)]
            is_part = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in PARTS
            is_part |= isinstance(node, ast.keyword) and node.arg in PARTS
            is_log = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "warning",
                "warning_once",
                "error",
            )
            if is_part or is_log:
                found += [(module, text) for text in texts(node)]
    return found


MESSAGES = messages()


def commands_of(module: str) -> list[str]:
    """The commands in which a module may speak: its own, or all that reach it."""
    room, _, own = module.partition(".")
    if room == "commands" and own in COMMANDS:
        return [own]
    return [command for command in COMMANDS if module in reached(command)]


def test_there_are_messages_to_walk():
    assert len(MESSAGES) > 300 and any("set drop_empty" in text for _, text in MESSAGES)
    assert "records.data" in reached("doctor") and "trainer" not in reached("data")
    assert "drop_empty" in options("filter")


def test_every_flag_that_a_message_names_is_one_of_the_command():
    for module, text in MESSAGES:
        for flag in re.findall(r"--([a-z]\w+)", re.sub(r"\(hf [^)]*\)|`[^`]*`", "", text)):
            owners = [command for command in commands_of(module) if flag in options(command)]
            assert owners or not commands_of(module), f"{module}: no command has --{flag}: {text}"


def test_remedies_are_options_and_no_python():
    for module, text in MESSAGES:
        # Parsers refuse what is written after a name of theirs; only remedies tell what to write.
        remedy = re.sub(r"\(hf [^)]*\)|`[^`]*`|pip install \S+", "", text)
        remedy = remedy.rpartition("; " if "; " in remedy else ": ")[2] if "; " in remedy or ": " in remedy else ""
        if not remedy or module.split(".")[0] in PYTHON_ROOMS or not commands_of(module):
            continue
        assert not re.search(r"\w\(\)|\w=(True|False|None)\b|\bimport \w", remedy), f"{module}: {text}"
        known = OTHER_WORDS.union(*(options(command) for command in commands_of(module)))
        for word in re.findall(r"(?<![\w./-])[a-z]+(?:_[a-z0-9]+)+(?![\w.]*\.\w)", remedy):
            assert word in known, f"{module}: {word} is no option of {', '.join(commands_of(module))}: {text}"
