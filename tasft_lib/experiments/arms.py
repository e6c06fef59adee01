"""Arms: a spec goes in, a folder with a trained adapter and a manifest comes out - once.

    runs/arms/<method>-<hash>/
        spec.json             what was asked
        trainer/checkpoint-N  what TRL saves: adapter, optimizer, random state; a killed run resumes from the last one
        manifest.json         written last: the arm is finished

Arms are found by the hash of their spec and their data, so two notebooks that need the same arm share it.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from .. import data, models
from ..evaluation import worlds
from ..evaluation.worlds import base_model
from ..files import (
    content_hash,
    environment,
    file_hash,
    model_identity,
    peak_memory_mb,
    runs_folder,
    show_progress,
    write_json,
)
from . import methods

TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "save_steps",
)


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """Everything that determines a trained arm.

    Attributes:
        method: one of `methods.METHODS`.
        model: base model: a local folder, a hub id (with `model_revision`, the commit) or one that is built here, see
            `worlds.base_model`.
        dtype, load_in_4bit: how the base model is loaded, as TRL's ModelConfig spells them.
        benign: benign rows, the name of a world (see `worlds.load`; hub ids with `benign_revision`).
        n_benign: rows drawn from them by `seed`.
        unsafe: D_unsafe, a source for `data.read_rows`; `n_unsafe` rows are drawn from it by `seed`, nested.
        extra: further rows with good answers, added to the benign ones (STL's safe answers, contrastive rows); a source
            for `data.read_rows`. `n_extra` of them are drawn as the unsafe rows are: from files in the same order, the
            same rows.
        held_out: evaluation prompts (of the world of that name) dropped from the benign rows.
        template: prompt template, see `data.format_prompt`.
        penalty_weight: λ; for KTO its undesirable weight.
        label: what tables and figures call the arm, by default its method; no part of what it is.
        seed: of the draw, the order of the rows, the adapter's start and dropout.
        training: options of the method's TRL config (`learning_rate`, `num_train_epochs`, `save_steps`, ...).
        lora: options of `peft.LoraConfig`; empty for full fine-tuning.

    Raises `ValueError`, one line, for an unknown method or option, a missing D_unsafe or an unpinned hub model.
    """

    method: str
    model: str
    model_revision: str | None = None
    dtype: str = "float32"
    load_in_4bit: bool = False
    benign: str
    benign_revision: str | None = None
    n_benign: int
    unsafe: str | None = None
    n_unsafe: int | None = None
    extra: str | None = None
    n_extra: int | None = None
    held_out: str | None = None
    template: str = "alpaca"
    penalty_weight: float | str = "auto"
    label: str | None = field(default=None, compare=False)
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in methods.METHODS:
            raise ValueError(f"method={self.method!r} is not known; choose one of {', '.join(methods.METHODS)}.")
        if self.method == "sft":
            # What plain SFT does not look at must not give it another name.
            for name, value in (("unsafe", None), ("n_unsafe", None), ("penalty_weight", "auto")):
                object.__setattr__(self, name, value)
        elif self.unsafe is None:
            raise ValueError(f"method={self.method!r} needs `unsafe`, the rows to push away from.")
        if worlds.is_hub_id(self.model) and self.model_revision is None:
            raise ValueError(f"model={self.model!r} is no local folder, and a hub id needs model_revision, a commit.")
        for options, cls in ((self.training, methods.CONFIGS[self.method]), (self.lora, LoraConfig)):
            unknown = set(options) - {f.name for f in fields(cls) if f.init}
            if unknown:
                raise ValueError(f"{', '.join(sorted(unknown))}: no option of {cls.__name__}; check the spelling.")

    @classmethod
    def from_parameters(cls, parameters: Any, **given: Any) -> "ArmSpec":
        """From a notebook's parameters (`settings.resolve`): fields by their names, options in `training` and `lora`.

        `TRAINING` lists the training options taken; LoRA's are those that start with `lora_`, as TRL spells them.
        """
        named = {name: value if value != "" else None for name, value in vars(parameters).items()}
        spec = {f.name: named[f.name] for f in fields(cls) if f.name in named and f.name not in given}
        lora = {name.removeprefix("lora_"): value for name, value in named.items() if name.startswith("lora_")}
        if lora:
            alpha, dropout = lora.pop("alpha"), lora.pop("dropout")
            modules = " ".join(lora.pop("target_modules")).replace(",", " ").split()
            lora |= {"lora_alpha": alpha, "lora_dropout": dropout, "target_modules": modules}
        training = {name: named[name] for name in TRAINING if name in named}
        return cls(**spec, training=training, lora=lora, **given)

    @cached_property
    def name(self) -> str:
        """`<method>-<hash>`, the arm's folder; the hash is over the spec, its data and the code that trains."""
        described = _without_label(self) | {"model": model_identity(base_model(self.model)), "code": _code_hash()}
        for side, is_good in (("unsafe", False), ("extra", True)):
            if (source := getattr(self, side)) is not None:
                described[side] = data.fingerprint(data.clean(_rows(source, self, label=is_good)))
        if (file := worlds.load(self.benign).file) is not None:
            described["benign"] = file_hash(file)
        return f"{self.method}-{content_hash(described)}"

    @property
    def folder(self) -> Path:
        """Where the arm lives."""
        return runs_folder() / "arms" / self.name


def train(spec: ArmSpec) -> Path:
    """Train the arm unless it is finished, resuming from its last complete checkpoint; return its folder."""
    folder = spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / "manifest.json").exists():
            return folder
        write_json(folder / "spec.json", _without_label(spec))
        started = time.time()
        benign, unsafe = training_rows(spec)
        model, tokenizer = load_model(spec)
        set_seed(spec.seed)  # the adapter is initialised when the trainer is built
        trainer = methods.make_trainer(
            spec.method,
            model,
            tokenizer,
            benign,
            unsafe,
            penalty_weight=spec.penalty_weight,
            lora=spec.lora,
            training=_defaults() | spec.training | {"output_dir": str(folder / "trainer"), "seed": spec.seed},
        )
        trainer.remove_callback(PrinterCallback)  # the log history goes into the manifest
        resumed = _last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=resumed and str(resumed))
        manifest = {
            "arm": spec.name,
            "spec": _without_label(spec),
            "benign_rows": data.fingerprint(benign),
            "unsafe_rows": unsafe and data.fingerprint(unsafe),
            "penalty_weight": getattr(trainer, "penalty_weight", None) or getattr(trainer, "undesirable_weight", None),
            "steps": trainer.state.global_step,
            "seconds": round(time.time() - started, 1),
            "resumed_from": resumed and resumed.name,
            "peak_memory_mb": peak_memory_mb(),
            "log_history": trainer.state.log_history,
        }
        write_json(folder / "manifest.json", manifest | environment())
    return folder


