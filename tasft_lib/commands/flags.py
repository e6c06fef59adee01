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


def check_data(source: str) -> None:
    """Raise `ValueError` for a file or folder of rows that is not there; a hub id (owner/name) may be anywhere."""
    path = Path(source).expanduser()
    is_file = {".json", ".jsonl", ".csv", ".parquet"} & {suffix.lower() for suffix in path.suffixes}
    if not path.exists() and (is_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        raise ValueError(f"{source}: no such file; check the path")
