"""What the commands that load a model share: flags, model, tokenizer."""

import argparse
import json
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
    is_adapter = os.path.isfile(os.path.join(args.model, "adapter_config.json"))
    source, revision = args.model, args.model_revision
    if is_adapter:
        source, revision = adapter_base(args.model, args.model_revision)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision or "main",
        dtype=args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
        quantization_config=quantization,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    if is_adapter:
        # transformers' own loading of adapters loses DoRA's magnitudes (5.23).
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.model)
    return model, tokenizer


def adapter_base(
    adapter: str | Path, revision: str | None = None, *, base: str | None = None
) -> tuple[str, str | None]:
    """The base of an adapter in a folder and the base's commit; `base` and `revision` win where they are given.

    Raises `ValueError` where the base is neither a folder nor a hub id with a commit.
    """
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    base = base or config.get("base_model_name_or_path") or ""
    if os.path.isdir(base):
        return base, None
    revision = revision or config.get("revision")
    if not base or revision in (None, "main"):
        raise ValueError(
            f"{adapter}: its base {base!r} is no folder here, and adapter_config.json names no commit of a hub id; "
            "give the base's commit as --model_revision."
        )
    return base, revision


def load_tokenizer(model: str, revision: str | None):
    """Tokenizer of a folder or of a hub id; raises `ValueError` for a hub id without a commit."""
    from transformers import AutoTokenizer

    if not os.path.isdir(model) and revision in (None, "main"):
        raise ValueError(f"{model}: no such folder, and a hub id needs model_revision; give the commit to load.")
    return AutoTokenizer.from_pretrained(model, revision=revision or "main")
