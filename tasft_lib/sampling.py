"""Which rows make up an optimizer step, where a set number of them are unsafe; and what share of the loss those have.

The paper draws rows uniformly. Then most steps hold no unsafe row where there are few, and an early one holds several.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """The rows of an epoch in an order in which every optimizer step has `unsafe_per_batch` unsafe ones.

    A step is `step_size` rows of that order, over all its micro-batches and ranks, and its unsafe rows are spread
    evenly over it. An epoch is one pass through the benign rows, in random order; its last step has those that are
    left, and its unsafe rows all the same. Unsafe rows are visited in passes of their own, each in a random order, that
    go on from one epoch to the next: no row is seen again before every other one was. Both orders depend on seed and
    epoch alone, so that a run which goes on from a checkpoint sees the rows that a straight one sees.

    Args:
        labels: of the rows, true (benign) or false (unsafe).
        epoch: tells the epoch that is begun, from 0.

    Raises `ValueError` where there is no unsafe or no benign row, or no room for one in a step.
    """

    def __init__(
        self, labels: list[bool], *, step_size: int, unsafe_per_batch: int, seed: int, epoch: Callable[[], int]
    ):
        self.benign, self.unsafe = np.flatnonzero(labels), np.flatnonzero(~np.array(labels, dtype=bool))
        self.per_step, self.seed, self.epoch = unsafe_per_batch, seed, epoch
        self.benign_per_step = step_size - unsafe_per_batch
        if self.benign_per_step < 1:
            raise ValueError(
                f"unsafe_per_batch={unsafe_per_batch} leaves no benign row in steps of {step_size} rows; use fewer."
            )
        if not (len(self.benign) and len(self.unsafe)):
            kind = "unsafe" if len(self.benign) else "benign"
            raise ValueError(f"unsafe_per_batch={unsafe_per_batch}, and no row is {kind}; leave it out, or add some.")
        self.steps = -(-len(self.benign) // self.benign_per_step)

    def __len__(self) -> int:
        return len(self.benign) + self.steps * self.per_step

    def __iter__(self) -> Iterator[int]:
        epoch, n_unsafe = self.epoch(), len(self.unsafe)
        benign = self._shuffled(self.benign, 0, epoch)
        visits = epoch * self.steps * self.per_step + np.arange(self.steps * self.per_step)  # counted from epoch 0
        passes = visits // n_unsafe
        orders = {i: self._shuffled(self.unsafe, 1, i) for i in range(passes[0], passes[-1] + 1)}
        unsafe = np.array([orders[i][visit % n_unsafe] for i, visit in zip(passes, visits, strict=True)])
        for step in range(self.steps):
            of_benign = benign[step * self.benign_per_step : (step + 1) * self.benign_per_step]
            rows = np.empty(len(of_benign) + self.per_step, dtype=np.int64)
            is_unsafe = np.zeros(len(rows), dtype=bool)
            is_unsafe[np.arange(self.per_step) * len(rows) // self.per_step] = True
            rows[is_unsafe], rows[~is_unsafe] = unsafe[step * self.per_step :][: self.per_step], of_benign
            yield from rows.tolist()

    def _shuffled(self, rows: np.ndarray, stream: int, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, stream, number]).permutation(rows)


def stratified(trainer: Any) -> StratifiedSampler:
    """The sampler of a `TASFTTrainer` with `unsafe_per_batch`."""
    args = trainer.args
    return StratifiedSampler(
        trainer.train_dataset.with_format(None)["label"][:],
        step_size=trainer.get_total_train_batch_size(args),
        unsafe_per_batch=args.unsafe_per_batch,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=lambda: int(trainer.state.epoch or 0),
    )


def check_sampling(args: Any) -> None:
    """Raise `ValueError` where a `TASFTConfig` asks for `unsafe_per_batch` beside what does not go with it."""
    if args.unsafe_per_batch < 0:
        raise ValueError(f"unsafe_per_batch={args.unsafe_per_batch} is not a number ≥ 0.")
    beside = {
        "packing": args.packing,
        f"train_sampling_strategy={args.train_sampling_strategy!r}": args.train_sampling_strategy != "random",
        "split_batches": args.accelerator_config.split_batches,
    }
    if args.unsafe_per_batch and (other := [name for name, is_set in beside.items() if is_set]):
        raise ValueError(f"unsafe_per_batch says which rows make up a step, as does {other[0]}; leave one of them out.")


def share_of_loss(
    unsafe_fraction: float, reduction: str, *, micro_batch: float, micro_batches: int, unsafe_per_batch: int = 0
) -> float:
    """What λ is multiplied with in expectation, in (0, 1]: the weight that `penalty_reduction` gives to unsafe rows.

    `micro_batches` of `micro_batch` samples make an optimizer step, over all ranks. λ times this share is the total
    pressure, `penalty_pressure`. With `unsafe_per_batch` it is what every step has, however many unsafe rows there are.
    """
    if unsafe_per_batch:
        parts = {"batch": micro_batch * micro_batches, "micro_batch": micro_batches, "unsafe": 1}[reduction]
        return min(1.0, unsafe_per_batch / parts)
    samples = {"batch": 1, "micro_batch": micro_batch, "unsafe": micro_batch * micro_batches}[reduction]
    return 1 - (1 - unsafe_fraction) ** samples
