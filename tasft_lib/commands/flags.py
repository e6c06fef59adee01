"""Flags that commands share."""

import argparse
from pathlib import Path


def model_parser(prog: str, description: str, *, needs_model: bool = True) -> argparse.ArgumentParser:
    """Flags of a command that asks a model and has its answers judged."""
    from ..judges.load import JUDGES

    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("--model", required=needs_model, help="folder of a model or adapter, or a hub id")
    parser.add_argument("--model_revision", help="commit of a hub id")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")
    parser.add_argument("--judge", default="compliance", help=f"one of {', '.join(JUDGES)}; default: compliance")
    parser.add_argument("--prompt_template", default="alpaca", choices=("alpaca", "short", "none"))
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser
