"""The one loader of models and tokenizers: a folder or a pinned hub id, an adapter on its base, 4 bits, the device.

All that loads a model meets its checks here: whole files, nothing missing, no NaN.
"""

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from . import files

# In the order in which transformers looks for them: in one file, or an index of several.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
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
    check_weights(model, revision, architecture=architecture)
    if load_in_4bit:
        options["quantization_config"] = nf4(dtype)
    if device is not None:
        options["device_map"] = {"": device}
    elif torch.cuda.is_available():
        options["device_map"] = "auto"
    options["dtype"] = torch_dtype(dtype)
    with _told(model):
        weights, info = architecture.from_pretrained(
            model, revision=revision or "main", output_loading_info=True, **options
        )
    _check_whole(model, weights, info)
    return weights


def check_weights(model: str | Path, revision: str | None = None, *, architecture: type = AutoModelForCausalLM) -> None:
    """Refuse a model whose weights cannot be used, before anything is trained, answered or copied.

    Files that are torn, that miss layers or have more of them than config.json, of other shapes, with NaN or infinity;
    pickles that hold more than tensors; architectures that bring their own code. It builds the model without memory
    and reads every weight once, one at a time: of 7B in bfloat16, 14 GB at 3 GB/s a core, which are then in the
    system's cache for the loading; where they don't fit there, as long as the disk takes.

    Raises:
        ValueError: what is wrong and where, in one line.
        OSError: no model there.
    """
    files.check_model(model, revision)
    if is_adapter(model):
        raise ValueError(f"{model}: holds an adapter, not a model; merge it into its base with tasft export first.")
    config = _read_config(model, revision, architecture)
    paths = _weight_files(model, revision)
    wrong = [(path, name) for path in paths for name, tensor in _tensors(path) if not _is_finite(tensor)]
    unread = set()
    # What is stored quantised is given its shapes by its own library.
    if getattr(config, "quantization_config", None) is None:
        options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
        with _told(model), _silent():
            empty, info = architecture.from_pretrained(model, revision=revision or "main", **options)
        _check_whole(model, empty, info)
        unread = info["unexpected_keys"]
    for path, name in wrong:
        if name not in unread:
            raise ValueError(f"{path}: {name} holds NaN or infinity; give a checkpoint from before that happened.")


def _read_config(model: str | Path, revision: str | None, architecture: type):
    path = _file(model, "config.json", revision)
    if path is None:
        raise OSError(f"{model}: no config.json here, so no model; check the path, or fetch or save the model again.")
    settings = read_object(path)
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in settings:
            raise ValueError(f"{path}: {kind!r} needs code of its own, which is never run; use a model without.")
        version = transformers.__version__
        raise ValueError(f"{path}: model_type {kind!r} is unknown to transformers {version}; a newer one may know it.")
    with _told(path):
        config = AutoConfig.from_pretrained(model, revision=revision)
        if type(config) not in architecture._model_mapping:
            wanted = architecture.__name__.removeprefix("AutoModelFor")
            raise ValueError(f"{path}: a {kind} model is of another kind than is needed here ({wanted}).")
    return config


def read_object(path: Path) -> dict:
    """The JSON object in a file; raises `ValueError` where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error}); fetch or save it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object; fetch or save it again.")
    return value


def _weight_files(model: str | Path, revision: str | None) -> list[Path]:
    """The files that transformers reads weights from, brought from the hub where they are not here yet."""
    for whole, index in _WEIGHTS:
        if path := _file(model, whole, revision):
            return [path]
        if path := _file(model, index, revision):
            parts = read_object(path).get("weight_map")
            if not isinstance(parts, dict) or not parts:
                raise ValueError(f"{path}: names no weights; fetch or save the model again.")
            paths = {part: _file(model, part, revision) for part in sorted(set(parts.values()))}
            if lost := [part for part, path in paths.items() if path is None]:
                raise OSError(f"{model}: {lost[0]} of {index} is not there; fetch or save the model again.")
            return list(paths.values())
    raise OSError(f"{model}: no weights here ({_WEIGHTS[0][0]}); fetch or save the model again.")


def _file(model: str | Path, name: str, revision: str | None) -> Path | None:
    """Where a file of the model lies, brought from the hub if need be; None where the model has none of that name."""
    path = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path and Path(path)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one after another, of safetensors or of a pickle that holds tensors alone."""
    with _told(path):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; of types of 8 bits and fewer, and of integers, nothing is known."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or not tensor.numel():
        return True
    # One pass without a copy, ten times as fast as isfinite; NaN becomes both.
    return all(torch.isfinite(bound) for bound in torch.aminmax(tensor))


def _check_whole(model: str | Path, weights: PreTrainedModel, info: dict) -> None:
    """Raise `ValueError` where weights and config.json disagree; transformers warns and puts random numbers there."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        shapes = f"{list(stored)}, and config.json says {list(expected)}"
        raise ValueError(f"{model}: {name} has the shape {shapes}; give weights and config.json of one model.")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{model}: lacks {', '.join(missing[:3])}; give a checkpoint that holds the whole model.")

    def kind(name: str) -> str:
        return re.sub(r"\d+", "0", name)

    # Of a kind that the model has: a layer more. Others are heads and buffers that this architecture does without.
    kinds = {kind(name) for name in weights.state_dict() if re.search(r"\d", name)}
    if more := sorted(name for name in info["unexpected_keys"] if kind(name) in kinds):
        raise ValueError(f"{model}: config.json leaves out {more[0]}; give weights and config.json of one model.")


@contextmanager
def _told(source: str | Path) -> Iterator[None]:
    """Whatever the libraries underneath raise on a file that is none of theirs, as one line."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: cannot be loaded ({type(error).__name__}: {reason}); check it.") from error


@contextmanager
def _silent() -> Iterator[None]:
    """transformers' reports and bars off; what they say is checked here."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


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
