"""Models and tokenizers: a folder or a pinned hub id, an adapter on its base, 4 bits."""

import argparse
import json
import logging
import os
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)


def quiet() -> None:
    """No bars and chatter of the libraries underneath; on a CPU one thread, so results don't depend on its cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


def load_model(args: argparse.Namespace):
    """Model and tokenizer of `args.model`, `args.model_revision` and `args.dtype`; on the GPU where there is one.

    In 4 bits (NF4) where there is an `args.load_in_4bit` that says so.
    """
    import torch

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

    if not os.path.isdir(model) and revision in (None, "main"):
        raise ValueError(f"{model}: no such folder, and a hub id needs model_revision; give the commit to load.")
    return AutoTokenizer.from_pretrained(model, revision=revision or "main")
