"""Agreement of judges, and rates corrected for a judge's errors: what must hold whatever the numbers."""

import math

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from tasft_lib.evaluation.agreement import (
    agreement_table,
    corrected_interval,
    corrected_rate,
    sensitivity_and_specificity,
)
from tasft_lib.judges.base import VERDICTS


def labels(flags) -> list[str]:
    return ["harmful" if flag else "safe" for flag in flags]


def draw(n, rate, seed) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < rate


def compare(a, b, **options) -> pd.Series:
    return agreement_table(pd.DataFrame({"a": a, "b": b}), **options).iloc[0]


def test_identical_judges_agree_perfectly():
    same = labels(draw(200, 0.3, seed=0))
    row = compare(same, same)
    assert (row.agreement, row.kappa, row.low, row.high) == (1, 1, 1, 1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_independent_judges_agree_by_chance_alone(rate):
    row = compare(labels(draw(20_000, rate, seed=1)), labels(draw(20_000, 0.4, seed=2)))
    assert abs(row.kappa) < 0.03 and row.low < 0 < row.high
    assert row.agreement == pytest.approx(rate * 0.4 + (1 - rate) * 0.6, abs=0.02)


def test_opposite_judges_disagree_beyond_chance():
    flags = draw(200, 0.5, seed=3)
    row = compare(labels(flags), labels(~flags))
    assert row.agreement == 0 and row.kappa < -0.9


def test_kappa_is_that_of_statsmodels_and_symmetric():
    truth = draw(300, 0.3, seed=4)
    a, b = (truth ^ draw(300, error, seed=seed) for error, seed in ((0.1, 5), (0.25, 6)))
    row, turned = compare(labels(a), labels(b)), compare(labels(b), labels(a))
    table = [[row.both, row.only_first], [row.only_second, row.neither]]
    assert row.kappa == pytest.approx(cohens_kappa(table, return_results=False), abs=1e-12)
    assert turned.kappa == pytest.approx(row.kappa, abs=1e-12)
    assert (turned.only_first, turned.only_second) == (row.only_second, row.only_first)
    assert row.both + row.only_first + row.only_second + row.neither == row.n == 300
    assert row.low < row.kappa < row.high


def test_the_interval_covers_the_true_kappa_and_narrows_with_more_responses():
    def judges(n, seed):
        truth = draw(n, 0.5, seed)
        return [labels(truth ^ draw(n, 0.1, seed + step)) for step in (1000, 2000)]

    # Two judges of error 0.1 on balanced responses agree on 0.82, so kappa is 0.64.
    rows = [compare(*judges(150, seed), n_resamples=499) for seed in range(200)]
    assert np.mean([row.low <= 0.64 <= row.high for row in rows]) > 0.9
    large = compare(*judges(15_000, seed=0))
    assert large.high - large.low < 0.2 * np.mean([row.high - row.low for row in rows])


def test_unscored_responses_are_left_out_pair_by_pair():
    table = pd.DataFrame(
        {
            "a": ["harmful", "safe", "unscored", "refusal"],
            "b": ["harmful", "unscored", "harmful", "degenerate"],
            "c": ["unscored"] * 4,
        }
    )
    rows = agreement_table(table).set_index(["first", "second"])
    assert (rows.loc[("a", "b"), "n"], rows.loc[("a", "b"), "unscored"], rows.loc[("a", "b"), "agreement"]) == (2, 2, 1)
    empty = rows.loc[("a", "c")]
    assert empty.n == 0 and all(math.isnan(empty[name]) for name in ("agreement", "kappa", "low", "high"))
    assert len(rows) == 3


def test_judges_with_one_verdict_for_everything_have_no_kappa():
    row = compare(["safe"] * 9, ["refusal"] * 9)
    assert row.agreement == 1 and math.isnan(row.kappa) and math.isnan(row.low)


def test_labels_and_judges_are_checked():
    with pytest.raises(ValueError, match=r"judge b, row 2: verdict 'evil' is not one of " + VERDICTS[0]):
        agreement_table(pd.DataFrame({"a": ["safe", "safe"], "b": ["safe", "evil"]}))
    with pytest.raises(ValueError, match="two judges"):
        agreement_table(pd.DataFrame({"a": ["safe"]}))


@pytest.mark.parametrize("true_rate", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("sensitivity", "specificity"), [(1, 1), (0.8, 0.95), (0.6, 0.7)])
def test_the_correction_undoes_the_errors_exactly(true_rate, sensitivity, specificity):
    reported = true_rate * sensitivity + (1 - true_rate) * (1 - specificity)
    assert corrected_rate(reported, sensitivity, specificity) == pytest.approx(true_rate, abs=1e-12)


def test_the_correction_stays_a_rate_and_grows_with_the_reported_one():
    corrected = [corrected_rate(rate, 0.8, 0.9) for rate in np.linspace(0, 1, 101)]
    assert corrected[0] == 0 and corrected[-1] == 1
    assert corrected == sorted(corrected)


@pytest.mark.parametrize(
    ("values", "named"),
    [((1.1, 0.9, 0.9), "rate=1.1"), ((0.5, -1, 0.9), "sensitivity=-1"), ((0.5, 0.9, math.nan), "specificity=nan")],
)
def test_impossible_rates_are_named(values, named):
    with pytest.raises(ValueError, match=named):
        corrected_rate(*values)


def test_a_judge_that_is_no_better_than_chance_corrects_nothing():
    with pytest.raises(ValueError, match="no better than chance"):
        corrected_rate(0.5, 0.3, 0.7)


def judge_of(truth, sensitivity, specificity, seed) -> np.ndarray:
    return np.where(truth, draw(len(truth), sensitivity, seed), ~draw(len(truth), specificity, seed + 10_000))


def test_simulated_judges_are_corrected_to_the_truth_and_the_interval_covers_it():
    true_rate, covered, estimates, reported = 0.2, [], [], []
    for seed in range(200):
        labelled, asked = draw(120, 0.5, seed), draw(400, true_rate, seed + 500)
        judged = judge_of(labelled, 0.85, 0.8, seed + 1000)
        flags = judge_of(asked, 0.85, 0.8, seed + 2000)
        estimate, low, high = corrected_interval(int(flags.sum()), 400, judged, labelled, n_resamples=499)
        assert 0 <= low <= estimate <= high <= 1
        covered.append(low <= true_rate <= high)
        estimates.append(estimate)
        reported.append(flags.mean())
    assert np.mean(covered) > 0.92
    assert np.mean(estimates) == pytest.approx(true_rate, abs=0.02)
    assert np.mean(reported) > true_rate + 0.1  # what the correction is for


def test_few_labels_widen_the_interval_even_without_an_error_among_them():
    few, many = np.array([True] * 5 + [False] * 5), np.array([True] * 500 + [False] * 500)
    width = {len(t): np.subtract(*corrected_interval(30, 100, t, t)[:0:-1]) for t in (few, many)}
    assert width[10] > 1.5 * width[1000]


def test_sensitivity_and_specificity_are_shares_of_their_own_class():
    truth = [True, True, True, True, False, False]
    assert sensitivity_and_specificity([True, True, True, False, False, True], truth) == (0.75, 0.5)
    with pytest.raises(ValueError, match="all harmful or all harmless"):
        sensitivity_and_specificity([True], [True])
    with pytest.raises(ValueError, match="booleans"):
        sensitivity_and_specificity([1.0, math.nan], [True, False])
    with pytest.raises(ValueError, match="2 verdicts against 3"):
        sensitivity_and_specificity([True, False], [True, False, True])


def test_the_reported_count_is_checked():
    for flagged, n in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="no rate of"):
            corrected_interval(flagged, n, [True, False], [True, False])
