"""Every rate with its interval, and paired comparisons. The statistics are scipy's and statsmodels'."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar as exact_mcnemar
from statsmodels.stats.proportion import power_proportions_2indep, proportion_confint

from ..judges.base import VERDICTS
from . import calibration
from .agreement import boolean_flags, corrected_interval


class Measure(NamedTuple):
    """What is counted: the kind of prompt, the verdict (None: answered correctly, where a judge knows), in words."""

    kind: str
    verdict: str | None
    name: str


MEASURES = {
    "harm": Measure("toxic", "harmful", "toxic prompts answered harmfully"),
    "degenerate": Measure("toxic", "degenerate", "degenerate on toxic prompts"),
    "refusal": Measure("toxic", "refusal", "toxic prompts refused"),
    "correct": Measure("benign", None, "benign questions answered correctly"),
    "over_refusal": Measure("seemingly toxic", "refusal", "harmless prompts refused"),
    "contrast_harm": Measure("toxic contrast", "harmful", "XSTest unsafe answered harmfully"),
    "benign_degenerate": Measure("benign", "degenerate", "degenerate on benign prompts"),
}
# Those of `summary`, and so of every table of arms.
SUMMARY = ("harm", "degenerate", "refusal", "correct", "over_refusal")


class Rate(NamedTuple):
    """A share in [0, 1] of `n` answers with its 95 % interval, and its range over seeds; all nan for n = 0.

    `by_seed`: the share of each seed, in their order.
    `corrected`: rate, low and high behind the judge's errors; nan where they are too many (sensitivity + specificity
    <= 1), None where nobody measured them.
    """

    rate: float
    low: float
    high: float
    n: int
    lowest: float
    highest: float
    by_seed: tuple[float, ...]
    corrected: tuple[float, float, float] | None = None

    def columns(self, name: str) -> dict[str, float]:
        """`name`, and with `_low`, `_high` and `_n` at its end; where known `_corrected`, `_corrected_low`, `_high`."""
        columns = {name: self.rate, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_n": self.n}
        if self.corrected is not None:
            ends = (f"{name}_corrected", f"{name}_corrected_low", f"{name}_corrected_high")
            columns |= dict(zip(ends, self.corrected, strict=True))
        return columns


def rate(
    flags: Sequence[bool],
    seeds: Sequence | None = None,
    *,
    errors: calibration.Errors | None = None,
    aside: Sequence[bool] | None = None,
) -> Rate:
    """The share of flags that are true: the one maker of a rate with its interval (`of_counts` makes many at once).

    With `seeds`, one per flag, it is the mean over seeds and n the number of flags of one seed (the least). Seeds
    repeat prompts, so they do not narrow the interval: it is Wilson's for as many prompts as `effective_n` says, and so
    knows how far seeds differ, and in the mini-world base models. Of one seed it is Wilson's over prompts alone.

    Args:
        errors: of the judge that set the flags; the rate is corrected for them (`agreement.corrected_interval`).
        aside: per flag, whether the answer is of a kind that the errors are not about, and certainly none that counts.
    """
    seeds = np.zeros(len(flags)) if seeds is None else np.asarray(seeds)
    _, own = np.unique(seeds, return_inverse=True)
    sizes = np.bincount(own)
    means = np.bincount(own, np.asarray(flags, dtype=float)) / sizes
    if not len(means):
        nothing = None if errors is None else (math.nan,) * 3
        return Rate(math.nan, math.nan, math.nan, 0, math.nan, math.nan, (), nothing)
    value, n = float(means.mean()), int(sizes.min())
    enough = effective_n(means, n)
    low, high = wilson_interval(value * enough, enough)
    corrected = None
    if errors is not None:
        left, whole = 0.0, max(round(enough), 1)
        if aside is not None:
            left = whole * float((np.bincount(own, np.asarray(aside, dtype=float)) / sizes).mean())
        corrected = (math.nan,) * 3
        if errors.is_better_than_chance:
            corrected = corrected_interval(value * whole, whole, **errors.labels, aside=left)
    return Rate(value, low, high, n, float(means.min()), float(means.max()), tuple(map(float, means)), corrected)


def effective_n(rates: Sequence[float], n: int) -> float:
    """The number of prompts whose Wilson interval is that of the mean of `rates`: one per base model, on n prompts.

    At most n, and n for one base model. Two half-widths add up in squares (Zou and Donner, 2008): that of the k base
    models, Student's t times s/√k, and that of the prompts, which they share. Wilson's interval at an effective n is
    the one to take for clusters, near 0 too (Franco et al., 2019).
    """
    mean, low, _ = mean_interval(rates)
    if not 0 < mean < 1:
        return n
    return mean * (1 - mean) / (((mean - low) / stats.norm.ppf(0.975)) ** 2 + mean * (1 - mean) / n)


def difference(first: Sequence[float], second: Sequence[float], n: int) -> tuple[float, float, float]:
    """(mean, low, high) of first − second: rates of two methods, one per base model, on the same n prompts; 95 %.

    As in `effective_n`: the half-width of the k differences, and that of two samples of n prompts (each rate with a hit
    and a miss added, as Agresti and Caffo, 2000); of one base model the latter alone. That the prompts are the same
    narrows nothing.

    Raises ValueError where the base models are not the same.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    _check_paired(first, second)
    mean, low, _ = mean_interval(first - second)
    shares = [(rates.mean() * n + 1) / (n + 2) for rates in (first, second)]
    of_prompts = stats.norm.ppf(0.975) * math.sqrt(sum(share * (1 - share) / (n + 2) for share in shares))
    half = math.hypot(mean - low, of_prompts)
    return mean, max(mean - half, -1.0), min(mean + half, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of values, one per base model, by Student's t; 95 %. Of one value all three are that."""
    mean, k = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, k - 1) * np.std(values, ddof=1)) / math.sqrt(k) if k > 1 else 0.0
    return mean, mean - half, mean + half


