"""The methods compared, one small function each: given the rows, a TRL trainer ready to `train()`."""

from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from ..config import TASFTConfig
from ..losses import PENALTIES
from ..records.data import mix
from ..trainer import TASFTTrainer

METHODS = ("sft", "kto", *PENALTIES)
CONFIGS = {"sft": SFTConfig, "kto": KTOConfig, **dict.fromkeys(PENALTIES, TASFTConfig)}


def make_trainer(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benign: Dataset,
    unsafe: Dataset | None,
    *,
    penalty_weight: float | str,
    unsafe_visits: int = 1,
    lora: dict[str, Any],
    training: dict[str, Any],
) -> Trainer:
    """The trainer of `method` (one of `METHODS`).

    Args:
        benign, unsafe: rows of `prompt`, `completion`, `label`; `unsafe` is None for "sft", the safe answers for
            "imitation".
        penalty_weight: λ of TA-SFT, or KTO's `undesirable_weight`; "auto" is each method's own rule.
        unsafe_visits: times that each of `unsafe` is seen in an epoch.
        lora: options of `peft.LoraConfig`; empty for full fine-tuning.
        training: options of the method's TRL config.
    """
    make = {"sft": sft, "kto": kto}.get(method, ta_sft)
    args = dict(training)
    if make is ta_sft:
        args["penalty"] = method
    return make(
        model,
        args,
        benign,
        unsafe,
        penalty_weight=penalty_weight,
        unsafe_visits=unsafe_visits,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
    )


def sft(model, args, benign, unsafe, *, penalty_weight, unsafe_visits, **kwargs) -> SFTTrainer:
    """Plain supervised fine-tuning on the benign rows."""
    return SFTTrainer(model, SFTConfig(**args), train_dataset=benign.remove_columns("label"), **kwargs)


def ta_sft(model, args, benign, unsafe, *, penalty_weight, unsafe_visits, **kwargs) -> TASFTTrainer:
    """The paper's method and its rivals: benign and unsafe rows mixed, the unsafe ones penalised.

    With safe answers as `unsafe`, penalty "imitation" is Safety-Tuned LLaMAs (Bianchi et al., 2023) with a weight: λ
    stands where TA-SFT's does, so that weight and content can be told apart. (STL itself is plain SFT on both.)
    """
    config = TASFTConfig(**args, penalty_weight=penalty_weight)
    rows = mix(benign, unsafe, unsafe_visits=unsafe_visits, seed=config.seed)
    return TASFTTrainer(model, config, train_dataset=rows, **kwargs)


def kto(model, args, benign, unsafe, *, penalty_weight, unsafe_visits, **kwargs) -> KTOTrainer:
    """KTO (Ethayarajh et al., 2024) with the unsafe rows as undesirable ones.

    "auto" takes the weights' rule of its authors at its 1:1 end: desirable weight times rows equals undesirable weight
    times rows. The reference is the base model. TRL takes the rows in their order, which `mix` shuffles, and no other.
    """
    if penalty_weight == "auto":
        penalty_weight = len(benign) / (len(unsafe) * unsafe_visits)
    config = KTOConfig(**args | {"train_sampling_strategy": "sequential"}, undesirable_weight=penalty_weight)
    rows = mix(benign, unsafe, unsafe_visits=unsafe_visits, seed=config.seed)
    return KTOTrainer(model, args=config, train_dataset=rows, **kwargs)
