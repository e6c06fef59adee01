"""Semantics by targets: unsafe rows pull to p* ∝ p_ref · exp(−β cos(ê_w, ê_y)), in three embeddings, over β and λ."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from ..evaluation.rates import difference, summary
from . import beyond
from .analysis import word_coverage
from .pressure import with_regret
from .specs import ArmSpec
from .study import Study

BY = ["method", "n_unsafe", "beta", "penalty_weight"]
EMBEDDINGS = {"target_lm_head": "lm_head", "target_random": "random", "target_one_hot": "one_hot"}
REFERENCE = "target_reference"  # p* = p_ref, whatever the embedding: what the pull does without the tilt
NO_TILT = 1e-6  # β of that


def arms_of(study: Study, seed: int, betas: dict[str, list[float]], weights: list[float]) -> list[ArmSpec]:
    """Plain SFT, and every method of `betas` at each of its β and every λ, on the base model of the seed."""
    arms, config = [study.arm("sft", seed=seed)], study.config
    for name, own in betas.items():
        options = {"penalty_embedding": EMBEDDINGS.get(name, "one_hot"), "unsafe_per_batch": config.per_batch}
        options |= {"display_name": name, "seed": seed}
        arms += [
            study.arm("target", config.n_unsafe, weight=weight, penalty_beta=beta, **options)
            for beta in own
            for weight in weights
        ]
    return arms


def with_beta(answers: pd.DataFrame, arms: list[ArmSpec]) -> pd.DataFrame:
    """The answers with their arm's `beta`, 0 where it has none."""
    return answers.assign(beta=answers["arm"].map({arm.name: arm.training.get("penalty_beta", 0.0) for arm in arms}))


def searched(answers: pd.DataFrame) -> pd.DataFrame:
    """`pressure.with_regret` of each seed's arms against its own plain SFT, with `seed`: a row per arm."""
    return pd.concat(
        [with_regret(summary(own, BY)).assign(seed=seed) for seed, own in answers.groupby("seed")], ignore_index=True
    )


def chosen(search: pd.DataFrame) -> pd.DataFrame:
    """Of the arms of `searched` at one λ a row per embedding: the `beta` of least regret; on a tie the smaller one."""
    tried = search[search["method"].isin(EMBEDDINGS)].sort_values(["regret", "beta"])
    return tried.drop_duplicates("method").sort_index()[["method", "beta", "penalty_weight", "regret"]]


def spread(search: pd.DataFrame) -> pd.DataFrame:
    """Per target and seed, over λ: the least and the largest regret, their difference, and plain SFT's beside them."""
    sft = search[search["method"] == "sft"].set_index("seed")["regret"]
    own = search[search["method"].str.startswith("target")]
    table = own.groupby(["method", "seed"], sort=False)["regret"].agg(weights="size", least="min", largest="max")
    table = table.reset_index().assign(spread=lambda t: (t["largest"] - t["least"]).round(9))
    return table.assign(sft=table["seed"].map(sft))


def coverage(answers: pd.DataFrame, unsafe: dict[str, Any], harm_words: Callable[[str], set[str]]) -> pd.DataFrame:
    """`analysis.word_coverage` of every method, seed and λ by itself, with `seed` and `penalty_weight`."""
    tables = []
    for (seed, weight), own in answers[answers["method"] != "sft"].groupby(["seed", "penalty_weight"], sort=False):
        sft = answers[(answers["method"] == "sft") & (answers["seed"] == seed)]
        table = word_coverage(pd.concat([sft, own]), unsafe, harm_words)
        tables.append(table.assign(seed=seed, penalty_weight=weight))
    return pd.concat(tables, ignore_index=True)


def verdict(spreads: pd.DataFrame, words: pd.DataFrame, weights: list[float]) -> list[dict]:
    """Rows as of `beyond.at_most`, in points: the criteria of the notebook.

    Args:
        spreads: as from `spread`, on the test split.
        words: as from `coverage`: what remains of plain SFT's harmful answers with words that D_unsafe does not show.
        weights: every λ, at each of which one-hot is compared with lm_head.
    """
    rows = []
    for method, own in spreads.groupby("method", sort=False):
        rows.append(beyond.below(f"{method}: regret over λ, worst base", own["spread"].max(), 0.03, len(own)))
    left, n = words.set_index(["method", "penalty_weight", "seed"])["left_uncovered"], int(words["sft_uncovered"].min())
    for weight in weights:
        pair = [left[name, weight].sort_index().tolist() for name in ("target_one_hot", "target_lm_head")]
        mean, low, high = difference(*pair, n)
        verdict = "holds" if low >= 0.05 else "fails" if high < 0.05 else "open"
        numbers = {"measured": 100 * mean, "low": 100 * low, "high": 100 * high, "limit": 5.0, "n": n}
        criterion = f"uncovered words, λ = {weight:g}: one-hot above lm_head"
        rows.append({"criterion": criterion} | numbers | {"verdict": verdict})
    return rows