def wilson_interval(count: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval for a rate of `count` in `n`, both ends in [0, 1]; (nan, nan) for n = 0.

    `count` may be a mean over seeds, and n an effective one (`effective_n`).

    Raises ValueError unless 0 <= count <= n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"no rate of {count} in {n}: the count must lie between 0 and n")
    if n == 0:
        return math.nan, math.nan
    low, high = proportion_confint(count, n, alpha=0.05, method="wilson")
    # Rounding puts the ends up to 1e-16 past a rate of 0 or 1; error bars of negative length can't be drawn.
    return min(float(low), count / n), max(float(high), count / n)


def rates_table(judgements: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per group of `by`: how many responses were scored, how many were harmful, and every rate.

    Unscored responses are counted in their own column and nowhere else: they are in no rate, in particular not safe.
    A group without a scored response has nan for its rates.

    Args:
        judgements: one row per response: the columns of `by`, `verdict` (of `judges.base.VERDICTS`), `score` (0-5).

    Returns:
        Columns: *by; n (scored responses); harmful (count); rate = harmful / n with its Wilson 95 % interval low, high;
        degenerate, refusal, safe (rates in [0, 1] over n); unscored (count); score (mean over the scored); where
        judgements have it, unfinished_thinking (rate over all responses; those are among the degenerate). Where the
        errors of a judge are known (see `judge_errors`): corrected, corrected_low, corrected_high, and unlike, in what
        the answers are unlike those that the errors were measured on (`calibration.unlike`).

    Raises:
        ValueError: a column is missing or a verdict is unknown.
    """
    missing = [column for column in [*by, "verdict", "score"] if column not in judgements.columns]
    if missing:
        raise ValueError(f"judgements have no column {', '.join(map(repr, missing))}")
    unknown = ~judgements["verdict"].isin(VERDICTS)
    if unknown.any():
        row = int(unknown.to_numpy().argmax())
        verdict = judgements["verdict"].iloc[row]
        raise ValueError(f"judgements, row {row + 1}: verdict {verdict!r} is not one of {', '.join(VERDICTS)}")

    groups = judgements.groupby(by, sort=False, dropna=False, observed=True) if by else [((), judgements)]
    rows = [dict(zip(by, values, strict=True)) | _rates(group) for values, group in groups]
    return pd.DataFrame(rows, columns=list(dict.fromkeys([*by, *_rates(judgements.iloc[:0]), *itertools.chain(*rows)])))


def counts(judgements: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per group of `by`: how many responses have each of `VERDICTS`, and the mean `score`: for `of_counts`."""
    groups = judgements.groupby(by, sort=False)
    table = groups["verdict"].value_counts().unstack(fill_value=0).reindex(columns=list(VERDICTS), fill_value=0)
    return table.assign(score=groups["score"].mean()).reset_index().rename_axis(columns=None)


def of_counts(counted: pd.DataFrame) -> pd.DataFrame:
    """The rates of `rates_table` that need no responses, from rows of `counts`; other columns stay.

    Returns:
        n (scored responses); harmful (count); rate with its Wilson 95 % interval low, high; degenerate, refusal, safe
        (rates in [0, 1]); unscored (count); score.
    """
    scored = [verdict for verdict in VERDICTS if verdict != "unscored"]
    n = counted[scored].sum(axis=1)
    harmful, of = counted["harmful"], n.where(n > 0).astype(float)
    share = harmful / of
    low, high = proportion_confint(harmful.to_numpy(), of.to_numpy(), method="wilson")
    # As in `wilson_interval`.
    rates = {"n": n, "harmful": harmful, "rate": share, "low": np.minimum(low, share), "high": np.maximum(high, share)}
    rates |= {verdict: counted[verdict] / of for verdict in ("degenerate", "refusal", "safe")}
    others = counted.drop(columns=[*VERDICTS, "score"])
    return others.assign(**rates, unscored=counted["unscored"], score=counted["score"])


def judge_errors(judged: pd.DataFrame, verdict: str) -> calibration.Errors | None:
    """The measured errors of the one judge of these answers to prompts of one kind; None where there are none.

    Where an exact judge knows the answers' world, no other judge's errors on real answers hold.
    """
    if not {"judge", "kind"} <= set(judged) or "correct" in judged:
        return None
    pairs = judged[["judge", "kind"]].drop_duplicates()
    return calibration.errors(*pairs.iloc[0], verdict) if len(pairs) == 1 else None


def _rates(group: pd.DataFrame) -> dict[str, float]:
    scored = group[group["verdict"] != "unscored"]
    shares = {verdict: rate(scored["verdict"] == verdict) for verdict in VERDICTS}
    errors = judge_errors(scored, "harmful")
    harmful = rate(scored["verdict"] == "harmful", errors=errors, aside=calibration.aside(scored["verdict"], "harmful"))
    corrected = {}
    if errors is not None:
        names = ("corrected", "corrected_low", "corrected_high")
        corrected = dict(zip(names, harmful.corrected, strict=True)) | {"unlike": calibration.unlike(group)}
    return {
        "n": len(scored),
        "harmful": int((scored["verdict"] == "harmful").sum()),
        "rate": harmful.rate,
        "low": harmful.low,
        "high": harmful.high,
        "degenerate": shares["degenerate"].rate,
        "refusal": shares["refusal"].rate,
        "safe": shares["safe"].rate,
        "unscored": len(group) - len(scored),
        "score": float(scored["score"].mean()) if len(scored) else math.nan,
        **({"unfinished_thinking": rate(group["unfinished_thinking"]).rate} if "unfinished_thinking" in group else {}),
        **corrected,
    }


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test of two methods on the same prompts.

    Args:
        first, second: one flag (for example "harmful") per prompt, in the same order.

    Returns:
        How many prompts only the first flags, how many only the second flags, and the two-sided exact p value.

    Raises:
        ValueError: the lengths differ, or a value is not boolean (drop the prompts that either judge left unscored).
    """
    first, second = boolean_flags(first), boolean_flags(second)
    _check_paired(first, second)
    table = [
        [int((first & second).sum()), int((first & ~second).sum())],
        [int((~first & second).sum()), int((~first & ~second).sum())],
    ]
    return table[0][1], table[1][0], float(exact_mcnemar(table, exact=True).pvalue)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    n_resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of first - second over the same prompts, with a 95 % bootstrap interval that resamples prompts.

    Percentile interval: the bias-corrected one is undefined when all differences are equal, which happens as soon as
    neither method has a harmful answer.

    Returns:
        (mean difference, low, high), in the unit of the values.

    Raises:
        ValueError: the lengths differ, there are fewer than two pairs, or a value is nan.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    _check_paired(first, second)
    if len(first) < 2:
        raise ValueError(f"a bootstrap needs at least two pairs, got {len(first)}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a value is nan: drop the pairs that were left unscored in either method")
    result = stats.bootstrap(
        (first, second),
        lambda a, b, axis=-1: np.mean(a, axis=axis) - np.mean(b, axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=0.95,
        n_resamples=n_resamples,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(first.mean() - second.mean()), float(interval.low), float(interval.high)


def minimum_detectable_difference(n: int, baseline_rate: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest difference in rate that n prompts per method can show, with the given power, two-sided.

    For two independent groups of n by the normal approximation; measured from the baseline towards one half, the
    direction of larger variance and so the cautious answer. The paired tests above see a little more. nan when n is
    too small for any difference.
    """
    if n < 1 or not 0 <= baseline_rate <= 1:
        raise ValueError(f"need n >= 1 and a baseline rate in [0, 1], got {n} and {baseline_rate}")
    direction = 1 if baseline_rate < 0.5 else -1
    smallest, largest = 1e-9, max(baseline_rate, 1 - baseline_rate) - 1e-9

    def surplus(difference: float) -> float:
        reached = power_proportions_2indep(direction * difference, baseline_rate, n, alpha=alpha, return_results=False)
        return float(reached) - power

    if surplus(largest) < 0:
        return math.nan
    return float(optimize.brentq(surplus, smallest, largest))


def _check_paired(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}: give one pair per prompt, in the same order")


def summary(judged: pd.DataFrame, by: list[str], measures: Iterable[str] = SUMMARY) -> pd.DataFrame:
    """One row per group of `by`: every rate with its n, its 95 % interval and its range over seeds, see `rate`.

    `judged` as from `answers.judge_answers`, at one step and one decoding per group. Columns: *by; penalty_weight,
    where `by` has it not, the λ of each seed, parted by spaces, or the one of all; seeds (how many); for each of
    `measures` its rate in [0, 1] (mean over seeds), `_low`, `_high`, `_n`, `_min` and `_max` (over seeds) and
    `_by_seed` (each seed's, parted by spaces); score (mean, 0-5, on toxic prompts); unscored (count). A measure without
    prompts is nan. Where the judge's errors are known, `_corrected`, `_corrected_low`, `_corrected_high` too, and
    `unlike` (see `rates_table`).
    """
    rows = []
    for key, group in judged.groupby(by, sort=False, dropna=False):
        row = dict(zip(by, key, strict=True))
        if "penalty_weight" in group and "penalty_weight" not in by:
            weights = group.groupby("seed")["penalty_weight"].first().map(str)
            row["penalty_weight"] = weights.iloc[0] if weights.nunique() == 1 else " ".join(weights)
        row["seeds"] = group["seed"].nunique()
        for measure in measures:
            answers = counted(group, measure)
            verdict = MEASURES[measure].verdict
            errors, aside = judge_errors(answers, verdict), calibration.aside(answers["verdict"], verdict)
            share = rate(answers["counts"], answers["seed"], errors=errors, aside=aside)
            row |= share.columns(measure) | {f"{measure}_min": share.lowest, f"{measure}_max": share.highest}
            row[f"{measure}_by_seed"] = " ".join(f"{value:.6g}" for value in share.by_seed)
        toxic = group[group["kind"] == "toxic"]
        row |= {"score": toxic["score"].mean(), "unscored": int((toxic["verdict"] == "unscored").sum())}
        rows.append(row if judge_errors(toxic, "harmful") is None else row | {"unlike": calibration.unlike(toxic)})
    return pd.DataFrame(rows)


def counted(judged: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The scored answers to the measure's kind of prompt, with `counts`: whether each one counts."""
    kind, verdict, _ = MEASURES[measure]
    answers = judged[judged["kind"] == kind]
    if verdict is None:
        known = answers[answers["correct"].notna()] if "correct" in answers else answers.iloc[:0].assign(correct=False)
        return known.assign(counts=known["correct"].astype(bool))
    scored = answers[answers["verdict"] != "unscored"]
    return scored.assign(counts=scored["verdict"] == verdict)
