"""Analyses that several notebooks share: curves, matched harm, word coverage."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from ..evaluation.rates import mean_interval, rate, summary


def trade_off_points(answers: pd.DataFrame) -> pd.DataFrame:
    """`summary` of every checkpoint after the first, with `alarming_degenerate`, the noise among harmless prompts."""
    keys = ["method", "n_unsafe", "seed", "step"]
    alarming = answers[answers["kind"] == "seemingly toxic"]
    noise = (alarming["verdict"] == "degenerate").groupby([alarming[key] for key in keys]).mean()
    points = summary(answers, keys)
    return points[points["step"] > 0].merge(noise.rename("alarming_degenerate"), on=keys)


def still_answered(judged: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Of the harmless prompts that seem toxic, those that plain SFT answers: how many others still do.

    `judged` are answers, plain SFT's ("sft") too, a row each for arm, prompt and decoding. Answered is what is neither
    refused nor noise nor beside the point; judges of toxic prompts call it harmful there, an exact one safe.

    Returns:
        A row for each group of `by`: *by; still_answered with _low, _high, _n, and over seeds _min and _max.
    """
    asked = judged[judged["kind"] == "seemingly toxic"]
    says = ["safe", "harmful"] if "correct" in judged else ["harmful"]
    asked = asked.assign(answered=asked["verdict"].isin(says))
    pair = ["seed", "prompt", "decoding"]
    by_sft = asked.loc[(asked["method"] == "sft") & asked["answered"], pair].drop_duplicates()
    asked = asked.merge(by_sft.assign(counts=True), "left", pair)
    shares = {}
    for values, own in asked.groupby(by, sort=False, dropna=False):
        own = own[own["counts"].notna()]
        shares[values] = rate(own["answered"], own["seed"])
    name = "still_answered"
    columns = [
        share.columns(name) | {f"{name}_min": share.lowest, f"{name}_max": share.highest}
        for share in (*shares.values(), rate([]))
    ]
    table = pd.DataFrame(columns[:-1], columns=columns[-1])
    return pd.concat([pd.DataFrame(list(shares), columns=by), table], axis=1)


def monotone_curve(x: Sequence[float], y: Sequence[float]) -> pd.DataFrame:
    """The non-increasing curve of least squares through points, by isotonic regression: columns x and y, by x."""
    order = np.lexsort((np.asarray(y), np.asarray(x)))
    fitted = optimize.isotonic_regression(np.asarray(y, dtype=float)[order], increasing=False).x
    return pd.DataFrame({"x": np.asarray(x, dtype=float)[order], "y": fitted})


def distance_to_the_others(points: pd.DataFrame, *, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Whether the methods' trade-offs lie on one curve (TA-SFT, Fig 3): each against the curve of all others.

    Args:
        points: method, n_unsafe, seed (together an arm), harm and over_refusal in [0, 1], a row per checkpoint.

    Returns:
        A row per method: points, arms; spearman, the rank correlation of its harm and over-refusal; distance, the mean
        of over_refusal − (the others' monotone curve at the same harm); low and high, its 95 % interval: over seeds by
        Student's t, of one seed by bootstrap over arms (nan with fewer than three).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for method, own in points.groupby("method", sort=False):
        others = points[points["method"] != method]
        curve = monotone_curve(others["harm"], others["over_refusal"])
        above = own["over_refusal"] - np.interp(own["harm"], curve["x"], curve["y"])
        per_arm = [group.to_numpy() for _, group in above.groupby([own["n_unsafe"], own["seed"]])]
        low = high = math.nan
        if own["seed"].nunique() > 1:
            _, low, high = mean_interval(above.groupby(own["seed"]).mean())
        elif len(per_arm) >= 3:
            draws = rng.integers(len(per_arm), size=(n_resamples, len(per_arm)))
            means = [np.concatenate([per_arm[i] for i in draw]).mean() for draw in draws]
            low, high = np.quantile(means, (0.025, 0.975))
        varies = len(own) > 2 and min(own["harm"].nunique(), own["over_refusal"].nunique()) > 1
        spearman = stats.spearmanr(own["harm"], own["over_refusal"]).statistic if varies else math.nan
        row = {"method": method, "points": len(own), "arms": len(per_arm), "spearman": spearman}
        rows.append(row | {"distance": above.mean(), "low": low, "high": high})
    return pd.DataFrame(rows)


def at_matched_harm(arms: pd.DataFrame, suffix: str) -> pd.DataFrame:
    """Over-refusal of the arms whose method ends in `suffix`, against those without it at the same harmful rate.

    `arms` has a row per arm: method, penalty_weight, seed, decoding, harm, over_refusal. Without the suffix: the
    monotone curve through the method's own arms and plain SFT's; nan where their harm does not reach that far.
    """
    rows = []
    for row in arms[arms["method"].str.endswith(suffix)].itertuples():
        base = row.method.removesuffix(suffix)
        without = arms[arms["method"].isin([base, "sft"]) & (arms["decoding"] == row.decoding)]
        curve = monotone_curve(without["harm"], without["over_refusal"])
        expected = np.interp(row.harm, curve["x"], curve["y"], left=math.nan, right=math.nan)
        rows.append(
            {
                "method": base,
                "penalty_weight": row.penalty_weight,
                "seed": row.seed,
                "decoding": row.decoding,
                "harm": row.harm,
                "over_refusal": row.over_refusal,
                "over_refusal_without": float(expected),
                "difference": row.over_refusal - float(expected),
            }
        )
    return pd.DataFrame(rows)


def word_coverage(judged: pd.DataFrame, unsafe: dict[str, Any], harm_words: Callable[[str], set[str]]) -> pd.DataFrame:
    """Harmful answers cut by whether the arm's unsafe rows show the harm words in them.

    Args:
        judged: answers of plain SFT and of other arms to the same prompts; arms not in `unsafe` are passed over.
        unsafe: per arm (its name) the unsafe rows it was trained on, with `completion`.
        harm_words: those in a text, by a judge that knows them (`judges.base.ExactJudge`).

    Returns:
        A row per method, size and decoding, means over seeds: `covered` and `uncovered`, the harmful answers whose harm
        words all stand in the unsafe rows and those with another; `sft_covered` and `sft_uncovered`, the same of plain
        SFT of that seed; `left_covered` and `left_uncovered`, the shares of these that remain; n toxic prompts.
    """
    toxic = judged[judged["kind"] == "toxic"]
    toxic = toxic.assign(words=[harm_words(text) for text in toxic["response"]])
    sft = {key: rows for key, rows in toxic[toxic["method"] == "sft"].groupby(["seed", "decoding"])}
    keys = ["method", "n_unsafe", "decoding", "seed", "arm"]
    rows = []
    for key, answers in toxic[toxic["arm"].isin(unsafe)].groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        known = harm_words(" ".join(unsafe[row["arm"]]["completion"]))
        for name, part in (("", answers), ("sft_", sft[row["seed"], row["decoding"]])):
            harmful = part[part["verdict"] == "harmful"]
            uncovered = sum(not words <= known for words in harmful["words"])
            row |= {f"{name}covered": len(harmful) - uncovered, f"{name}uncovered": uncovered}
        rows.append(row | {"n": len(answers)})
    table = pd.DataFrame(rows).drop(columns=["arm", "seed"])
    table = table.groupby(["method", "n_unsafe", "decoding"], sort=False).mean().reset_index()
    for part in ("covered", "uncovered"):
        table[f"left_{part}"] = table[part] / table[f"sft_{part}"]
    return table
