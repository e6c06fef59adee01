"""Metrics: what an interval, a table and a paired test must say whatever the data."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tasft_lib.evaluation.rates import (
    counts,
    difference,
    effective_n,
    mcnemar,
    minimum_detectable_difference,
    of_counts,
    paired_bootstrap,
    rate,
    rates_table,
    wilson_interval,
)
from tasft_lib.experiments.analysis import at_matched_harm, distance_to_the_others, monotone_curve, still_answered
from tasft_lib.judges.base import VERDICTS


def test_wilson_of_none_in_forty_reaches_nearly_nine_percent():
    low, high = wilson_interval(0, 40)
    assert low == 0
    assert high == pytest.approx(0.0876, abs=5e-5)


def test_wilson_contains_the_rate_narrows_with_n_and_mirrors():
    for count, n in [(0, 7), (3, 10), (10, 10), (55, 200)]:
        low, high = wilson_interval(count, n)
        assert 0 <= low <= count / n <= high <= 1
        assert (1 - high, 1 - low) == pytest.approx(wilson_interval(n - count, n))
        narrower = wilson_interval(10 * count, 10 * n)
        assert narrower[1] - narrower[0] < high - low


def test_a_rate_is_the_mean_over_seeds_and_its_interval_that_of_one_seed_or_wider_where_seeds_differ():
    flags, seeds = [True, False, False, False, True, True, False, False], [0] * 4 + [1] * 4
    over = rate(flags, seeds)
    assert (over.rate, over.n, over.lowest, over.highest) == (0.375, 4, 0.25, 0.5)
    assert over.by_seed == (0.25, 0.5) and 0 <= over.low < wilson_interval(1.5, 4)[0]
    assert over.high > wilson_interval(1.5, 4)[1]
    alike = rate(flags[:4] * 2, seeds)
    assert (alike.low, alike.high) == pytest.approx(wilson_interval(1, 4))
    assert rate(flags)[:4] == (3 / 8, *wilson_interval(3, 8), 8)
    assert rate([]).n == 0 and math.isnan(rate([]).rate) and math.isnan(rate([], []).high)
    assert list(over.columns("harm")) == ["harm", "harm_low", "harm_high", "harm_n"]


@pytest.mark.parametrize("a, b", [(4, 4), (5, 15), (1, 12)])
def test_three_base_models_that_differ_are_covered(a, b):
    """Rates of base models are Beta(a, b), answers to 400 prompts binomial."""
    draws = np.random.default_rng(0)
    by_base = draws.binomial(400, draws.beta(a, b, (600, 3))) / 400
    means, enough = by_base.mean(1), [effective_n(rates, 400) for rates in by_base]
    ends = np.array([wilson_interval(mean * n, n) for mean, n in zip(means, enough, strict=True)])
    covered = (ends[:, 0] <= a / (a + b)) & (a / (a + b) <= ends[:, 1])
    assert 0.92 < covered.mean() < 0.985
    narrow = np.array([wilson_interval(mean * 400, 400) for mean in means])
    assert ((narrow[:, 0] <= a / (a + b)) & (a / (a + b) <= narrow[:, 1])).mean() < 0.6, "of prompts alone"


def test_a_difference_is_of_the_same_base_models_and_covered_where_the_effect_differs_among_them():
    draws = np.random.default_rng(0)
    base, effect = draws.beta(8, 4, (600, 3)), 0.4 * draws.beta(4, 4, (600, 3))
    first, second = (draws.binomial(400, np.clip(p, 0, 1)) / 400 for p in (base, base - effect))
    true = (base - np.clip(base - effect, 0, 1)).mean()
    ends = np.array([difference(*rates, 400) for rates in zip(first, second, strict=True)])
    assert 0.92 < ((ends[:, 1] <= true) & (true <= ends[:, 2])).mean() < 0.999
    # Base models far apart, the same effect on each: sure of the same base models, and of no others.
    assert (
        difference([0.2, 0.5, 0.8], [0.1, 0.4, 0.7], 1000)[1]
        > 0
        > difference([0.2, 0.5, 0.8], [0.7, 0.1, 0.4], 1000)[1]
    )
    assert difference([0.5], [0.5], 100)[1:] == pytest.approx((-0.1372, 0.1372), abs=1e-3)
    assert difference([0.0], [0.0], 20)[1] < 0 < difference([0.0], [0.0], 20)[2], "no rate is known for certain"
    with pytest.raises(ValueError, match="one pair"):
        difference([0.1, 0.2], [0.1], 9)


def test_wilson_of_nothing_is_nan_and_of_nonsense_an_error():
    assert all(map(math.isnan, wilson_interval(0, 0)))
    for count, n in [(5, 4), (-1, 4), (1, 0)]:
        with pytest.raises(ValueError, match="between 0 and n"):
            wilson_interval(count, n)


def frame(**verdicts_by_arm):
    rows = [
        (arm, verdict, 5.0 if verdict == "harmful" else 0.0)
        for arm, verdicts in verdicts_by_arm.items()
        for verdict in verdicts
    ]
    table = pd.DataFrame(rows, columns=["arm", "verdict", "score"])
    table.loc[table["verdict"] == "unscored", "score"] = math.nan
    return table


def test_rates_table_counts_every_label():
    verdicts = ["harmful"] * 3 + ["refusal"] * 2 + ["safe"] * 4 + ["degenerate"] + ["unscored"] * 5
    table = rates_table(frame(sft=verdicts), ["arm"])
    assert list(table.columns) == (
        ["arm", "n", "harmful", "rate", "low", "high", "degenerate", "refusal", "safe", "unscored", "score"]
    )
    row = table.iloc[0]
    assert (row["n"], row["harmful"], row["unscored"]) == (10, 3, 5)
    assert (row["rate"], row["refusal"], row["safe"], row["degenerate"]) == pytest.approx((0.3, 0.2, 0.4, 0.1))
    assert (row["low"], row["high"]) == wilson_interval(3, 10)
    assert row["score"] == pytest.approx(1.5)


def test_unscored_is_never_counted_as_safe():
    scored = ["harmful", "safe", "refusal", "degenerate"]
    without = rates_table(frame(sft=scored), ["arm"]).drop(columns="unscored")
    with_unscored = rates_table(frame(sft=scored + ["unscored"] * 96), ["arm"])
    assert with_unscored["unscored"].item() == 96
    pd.testing.assert_frame_equal(with_unscored.drop(columns="unscored"), without)


def test_a_group_without_scores_has_no_rate():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = rates_table(frame(sft=["safe"], judge_gone=["unscored"] * 3), ["arm"]).set_index("arm")
    gone = table.loc["judge_gone"]
    assert (gone["n"], gone["harmful"], gone["unscored"]) == (0, 0, 3)
    assert gone[["rate", "low", "high", "degenerate", "refusal", "safe", "score"]].isna().all()
    assert table.loc["sft", "rate"] == 0


def test_counts_alone_give_the_rates_of_the_table():
    draws = np.random.default_rng(0)
    verdicts = {arm: draws.choice(VERDICTS, 40).tolist() for arm in "ab"} | {"gone": ["unscored"] * 3}
    judged = frame(**verdicts, none_harmful=["safe"] * 7, all_harmful=["harmful"] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = of_counts(counts(judged, ["arm"])).set_index("arm")
    expected = rates_table(judged, ["arm"]).set_index("arm")
    pd.testing.assert_frame_equal(table.loc[expected.index], expected, check_dtype=False)


def test_groups_of_several_columns_add_up_and_keep_missing_keys():
    rng = np.random.default_rng(0)
    judgements = pd.DataFrame(
        {
            "arm": rng.choice(["sft", "emd", None], 300),
            "step": rng.choice([8, 16], 300),
            "verdict": rng.choice(["harmful", "safe", "unscored"], 300),
            "score": 1.0,
        }
    )
    table = rates_table(judgements, ["arm", "step"])
    assert len(table) == 6
    assert table["n"].sum() + table["unscored"].sum() == 300
    assert table["harmful"].sum() == (judgements["verdict"] == "harmful").sum()
    whole = rates_table(judgements, [])
    assert len(whole) == 1 and whole["n"].item() == table["n"].sum()


def test_an_empty_table_keeps_its_columns():
    table = rates_table(frame(), ["arm"])
    assert len(table) == 0 and "rate" in table.columns


def test_unknown_label_and_missing_column_are_named():
    with pytest.raises(ValueError, match="row 2: verdict 'Safe'"):
        rates_table(frame(sft=["safe", "Safe"]), ["arm"])
    with pytest.raises(ValueError, match="row 1: verdict None"):
        rates_table(pd.DataFrame({"verdict": [None], "score": [0.0]}), [])
    with pytest.raises(ValueError, match="'step', 'score'"):
        rates_table(frame(sft=["safe"]).drop(columns="score"), ["arm", "step"])


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random(60) < 0.6, rng.random(60) < 0.35
    only_first, only_second, p = mcnemar(first, second)
    assert only_first == sum(a and not b for a, b in zip(first, second, strict=True))
    assert only_second == sum(b and not a for a, b in zip(first, second, strict=True))
    assert p == pytest.approx(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)
    assert mcnemar(second.tolist(), first.tolist()) == (only_second, only_first, pytest.approx(p))


def test_mcnemar_of_equal_methods_is_one():
    assert mcnemar([True, False, True], [True, False, True]) == (0, 0, 1.0)
    assert mcnemar([], []) == (0, 0, 1.0)


@pytest.mark.parametrize("unscored", [None, math.nan])
def test_mcnemar_refuses_unscored_and_unpaired(unscored):
    with pytest.raises(ValueError, match="unscored"):
        mcnemar([True, unscored], [True, False])
    with pytest.raises(ValueError, match="2 values against 1"):
        mcnemar([True, False], [True])


def test_bootstrap_brackets_the_mean_difference_and_repeats_by_seed():
    rng = np.random.default_rng(0)
    first = rng.random(150)
    second = first - 0.1 + 0.05 * rng.standard_normal(150)
    mean, low, high = paired_bootstrap(first, second, n_resamples=2000)
    assert low < mean < high
    assert mean == pytest.approx((first - second).mean())
    # Pairing: the interval is that of the differences, far narrower than that of two independent samples.
    half_width = stats.sem(first - second) * 1.96
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.15)
    assert paired_bootstrap(first, second, n_resamples=2000) == (mean, low, high)
    assert paired_bootstrap(first, second, n_resamples=2000, seed=1) != (mean, low, high)
    flipped = paired_bootstrap(second, first, n_resamples=2000)
    assert flipped == pytest.approx((-mean, -high, -low))


def test_bootstrap_of_equal_differences_is_a_point_not_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_bootstrap([0, 0, 0], [0, 0, 0], n_resamples=99) == (0, 0, 0)
        assert paired_bootstrap([True, True], [False, False], n_resamples=99) == (1, 1, 1)


def test_bootstrap_refuses_what_it_cannot_pair():
    with pytest.raises(ValueError, match="3 values against 2"):
        paired_bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least two"):
        paired_bootstrap([1], [1])
    with pytest.raises(ValueError, match="nan"):
        paired_bootstrap([1, math.nan], [1, 2])


@pytest.mark.parametrize(("n", "baseline"), [(200, 0.05), (200, 0.7), (40, 0.5)])
def test_minimum_detectable_difference_is_found_four_times_in_five(n, baseline):
    difference = minimum_detectable_difference(n, baseline)
    other = baseline + difference if baseline < 0.5 else baseline - difference
    rng = np.random.default_rng(0)
    a, b = rng.binomial(n, baseline, 20_000) / n, rng.binomial(n, other, 20_000) / n
    pooled = (a + b) / 2
    z = np.abs(a - b) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.04)


def test_minimum_detectable_difference_shrinks_with_n_and_grows_with_power():
    sizes = [minimum_detectable_difference(n, 0.1) for n in (40, 100, 400, 1600)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    assert minimum_detectable_difference(100, 0.1, power=0.95) > sizes[1]
    assert minimum_detectable_difference(100, 0.1, alpha=0.01) > sizes[1]
    assert math.isnan(minimum_detectable_difference(3, 0.5))
    assert 0 < minimum_detectable_difference(40, 0.0) < 0.2
    assert minimum_detectable_difference(40, 1.0) == pytest.approx(minimum_detectable_difference(40, 0.0), rel=1e-6)
    with pytest.raises(ValueError, match="n >= 1"):
        minimum_detectable_difference(0, 0.1)


def trade_off(method: str, shift: float = 0.0, arms: int = 4, seed: int = 0) -> pd.DataFrame:
    """Checkpoints of `arms` arms around one falling curve, `shift` above it."""
    rng = np.random.default_rng([seed, len(method)])
    rows = [
        {"method": method, "n_unsafe": 9, "seed": arm, "harm": harm, "over_refusal": 0.6 * (1 - harm) ** 2 + shift}
        for arm in range(arms)
        for harm in rng.uniform(0, 1, 12)
    ]
    table = pd.DataFrame(rows)
    return table.assign(over_refusal=table["over_refusal"] + rng.normal(0, 0.01, len(table)))


def test_a_monotone_curve_never_rises_and_no_other_such_curve_fits_better():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=30), rng.uniform(size=30)
    curve = monotone_curve(x, y)
    assert curve["x"].is_monotonic_increasing and (np.diff(curve["y"]) <= 1e-12).all()
    targets = y[np.argsort(x)]
    best = ((curve["y"] - targets) ** 2).sum()
    for _ in range(200):
        other = np.sort(curve["y"] + rng.normal(0, 0.05, 30))[::-1]
        assert ((other - targets) ** 2).sum() >= best - 1e-12
    falling = monotone_curve([3, 1, 2], [0.1, 0.9, 0.5])
    assert falling["y"].tolist() == [0.9, 0.5, 0.1]


def test_methods_on_one_curve_are_found_there_and_a_planted_shift_is_found():
    together = pd.concat([trade_off(name) for name in ("a", "bb", "ccc")])
    table = distance_to_the_others(together)
    assert (table["distance"].abs() < 0.02).all() and (table["spearman"] < -0.95).all()
    apart = distance_to_the_others(pd.concat([trade_off("a", shift=0.2), trade_off("bb"), trade_off("ccc")]))
    row = apart.set_index("method").loc["a"]
    assert row["low"] <= row["distance"] <= row["high"] and row["distance"] == pytest.approx(0.2, abs=0.02)
    assert row["low"] > 0.15 and row["arms"] == 4
    one_seed = pd.concat([trade_off("a", shift=0.2), trade_off("bb")])
    one_seed = one_seed.assign(n_unsafe=one_seed["seed"], seed=0)
    table = distance_to_the_others(one_seed)
    assert (table["low"] <= table["distance"]).all() and (table["high"] - table["low"] > 0).all()
    few = distance_to_the_others(one_seed[one_seed["n_unsafe"] < 2])
    assert few["low"].isna().all(), "two arms of one seed have no interval"


def test_still_answered_is_a_share_of_what_plain_sft_answers():
    says = {"sft": ["harmful", "harmful", "refusal", "harmful"], "emd": ["harmful", "safe", "harmful", "harmful"]}
    tables = [
        pd.DataFrame(
            {"kind": "seemingly toxic", "prompt": list("abcd"), "verdict": verdicts, "method": m, "seed": 0}
        ).assign(decoding="greedy")
        for m, verdicts in says.items()
    ]
    judged = pd.concat(tables)
    measured = still_answered(judged, ["method"]).set_index("method")
    assert measured["still_answered"].tolist() == pytest.approx([1, 2 / 3]) and set(measured["still_answered_n"]) == {3}
    exact = still_answered(judged.assign(correct=None), ["method"])
    assert exact["still_answered"].tolist() == [1, 1], "an exact judge calls an answer there safe"
    # Another seed's plain SFT answers nothing, so nothing can be lost of it; a second strength is a row of its own.
    silent = tables[0].assign(seed=1, verdict="refusal", factor=math.nan)
    strong = tables[1].assign(factor=2.0, verdict="refusal")
    rows = still_answered(pd.concat([silent, tables[0].assign(factor=math.nan), strong]), ["method", "factor"])
    assert rows["still_answered"].tolist() == [1, 0] and rows["still_answered_n"].tolist() == [3, 3]
    sampled = still_answered(pd.concat([judged, tables[1].assign(decoding="sampled")]), ["method", "decoding"])
    assert sampled["still_answered_n"].tolist() == [3, 3, 0], "no sampled answer of plain SFT, nothing to keep"
    none = still_answered(judged[judged["verdict"] == "none"], ["method"])
    assert none.empty and "still_answered_low" in none


def test_matched_harm_compares_on_the_curve_and_not_at_the_same_weight():
    rows = [("emd", w, harm, 0.5 * (1 - harm)) for w, harm in ((1.0, 0.6), (2.0, 0.2), (4.0, 0.0))]
    rows += [("sft", math.nan, 1.0, 0.0)]
    rows += [("emd_contrastive", 2.0, 0.6, 0.2), ("emd_contrastive", 4.0, 0.4, 0.1)]
    table = pd.DataFrame(rows, columns=["method", "penalty_weight", "harm", "over_refusal"])
    matched = at_matched_harm(table.assign(seed=0, decoding="sampled"), "_contrastive")
    assert matched["over_refusal_without"].tolist() == pytest.approx([0.2, 0.3])
    assert matched["difference"].tolist() == pytest.approx([0.0, -0.2])
    table.loc[table["method"] == "emd_contrastive", "harm"] = [1.5, 0.1]
    matched = at_matched_harm(table.assign(seed=0, decoding="sampled"), "_contrastive")
    assert math.isnan(matched["difference"].iloc[0]) and not math.isnan(matched["difference"].iloc[1])
