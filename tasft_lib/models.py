"""The one loader of models and tokenizers: a folder or a pinned hub id, an adapter on its base, 4 bits, the device."""

import json
import logging
import os
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import files


def quiet() -> None:
    """No bars and chatter of the libraries underneath; on a CPU one thread, so results don't depend on its cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


def load_model(
    model: str | Path,
    revision: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    load_in_4bit: bool = False,
    adapter: str | Path | None = None,
    device: str | int | None = None,
):
    """(model, tokenizer) of a folder or of a hub id with `revision`, its commit; in evaluation mode.

    Args:
        model: a base or fully tuned model, or the folder of an adapter, whose base is then looked up.
        dtype: "float32", "bfloat16", ...; "auto" is the checkpoint's own.
        load_in_4bit: NF4, computing in `dtype`.
        adapter: folder of an adapter of `model`.
        device: where all of it goes; None: over the GPUs there are, else the CPU.

    Raises:
        ValueError: a hub id without a commit, an adapter whose base is not known, an unknown dtype, missing weights.
        OSError: no checkpoint or tokenizer there.
    """
    tokenizer = load_tokenizer(model, revision)
    if adapter is None and is_adapter(model):
        adapter = model
        model, revision = adapter_base(model, revision)
    weights = load_weights(model, revision, dtype=dtype, load_in_4bit=load_in_4bit, device=device)
    if adapter is not None:
        # transformers' own loading of adapters loses DoRA's magnitudes (5.23).
        weights = PeftModel.from_pretrained(weights, str(adapter))
    return weights, tokenizer


def load_weights(
    model: str | Path,
    revision: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    load_in_4bit: bool = False,
    device: str | int | None = None,
    architecture: type = AutoModelForCausalLM,
    **options,
) -> PreTrainedModel:
    """`load_model` without tokenizer and adapters; `options` go to `architecture.from_pretrained`."""
    files.check_model(model, revision)
    if load_in_4bit:
        options["quantization_config"] = nf4(dtype)
    if device is not None:
        options["device_map"] = {"": device}
    elif torch.cuda.is_available():
        options["device_map"] = "auto"
    weights, info = architecture.from_pretrained(
        model, revision=revision or "main", dtype=torch_dtype(dtype), output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        # transformers only warns and puts random numbers there.
        raise ValueError(f"{model}: lacks {', '.join(missing[:3])}; give a checkpoint that holds the whole model.")
    return weights


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or of a hub id; raises `ValueError` for a hub id without a commit."""
    files.check_model(model, revision)
    return AutoTokenizer.from_pretrained(model, revision=revision or "main")


def nf4(dtype: str | torch.dtype = "auto") -> BitsAndBytesConfig:
    """Weights in 4 bits, NF4 (QLoRA, arXiv:2305.14314); products in `dtype`, bfloat16 for "auto"."""
    compute = torch.bfloat16 if dtype == "auto" else torch_dtype(dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def torch_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """The dtype of that name, or "auto" as it is; raises `ValueError` where torch has none."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if name != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {name!r}; use float32, bfloat16, float16 or auto.")
    return dtype or name


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


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
