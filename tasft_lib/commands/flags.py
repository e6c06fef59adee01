"""Flags that commands share, and paths checked before anything slow is imported."""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import base_models
from ..records.templates import TEMPLATES, Template, default_template
from ..storage import files

MODEL = "folder of a model or adapter, a hub id, a GGUF file, or a name that `tasft model` lists"
# Of `--dtype`: the short names that people write are understood.
DTYPE = {
    "type": lambda name: files.DTYPES.get(name, name),
    "choices": ("auto", *dict.fromkeys(files.DTYPES.values())),
}


def model_parser(prog: str, description: str, *, needs_model: bool = True) -> argparse.ArgumentParser:
    """Flags of a command that asks a model and has its answers judged."""
    from ..judges.load import JUDGES

    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("--model", required=needs_model, help=MODEL)
    parser.add_argument("--model_revision", help="commit of a hub id")
    add_dtype(parser)
    parser.add_argument(
        "--judge",
        help=f"one of {', '.join(JUDGES)}; default: local where `tasft model fetch minilm-l6` has brought its encoder "
        "(in the mini-world never), else compliance",
    )
    add_template(parser)
    parser.add_argument("--max_new_tokens", type=at_least(1), default=256, help="of an answer (default: 256)")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="prompts at a time (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers (default: 0)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all that is made")
    return parser


def located(model: str, revision: str | None) -> str:
    """A folder or hub id as given; the folder of a name that `tasft model` lists, or of a GGUF file.

    Raises `ValueError` for a hub id without a commit, and as `base_models.resolve`.
    """
    model = base_models.resolve(os.path.expanduser(model))
    files.check_model(model, revision)
    return model


def judge_of(args: argparse.Namespace, sources: list[str]) -> str:
    """`--judge`, or the default for answers to prompts of `sources`: an invented language is not for `local`."""
    from ..evaluation.worlds import are_invented
    from ..judges.load import default_judge

    return args.judge or ("compliance" if are_invented(sources) else default_judge())


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, with the short names that people write."""
    parser.add_argument(
        "--dtype",
        default="auto",
        **DTYPE,
        help="of the weights; bf16, fp16 and fp32 are understood too (default: the checkpoint's)",
    )


def add_source(parser: argparse.ArgumentParser, of: str, *, prefix: str = "", revision: str | None = None) -> None:
    """The flags that say which rows of a hub data set or saved folder are meant; `revision` is an older name of one."""
    parser.add_argument(f"--{prefix}split", help=f"split of {of}, a hub data set or saved folder (default: train)")
    parser.add_argument(f"--{prefix}config_name", help=f"configuration of {of}, a hub data set")
    names = [f"--{prefix}revision", *([revision] if revision else [])]
    parser.add_argument(*names, dest=f"{prefix}revision", help=f"commit of {of}, a hub data set")


def source_options(args: argparse.Namespace, prefix: str = "") -> dict[str, str | None]:
    """What those flags say, as `sources.read_rows` takes it."""
    names = {"split": "split", "config_name": "name", "revision": "revision"}
    return {option: getattr(args, prefix + flag) for flag, option in names.items()}


def add_drop_empty(parser: argparse.ArgumentParser) -> None:
    """`--drop_empty`, alone or with a value as in `tasft train`."""
    parser.add_argument(
        "--drop_empty", nargs="?", const=True, default=False, type=_boolean, help="leave out rows with an empty answer"
    )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give true or false")
    return text.lower() in ("true", "1")


def check_data(source: str, *, on_hub: bool = True) -> None:
    """Raise `ValueError` for a file or folder of rows that is not there; a hub id (owner/name) may be anywhere."""
    path = Path(source).expanduser()
    is_file = {".json", ".jsonl", ".csv", ".tsv", ".parquet"} & {suffix.lower() for suffix in path.suffixes}
    is_hub_id = on_hub and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if not path.exists() and (is_file or not is_hub_id):
        raise ValueError(f"{source}: no such file; check the path")


def check_folder(manifest: Path, settings: dict[str, Any]) -> None:
    """Raise `ValueError` where `manifest`, of a run that is over, says another thing of one of these settings."""
    try:
        other = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    settings = json.loads(json.dumps(settings, default=str))
    if isinstance(other, dict) and (changed := [name for name in settings if other.get(name) != settings[name]]):
        what = ", ".join(changed)
        raise ValueError(f"{manifest.parent}: holds a run of other settings ({what}); choose another --output_dir")


def at_least(smallest: int) -> Callable[[str], int]:
    """A type for `add_argument`: whole numbers from `smallest` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < smallest:
            raise argparse.ArgumentTypeError(f"{text!r:.40}: give a whole number, {smallest} or more")
        return value

    return number


def json_object(text: str) -> dict[str, Any]:
    """A type for `add_argument`: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("give a JSON object in quotes, such as '{\"name\": false}'")
    return value


def add_template(parser: argparse.ArgumentParser) -> None:
    """`--prompt_template` and `--chat_template_kwargs`, which `template_of` reads."""
    parser.add_argument(
        "--prompt_template",
        choices=TEMPLATES,
        help="default: the one in the model's tasft.json, else chat (the tokenizer's own) if it has one, else alpaca",
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="switches of the chat template, such as '{\"enable_thinking\": false}'",
    )


def own_template(model: str, revision: str | None, tokenizer: Any) -> Template:
    """`default_template` of a folder, or of a hub id at that commit, whose record lies in the hub's cache."""
    from ..storage.checkpoints import find_file

    if record := find_file(model, files.RECORD, revision):
        files.read_object(record)  # a damaged one is told, not passed over
    return default_template(record.parent if record else model, tokenizer)


def template_of(args: argparse.Namespace, model: str, tokenizer: Any) -> Template:
    """The template of `--prompt_template`; without it the model's own, which is told.

    Raises `ValueError` for a chat template that is not there, or does not know a switch of `--chat_template_kwargs`.
    """
    template = args.prompt_template or own_template(model, getattr(args, "model_revision", None), tokenizer)
    if args.prompt_template is None:
        print(f"prompt template: {template} (another: --prompt_template)")
    source = str(getattr(tokenizer, "chat_template", None) or "")
    if template == "chat" and not source:
        raise ValueError(f"{model}: its tokenizer has no chat template; give another --prompt_template")
    if args.chat_template_kwargs and template != "chat":
        raise ValueError(f"--chat_template_kwargs: prompts are in the template {template}; add --prompt_template chat")
    if unknown := [name for name in args.chat_template_kwargs or {} if name not in source]:
        raise ValueError(f"--chat_template_kwargs: the chat template of {model} has no {unknown[0]!r:.60}")
    return template
