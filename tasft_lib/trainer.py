"""`TASFTTrainer`: TRL's `SFTTrainer` plus a penalty on the rows labelled unsafe (TA-SFT, arXiv:2412.06843).

The benign part is left to `SFTTrainer.compute_loss`, which sees the unsafe rows masked out; the penalty is computed on
the same backbone pass and added. So without unsafe rows, or with `penalty_weight=0`, a run *is* an SFTTrainer run.
This is the only module that touches TRL's internals; written against TRL 1.16.
"""

from collections import defaultdict
from dataclasses import dataclass, field, fields
from types import MethodType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput

from . import losses

logger = logging.get_logger(__name__)

PENALTIES = ("emd", "emd_exact", "nlcl")
REDUCTIONS = ("batch", "unsafe", "micro_batch")
EMBEDDINGS = ("lm_head", "embed_tokens")

# Expected weight of the mean unsafe sample's penalty against one mean benign token's NLL. The paper's tuned λ (Table 4)
# times the share of micro-batches of 3 that hold an unsafe row is nearly constant over four models and four sizes of
# D_unsafe; these are the geometric means of those 16 products. The exact EMD is half as large as the paper's bound
# (½‖μ−ê‖² = 1 − μ·ê for concentrated mass), so it gets twice the weight.
TABLE_4_PRESSURE = {"emd": 0.077, "emd_exact": 0.154, "nlcl": 0.39}


@dataclass
class TASFTConfig(SFTConfig):
    r"""
    Configuration class for the [`TASFTTrainer`]: every [`~trl.SFTConfig`] option, and those of the penalty.

    Parameters:
        penalty (`str`, *optional*, defaults to `"emd"`):
            Penalty on unsafe rows: `"emd"` (the paper's bound, eq. 5), `"emd_exact"` (the earth mover's distance
            itself) or `"nlcl"` (eq. 7).
        penalty_weight (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            λ of eq. 6 and 8. `"auto"` divides `penalty_pressure` by the share of the loss that unsafe rows get under
            `penalty_reduction`, so the number of unsafe rows needs no retuning.
        penalty_pressure (`float`, *optional*):
            Expected weight of the penalty, for `penalty_weight="auto"`. By default the geometric mean over the paper's
            tuned weights (Table 4): 0.077 for `"emd"`, 0.154 for `"emd_exact"`, 0.39 for `"nlcl"`.
        penalty_reduction (`str`, *optional*, defaults to `"batch"`):
            What the summed penalty of the unsafe samples is divided by. `"batch"`: all samples of the optimizer step
            (unbiased, invariant to any split into micro-batches and ranks); `"unsafe"`: the unsafe samples of the
            optimizer step (eq. 6 to the letter); `"micro_batch"`: the unsafe samples of the micro-batch, averaged over
            accumulation steps (most likely what the authors ran: Table 4's λ apply as they stand).
        penalty_embedding (`str`, *optional*, defaults to `"lm_head"`):
            Token embedding that the EMD penalties measure distance in: `"lm_head"` or `"embed_tokens"`.
        penalize_eos (`bool`, *optional*, defaults to `False`):
            Whether the end-of-sequence token of an unsafe row is penalised too. Ending an answer is not unsafe.
    """

    penalty: str = field(
        default="emd",
        metadata={"help": "Penalty on unsafe rows.", "choices": PENALTIES},
    )
    penalty_weight: str = field(
        default="auto",
        metadata={"help": "Weight of the penalty (lambda): a number, or `auto` for `penalty_pressure` / unsafe share."},
    )
    penalty_pressure: float | None = field(
        default=None,
        metadata={
            "help": "Expected weight of the penalty for `penalty_weight=auto`; default: from the paper's Table 4."
        },
    )
    penalty_reduction: str = field(
        default="batch",
        metadata={
            "help": "Divide the summed penalty by all samples of the optimizer step (`batch`), by its unsafe samples "
            "(`unsafe`), or average micro-batch means (`micro_batch`, the paper's lambda as they stand).",
            "choices": REDUCTIONS,
        },
    )
    penalty_embedding: str = field(
        default="lm_head",
        metadata={"help": "Token embedding of the EMD penalties.", "choices": EMBEDDINGS},
    )
    penalize_eos: bool = field(
        default=False, metadata={"help": "Whether to penalise the end-of-sequence token of unsafe rows too."}
    )

    def __post_init__(self):
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's default of True is refused on a machine without a GPU
        super().__post_init__()
        # YAML values bypass argparse's choices, so they are checked here.
        for name, allowed in (
            ("penalty", PENALTIES),
            ("penalty_reduction", REDUCTIONS),
            ("penalty_embedding", EMBEDDINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}.")
        if self.penalty_weight != "auto":
            self.penalty_weight = _nonnegative("penalty_weight", self.penalty_weight, 'a number ≥ 0 or "auto"')
        if self.penalty_pressure is not None:
            self.penalty_pressure = _nonnegative("penalty_pressure", self.penalty_pressure, "a number ≥ 0")
        if self.packing or self.eval_packing or self.padding_free:
            raise ValueError(
                "TASFTTrainer does not support packing=True, eval_packing=True or padding_free=True: the label of a "
                "row would be lost when rows are joined. Set them to False."
            )
        if self.loss_type != "nll":
            raise ValueError(f"TASFTTrainer's benign loss is loss_type='nll', not {self.loss_type!r}.")
        if self.label_smoothing_factor > 0:
            raise ValueError("TASFTTrainer does not support label smoothing; set label_smoothing_factor to 0.")
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False would penalise the prompts of unsafe rows; leave it unset or True."
            )


