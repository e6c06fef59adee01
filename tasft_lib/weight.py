"""λ: what it may be, and what it is where nobody chooses it, `penalty_weight="auto"`: from a pressure."""

from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .sampling import share_of_loss

logger = logging.get_logger(__name__)

# Expected weight of the mean unsafe sample's penalty against one mean benign token's NLL. The paper's tuned λ (Table 4)
# times the share of micro-batches of 3 that hold an unsafe row is nearly constant over four models and four sizes of
# D_unsafe; these are the geometric means of those 16 products. The exact EMD is half as large as the paper's bound
# (½‖μ−ê‖² = 1 − μ·ê for concentrated mass), so it gets twice the weight. A recovery weighs like an ordinary answer.
PRESSURE = {"emd": 0.077, "emd_exact": 0.154, "nlcl": 0.39, "recover": 1.0}


def check_weight(config: Any) -> None:
    """Make numbers of the λ and the pressure of a `TASFTConfig`; `ValueError` where there is none, or one too many."""
    if config.penalty_pressure is not None:
        config.penalty_pressure = nonnegative("penalty_pressure", config.penalty_pressure)
    if config.penalty_weight != "auto":
        config.penalty_weight = nonnegative("penalty_weight", config.penalty_weight, 'a number ≥ 0 or "auto"')
        if config.penalty_pressure is not None:
            raise ValueError("penalty_pressure is for penalty_weight='auto'; leave one of them out.")
    elif config.penalty_pressure is None and config.penalty not in PRESSURE:
        raise ValueError(f'penalty_weight="auto" has no pressure for {config.penalty!r}; give a weight or a pressure.')


def nonnegative(name: str, value: Any, expected: str = "a number ≥ 0") -> float:
    """The value of the option `name` as a number, for YAML gives 2e-4 as text; `ValueError` for any other."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name}={value!r} is not {expected}.")
    return number


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
