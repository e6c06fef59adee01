"""The one loader of models and tokenizers: a folder or a pinned hub id, an adapter on its base, 4 bits, the device.

All that loads a model meets its checks here: whole files, nothing missing, no NaN.
"""

import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model_state_dict
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
from transformers.utils import cached_file, find_adapter_config_file

from . import files

# In the order in which transformers looks for them: in one file, or an index of several.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def quiet() -> None:
    """No bars and chatter of the libraries underneath; on a CPU one thread, so results don't depend on its cores."""
    if not torch.accelerator.is_available():
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
        model: a base or fully tuned model, or an adapter, whose base is then looked up; `revision` is then the commit
            of the base where `model` is a folder, and of the adapter where it is a hub id.
        dtype: "float32", "bf16", ...; "auto" is the checkpoint's own.
        load_in_4bit: NF4, computing in `dtype`.
        adapter: folder of an adapter of `model`.
        device: where all of it goes; None: over the GPUs there are, else the CPU.

    Raises:
        ValueError: a hub id without a commit, an adapter whose base is not known, an unknown dtype, and all that
            `check_weights`, `put_on` and `check_tokens` refuse.
        OSError: no checkpoint or tokenizer there.
    """
    tokenizer = load_tokenizer(model, revision)
    source = model
    if adapter is None and is_adapter(model, revision):
        adapter = fetch(model, revision)
        model, revision = adapter_base(model, revision)
    weights = load_weights(model, revision, dtype=dtype, load_in_4bit=load_in_4bit, device=device)
    if adapter is not None:
        weights = put_on(weights, adapter)
    check_tokens(weights, tokenizer, source)
    return weights, tokenizer


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one; `Trainer.train` would take a step beyond the last one.

    Of a checkpoint at the last step the weights are loaded, and nothing is trained.
    """
    from transformers import TrainerState

    state = checkpoint and TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # their weights load into a prepared model alone
    if not state or sharded or not 0 < state.max_steps <= state.global_step or trainer.args.load_best_model_at_end:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses:  # as training ends, but for steps that are in no window of the log
        state.log_history.append({"train_loss": sum(losses) / len(losses), "step": state.global_step})


def sort_targets(model: PreTrainedModel) -> None:
    """Sort what PEFT keeps as sets and saves in any order, so that equal trainings save equal files."""
    for config in getattr(model, "peft_config", {}).values():
        for name in ("target_modules", "exclude_modules"):
            if isinstance(modules := getattr(config, name, None), set):
                setattr(config, name, sorted(modules))


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
    elif torch.accelerator.is_available():
        options["device_map"] = "auto"
    options |= {"dtype": torch_dtype(dtype), "output_loading_info": True, "trust_remote_code": False}
    with _told(model), _silent(bars=True):
        weights, info = architecture.from_pretrained(model, revision=revision or "main", **options)
    _check_whole(model, weights, info)
    return weights


def check_weights(
    model: str | Path,
    revision: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    architecture: type = AutoModelForCausalLM,
) -> None:
    """Refuse a model whose weights cannot be used, before anything is trained, answered or copied.

    Files that are torn, that miss layers or have more of them than config.json, of other shapes, with NaN or infinity;
    pickles that hold more than tensors; architectures that bring their own code. It builds the model without memory
    and reads every weight once, one at a time: of 7B in bfloat16, 14 GB at 3 GB/s a core, which are then in the
    system's cache for the loading; where they don't fit there, as long as the disk takes.

    Args:
        tokenizer: checked too, see `check_tokens`.

    Raises:
        ValueError: what is wrong and where, in one line.
        OSError: no model there.
    """
    files.check_model(model, revision)
    if is_adapter(model, revision):
        raise ValueError(f"{model}: holds an adapter, not a model; merge it into its base with tasft export first.")
    config = _read_config(model, revision, architecture)
    with _told(model):
        paths = _weight_files(model, revision)
    wrong = [(path, name) for path in paths for name, tensor in _tensors(path) if not _is_finite(tensor)]
    unread = set()
    # What is stored quantised is given its shapes by its own library.
    if getattr(config, "quantization_config", None) is None:
        options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
        options["trust_remote_code"] = False
        with _told(model), _silent():
            empty, info = architecture.from_pretrained(model, revision=revision or "main", **options)
        _check_whole(model, empty, info)
        unread = info["unexpected_keys"]
        if tokenizer is not None:
            check_tokens(empty, tokenizer, model)
    for path, name in wrong:
        if name not in unread:
            raise ValueError(f"{path}: {name} holds NaN or infinity; give a checkpoint from before that happened.")


def _read_config(model: str | Path, revision: str | None, architecture: type):
    path = find_file(model, "config.json", revision)
    if path is None:
        raise OSError(f"{model}: no config.json here, so no model; check the path, or fetch or save the model again.")
    settings = files.read_object(path)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in settings:
            raise ValueError(f"{path}: {kind!r} needs code of its own, which is never run; use a model without.")
        version = transformers.__version__
        raise ValueError(f"{path}: model_type {kind!r} is unknown to transformers {version}; a newer one may know it.")
    with _told(path):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        if type(config) not in architecture._model_mapping:
            wanted = architecture.__name__.removeprefix("AutoModelFor")
            raise ValueError(f"{path}: a {kind} model is of another kind than is needed here ({wanted}).")
    return config


