"""Response quality: held-out loss, questions with one right answer, and exact answers by kind of question."""

from pathlib import Path

import pandas as pd

from ..evaluation import lm_eval
from ..evaluation.likelihood import completion_loss
from ..evaluation.rates import paired_bootstrap, rate
from ..evaluation.worlds import World
from ..storage.files import content_hash, file_hash, runs_folder
from .arms import load_trained
from .results import table_in
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


def capability(
    arms: list[ArmSpec], tasks: list[str], files: list[str] = (), *, limit: int | None = None, batch_size: int = 8
) -> pd.DataFrame:
    """lm-evaluation-harness on each arm at the end of training, kept beside it: a row per arm, task and metric.

    Args:
        tasks: NAME@<commit of its data>; the paper's three need no commit.
        files: questions of your own on disk, see `lm_eval.write_tasks`.
        limit: only the first so many questions of each.

    Columns: arm, method, seed; task, metric, value, stderr and n of `lm_eval.harness_scores`.

    Raises `ValueError` for a task without a commit, and as `lm_eval.harness_scores`.
    """
    names = {}
    for task in tasks:
        name, _, commit = task.partition("@")
        names[name] = commit or lm_eval.TASKS.get(name)
        if names[name] is None:
            raise ValueError(f"task {name}: give the commit of its data set, {name}@<commit>")
    paths = [Path(file) for file in files]
    described = content_hash([names, [(path.name, file_hash(path)) for path in paths], limit])
    folder = runs_folder() / "tasks" / described
    names |= dict.fromkeys(lm_eval.write_tasks(paths, folder, limit=limit))
    options = {"limit": limit, "include_path": str(folder) if files else None, "batch_size": batch_size}
    scores = []
    for arm in arms:
        options["apply_chat_template"] = arm.template == "chat"
        found = table_in(
            arm.folder / f"capability-{described}.csv",
            lambda arm=arm: lm_eval.harness_scores(*load_trained(arm), names, **options),
        )
        told = {"arm": arm.name, "method": arm.display_name or arm.method, "seed": arm.seed}
        scores.append(found.assign(**told)[[*told, *found.columns]])
    return pd.concat(scores, ignore_index=True)


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