def read_manifest(spec: ArmSpec) -> dict[str, Any]:
    """What the finished arm recorded about itself."""
    return json.loads((spec.folder / "manifest.json").read_text())


def summary(spec: ArmSpec) -> dict[str, Any]:
    """The arm's manifest without its log, for the manifest of a figure; local paths by the name of their folder."""
    manifest = read_manifest(spec)
    kept = {k: v for k, v in manifest.items() if k not in ("log_history", "versions", "hardware")}
    paths = ("model", "benign", "unsafe", "extra")
    kept["spec"] = {k: Path(v).name if k in paths and v else v for k, v in manifest["spec"].items()}
    return kept


def training_rows(spec: ArmSpec) -> tuple[Dataset, Dataset | None]:
    """(benign, unsafe) rows of the arm: drawn by its seed, checked, evaluation prompts and repeated rows left out."""
    prompts = _held_out_prompts(spec)
    unsafe = None if spec.unsafe is None else data.clean(_rows(spec.unsafe, spec, label=False))
    rows = data.draw(
        data.clean(_benign_rows(spec, seed=spec.seed), prompts),
        unsafe,
        n_benign=spec.n_benign,
        n_unsafe=spec.n_unsafe,
        seed=spec.seed,
        source=spec.unsafe or spec.benign,
        evaluation_prompts=prompts,
    )
    benign, unsafe = data.by_label(rows)
    if spec.extra is not None:
        extra = data.clean(_rows(spec.extra, spec, label=True), prompts)
        extra = data.mix(benign.select([]), extra, n_unsafe=spec.n_extra, seed=spec.seed)
        benign = concatenate_datasets([benign, extra])
    return benign, None if spec.unsafe is None else unsafe