def _weight_files(model: str | Path, revision: str | None) -> list[Path]:
    """The files that transformers reads weights from, brought from the hub where they are not here yet."""
    for whole, index in _WEIGHTS:
        if path := find_file(model, whole, revision):
            return [path]
        if path := find_file(model, index, revision):
            parts = files.read_object(path).get("weight_map")
            if not isinstance(parts, dict) or not parts:
                raise ValueError(f"{path}: names no weights; fetch or save the model again.")
            paths = {part: find_file(model, part, revision) for part in sorted(set(parts.values()))}
            if lost := [part for part, path in paths.items() if path is None]:
                raise OSError(f"{model}: {lost[0]} of {index} is not there; fetch or save the model again.")
            return list(paths.values())
    raise OSError(f"{model}: no weights here ({_WEIGHTS[0][0]}); fetch or save the model again.")


def find_file(model: str | Path, name: str, revision: str | None = None) -> Path | None:
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
            return
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:
            tensors = None
        if not isinstance(tensors, dict):
            raise ValueError(f"{path}: a pickle of something else than weights, which is never run; give safetensors.")
        yield from tensors.items()


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

    # Others are heads and buffers that this architecture does without, or layers that guess further tokens.
    more = _further(info["unexpected_keys"], weights.state_dict())
    if more and not getattr(weights.config, "num_nextn_predict_layers", None):
        raise ValueError(f"{model}: config.json leaves out {more[0]}; give weights and config.json of one model.")


def _further(names: Iterable[str], own: Iterable[str]) -> list[str]:
    """The names that would be among `own` if there were more layers."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "0", name)

    own = set(own)
    kinds = {kind(name) for name in own}
    return sorted(name for name in names if name not in own and re.search(r"\d", name) and kind(name) in kinds)


@contextmanager
def _told(source: str | Path, part: str = "") -> Iterator[None]:
    """Whatever the libraries underneath raise on a file that is none of theirs, as one line with its name."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(f"{source}: needs code of its own, which is never run; use a model without.") from None
        if isinstance(error, (OSError, ValueError)) and str(source) in reason:
            raise
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise ValueError(f"{source}: does not fit into memory ({reason[:100]}); try a smaller dtype.") from error
        kind = type(error)
        told = f"{source}: {part}cannot be loaded ({kind.__name__}: {reason[:200]}); fetch or save it again."
        raise (kind if kind in (OSError, ImportError) else ValueError)(told) from error


@contextmanager
def _silent(*, bars: bool = False) -> Iterator[None]:
    """transformers' reports off, and its bars unless asked for; what the reports say is checked here."""
    logs = transformers.utils.logging
    level, shown = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    if not bars:
        logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if shown:
            logs.enable_progress_bar()


