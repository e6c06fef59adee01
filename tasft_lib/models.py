"""The one loader of models and tokenizers: a folder or a pinned hub id, an adapter on its base, 4 bits, the device.

Whatever is loaded here has met the checks of `checkpoints`.
"""

import logging
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import find_adapter_config_file

from .storage import files
from .storage.checkpoints import (
    adapter_shapes,
    check_tokens,
    check_weights,
    find_file,
    further_layers,
    load_strictly,
    one_line_errors,
)

CORES = torch.get_num_threads()  # as many as torch takes by itself, or $OMP_NUM_THREADS


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
    """`load_model` without tokenizer and adapters; `options` go to `architecture.from_pretrained`.

    Raises as `check_weights`, and `ValueError` for an unknown dtype.
    """
    check_weights(model, revision, architecture=architecture)
    if load_in_4bit:
        options["quantization_config"] = nf4(dtype)
    if device is not None:
        options["device_map"] = {"": device}
    elif torch.accelerator.is_available():
        options["device_map"] = "auto"
    options["dtype"] = torch_dtype(dtype)
    weights, _ = load_strictly(architecture, model, revision, bars=True, **options)
    return weights


def nf4(dtype: str | torch.dtype = "auto") -> BitsAndBytesConfig:
    """Weights in 4 bits, NF4 (QLoRA, arXiv:2305.14314); products in `dtype`, bfloat16 for "auto"."""
    compute = torch.bfloat16 if dtype == "auto" else torch_dtype(dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def torch_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """The dtype of one of `files.DTYPES`, or "auto" as it is; raises `ValueError` for others."""
    if isinstance(name, torch.dtype) or name == "auto":
        return name
    return getattr(torch, files.dtype_name(name))


def put_on(weights: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """The model with the adapter of a folder on it, for evaluation.

    Embeddings are resized to those that the adapter brings: it was trained with other tokens. transformers' own loading
    of adapters loses DoRA's magnitudes (5.23).

    Raises `ValueError` as `adapter_shapes` does, and where the adapter was trained on another base.
    """
    folder = Path(adapter)
    shapes = adapter_shapes(folder)
    _resize(weights, shapes, folder)

    def unfit(why: str) -> ValueError:
        return ValueError(
            f"{folder}: does not fit {weights.name_or_path}, {why}; give the base that it was trained on."
        )

    with one_line_errors(folder), warnings.catch_warnings():
        # A base with layers that the adapter knows nothing of; tied weights that it unties, which export sees to.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        try:
            model = PeftModel.from_pretrained(weights, str(folder))
        except (RuntimeError, ValueError, UserWarning) as error:
            raise unfit(_why_unfit(" ".join(str(error).split()))) from None
    if more := further_layers(shapes, get_peft_model_state_dict(model, save_embedding_layers=False)):
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
    """Give embedding and head as many rows as the adapter has for them, if it has any.

    Raises `ValueError` where it has more rows for one of them alone, and they are not tied.
    """
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

    Raises `ValueError` for a hub id without a commit, a torn file and a tokenizer without words, `OSError` where there
    is none.
    """
    files.check_model(model, revision)
    if is_adapter(model, revision):
        folder = fetch(model, revision)
        has_own = (folder / "tokenizer_config.json").is_file()
        model, revision = (folder, None) if has_own else adapter_base(model, revision)
    try:
        with one_line_errors(model, "its tokenizer "):
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


class _Divergence(TrainerCallback):
    """Stops a training whose weights are lost. TRL's trainers would go on and log a loss of 0; TASFTTrainer stops at
    the step itself and names its rows."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, model: Any, **kwargs: Any) -> None:
        if math.isfinite(logs.get("grad_norm", 0.0)):
            return
        # In fp16 the scaler leaves out a step without a finite gradient.
        if not all(weights.isfinite().all() for weights in model.parameters() if weights.requires_grad):
            raise ValueError(
                f"step {state.global_step}: the weights are not finite any more; lower learning_rate "
                f"({args.learning_rate:g}), or look at the rows and at the model's weights."
            )


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one; `Trainer.train` would take a step beyond the last one.

    Of a checkpoint at the last step the weights are loaded, and nothing is trained. The log goes on where it was.
    Raises `ValueError` where the weights are not finite any more.
    """
    from transformers import TrainerState

    from .storage.resume import GoOn, LengthOrder, keep_whole, restore_sums

    state = checkpoint and TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    args = trainer.args
    args.restore_callback_states_from_checkpoint = True  # else early stopping counts anew
    keep_whole(trainer)
    trainer.add_callback(LengthOrder())
    trainer.add_callback(_Divergence())
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # their weights load into a prepared model alone
    if not state or sharded or args.load_best_model_at_end or not _is_at_its_end(state, args):
        if checkpoint is not None:
            trainer.add_callback(GoOn(trainer, checkpoint))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    if restore_sums(trainer, checkpoint):  # then the log ends as training ends it
        trainer._total_loss_scalar += trainer._tr_loss.item()
        trainer.model.train()
        trainer.log({"total_flos": state.total_flos, "train_loss": 0.0})


def _is_at_its_end(state: Any, args: Any) -> bool:
    """Whether a training has taken its last step, and is not to be longer now."""
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return 0 < state.max_steps <= state.global_step and args.num_train_epochs <= state.num_train_epochs


def sort_targets(model: PreTrainedModel) -> None:
    """Sort what PEFT keeps as sets and saves in any order, so that equal trainings save equal files."""
    for config in getattr(model, "peft_config", {}).values():
        for name in ("target_modules", "exclude_modules"):
            if isinstance(modules := getattr(config, name, None), set):
                setattr(config, name, sorted(modules))
