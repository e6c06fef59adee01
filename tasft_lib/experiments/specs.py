"""What is to be trained, and on which rows: specs, which say what is wanted and name it.

Making, naming and comparing specs trains nothing and reads nothing; `arms` makes what they ask for.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..evaluation import worlds
from ..generation import Decoding
from ..records.templates import TEMPLATES
from ..storage.files import content_hash, runs_folder
from . import methods

TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "train_sampling_strategy",
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
        model: base model: a local folder, a hub id (with `model_revision`, the commit), a GGUF file or a name, see
            `worlds.base_model`.
        dtype, load_in_4bit: how the base model is loaded, as TRL's ModelConfig spells them.
        benign: benign rows, the name of a world (see `worlds.load`; hub ids with `benign_revision`).
        n_benign: rows drawn from them by `seed`.
        drop_truncated: whether benign rows that `max_length` would cut are left out before the draw.
        unsafe: D_unsafe, a `HarvestSpec` or a source for `sources.read_rows`; `n_unsafe` rows are drawn from it by
            `seed`, nested. For "imitation" a `SafeSpec`, for "recover" a `RecoverySpec`.
        extra: further rows with good answers, added to the benign ones: a `SafeSpec` (STL), a `ContrastiveSpec` or a
            source for `sources.read_rows`. `n_extra` of them are drawn as the unsafe rows are: from files in the same
            order, the same rows.
        unsafe_visits, extra_visits: times that each unsafe row, and each of `extra`, is seen in an epoch.
        held_out: evaluation prompts (of the world of that name) dropped from the benign rows.
        template: prompt template: alpaca, short, none, or chat, the base's own (see `templates.ask`).
        penalty_weight: λ; for KTO its undesirable weight.
        display_name: what tables and figures call the arm, by default its method; no part of what it is.
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
    drop_truncated: bool = False
    unsafe: "str | HarvestSpec | SafeSpec | None" = None
    n_unsafe: int | None = None
    unsafe_visits: int = 1
    extra: "str | SafeSpec | ContrastiveSpec | None" = None
    n_extra: int | None = None
    extra_visits: int = 1
    held_out: str | None = None
    template: str = "alpaca"
    penalty_weight: float | str = "auto"
    display_name: str | None = field(default=None, compare=False)
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in methods.METHODS:
            raise ValueError(f"method={self.method!r} is not known; choose one of {', '.join(methods.METHODS)}.")
        if self.method == "sft":
            # What plain SFT does not look at must not give it another name.
            for name, value in (("unsafe", None), ("n_unsafe", None), ("unsafe_visits", 1), ("penalty_weight", "auto")):
                object.__setattr__(self, name, value)
        elif self.unsafe is None:
            raise ValueError(f"method={self.method!r} needs `unsafe`, the rows to push away from.")
        if self.template not in TEMPLATES:
            raise ValueError(f"template={self.template!r} is not known; choose one of {', '.join(TEMPLATES)}.")
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
        """`<method>-<hash of the spec>`, the arm's folder."""
        return f"{self.method}-{content_hash(describe(self))}"

    @property
    def folder(self) -> Path:
        """Where the arm lives."""
        return runs_folder() / "arms" / self.name


@dataclass(frozen=True, kw_only=True)
class HarvestSpec:
    """D_unsafe (TA-SFT, §4.1): a plainly fine-tuned arm's own answers to toxic prompts, judged harmful.

    Attributes:
        arm: who answers; its evaluation prompts, `held_out`, are not asked.
        prompts: the harvest prompts of the world of that name.
        judge: who says what is harmful, see `judges.load.load_judge`.
        decoding: how answers are sampled.
        n: rows wanted.
        rounds: times a prompt is asked at most.
        batch_size: of generation; sampled answers depend on it.
    """

    arm: ArmSpec
    prompts: str
    judge: str
    decoding: Decoding
    n: int
    rounds: int = 4
    batch_size: int = 64

    @cached_property
    def name(self) -> str:
        """`unsafe-<hash of the spec>`."""
        return f"unsafe-{content_hash(describe(self))}"


@dataclass(frozen=True, kw_only=True)
class SafeSpec:
    """STL's counterpart of D_unsafe: the same prompts in the same order, answered safely."""

    unsafe: HarvestSpec

    @cached_property
    def name(self) -> str:
        """`safe-<hash of the spec>`."""
        return f"safe-{content_hash(describe(self))}"


@dataclass(frozen=True, kw_only=True)
class RecoverySpec:
    """D_unsafe with a recovery in each row, for the penalty `recover`: a safe answer of the arm's own (see `branches`).

    Attributes:
        unsafe: the D_unsafe; its arm is asked for what it has not said by itself (`prepare.recoveries`).
        one: whether all rows have the same recovery, the arm's most frequent refusal.
    """

    unsafe: HarvestSpec
    one: bool = False

    @cached_property
    def name(self) -> str:
        """`recovery-<hash of the spec>`."""
        return f"recovery-{content_hash(describe(self))}"


@dataclass(frozen=True, kw_only=True)
class ContrastiveSpec:
    """Harmless rows with the toxic words of D_unsafe's prompts (TA-SFT, §4.3.6), see `prepare.contrastive`.

    Attributes:
        unsafe: the D_unsafe; a word is toxic that its prompts have and the benign rows of its arm have not.
        writer: the second model, which writes and answers them: a folder, a hub id (with `writer_revision`), or a world
            that makes such rows itself.
        per_word: rows a word.
        decoding, batch_size: of the second model.
        seed: of a world's rows.
    """

    unsafe: HarvestSpec
    writer: str
    writer_revision: str | None = None
    per_word: int = 5
    decoding: Decoding
    batch_size: int = 64
    seed: int = 0

    @cached_property
    def name(self) -> str:
        """`contrastive-<hash of the spec>`."""
        return f"contrastive-{content_hash(describe(self))}"


Rows = HarvestSpec | SafeSpec | RecoverySpec | ContrastiveSpec  # what an arm's rows are made from


def describe(spec: ArmSpec | Rows) -> dict[str, Any]:
    """The spec's fields but its display name, JSON-like: another spec in it by its name, a path in runs/ from there."""
    described = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "display_name"}
    for name, value in described.items():
        if isinstance(value, ArmSpec | Rows):
            described[name] = value.name
        elif is_dataclass(value):
            described[name] = asdict(value)
        elif isinstance(value, str) and Path(value).is_relative_to(runs_folder()):
            described[name] = f"runs/{Path(value).relative_to(runs_folder())}"
    return described
