"""Flags that commands share, and paths checked before anything slow is imported."""

import argparse
import re
from pathlib import Path

from .. import files


def model_parser(prog: str, description: str, *, needs_model: bool = True) -> argparse.ArgumentParser:
    """Flags of a command that asks a model and has its answers judged."""
    from ..judges.load import JUDGES

    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("--model", required=needs_model, help="folder of a model or adapter, or a hub id")
    parser.add_argument("--model_revision", help="commit of a hub id")
    add_dtype(parser)
    parser.add_argument("--judge", default="compliance", help=f"one of {', '.join(JUDGES)}; default: compliance")
    parser.add_argument("--prompt_template", default="alpaca", choices=("alpaca", "short", "none"))
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, with the short names that people write."""
    parser.add_argument(
        "--dtype",
        default="auto",
        type=lambda name: files.DTYPES.get(name, name),
        choices=("auto", *dict.fromkeys(files.DTYPES.values())),
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
        raise ValueError(text)
    return text.lower() in ("true", "1")


def check_data(source: str, *, on_hub: bool = True) -> None:
    """Raise `ValueError` for a file or folder of rows that is not there; a hub id (owner/name) may be anywhere."""
    path = Path(source).expanduser()
    is_file = {".json", ".jsonl", ".csv", ".tsv", ".parquet"} & {suffix.lower() for suffix in path.suffixes}
    is_hub_id = on_hub and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if not path.exists() and (is_file or not is_hub_id):
        raise ValueError(f"{source}: no such file; check the path")
