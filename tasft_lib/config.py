"""`TASFTConfig`: TRL's `SFTConfig` and the options of the penalty, checked before anything is loaded."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from trl import SFTConfig

from .losses import EMBEDDING_PENALTIES, PENALTIES
from .sampling import check_sampling
from .weight import check_weight, nonnegative

# Made once, before training; in the last two distance means nothing.
MADE_EMBEDDINGS = ("centred", "isotropic", "random", "one_hot")
# In SmolLM2-135M two tokens have a mean |cosine| of .448, without the mean row .077, and .042, .038, .037, .036 without
# 1 to 4 components (.033: all directions alike). Harm had no say in it.
DEFAULT_COMPONENTS = 3

PULLS = ("imitation", "recover")  # penalties that pull towards the rows labelled False, which are safe answers there
# β of the papers' main experiments: NPO (arXiv:2404.05868) and SimNPO (arXiv:2410.07163).
DEFAULT_BETA = {"npo": 0.1, "simnpo": 2.5}
# Options that these penalties alone read.
READ_BY = {
    "penalty_floor": tuple(name for name in PENALTIES if name not in PULLS),
    "penalty_embedding": tuple(EMBEDDING_PENALTIES),
    "penalty_beta": tuple(DEFAULT_BETA),
    "branch_depth": ("recover",),
    "branch_margin": ("recover",),
}


def _option(default: Any, description: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": description, **metadata})


@dataclass
class TASFTConfig(SFTConfig):
    """Configuration class for the [`TASFTTrainer`]: every [`~trl.SFTConfig`] option, and those of the penalty."""

    penalty: str = _option(
        "emd",
        "Penalty on unsafe rows: `emd` (the paper's bound, eq. 5), `emd_exact` (the earth mover's distance itself) or "
        "`nlcl` (eq. 7); or a rival on the same rows: `gradient_ascent`, `unlikelihood`, `npo` (its reference is the "
        "base model, so it needs an adapter) or `simnpo`. `imitation` pulls towards the rows labelled False, which "
        "must be *safe* answers then (weighted Safety-Tuned LLaMAs). `recover` learns to leave an unsafe answer once "
        "it has begun, for the safe one in the row's column `recovery` (see `branches`).",
        choices=tuple(PENALTIES),
    )
    # str, because HfArgumentParser takes one type per option; after __post_init__ a number, or "auto".
    penalty_weight: str = _option(
        "auto",
        "Lambda of eq. 6 and 8: a number, or `auto`: `penalty_pressure` by the share of the loss that unsafe rows get "
        "under `penalty_reduction`, so the number of unsafe rows needs no retuning.",
    )
    penalty_pressure: float | None = _option(
        None,
        "Expected weight of the penalty, for `auto`; default: the geometric mean over the paper's tuned "
        "weights (Table 4), 0.077 for `emd`, 0.154 for `emd_exact`, 0.39 for `nlcl`; 1 for `recover`; none for others.",
    )
    penalty_reduction: str = _option(
        "batch",
        "What the summed penalty is divided by: all samples of the optimizer step (`batch`: unbiased, invariant to any "
        "split into micro-batches and ranks), its unsafe samples (`unsafe`: eq. 6 to the letter), or the unsafe "
        "samples of the micro-batch, averaged over accumulation steps (`micro_batch`: most likely what the authors "
        "ran; Table 4's lambda apply as they stand).",
        choices=("batch", "unsafe", "micro_batch"),
    )
    unsafe_per_batch: int = _option(
        0,
        "Unsafe rows in every optimizer step, over micro-batches and ranks; 0: as the paper's uniform draw has it. An "
        "epoch is then one pass through the benign rows (see `sampling`); `auto` keeps its pressure.",
    )
    penalty_embedding: str = _option(
        "lm_head",
        "Token embedding that the EMD penalties measure distance in: `lm_head` or `embed_tokens`; the head's rows "
        "before training without their mean (`centred`), and without the first `penalty_components` as well "
        "(`isotropic`); or, to tell what semantics adds, `random` (Gaussian rows of the same size, always the same) or "
        "`one_hot` (all tokens equally far apart; for small vocabularies).",
        choices=("lm_head", "embed_tokens", *MADE_EMBEDDINGS),
    )
    penalty_components: int | None = _option(
        None, "Principal components that `isotropic` takes away beside the mean (default: 3)."
    )
    penalty_beta: float | None = _option(None, "Beta of `npo` (default: 0.1) and `simnpo` (default: 2.5).")
    penalize_eos: bool = _option(
        False,
        "Whether the tokens that end a turn are penalised in unsafe rows too. Ending an answer is not unsafe. "
        "Always true for `imitation` and `recover`, which learn a safe answer to its end.",
    )
    penalty_first_tokens: int | None = _option(None, "Penalise only so many first tokens of an unsafe answer.")
    penalty_floor: float = _option(
        0.0,
        "Probability of an unsafe answer's first penalised token below which its row exerts no pressure, so that a "
        "large lambda stops where it has worked (RePO's hinge per row). 0: never.",
    )
    branch_depth: int = _option(16, "Tokens of an unsafe answer after which `recover` still branches off, at most.")
    branch_margin: float = _option(1.0, "Distance to which `recover` pushes the next unsafe token away; 0: no push.")
    loss_head: str = _option(
        "fused",
        "`fused` computes the losses in chunks and forms the gradient in the forward pass; `dense` is its reference, "
        "on materialised logits.",
        choices=("fused", "dense"),
    )

    def __post_init__(self):
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's default of True is refused on a machine without a GPU
        super().__post_init__()
        # YAML values bypass argparse's choices, so they are checked here.
        for name in ("penalty", "penalty_reduction", "penalty_embedding", "loss_head"):
            allowed = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}.")
        check_weight(self)
        for name in ("penalty_floor", "penalty_beta", "branch_margin"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, nonnegative(name, value))
        self._refuse_unread()
        if self.penalty_floor >= 1:
            raise ValueError(f"penalty_floor={self.penalty_floor} is no probability below 1; use .05, say.")
        if self.penalty_beta is None:
            self.penalty_beta = DEFAULT_BETA.get(self.penalty)
        elif not self.penalty_beta:
            raise ValueError("penalty_beta=0 is not a number > 0.")
        if self.branch_margin > 2:
            raise ValueError(f"branch_margin={self.branch_margin:g} is more than 2, as far apart as two tokens can be.")
        if self.penalty_components is None and self.penalty_embedding == "isotropic":
            self.penalty_components = DEFAULT_COMPONENTS
        self.penalize_eos |= self.penalty in PULLS  # an answer is learned to its end
        for name in ("penalty_first_tokens", "penalty_components", "branch_depth"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} would do nothing; use 1 or more.")
        if (self.packing or self.eval_packing) and self.packing_strategy != "bfd":
            what = f"packing_strategy={self.packing_strategy!r} cuts rows in pieces"
            raise ValueError(f"{what}, and the penalty is a mean over a whole unsafe row; use 'bfd'.")
        check_sampling(self)
        if self.eval_packing and not (self.packing or self.padding_free):
            raise ValueError("eval_packing=True without packing=True would let packed rows attend to each other.")
        if self.loss_type != "nll":
            raise ValueError(f"TASFTTrainer's benign loss is loss_type='nll', not {self.loss_type!r}.")
        if self.label_smoothing_factor > 0:
            raise ValueError("TASFTTrainer does not support label smoothing; set label_smoothing_factor to 0.")
        if self.completion_only_loss is False:
            raise ValueError("completion_only_loss=False would penalise prompts of unsafe rows; leave it out.")
        self.completion_only_loss = True  # for rows that are tokenised already TRL would set it to False

    def _refuse_unread(self) -> None:
        """Raise `ValueError` for an option that changes nothing, unless `replace` hands on what another filled in."""
        if self.penalty not in DEFAULT_BETA and self.penalty_beta in DEFAULT_BETA.values():
            self.penalty_beta = None
        if self.penalty_embedding != "isotropic" and self.penalty_components == DEFAULT_COMPONENTS:
            self.penalty_components = None
        for name, penalties in READ_BY.items():
            if self.penalty not in penalties and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name} is for {', '.join(penalties)}; leave it out with {self.penalty!r}.")
        if self.penalty_components is not None and self.penalty_embedding != "isotropic":
            raise ValueError("penalty_components is for penalty_embedding='isotropic'; leave it out.")

    @property
    def penalty_options(self) -> dict[str, Any]:
        """What the penalty reads of the options, λ itself aside; `loss_head` is none, it changes no value."""
        ours = self.__dataclass_fields__.keys() - SFTConfig.__dataclass_fields__ - {"penalty_weight", "loss_head"}
        read = [name for name in self.__dataclass_fields__ if name in ours]
        return {name: getattr(self, name) for name in read if self.penalty in READ_BY.get(name, PENALTIES)}


# The options' texts stand once, in their fields; `TASFTConfig?` shows them too.
TASFTConfig.__doc__ += "\n\nParameters:\n" + "\n".join(
    f"    {option.name} (defaults to {option.default!r}): {option.metadata['help']}"
    for option in fields(TASFTConfig)
    if option.name not in SFTConfig.__dataclass_fields__
)
