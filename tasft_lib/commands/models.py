"""What the commands that load a model share: flags, model, tokenizer."""

import argparse
import os
from pathlib import Path


def model_parser(prog: str, description: str, *, needs_model: bool = True) -> argparse.ArgumentParser:
    """Flags of a command that asks a model and has its answers judged."""
    from ..judges import JUDGES

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


def load_model(args: argparse.Namespace):
    """Model and tokenizer of `args.model`, `args.model_revision` and `args.dtype`; on the GPU where there is one.

    In 4 bits (NF4) where there is an `args.load_in_4bit` that says so.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tokenizer = load_tokenizer(args.model, args.model_revision)
    quantization = None
    if getattr(args, "load_in_4bit", False):
        compute = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        revision=args.model_revision or "main",
        dtype=args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
        quantization_config=quantization,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    return model, tokenizer


def load_tokenizer(model: str, revision: str | None):
    """Tokenizer of a folder or of a hub id; raises `ValueError` for a hub id without a commit."""
    from transformers import AutoTokenizer

    if not os.path.isdir(model) and revision in (None, "main"):
        raise ValueError(f"{model}: no such folder, and a hub id needs model_revision; give the commit to load.")
    return AutoTokenizer.from_pretrained(model, revision=revision or "main")
