"""λ where nobody chooses it: `penalty_weight="auto"`, from a pressure."""

from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .config import PRESSURE
from .sampling import share_of_loss

logger = logging.get_logger(__name__)


def penalty_weight_of(trainer: Any) -> float:
    """λ of a `TASFTTrainer` as a number: as given, or `penalty_pressure` over the share of the loss of unsafe rows.

    Raises `ValueError` for streamed rows, of which that share is not known.
    """
    args, dataset = trainer.args, trainer.train_dataset
    is_auto = args.penalty_weight == "auto"
    if not isinstance(dataset, Dataset) and (is_auto or args.unsafe_per_batch):
        name, other = ("unsafe_per_batch", 0) if args.unsafe_per_batch else ('penalty_weight="auto"', "a number")
        raise ValueError(f"{name} needs a data set of known size; give {other} for a streamed one.")
    if not is_auto:
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
    weight = pressure / share
    logger.info(f"penalty_weight=auto: λ = {weight:.4g} ({unsafe_fraction:.2%} of the rows are unsafe)")
    return weight
