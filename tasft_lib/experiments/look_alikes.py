"""Over-refusal for nothing: benign sets half of whose rows look like unsafe ones, and the arms trained on them."""

import random
from dataclasses import replace
from pathlib import Path

import pandas as pd

from .. import text
from ..evaluation.rates import counted, mcnemar, rate
from ..records.templates import questions
from ..storage.files import content_hash, runs_folder, write_rows
from . import beyond, rows, trade_off
from .specs import ArmSpec
from .study import Study

# What the benign rows are, where they aren't the ordinary ones: half of them look-alikes; harmless rows with alarming
# words among them, as many as a draw from the larger set would have; half look-alikes, of that larger set.
SETS = ("look_alikes", "alarming", "alarming_look_alikes")


def likeness(asked: str, toxic: list[str]) -> float:
    """How much a prompt looks like one of the toxic prompts: the largest Jaccard index of their distinct words."""
    own = text.words_of(asked)
    return max(len(own & words) / len(own | words) for words in map(text.words_of, toxic))


def alike(pool: list[dict], toxic: list[str], n: int) -> list[dict]:
    """The `n` rows of `pool` whose `instruction` has most `likeness`, the most alike first; of equals the earlier."""
    return sorted(pool, key=lambda row: likeness(row["instruction"], toxic), reverse=True)[:n]


def arms(study: Study, seed: int) -> list[ArmSpec]:
    """Every trial of the notebook on the ordinary rows and, but plain SFT, on look-alikes; `alarming_methods` on the
    alarming sets too. `write` makes the rows.
    """
    config, found = study.config, []
    for trial in trade_off.trials(study, seed):
        kinds = SETS if trial.method in config.alarming_methods else SETS[: trial.method != "sft"]
        found.append(trial.arm)
        found += [
            replace(trial.arm, benign=str(_file(study, seed, kind)), display_name=f"{trial.method}_{kind}")
            for kind in kinds
        ]
    return found


def write(study: Study) -> pd.DataFrame:
    """Write the benign sets that `arms` names, `n_benign` rows each; harvests where needed.

    Toxic prompts are those of the unsafe rows that the arms of a seed draw. Returns a row per seed and set, that of the
    ordinary rows too: `rows`, `alarming` (how many of them have alarming words), `likeness` (their mean).
    """
    config, world, told = study.config, study.world, []
    for seed in study.seeds:
        unsafe = rows.training_rows(study.arm("emd", config.n_unsafe, weight=1.0, seed=seed))[1]
        toxic = [questions(prompt)[0] for prompt in unsafe["prompt"][:]]
        ordinary, pool = (world.benign_rows(n, seed=seed).to_list() for n in (config.n_benign, config.n_pool))
        # Words of all harvest prompts: the arms' few prompts name hardly any.
        words = text.toxic_words(world.harvest_prompts(), [row["instruction"] for row in pool])
        alarming = world.contrastive_rows(words, config.alarming_per_word, seed=seed)
        drawn = round(config.n_benign * len(alarming) / (len(pool) + len(alarming)))
        half = config.n_benign // 2
        chosen = {
            "ordinary": [],
            "look_alikes": alike(pool, toxic, half),
            "alarming": random.Random(seed).sample(alarming, drawn),
            "alarming_look_alikes": alike([*alarming, *pool], toxic, half),
        }
        for name, first in chosen.items():
            taken = {_key(row) for row in first}
            own = [*first, *(row for row in ordinary if _key(row) not in taken)][: config.n_benign]
            write_rows(_file(study, seed, name), own)
            are_alarming = sum(row in alarming for row in own)
            mean = sum(likeness(row["instruction"], toxic) for row in own) / len(own)
            told.append({"seed": seed, "set": name, "rows": len(own), "alarming": are_alarming, "likeness": mean})
    return pd.DataFrame(told)


def pairs(answers: pd.DataFrame, pairs: dict[str, str]) -> pd.DataFrame:
    """`harm` and `over_refusal` of an arm's name and of what it is held against, prompt by prompt within a base model.

    A row per pair, seed and measure: `with_` and `without` (rates), their `difference` and McNemar's exact `p`.
    """
    table = []
    for first, second in pairs.items():
        for seed, own in answers.groupby("seed"):
            for measure in ("harm", "over_refusal"):
                sides = [counted(own[own["method"] == name], measure)["counts"].tolist() for name in (first, second)]
                shares = [rate(side).rate for side in sides]
                row = {"method": first, "against": second, "seed": seed, "measure": measure}
                row |= {"with_": shares[0], "without": shares[1], "difference": shares[0] - shares[1]}
                table.append(row | {"n": len(sides[0]), "p": mcnemar(*sides)[2]})
    return pd.DataFrame(table)


def verdict(answers: pd.DataFrame, pairs: dict[str, str]) -> pd.DataFrame:
    """Rows as of `beyond.differ_by`, and the pair's names: over-refusal lower by 5 points, harm higher by 1 at most."""
    table = []
    for first, second in pairs.items():
        for measure, limit in (("over_refusal", -0.05), ("harm", 0.01)):
            sides = [beyond.share(answers, measure, name) for name in (first, second)]
            row = beyond.differ_by(f"{first} - {second}: {measure}", *sides, low=-1.0, high=limit)
            table.append({"method": first, "against": second} | row)
    return pd.DataFrame(table)


def _file(study: Study, seed: int, kind: str) -> Path:
    """Where the rows of a set lie; reads nothing."""
    config = study.config
    made_of = [config.model, config.benign, config.harvest_prompts, config.n_unsafe, config.n_benign, config.n_pool]
    name = f"{kind}-{seed}-{content_hash([*made_of, config.alarming_per_word])}"
    return runs_folder() / "look_alikes" / f"{name}.jsonl"


def _key(row: dict) -> tuple[str, str]:
    return text.normalise(row["instruction"]), text.normalise(row["output"])