@dataclass
class TASFTOutput(FusedCausalLMOutput):
    """TRL's fused output on the benign rows, and per sample `[B]` what the unsafe rows give (0 on benign rows)."""

    penalty: Tensor | None = None
    unsafe_log_prob: Tensor | None = None


@dataclass
class UnsafeLabelCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the boolean `label` column carried along as `unsafe` `[B]` (True where label is False)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["unsafe"] = torch.tensor([not example["label"] for example in examples])
        return batch


class TASFTTrainer(SFTTrainer):
    """
    Trainer for toxicity-avoiding supervised fine-tuning: minimises NLL(benign rows) + λ · penalty(unsafe rows).

    A drop-in for [`~trl.SFTTrainer`]: same arguments, with data in TRL's unpaired-preference format (`prompt`,
    `completion`, boolean `label`; `False` marks an unsafe row), plain or conversational. An evaluation set without a
    `label` column is taken as benign.

    Logs beside TRL's own metrics (which describe the benign rows): `nll` per benign token, `penalty` per unsafe sample
    (unweighted), `unsafe_log_prob` (mean log-probability of a penalised token, averaged over unsafe samples) and
    `unsafe_rows` per optimizer step (in evaluation: in all).

    Raises `ValueError` for data without a usable `label` column and for what can't be honoured: custom collators,
    formatting functions, loss functions, image data, context, sequence and tensor parallelism.

    Example:

    ```python
    from datasets import load_dataset
    from tasft_lib import TASFTConfig, TASFTTrainer

    dataset = load_dataset("json", data_files="rows.jsonl", split="train")  # {"prompt", "completion", "label"}
    trainer = TASFTTrainer("Qwen/Qwen3-0.6B-Base", TASFTConfig(penalty="emd"), train_dataset=dataset)
    trainer.train()
    ```
    """

    _tag_names = ("trl", "sft", "ta-sft")
    _name = "TA-SFT"
    _paper = {  # noqa: RUF012 (TRL's class attribute)
        "title": "Semantic Loss Guided Data Efficient Supervised Fine Tuning for Safe Responses in LLMs",
        "id": "2412.06843",
        "citation": """\
@article{lu2024semantic,
    title        = {{Semantic Loss Guided Data Efficient Supervised Fine Tuning for Safe Responses in LLMs}},
    author       = {Yuxiao Lu and Arunesh Sinha and Pradeep Varakantham},
    year         = 2024,
    eprint       = {arXiv:2412.06843},
}""",
    }
    # The denominators below span the whole optimizer step, so Trainer must not divide by accumulation steps again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TASFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        **kwargs,
    ):
        for name in ("data_collator", "formatting_func", "compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"TASFTTrainer does not support {name}: it would lose the label of a row.")
        args = args or TASFTConfig("trainer_output")
        _require_labels(train_dataset, "train_dataset")
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise ValueError("TASFTTrainer does not support context, sequence or tensor parallelism; use DDP or FSDP.")
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            raise ValueError("TASFTTrainer trains on text only; image columns are not supported.")
        self.data_collator = UnsafeLabelCollator(
            **{f.name: getattr(self.data_collator, f.name) for f in fields(self.data_collator)}
        )
        causal_lm = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        _add_penalty(causal_lm, args.penalty, args.penalty_embedding)
        eos = {self._tokenizer.eos_token_id, *_as_list(causal_lm.generation_config.eos_token_id)} - {None}
        self._eos_token_ids = torch.tensor(sorted(eos))
        self.penalty_weight = self._resolve_penalty_weight()
        self._sums = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
        self._steps_since_log = 0

    def _resolve_penalty_weight(self) -> float:
        """λ as a number; "auto" is `penalty_pressure` over the share of the loss that unsafe samples get."""
        args = self.args
        if args.penalty_weight != "auto":
            return args.penalty_weight
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError('penalty_weight="auto" needs a data set of known size; give a number for a streamed one.')
        unsafe_fraction = 1 - sum(self.train_dataset["label"][:]) / len(self.train_dataset)
        if unsafe_fraction == 0:
            return 0.0
        samples = {
            "batch": 1,
            "micro_batch": args.per_device_train_batch_size,
            "unsafe": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }[args.penalty_reduction]
        pressure = TABLE_4_PRESSURE[args.penalty] if args.penalty_pressure is None else args.penalty_pressure
        weight = pressure / (1 - (1 - unsafe_fraction) ** samples)
        logger.info(f"penalty_weight=auto: λ = {weight:.4g} ({unsafe_fraction:.2%} of the rows are unsafe)")
        return weight

    def _prepare_dataset(self, dataset, processing_class, args, *rest):
        columns = dataset.column_names or list(next(iter(dataset)))
        if "input_ids" not in columns and not {"prompt", "completion"} <= set(columns):
            raise ValueError(
                f"TASFTTrainer needs columns 'prompt', 'completion' and 'label'; the data set has {', '.join(columns)}."
            )
        if "label" not in columns:  # only an evaluation set: the training set was checked before
            dataset = dataset.map(lambda _: {"label": True})
        _require_labels(dataset, "the data set")
        prepared = super()._prepare_dataset(dataset, processing_class, args, *rest)
        if isinstance(prepared, Dataset) and len(prepared) < len(dataset):
            lost = dataset["label"][:].count(False) - prepared["label"][:].count(False)
            logger.warning(
                f"{len(dataset) - len(prepared)} rows, {lost} of them unsafe, have no completion left after truncation "
                f"to max_length={args.max_length} and were dropped."
            )
        return prepared

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "label" not in self._signature_columns:
            self._signature_columns.append("label")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Adds the denominators of one optimizer step, over all its micro-batches and ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([_count(batch) for batch in batches]).sum(0).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, "sum")
            self._step_counts = counts
            self._steps_since_log += 1
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """NLL of the benign rows, by `SFTTrainer`, plus λ times the reduced penalty of the unsafe rows (eq. 6, 8)."""
        inputs = dict(inputs)
        unsafe, labels = inputs.pop("unsafe"), inputs["labels"]
        penalized = labels if self.args.penalize_eos else self._mask_eos(labels)
        inputs["labels"] = labels.masked_fill(unsafe[:, None], -100)
        unsafe_labels = penalized.masked_fill(~unsafe[:, None], -100)
        training = self.model.training
        counts = self._step_counts if training else _count({"labels": labels, "unsafe": unsafe})
        outputs = None

        def forward(**kwargs):
            nonlocal outputs
            if not kwargs.get("fused_lm_head"):  # the extra pass for logits that TRL makes in evaluation
                return model(**kwargs)
            outputs = model(**kwargs, unsafe_labels=unsafe_labels)
            return outputs

        result = super().compute_loss(
            forward, inputs, return_outputs=return_outputs, num_items_in_batch=counts[0] if training else None
        )
        nll, model_outputs = result if return_outputs else (result, None)

        penalty = outputs.penalty.sum()
        _, samples, unsafe_samples = counts
        if self.args.penalty_reduction == "micro_batch":
            penalty = penalty / unsafe.sum().clamp(min=1)
            if training:
                penalty = penalty / self.current_gradient_accumulation_steps
        else:
            penalty = penalty / (samples if self.args.penalty_reduction == "batch" else unsafe_samples.clamp(min=1))
            # Like SFTTrainer: the counts are those of all ranks, and DDP averages the gradients over ranks.
            if training and self.args.average_tokens_across_devices:
                penalty = penalty * self.accelerator.num_processes
        loss = nll + self.penalty_weight * penalty

        with torch.no_grad():
            self._sums["train" if training else "eval"] += torch.stack(
                [
                    -outputs.log_probs.sum(),
                    outputs.label_mask.sum(),
                    outputs.penalty.sum(),
                    outputs.unsafe_log_prob.sum(),
                    unsafe.sum(),
                ]
            ).to("cpu", torch.float64)
        return (loss, model_outputs) if return_outputs else loss

    def _mask_eos(self, labels: Tensor) -> Tensor:
        return labels.masked_fill(torch.isin(labels, self._eos_token_ids.to(labels.device)), -100)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode in self._sums:
            sums = self.accelerator.reduce(self._sums.pop(mode).to(self.accelerator.device, torch.float32), "sum")
            nll, benign_tokens, penalty, log_prob, unsafe_rows = sums.tolist()
            metrics = {"nll": nll / max(benign_tokens, 1), "unsafe_rows": unsafe_rows}
            if unsafe_rows:
                metrics |= {"penalty": penalty / unsafe_rows, "unsafe_log_prob": log_prob / unsafe_rows}
            if mode == "train":
                metrics["unsafe_rows"] /= self._steps_since_log
                self._steps_since_log = 0
            logs |= metrics if mode == "train" else {f"eval_{name}": value for name, value in metrics.items()}
        super().log(logs, start_time)


