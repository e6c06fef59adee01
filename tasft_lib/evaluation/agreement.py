"""How far judges agree on the same responses, and what a judge's errors do to a rate."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..judges.base import VERDICTS


def agreement_table(verdicts: pd.DataFrame, *, n_resamples: int = 9999, seed: int = 0) -> pd.DataFrame:
    """Every pair of judges, a row each: how often they agree that a response is harmful (or that it is not).

    Cohen's kappa (1960), (agreement − chance) / (1 − chance), with a percentile bootstrap interval over responses. A
    response that either judge left unscored is not compared. The judges of this library share `find_degenerate`, so
    degenerate responses raise every agreement; leave them out to compare the judges themselves.

    Args:
        verdicts: a column per judge, a row per response, the same responses for all; values of `judges.base.VERDICTS`.

    Returns:
        Columns: first, second (judges); n (responses compared); unscored (those left out); agreement in [0, 1]; kappa
        in [-1, 1] with its 95 % interval low, high; both, only_first, only_second, neither (counts of "harmful").
        Kappa is nan where both judges give all responses one and the same verdict, because chance explains that too.

    Raises:
        ValueError: fewer than two judges, or a verdict that is not in `judges.base.VERDICTS`.
    """
    if verdicts.shape[1] < 2:
        raise ValueError(f"agreement needs two judges or more, got {verdicts.shape[1]}")
    for name, column in verdicts.items():
        unknown = ~column.isin(VERDICTS)
        if unknown.any():
            row = int(unknown.to_numpy().argmax())
            raise ValueError(
                f"judge {name}, row {row + 1}: verdict {column.iloc[row]!r} is not one of {', '.join(VERDICTS)}"
            )
    rng = np.random.default_rng(seed)
    rows = []
    for first, second in itertools.combinations(range(verdicts.shape[1]), 2):
        pair = verdicts.iloc[:, [first, second]]
        scored = pair[(pair != "unscored").all(axis=1)]
        a, b = (scored.iloc[:, side].to_numpy() == "harmful" for side in (0, 1))
        counts = np.array([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()])
        n = len(scored)
        low = high = math.nan
        if n:
            # Resampling responses with replacement is the same as drawing the four counts.
            resampled = kappa(rng.multinomial(n, counts / n, size=n_resamples))
            if not np.isnan(resampled).all():
                low, high = np.nanquantile(resampled, (0.025, 0.975))
        row = {"first": verdicts.columns[first], "second": verdicts.columns[second], "n": n, "unscored": len(pair) - n}
        row |= {"agreement": (counts[0] + counts[3]) / n if n else math.nan, "kappa": float(kappa(counts))}
        row |= {"low": float(low), "high": float(high)}
        rows.append(row | dict(zip(("both", "only_first", "only_second", "neither"), counts.tolist(), strict=True)))
    return pd.DataFrame(rows)


def sensitivity_and_specificity(judged: Sequence[bool], truth: Sequence[bool]) -> tuple[float, float]:
    """Share of the truly harmful that the judge flags, and of the truly harmless that it does not, each in [0, 1].

    Args:
        judged, truth: one boolean per labelled response, in the same order.

    Raises:
        ValueError: lengths differ, a value is not boolean, or `truth` has only one class.
    """
    judged, truth = boolean_flags(judged), boolean_flags(truth)
    if len(judged) != len(truth):
        raise ValueError(f"{len(judged)} verdicts against {len(truth)} true labels: give one of each per response")
    if truth.all() or not truth.any():
        raise ValueError("the labelled responses are all harmful or all harmless: label some of the other kind too")
    return float(judged[truth].mean()), float((~judged[~truth]).mean())


def corrected_rate(rate: float, sensitivity: float, specificity: float) -> float:
    """The true rate behind the one a judge reports, (rate + specificity − 1) / (sensitivity + specificity − 1).

    Rogan and Gladen (1978), clipped to [0, 1]. Holds where the judge errs on these responses as often as it did on the
    labelled ones, which another model's answers need not grant.

    Raises:
        ValueError: a value outside [0, 1], or a judge no better than chance (sensitivity + specificity <= 1).
    """
    for name, value in (("rate", rate), ("sensitivity", sensitivity), ("specificity", specificity)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie between 0 and 1")
    if sensitivity + specificity <= 1:
        raise ValueError(
            f"sensitivity {sensitivity:g} and specificity {specificity:g}: such a judge is no better than chance, "
            "and no true rate follows from it"
        )
    return min(max((rate + specificity - 1) / (sensitivity + specificity - 1), 0.0), 1.0)


def corrected_interval(
    flagged: float,
    n: int,
    judged: Sequence[bool],
    truth: Sequence[bool],
    *,
    aside: float = 0,
    groups: Sequence | None = None,
    n_resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`corrected_rate` of `flagged` in `n` responses with a 95 % interval that knows how few were labelled.

    Parametric bootstrap of all three parts: the reported rate, sensitivity and specificity. Each is drawn around its
    estimate with a pseudo-success and a pseudo-failure added, as in Lang and Reiczigel (2014); else a judge without an
    error on ten verdicts would count as perfect for certain. Draws no better than chance widen the interval both ways.

    Args:
        flagged, n: what the judge said of the responses in question; a mean over seeds need not be whole.
        judged, truth: the judge's verdicts and the true ones on other responses, as in `sensitivity_and_specificity`.
        aside: of the n, responses that are neither flagged nor truly harmful for certain, such as what is no language.
            None of that kind may be among the labelled ones.
        groups: per label, whose response it was (a model's, an arm's). A judge errs on one more often than on another,
            so the groups are then drawn with replacement too. How far the responses in question deviate from the mean
            of the groups is not in the interval.

    Returns:
        (corrected rate, low, high), each in [0, 1].

    Raises:
        ValueError: as `corrected_rate` and `sensitivity_and_specificity`, or not 0 <= flagged + aside <= n with n > 0.
    """
    if not (flagged >= 0 and aside >= 0 and flagged + aside <= n + 1e-9 and n > 0):
        raise ValueError(f"no rate of {flagged} in {n}: the count must lie between 0 and n, and n above 0")
    sensitivity, specificity = sensitivity_and_specificity(judged, truth)
    asked = max(n - aside, 0)
    estimate = corrected_rate(min(flagged / asked, 1.0), sensitivity, specificity) * asked / n if asked > 1e-9 else 0.0
    judged, truth = boolean_flags(judged), boolean_flags(truth)
    groups = np.zeros(len(truth)) if groups is None else np.asarray(groups)
    rng = np.random.default_rng(seed)

    def drawn(count: np.ndarray | float, out_of: np.ndarray | int) -> np.ndarray:
        return rng.binomial(out_of, (count + 1) / (out_of + 2), size=n_resamples) / np.maximum(out_of, 1)

    # Per group: flagged and all that are harmful, passed and all that are harmless.
    kinds = (judged & truth, truth, ~judged & ~truth, ~truth)
    counts = np.array([[(kind & (groups == group)).sum() for kind in kinds] for group in np.unique(groups)])

    def resampled(column: int) -> np.ndarray:
        """[draws, 2]: the two counts from `column` on, over as many groups as have such labels, with replacement."""
        having = counts[counts[:, column + 1] > 0, column : column + 2]
        return rng.multinomial(len(having), np.full(len(having), 1 / len(having)), size=n_resamples) @ having

    (found, positives), (right, negatives) = resampled(0).T, resampled(2).T
    # Without any aside all are asked about, for certain.
    asked_shares = 1 - drawn(aside, n) if aside else np.ones(n_resamples)
    rates = drawn(flagged, round(asked))
    sensitivities, specificities = drawn(found, positives), drawn(right, negatives)
    power = sensitivities + specificities - 1
    useless = power <= 0
    corrected = asked_shares * np.clip((rates + specificities - 1) / np.where(useless, 1.0, power), 0, 1)
    low = np.quantile(np.where(useless, 0.0, corrected), 0.025)
    high = np.quantile(np.where(useless, 1.0, corrected), 0.975)
    return estimate, min(float(low), estimate), max(float(high), estimate)


def kappa(counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa of counts [..., 4] (both, only first, only second, neither)."""
    both, first, second, neither = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        n = both + first + second + neither
        observed = (both + neither) / n
        chance = ((both + first) * (both + second) + (neither + first) * (neither + second)) / n**2
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def boolean_flags(values: Sequence[bool]) -> np.ndarray:
    """The values as an array of booleans; raises ValueError where one is none, such as nan for what was unscored."""
    flags = np.asarray(values)
    if flags.dtype != bool and len(flags):
        # bool(nan) is True: an unscored response would silently count.
        raise ValueError("flags must be booleans: leave out the responses that were left unscored")
    return flags.astype(bool)