def put_on(weights: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """The model with the adapter of a folder on it, for evaluation.

    Embeddings are resized to those that the adapter brings: it was trained with other tokens. transformers' own loading
    of adapters loses DoRA's magnitudes (5.23).

    Raises `ValueError` where the adapter is torn, holds NaN, or was trained on another base.
    """
    folder = Path(adapter)
    if (kind := files.read_adapter_config(folder).get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{folder}: peft {peft.__version__} knows no adapter {kind!r}; a newer one may.")
    path = next((p for name in _ADAPTER_WEIGHTS if (p := folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: an adapter without weights ({_ADAPTER_WEIGHTS[0]}); fetch or save it again.")
    shapes = {}
    for name, tensor in _tensors(path):
        if not _is_finite(tensor):
            raise ValueError(f"{path}: {name} holds NaN or infinity; give an adapter from before that happened.")
        shapes[name] = tensor.shape
    _resize(weights, shapes, folder)

    def unfit(why: str) -> ValueError:
        return ValueError(
            f"{folder}: does not fit {weights.name_or_path}, {why}; give the base that it was trained on."
        )

    with _told(folder), warnings.catch_warnings():
        # A base with layers that the adapter knows nothing of; tied weights that it unties, which export sees to.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        try:
            model = PeftModel.from_pretrained(weights, str(folder))
        except (RuntimeError, ValueError, UserWarning) as error:
            raise unfit(_why_unfit(" ".join(str(error).split()))) from None
    if more := _further(shapes, get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise unfit(f"which has no {more[0]}")
    return model


def _why_unfit(told: str) -> str:
    """What PEFT and torch say of an adapter on another base, in few words."""
    if shape := re.search(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", told):
        return f"whose {shape[1]} is {shape[3]} and not {shape[2]}"
    if missing := re.search(r"missing adapter keys.*?'(.*?)'", told):
        return f"which has {missing[1]} too"
    return f"as peft says: {told[:200]}"


def _resize(weights: PreTrainedModel, shapes: dict[str, torch.Size], adapter: Path) -> None:
    """Give embedding and head as many rows as the adapter has for them, if it has any."""
    ends = (weights.get_input_embeddings(), weights.get_output_embeddings())
    rows = {}
    for module in (name for name, module in weights.named_modules() if any(module is end for end in ends)):
        for name, shape in shapes.items():
            if f".{module}." in name and len(shape) == 2:
                if name.endswith(".weight") and ".lora_A." not in name:
                    rows[module] = shape[0]
                elif name.endswith(".lora_embedding_A"):
                    rows[module] = shape[1]
    size = max(rows.values(), default=ends[0].weight.size(0))
    if size == ends[0].weight.size(0):
        return
    if len(rows) == 1 and ends[0].weight is not ends[1].weight:
        raise ValueError(
            f"{adapter}: of embedding and head, it has but {next(iter(rows))} for {size} tokens; save it with both."
        )
    weights.resize_token_embeddings(size, mean_resizing=False)


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or of a hub id, that of an adapter's base where the adapter has none.

    Raises `ValueError` for a hub id without a commit and a torn file.
    """
    files.check_model(model, revision)
    if is_adapter(model, revision):
        folder = fetch(model, revision)
        has_own = (folder / "tokenizer_config.json").is_file()
        model, revision = (folder, None) if has_own else adapter_base(model, revision)
    try:
        with _told(model, "its tokenizer "):
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError):
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
            if path := find_file(model, name, revision):
                files.read_object(path)
        raise
    # What transformers makes of a tokenizer_config.json alone.
    if set(tokenizer.get_vocab()) <= {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}:
        raise ValueError(f"{model}: its tokenizer has no words (is tokenizer.json missing?); fetch or save it again.")
    return tokenizer


def check_tokens(weights: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """Raise `ValueError` where the tokenizer gives tokens that the model's embedding has no row for.

    Special tokens that neither it nor its chat template puts anywhere may be beyond: Gemma 3 1B has one, for images.
    """
    rows = weights.get_input_embeddings().weight.size(0)
    own = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - own
    template = str(tokenizer.chat_template or "")
    beyond = [
        (i, token)
        for token, i in tokenizer.get_vocab().items()
        if i >= rows and not (token in special and token not in template)
    ]
    if beyond:
        raise ValueError(
            f"{source}: the tokenizer knows token {max(beyond)[0]}, the embedding has {rows} rows; use the tokenizer "
            "that the model was trained with."
        )


def nf4(dtype: str | torch.dtype = "auto") -> BitsAndBytesConfig:
    """Weights in 4 bits, NF4 (QLoRA, arXiv:2305.14314); products in `dtype`, bfloat16 for "auto"."""
    compute = torch.bfloat16 if dtype == "auto" else torch_dtype(dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def torch_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """The dtype of one of `files.DTYPES`, or "auto" as it is; raises `ValueError` for others."""
    if isinstance(name, torch.dtype) or name == "auto":
        return name
    return getattr(torch, files.dtype_name(name))


def is_adapter(model: str | Path, revision: str | None = None) -> bool:
    """Whether the folder, or the hub id at that commit, holds an adapter."""
    return find_adapter_config_file(str(model), revision=revision) is not None


def fetch(model: str | Path, revision: str | None = None) -> Path:
    """The folder that a model lies in; a hub id's is brought into the hub's cache.

    Raises `ValueError` for a hub id without a commit, OSError where the hub has no such thing.
    """
    files.check_model(model, revision)
    if os.path.isdir(model):
        return Path(model)
    wanted = [*files.MODEL_FILES, "README.md", files.RECORD]
    return Path(snapshot_download(str(model), revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))


def adapter_base(
    adapter: str | Path, revision: str | None = None, *, base: str | None = None
) -> tuple[str, str | None]:
    """The base of an adapter and the base's commit.

    Args:
        revision: of a folder the base's commit, which wins over the one that the adapter names; of a hub id the
            adapter's own.
        base: another place of the base.

    Raises `ValueError` where the base is neither a folder nor a hub id with a commit.
    """
    config = files.read_adapter_config(fetch(adapter, revision))
    base = base or config.get("base_model_name_or_path") or ""
    if os.path.isdir(base):
        return base, None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        place = f"its base {base!r} is not there" if base else "adapter_config.json names no base"
        raise ValueError(f"{adapter}: {place}; write the base's folder into adapter_config.json.")
    remedy = "give the base's commit as --model_revision"
    commit = config.get("revision")
    if os.path.isdir(adapter):
        commit = revision or commit
    else:
        remedy = f"bring it here (hf download {adapter} --revision {revision} --local-dir FOLDER) and {remedy} with it"
    if commit in (None, "main"):
        raise ValueError(
            f"{adapter}: its base {base!r} is no folder here, and adapter_config.json names no commit of a hub id; "
            f"{remedy}."
        )
    return base, commit