def held_out_rows(spec: ArmSpec, n: int) -> Dataset:
    """`n` benign rows that the arm was not trained on, the same for all arms of a seed; fewer where there are fewer."""
    trained = set(zip(*(training_rows(spec)[0][column][:] for column in ("prompt", "completion")), strict=True))
    rows = data.clean(_benign_rows(spec, seed=spec.seed + 10_000), _held_out_prompts(spec))
    rows = rows.select(np.random.default_rng([spec.seed, 3]).permutation(len(rows)))
    pairs = zip(rows["prompt"][:], rows["completion"][:], strict=True)
    return rows.select([i for i, pair in enumerate(pairs) if pair not in trained][:n])


def load_tokenizer(spec: ArmSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of the arm's base."""
    return models.load_tokenizer(base_model(spec.model), spec.model_revision)


def load_model(spec: ArmSpec, adapter: Path | None = None):
    """(model, tokenizer) of the arm's base, with `adapter` (or tuned checkpoint) of a step if one is given."""
    options = {
        "dtype": spec.dtype,
        "load_in_4bit": spec.load_in_4bit,
        "device": "cuda:0" if torch.cuda.is_available() else None,
    }
    if adapter is not None and not models.is_adapter(adapter):
        return models.load_weights(adapter, **options), load_tokenizer(spec)
    return models.load_model(base_model(spec.model), spec.model_revision, adapter=adapter, **options)


def load_trained(spec: ArmSpec):
    """(model, tokenizer) of the arm at the end of its training."""
    saved = checkpoints(spec)
    return load_model(spec, saved[max(saved)])


def checkpoints(spec: ArmSpec) -> dict[int, Path]:
    """Step -> complete checkpoint of the arm, in the order of training."""
    found = {}
    for path in (spec.folder / "trainer").glob("checkpoint-*"):
        if _is_complete(path):
            found[int(path.name.removeprefix("checkpoint-"))] = path
    return dict(sorted(found.items()))


def _without_label(spec: ArmSpec) -> dict[str, Any]:
    return {name: value for name, value in asdict(spec).items() if name != "label"}


def _defaults() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "report_to": "none",
        "logging_steps": 10,
        "save_strategy": "steps",
        "disable_tqdm": not show_progress(),
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
    }


def _benign_rows(spec: ArmSpec, *, seed: int) -> Dataset:
    """All benign rows there are to draw from (made ones: `n_benign`, by `seed`)."""
    rows = worlds.load(spec.benign).benign_rows(spec.n_benign, seed=seed, revision=spec.benign_revision)
    return data.to_training_rows(rows, label=True, template=spec.template, source=spec.benign, drop_empty=True)


def _rows(source: str, spec: ArmSpec, *, label: bool) -> Dataset:
    return data.read_training_rows(source, label=label, template=spec.template)


def _held_out_prompts(spec: ArmSpec) -> list[str]:
    return [] if spec.held_out is None else worlds.load(spec.held_out).evaluation_prompts()["prompt"].tolist()


def _is_complete(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last; a checkpoint without a readable one was cut off."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _last_checkpoint(folder: Path) -> Path | None:
    found = sorted((folder / "trainer").glob("checkpoint-*"), key=lambda p: int(p.name.removeprefix("checkpoint-")))
    for path in reversed(found):
        if _is_complete(path):
            return path
        shutil.rmtree(path)
    return None


@cache
def _code_hash() -> str:
    """Of the modules that determine what is trained, and of the libraries' versions: other code, other arm."""
    package = Path(__file__).parents[1]
    modules = ("losses", "fused_head", "forward", "config", "trainer", "experiments/methods", "data", "text")
    sources = [(package / f"{name}.py").read_text() for name in modules]
    return content_hash([*sources, transformers.__version__, torch.__version__, version("trl"), version("peft")])
