"""Response quality on benign rows: held-out loss, and exact answers by kind of question."""

import pandas as pd

from ..evaluation.rates import paired_bootstrap, rate
from ..evaluation.worlds import World
from ..saft.activations import completion_loss
from .arms import load_trained
from .rows import held_out_rows
from .specs import ArmSpec


def held_out_loss(arms: list[ArmSpec], n: int, *, batch_size: int = 32) -> pd.DataFrame:
    """Loss (nats per token, averaged over rows) on benign rows that were not trained on, at the end of training.

    `arms` hold plain SFT of every seed. Columns: method, seed, n (rows), loss; difference to plain SFT of that seed
    with low and high, a paired 95 % bootstrap interval over rows.
    """
    per_row = [(arm, completion_loss(*load_trained(arm), held_out_rows(arm, n), batch_size=batch_size)) for arm in arms]
    plain_of = {arm.seed: values for arm, values in per_row if arm.method == "sft" and arm.extra is None}
    rows = []
    for arm, values in per_row:
        plain = plain_of[arm.seed]
        difference, low, high = paired_bootstrap(values, plain)
        row = {"method": arm.display_name, "seed": arm.seed, "n": len(values), "loss": sum(values) / len(values)}
        rows.append(row | {"difference": difference, "low": low, "high": high})
    return pd.DataFrame(rows)


def by_kind(benign: pd.DataFrame, world: World) -> pd.DataFrame:
    """Correct answers by kind of the world's questions, a row per method, decoding and kind: n, correct, low, high.

    Kind "yes or no": the first word alone.
    Empty where no judge knew the right answers.
    """
    if "correct" not in benign:
        return pd.DataFrame()
    benign = benign.assign(question=benign["prompt"].map(world.question_kinds()))
    either = benign[benign["question"] == "ability"].copy()
    either["correct"] = [
        world.begins_correctly(prompt, response)
        for prompt, response in zip(either["prompt"], either["response"], strict=True)
    ]
    both = pd.concat([benign, either.assign(question="yes or no")])
    rows = []
    for (method, decoding, kind), group in both.groupby(["method", "decoding", "question"], sort=False):
        correct = rate(group["correct"], group["seed"])
        row = {"method": method, "decoding": decoding, "kind": kind, "n": correct.n, "correct": correct.rate}
        rows.append(row | {"low": correct.low, "high": correct.high})
    return pd.DataFrame(rows)
