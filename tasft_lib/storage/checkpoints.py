"""Whether a checkpoint is whole and can be used, told in one line before anything is done with it.

Of a model: files, layers, shapes, NaN, code of its own. Of a tokenizer: tokens beyond the embedding. Of an adapter:
its kind and its weights.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
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
    if find_adapter_config_file(str(model), revision=revision):
        raise ValueError(f"{model}: holds an adapter, not a model; merge it into its base with tasft export first.")
    config = _read_config(model, revision, architecture)
    with one_line_errors(model):
        paths = _weight_files(model, revision)
    wrong = [(path, name) for path in paths for name, tensor in _tensors(path) if not _is_finite(tensor)]
    unread = set()
    # What is stored quantised is given its shapes by its own library.
    if getattr(config, "quantization_config", None) is None:
        options = {"device_map": "meta", "ignore_mismatched_sizes": True}
        empty, unread = load_strictly(architecture, model, revision, **options)
        if tokenizer is not None:
            check_tokens(empty, tokenizer, model)
    for path, name in wrong:
        if name not in unread:
            raise ValueError(f"{path}: {name} holds NaN or infinity; give a checkpoint from before that happened.")


def _read_config(model: str | Path, revision: str | None, architecture: type) -> PreTrainedConfig:
    """config.json, of a kind that transformers knows and `architecture` is for.

    Raises `ValueError` where it is torn or of another kind, `OSError` where there is none.
    """
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
    with one_line_errors(path):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        if type(config) not in architecture._model_mapping:
            wanted = architecture.__name__.removeprefix("AutoModelFor")
            raise ValueError(f"{path}: a {kind} model is of another kind than is needed here ({wanted}).")
    return config


def _weight_files(model: str | Path, revision: str | None) -> list[Path]:
    """The files that transformers reads weights from, brought from the hub where they are not here yet.

    Raises `OSError` where one is missing, `ValueError` where their index names none.
    """
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
    """Where a file of the model lies, brought from the hub if need be; None where the model has none of that name.

    Raises `OSError` where the hub is not reached, or `model` is neither a folder nor a hub id.
    """
    path = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path and Path(path)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one after another, of safetensors or of a pickle that holds tensors alone.

    Raises `ValueError` for a torn file and another pickle.
    """
    with one_line_errors(path):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
            return
        try:
            with warnings.catch_warnings():  # of how it was pickled
                warnings.simplefilter("ignore")
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


def load_strictly(
    architecture: type, model: str | Path, revision: str | None, *, bars: bool = False, **options
) -> tuple[PreTrainedModel, set[str]]:
    """`architecture.from_pretrained` that refuses what transformers only warns of, and runs no code of the model's own.

    Args:
        bars: whether progress is shown.
        options: of `from_pretrained`.

    Returns:
        The model, and the names of the stored weights that it has no use for.

    Raises:
        ValueError: it cannot be loaded, or weights and config.json disagree.
        OSError: no model there.
    """
    options |= {"output_loading_info": True, "trust_remote_code": False}
    source = Path(model, options["gguf_file"]) if "gguf_file" in options else model
    with one_line_errors(source), _silent(bars=bars):
        weights, info = architecture.from_pretrained(model, revision=revision or "main", **options)
    _check_whole(source, weights, info)
    return weights, info["unexpected_keys"]


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


def _check_whole(model: str | Path, weights: PreTrainedModel, info: dict) -> None:
    """Raise `ValueError` where weights and config.json disagree; transformers warns and puts random numbers there."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        shapes = f"{list(stored)}, and config.json says {list(expected)}"
        raise ValueError(f"{model}: {name} has the shape {shapes}; give weights and config.json of one model.")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{model}: lacks {', '.join(missing[:3])}; give a checkpoint that holds the whole model.")

    # Others are heads and buffers that this architecture does without, or layers that guess further tokens.
    more = further_layers(info["unexpected_keys"], weights.state_dict())
    if more and not getattr(weights.config, "num_nextn_predict_layers", None):
        raise ValueError(f"{model}: config.json leaves out {more[0]}; give weights and config.json of one model.")


def further_layers(names: Iterable[str], own: Iterable[str]) -> list[str]:
    """The names that would be among `own` if there were more layers."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "0", name)

    own = set(own)
    kinds = {kind(name) for name in own}
    return sorted(name for name in names if name not in own and re.search(r"\d", name) and kind(name) in kinds)


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


def adapter_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of an adapter's weights.

    Raises `ValueError` where peft doesn't know its kind, or its weights are not there, are torn or hold NaN.
    """
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
    return shapes


@contextmanager
def one_line_errors(source: str | Path, part: str = "") -> Iterator[None]:
    """Whatever the libraries underneath raise on a file that is none of theirs, as one line with its name.

    Raises `ValueError`; an `OSError` or `ImportError` stays one.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(f"{source}: needs code of its own, which is never run; use a model without.") from None
        if isinstance(error, (OSError, ValueError)) and re.search(rf"(?<!\w){re.escape(str(source))}(?!\w)", reason):
            raise
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise ValueError(f"{source}: does not fit into memory ({reason[:100]}); try a smaller dtype.") from error
        kind = type(error)
        told = f"{source}: {part}cannot be loaded ({kind.__name__}: {reason[:200]}); fetch or save it again."
        raise (kind if kind in (OSError, ImportError) else ValueError)(told) from error
