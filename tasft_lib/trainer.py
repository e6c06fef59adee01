"""`TASFTTrainer`: TRL's `SFTTrainer` plus a penalty on the rows labelled unsafe (TA-SFT, arXiv:2412.06843).

`SFTTrainer.compute_loss` still makes the benign loss, from log-probabilities in which unsafe rows are masked out; they
and the penalty come from one pass through backbone and head. So without unsafe rows, or with `penalty_weight=0`, a run
is an SFTTrainer run up to rounding. This module and `forward` are the only ones that change TRL's behaviour
(`test_trl_internals.py` fails when what they build on changes).
"""

import math
from collections import defaultdict
from dataclasses import fields
from functools import partial, wraps
from inspect import signature

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from . import branches, labels
from .config import MADE_EMBEDDINGS, TASFTConfig
from .forward import TASFTForward, TASFTOutput
from .sampling import stratified
from .weight import penalty_weight_of

logger = logging.get_logger(__name__)

# Minor versions of TRL that test_trl_internals.py and the tests of the trainer ran on.
TESTED_TRL = ("1.15", "1.16")


class TASFTTrainer(SFTTrainer):
    """
    Trainer for toxicity-avoiding supervised fine-tuning: minimises NLL(benign rows) + λ · penalty(unsafe rows).

    A drop-in for [`~trl.SFTTrainer`]: same arguments, with data in TRL's unpaired-preference format (`prompt`,
    `completion`, boolean `label`; `False` marks an unsafe row), plain or conversational. An evaluation set without a
    `label` column is taken as benign. `TrainingArguments` and `SFTConfig` become a `TASFTConfig`, as TRL does.

    Logs beside TRL's own metrics (which describe the benign rows): `nll` per benign token, `penalty` per unsafe sample
    (unweighted), `unsafe_log_prob` (mean log-probability of a penalised token, averaged over unsafe samples)
    and `unsafe_rows` per optimizer step (in evaluation: in all).

    Raises `ValueError` for data without a usable `label` column and for what can't be honoured: custom collators,
    formatting functions, loss functions, image data, context, sequence and tensor parallelism.

    Example: `TASFTTrainer("Qwen/Qwen3-0.6B-Base", TASFTConfig(penalty="emd"), train_dataset=rows).train()`
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

    @wraps(SFTTrainer.__init__)  # its arguments in its order
    def __init__(self, *positional, **named):
        given = signature(super().__init__).bind(*positional, **named).arguments
        for name in ("data_collator", "formatting_func", "compute_loss_func", "compute_metrics"):
            if given.get(name) is not None:
                raise ValueError(f"TASFTTrainer does not support {name}: it would lose the label of a row.")
        args = given.get("args") or TASFTConfig("trainer_output")
        if not isinstance(args, TASFTConfig):
            options = args.to_dict()  # which hides what is named a token
            args = TASFTConfig(**{name: getattr(args, name) if "token" in name else options[name] for name in options})
        labels.require_labels(given.get("train_dataset"), "train_dataset")
        self._rows = None
        self.row_names: list[str] | None = None  # of the training rows, for messages; else they have numbers
        super().__init__(**given | {"args": args})
        if args.penalty == "npo" and not isinstance(self.model, PeftModel):
            raise ValueError('penalty="npo" takes the base model as its reference, so it needs an adapter (use_peft).')
        if is_deepspeed_zero3_enabled() and (args.loss_head == "dense" or args.penalty_embedding in MADE_EMBEDDINGS):
            raise ValueError(
                f'loss_head="dense" and penalty_embedding={", ".join(MADE_EMBEDDINGS)} do not work under '
                "DeepSpeed ZeRO-3; use DDP or FSDP."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise ValueError("TASFTTrainer does not support context, sequence or tensor parallelism; use DDP or FSDP.")
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            raise ValueError("TASFTTrainer trains on text only; image columns are not supported.")
        options = {f.name: getattr(self.data_collator, f.name) for f in fields(self.data_collator)}
        self.data_collator = labels.UnsafeLabelCollator(**options)
        causal_lm = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        TASFTForward.replace_forward(causal_lm, args)
        eos = causal_lm.generation_config.eos_token_id
        self._ends = labels.turn_ends(self.processing_class, self._tokenizer, self.chat_template, eos)
        self.penalty_weight = penalty_weight_of(self)
        self._sums = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
        self._steps_since_log = 0
        self._to_compare = ".".join(trl.__version__.split(".")[:2]) not in TESTED_TRL
        if self._to_compare:
            logger.warning_once(f"TASFTTrainer is tested on TRL {' and '.join(TESTED_TRL)}, not on {trl.__version__}.")

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if not isinstance(dataset, Dataset) or dataset.format["type"] != "custom":  # TRL refuses that one
            dataset = dataset.with_format(None)
        if "label" not in get_dataset_column_names(dataset):  # an evaluation set; the training set was checked
            dataset = dataset.map(lambda _: {"label": True})
        labels.require_labels(dataset, "the data set")
        dataset = dataset.map(partial(labels.read_row, bos=labels.added_bos(processing_class)), with_indices=True)
        how = (processing_class, args, False, formatting_func, dataset_name)
        prepared = super()._prepare_dataset(dataset, *how)
        if isinstance(prepared, Dataset) and len(prepared) < len(dataset):
            lost = dataset["label"][:].count(False) - prepared["label"][:].count(False)
            logger.warning(
                f"{len(dataset) - len(prepared)} rows, {lost} of them unsafe, have no completion left after truncation "
                f"to max_length={args.max_length} and were dropped."
            )
        if args.penalty == "recover" and (recoveries := branches.recovery_rows(dataset, dataset_name)) is not None:
            options = {"depth": args.branch_depth, "seed": args.seed, "max_length": args.max_length}
            prepared = branches.branched(prepared, super()._prepare_dataset(recoveries, *how), **options)
        if dataset_name == "train" and isinstance(prepared, Dataset):
            self._rows = prepared
        return labels.pack(prepared, args) if packing else prepared

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in ("label", "_tasft_row", "pushed") if n not in self._signature_columns]

    def _get_train_sampler(self, train_dataset=None):
        return stratified(self) if self.args.unsafe_per_batch else super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Adds the denominators of one optimizer step, over all its micro-batches and ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([labels.count(batch) for batch in batches]).sum(0).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, "sum")
            self._step_counts = counts
            self._step_rows = torch.cat([batch["rows"] for batch in batches]).unique().tolist()
            self._steps_since_log += 1
        return batches, num_items

    def _get_grad_norm(self, model, grad_norm=None):
        """Also stops a run whose loss or gradient is not finite. In fp16 the scaler leaves out such a step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        finite = grad_norm is None or math.isfinite(grad_norm)
        if not self.args.fp16 and not (finite and self._sums["train"].isfinite().all()):
            names = [self.row_names[row] if self.row_names else f"row {row + 1}" for row in self._step_rows]
            raise ValueError(
                f"step {self.state.global_step + 1}: loss or gradient is not finite, with {', '.join(names)}; lower "
                "learning_rate, or look at these rows and at the model's weights."
            )
        return grad_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """NLL of the benign rows, by `SFTTrainer`, plus λ times the reduced penalty of the unsafe rows (eq. 6, 8)."""
        inputs = dict(inputs)
        training = self.model.training
        local = labels.count(inputs)
        benign_tokens, samples, unsafe_samples = self._step_counts if training else local
        # Like SFTTrainer: the counts are those of all ranks, and DDP averages the gradients over ranks.
        ranks = self.accelerator.num_processes if training and self.args.average_tokens_across_devices else 1
        steps = self.current_gradient_accumulation_steps if training else 1
        unsafe, pushed, _ = inputs.pop("unsafe"), inputs.pop("pushed", None), inputs.pop("rows")
        sample, n_samples = labels.samples_of(inputs)
        ends, first = None if self.args.penalize_eos else self._ends, self.args.penalty_first_tokens
        inputs["labels"] = labels.penalised(inputs["labels"], unsafe, sample, n_samples, ends=ends, first=first)
        ours = {"unsafe_sample": sample.masked_fill(~unsafe, -1), "n_samples": n_samples, "pushed": pushed}
        if self.args.penalty == "npo":
            with torch.no_grad(), self.accelerator.unwrap_model(self.model).disable_adapter():
                reference = model(**inputs, **ours, fused_lm_head=True, use_cache=False)
            ours["reference_log_prob"] = reference.unsafe_log_prob
        ours["with_dense"] = self._to_compare and not is_deepspeed_zero3_enabled()
        passes = []  # in evaluation TRL makes a second one, for logits

        def forward(**kwargs):
            passes.append(model(**kwargs))
            return passes[-1]

        num_items = benign_tokens if training else None
        result = super().compute_loss(forward, inputs | ours, return_outputs, num_items)
        nll, model_outputs = result if return_outputs else (result, None)
        outputs = passes[0]
        if ours["with_dense"]:
            self._compare_with_dense_head(inputs, nll, outputs, ranks / benign_tokens.clamp(min=1), steps)
            self._to_compare = not local[2] > 0

        penalty = outputs.penalty.sum()
        if self.args.penalty_reduction == "micro_batch":
            penalty = penalty / local[2].clamp(min=1) / steps
        else:
            divisor = samples if self.args.penalty_reduction == "batch" else unsafe_samples
            penalty = penalty / divisor.clamp(min=1) * ranks
        loss = nll + self.penalty_weight * penalty

        with torch.no_grad():
            unsafe_log_prob = outputs.unsafe_log_prob.sum()
            sums = [-outputs.log_probs.sum(), local[0], outputs.penalty.sum(), unsafe_log_prob, local[2]]
            self._sums["train" if training else "eval"] += torch.stack(sums).cpu().double()  # no float64 on Apple's
        return (loss, model_outputs) if return_outputs else loss

    def _compare_with_dense_head(self, inputs, nll: Tensor, outputs: TASFTOutput, per_token: Tensor, steps: int):
        """Refuse an untested TRL whose loss parts are more than 1e-3 off those of `losses.dense_head`.

        Runs on the first micro-batch, and on until one has held an unsafe row; not under ZeRO-3, which shards the head.
        """
        log_prob, penalty = outputs.dense_sums
        aux_loss = 0 if outputs.aux_loss is None else self.router_aux_loss_coef * outputs.aux_loss / steps
        dense = torch.stack([-log_prob * per_token + aux_loss, penalty])
        value = torch.stack([nll, outputs.penalty.sum()])
        problem = None
        if not (inputs["labels"] == inputs["input_ids"])[inputs["labels"] != -100].all():
            problem = "labels are not the input's tokens"
        elif not torch.allclose(value, dense, rtol=1e-3, atol=1e-6, equal_nan=True):
            problem = "NLL {:.6g} and penalty {:.6g}, by losses.dense_head {:.6g} and {:.6g}".format(*value, *dense)
        if problem:
            raise ValueError(f"TRL {trl.__version__} changes the loss: {problem}; install trl>=1.15,<1.17.")

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