def _count(batch: dict[str, Tensor]) -> Tensor:
    """[benign tokens, samples, unsafe samples] of one micro-batch; tokens as the shifted loss counts them."""
    labels, unsafe = batch["labels"][:, 1:], batch["unsafe"]
    benign_tokens = ((labels != -100) & ~unsafe[:, None]).sum()
    return torch.stack([benign_tokens, torch.tensor(len(unsafe), device=unsafe.device), unsafe.sum()])


def _add_penalty(model: PreTrainedModel, penalty: str, embedding: str) -> None:
    """Let `model(..., fused_lm_head=True, unsafe_labels=...)` also return the penalty of the unsafe rows.

    Patches the causal LM's `forward` over TRL's fused head, so that the penalty is part of the wrapped model's forward
    (DDP, autocast, PEFT) and takes the hidden states of the one backbone pass.
    """
    fused_forward = model.forward
    transform_logits = _logit_transform(model.config.get_text_config())
    cache = {}

    def unit_embedding(model: PreTrainedModel) -> Tensor:
        module = model.get_output_embeddings() if embedding == "lm_head" else model.get_input_embeddings()
        weight = module.weight
        if weight.requires_grad:  # full fine-tuning: the geometry of the current weights, without gradient
            return losses.unit_rows(weight)
        if "unit" not in cache:
            cache["unit"] = losses.unit_rows(weight)
        return cache["unit"]

    def forward(self, *args, unsafe_labels: Tensor | None = None, **kwargs):
        if unsafe_labels is None:
            return fused_forward(*args, **kwargs)
        hidden = {}
        hook = self.base_model.register_forward_hook(
            lambda module, inputs, outputs: hidden.update(states=outputs.last_hidden_state)
        )
        try:
            outputs = fused_forward(*args, **kwargs)
        finally:
            hook.remove()
        targets = unsafe_labels[:, 1:]
        states = hidden["states"][:, :-1][:, -targets.size(1) :]  # prompt tuning puts virtual tokens in front
        mask = targets != -100
        logits = transform_logits(self.get_output_embeddings()(states[mask]))
        targets = targets[mask]

        # masked_scatter keeps the result connected to the model when the batch has no unsafe row.
        def per_sample(token_values: Tensor) -> Tensor:
            return losses.sample_mean(token_values.new_zeros(mask.shape).masked_scatter(mask, token_values), mask)

        log_prob = per_sample(losses.token_log_probs(logits, targets))
        if penalty == "nlcl":
            value = torch.where(mask.any(-1), losses.nlcl(log_prob), 0.0)
        else:
            value = per_sample(getattr(losses, penalty)(logits, targets, unit_embedding(self)))
        return TASFTOutput(**outputs, penalty=value, unsafe_log_prob=log_prob.detach())

    # Trainer and generate read the signature of the model's own forward.
    forward.__wrapped__ = type(model).forward
    model.forward = MethodType(forward, model)


def _logit_transform(config):
    """What a model does to its logits after the head: scaling (Cohere, Granite, ...) and soft-capping (Gemma 2)."""
    scale = next(
        (
            v
            for n in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (v := getattr(config, n, None)) is not None
        ),
        None,
    )
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        logits = logits if scale is None else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return transform


def _require_labels(dataset: Dataset | IterableDataset | None, name: str) -> None:
    """A boolean `label` on every row, or a ValueError that names the first row without one."""
    if dataset is None:
        return
    columns = dataset.column_names or list(next(iter(dataset)))
    if "label" not in columns:
        raise ValueError(
            f"{name} has no 'label' column (columns: {', '.join(columns)}); add one: true (benign) or false (unsafe)."
        )
    if isinstance(dataset, Dataset):
        labels = dataset["label"][:]
        row = next((i for i, label in enumerate(labels, start=1) if not isinstance(label, bool)), None)
        if row is not None:
            raise ValueError(f"{name}, row {row}: label is {labels[row - 1]!r}; use true (benign) or false (unsafe).")


def _nonnegative(name: str, value: Any, expected: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name}={value!r} is not {expected}.")
    return number


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]
