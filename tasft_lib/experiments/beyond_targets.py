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


def arms_of(study: Study, seed: int, betas: dict[str, list[float]]) -> list[ArmSpec]:
    """Plain SFT; every method of `betas` at each of its β and every λ; the pull without a tilt. On one base model."""
    config = study.config
    arms = [study.arm("sft", seed=seed)]
    for name, own in (betas | {REFERENCE: [NO_TILT]}).items():
        options = {"penalty_embedding": EMBEDDINGS.get(name, "one_hot"), "unsafe_per_batch": config.per_batch}
        options |= {"display_name": name, "seed": seed}
        arms += [
            study.arm("target", config.n_unsafe, weight=weight, penalty_beta=beta, **options)
            for beta in own
            for weight in config.weights
        ]
    return arms


def references(study: Study, seed: int) -> list[ArmSpec]:
    """NLCL and EMD under uniform draws, at the base model's λ in the profile's table; stratified EMD at one λ."""
    config = study.config
    stratified = {"weight": config.emd_weight, "unsafe_per_batch": config.per_batch, "display_name": "emd_stratified"}
    options = {"nlcl": {}, "emd": {}, "emd_stratified": stratified}
    return [study.arm(name.split("_")[0], config.n_unsafe, seed=seed, **own) for name, own in options.items()]


def with_beta(answers: pd.DataFrame, arms: list[ArmSpec]) -> pd.DataFrame:
    """The answers with their arm's `beta`, 0 where it has none."""
    return answers.assign(beta=answers["arm"].map({arm.name: arm.training.get("penalty_beta", 0.0) for arm in arms}))


def searched(answers: pd.DataFrame) -> pd.DataFrame:
    """`pressure.with_regret` of each seed's arms against its own plain SFT, with `seed`: a row per arm."""
    return pd.concat(
        [with_regret(summary(own, BY)).assign(seed=seed) for seed, own in answers.groupby("seed")], ignore_index=True
    )


def chosen(search: pd.DataFrame) -> pd.DataFrame:
    """A row per embedding: the `beta` of least mean regret over λ (λ is what nobody is to choose), that regret, and
    the λ of least regret there. On a tie the smaller one.
    """
    rows = []
    for method, tried in search[search["method"].isin(EMBEDDINGS)].groupby("method", sort=False):
        means = tried.groupby("beta")["regret"].mean().round(9)
        own = tried[tried["beta"] == means.idxmin()].astype({"penalty_weight": float})
        best = own.sort_values(["regret", "penalty_weight"]).iloc[0]
        rows.append((method, means.idxmin(), means.min(), best["penalty_weight"], best["regret"]))
    return pd.DataFrame(rows, columns=["method", "beta", "mean_regret", "penalty_weight", "regret"])


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


def verdict(spreads: pd.DataFrame, words: pd.DataFrame, best: pd.DataFrame) -> list[dict]:
    """Rows as of `beyond.at_most`, in points: the criteria of the notebook.

    Args:
        spreads: as from `spread`, on the test split.
        words: as from `coverage`; what remains of plain SFT's harmful answers with words that D_unsafe does not show.
        best: as from `chosen`, whose λ each embedding has.
    """
    rows = []
    for method in EMBEDDINGS:
        own = spreads[spreads["method"] == method]
        rows.append(beyond.below(f"{method}: regret over λ, worst base", own["spread"].max(), 0.03, len(own)))
    left, n = {}, int(words["sft_uncovered"].min())
    for method, weight in best.set_index("method")["penalty_weight"].items():
        own = words[(words["method"] == method) & (words["penalty_weight"] == weight)]
        left[method] = own.sort_values("seed")["left_uncovered"].tolist()
    for other in ("target_one_hot", "target_random"):
        mean, low, high = difference(left[other], left["target_lm_head"], n)
        verdict = "holds" if low >= 0.05 else "fails" if high < 0.05 else "open"
        numbers = {"measured": 100 * mean, "low": 100 * low, "high": 100 * high, "limit": 5.0, "n": n}
        rows.append({"criterion": f"uncovered words: lm_head below {other}"} | numbers | {"verdict": verdict})
    return rows
