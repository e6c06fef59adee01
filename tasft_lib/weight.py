"""λ where nobody chooses it: from a pressure, `penalty_weight="auto"`, or by parity, `penalty_weight="parity"`.

Parity is for penalties that pull towards a safe answer (`config.PULLS`). That answer is to become as likely as an
ordinary one, and no more:

    λ ← clip(λ + η Λ (pull − NLL), 0, Λ)        after each optimizer step with an unsafe row; λ = 0 at first

pull is the mean of −log p per token of the rows labelled False, averaged over rows; NLL is that of benign tokens. Both
are averages over the steps so far, of which an older one counts less, and over all their micro-batches and ranks. Λ is
the λ of "auto": at most, a token of a safe answer weighs as `penalty_pressure` ordinary ones.

The two likelihoods are means over tokens. Where ordinary text is hard to predict, a stock refusal meets parity by its
later tokens while it is seldom begun.
"""

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from .config import PRESSURE
from .sampling import share_of_loss

logger = logging.get_logger(__name__)

RATE = 0.05  # η: pressure gained per nat and step, so that one nat takes 20 steps from none to a pressure of 1
KEPT = 0.9  # of the sums over earlier steps, in each step: averages over about ten


def starting_weight(trainer: Any) -> float:
    """λ of a `TASFTTrainer` as a number: as given, or `penalty_pressure` over the share of the loss of unsafe rows.

    The latter is the largest λ of parity. Raises `ValueError` for streamed rows, of which that share is not known.
    """
    args, dataset = trainer.args, trainer.train_dataset
    is_rule = isinstance(args.penalty_weight, str)
    if not isinstance(dataset, Dataset) and (is_rule or args.unsafe_per_batch):
        rule = f'penalty_weight="{args.penalty_weight}"'
        name, other = ("unsafe_per_batch", 0) if args.unsafe_per_batch else (rule, "a number")
        raise ValueError(f"{name} needs a data set of known size; give {other} for a streamed one.")
    if not is_rule:
        return args.penalty_weight
    # Packed rows have no label of their own.
    of_rows = (trainer._rows or dataset).with_format(None)["label"][:]
    unsafe_fraction = of_rows.count(False) / len(of_rows)
    if unsafe_fraction == 0:
        return 0.0
    share = share_of_loss(
        unsafe_fraction,
        args.penalty_reduction,
        micro_batch=args.per_device_train_batch_size * len(of_rows) / len(dataset),
        micro_batches=args.gradient_accumulation_steps * args.world_size,
        unsafe_per_batch=args.unsafe_per_batch,
    )
    pressure = PRESSURE[args.penalty] if args.penalty_pressure is None else args.penalty_pressure
    weight, relation = pressure / share, "=" if args.penalty_weight == "auto" else "≤"
    rule = f"penalty_weight={args.penalty_weight}: λ {relation} {weight:.4g}"
    logger.info(f"{rule} ({unsafe_fraction:.2%} of the rows are unsafe)")
    return weight


class Parity(TrainerCallback):
    """Moves the `penalty_weight` of a `TASFTTrainer` after each optimizer step, between 0 and what it was.

    λ and the averages are part of the trainer's state, so a run that goes on from a checkpoint goes on with them.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.largest, trainer.penalty_weight = trainer, trainer.penalty_weight, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.held = state.stateful_callbacks.setdefault("parity", {"penalty_weight": 0.0, "sums": [0.0] * 4})
        self.trainer.penalty_weight = self.held["penalty_weight"]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.before = self._sums()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        accelerator = self.trainer.accelerator
        own = (self._sums() - self.before).to(accelerator.device, torch.float32)  # no float64 on Apple's
        step = accelerator.reduce(own, "sum").tolist()
        if not math.isfinite(sum(step)):
            return  # in fp16 such a step is left out
        sums = [KEPT * old + new for old, new in zip(self.held["sums"], step, strict=True)]
        nll, benign_tokens, log_prob, unsafe_rows = sums
        weight = self.held["penalty_weight"]
        if step[-1] > 0:
            gap = -log_prob / unsafe_rows - nll / max(benign_tokens, 1)
            weight = min(max(weight + RATE * self.largest * gap, 0.0), self.largest)
        self.held |= {"penalty_weight": weight, "sums": sums}
        self.trainer.penalty_weight = weight

    def _sums(self) -> torch.Tensor:
        """[Σ NLL, benign tokens, Σ log p of unsafe rows, unsafe rows] since the last line of the log, on this rank."""
        return self.trainer._sums["train"][[0, 1, 3, 4]]
