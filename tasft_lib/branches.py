"""Branch and recover, the penalty `recover`: rows [x, u_1..u_k, r], on which r is learned and u_{k+1} pushed away.

x is the prompt, u the unsafe answer, r the recovery: a safe answer to x, best one of the model's own. A penalty of
[x, u] teaches a model to begin no unsafe answer; these rows, to leave one that is begun. Here stands what makes a row,
and what a head makes of the token with two targets; the loss is in `losses`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import get_dataset_column_names

from .losses import HeadOutput


def recovery_rows(dataset: Any, name: str) -> Dataset | None:
    """The unsafe rows with `recovery` as their `completion`, to be tokenised as rows are; None where none is unsafe.

    Raises `ValueError` for rows that are streamed or tokenised, and for an unsafe one without a recovery.
    """
    columns = get_dataset_column_names(dataset)
    if not isinstance(dataset, Dataset) or "input_ids" in columns:
        raise ValueError(
            f'{name}: penalty="recover" makes rows of text or messages; give no streamed or tokenised ones.'
        )
    unsafe = dataset.select(np.flatnonzero(~np.array(dataset["label"][:], dtype=bool)))
    if not len(unsafe):
        return None
    recoveries = unsafe["recovery"][:] if "recovery" in columns else [None] * len(unsafe)
    if without := [row for row, recovery in zip(unsafe["_tasft_row"][:], recoveries, strict=True) if not recovery]:
        what = (
            'no recovery, a safe answer to its prompt, which penalty="recover" needs; see `tasft harvest --recoveries`'
        )
        raise ValueError(f"{name}, row {without[0] + 1}: unsafe, and {what}.")
    return unsafe.remove_columns("completion").rename_column("recovery", "completion")


def branched(dataset: Dataset, recoveries: Dataset, *, depth: int, seed: int, max_length: int | None) -> Dataset:
    """Tokenised rows, of which the unsafe ones branch off into their recovery after k tokens of the unsafe answer.

    k is 0 with probability ½, else uniform on 1..min(|u| − 1, `depth`), or up to where r still fits `max_length`. It is
    drawn once for each row, by `seed` and the row's number: the same in every epoch, and another one for each of its
    `unsafe_visits`. |u| does not count how both answers end, which is the end of the turn.

    Adds `pushed`, per token: u_{k+1} where r_1 stands, and −100 elsewhere (there too if both are the same token).
    """
    by_number = dict(zip(recoveries["_tasft_row"][:], recoveries.to_list(), strict=True))

    def branch(row: dict[str, Any]) -> dict[str, list[int]]:
        if row["label"]:
            return {"pushed": [-100] * len(row["input_ids"])}
        (x, u), (_, r) = _parts(row), _parts(by_number[row["_tasft_row"]])
        ending = next((i for i, (a, b) in enumerate(zip(reversed(u), reversed(r), strict=False)) if a != b), len(u))
        before_end = u[: len(u) - ending]
        fitting = depth if max_length is None else max_length - len(x) - len(r)
        deepest, generator = min(len(before_end) - 1, depth, fitting), np.random.default_rng([seed, row["_tasft_row"]])
        k = int(generator.integers(1, deepest + 1)) if generator.random() < 0.5 and deepest > 0 else 0
        pushed = before_end[k] if before_end and before_end[k] != r[0] else -100
        begun = x + u[:k]
        return {
            "input_ids": begun + r,
            "labels": [-100] * len(begun) + r,
            "pushed": [-100] * len(begun) + [pushed] + [-100] * (len(r) - 1),
        }

    return dataset.map(branch)


def _parts(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens before the first that is learned, and those from there on."""
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:start], row["input_ids"][start:]


def two_targets(
    head: Callable[..., HeadOutput], pushed: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> HeadOutput:
    """`head`, where tokens with a second target in `pushed` `[N]` (≥ 0) take the penalty on it, beside log p_t(y_t).

    Their hidden states pass through the head twice. On all other tokens the penalty is −4, as far from its target as
    EMD goes, where `losses.push` is zero.
    """
    n, has_two = len(targets), pushed >= 0
    hidden, targets = torch.cat([hidden, hidden[has_two]]), torch.cat([targets, pushed[has_two]])
    options["unsafe"] = torch.arange(len(targets), device=targets.device) >= n
    output = head(hidden, weight, targets, **options)
    penalty = output.penalty.new_full((n,), -4.0).masked_scatter(has_two, output.penalty[n:])
    return HeadOutput(*(values[:n] for values in output[:3]), penalty)
