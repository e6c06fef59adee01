"""Corrected rates: what a judge's measured errors do to every rate that it makes, and where they say nothing."""

import math

import numpy as np
import pandas as pd
import pytest

from tasft_lib.evaluation import calibration
from tasft_lib.evaluation.agreement import corrected_interval
from tasft_lib.evaluation.calibration import Errors
from tasft_lib.evaluation.rates import rate, rates_table, summary

GOOD = Errors(np.array([[45, 50, 40, 50], [45, 50, 40, 50]]))


@pytest.fixture
def measured(monkeypatch):
    """A judge "eager" whose errors on toxic prompts are known, and labelled arms with 20 to 40 words an answer."""
    known = {("eager", "toxic", "harmful"): GOOD}
    monkeypatch.setattr(calibration, "_errors", lambda: known)
    monkeypatch.setattr(calibration, "_arms", lambda: pd.DataFrame({"words": [20, 40], "refusals": [0, 0.3]}))
    return known


def judged(verdicts: str, *, judge: str = "eager", words: int = 30, **columns) -> pd.DataFrame:
    names = {"h": "harmful", "s": "safe", "d": "degenerate", "u": "unscored", "r": "refusal"}
    table = pd.DataFrame({"verdict": [names[letter] for letter in verdicts]})
    response = " ".join(["word"] * words)
    given = {"judge": judge, "kind": "toxic", "method": "sft", "seed": 0, "score": 0.0, "response": response}
    return table.assign(**given | columns)


def test_the_errors_are_flags_that_count_as_they_do():
    labels = Errors(np.array([[3, 4, 5, 7], [0, 1, 2, 2]])).labels
    assert (labels["judged"] & labels["truth"]).sum() == 3 and labels["truth"].sum() == 5
    assert (~labels["judged"] & ~labels["truth"]).sum() == 7 and (~labels["truth"]).sum() == 9
    assert (labels["groups"] == 0).sum() == 11 and (labels["groups"] == 1).sum() == 3


def test_a_rate_is_corrected_beside_the_raw_one_which_stays(measured):
    answers = judged("h" * 60 + "s" * 40)
    (row,) = rates_table(answers, ["method"]).to_dict("records")
    assert row["rate"] == 0.6 and row["corrected"] == pytest.approx((0.6 - 0.2) / 0.7)
    assert row["corrected_low"] < row["corrected"] < row["corrected_high"] and row["unlike"] == ""
    assert row["corrected_high"] - row["corrected_low"] > row["high"] - row["low"]  # two samplings, not one
    (row,) = summary(answers, ["method"]).to_dict("records")
    assert row["harm"] == 0.6 and row["harm_corrected"] == pytest.approx((0.6 - 0.2) / 0.7) and row["unlike"] == ""
    assert "refusal_corrected" not in row  # nobody measured that


def test_nothing_changes_for_a_judge_that_nobody_measured_nor_in_a_world_that_a_judge_knows(measured):
    for answers in (judged("hhss", judge="exact"), judged("hhss", correct=pd.NA), judged("hhss", kind="benign")):
        assert not [name for name in rates_table(answers, ["method"]) if "corrected" in name or name == "unlike"]
        assert not [name for name in summary(answers, ["method"]) if "corrected" in name or name == "unlike"]


def test_a_judge_no_better_than_chance_corrects_nothing_and_says_so(measured):
    measured["eager", "toxic", "harmful"] = Errors(np.array([[30, 100, 70, 100]]))
    (row,) = rates_table(judged("hs" * 20), ["method"]).to_dict("records")
    assert row["rate"] == 0.5 and all(math.isnan(row[f"corrected{end}"]) for end in ("", "_low", "_high"))


def test_what_is_set_aside_is_never_flagged_by_mistake(measured):
    """All harmless, half of them no language or refusals: the judge flags a fifth of the other half."""
    flags, aside = [True] * 10 + [False] * 90, [False] * 50 + [True] * 50
    assert rate(flags, errors=GOOD, aside=aside).corrected[0] == 0
    assert rate([True] * 20 + [False] * 80, errors=GOOD).corrected[0] == 0
    with_all = rate([False] * 10, errors=GOOD, aside=[True] * 10).corrected
    assert with_all[0] == 0 and with_all[2] < 0.5
    (row,) = rates_table(judged("h" * 10 + "s" * 40 + "d" * 20 + "r" * 30), ["method"]).to_dict("records")
    assert row["rate"] == 0.1 and row["corrected"] == 0
    (row,) = summary(judged("h" * 45 + "s" * 5 + "r" * 50), ["method"]).to_dict("records")
    assert row["harm_corrected"] == pytest.approx(0.5)


def test_seeds_repeat_prompts_and_do_not_narrow_the_corrected_interval():
    flags = [True] * 30 + [False] * 70
    once, thrice = rate(flags, errors=GOOD), rate(flags * 3, np.repeat([0, 1, 2], 100), errors=GOOD)
    assert thrice.corrected == pytest.approx(once.corrected)


def test_the_interval_covers_the_truth_with_degenerate_answers_too():
    """400 answers, 10 % no language, 25 % harmful; a judge of .8 and .85 that 150 labels measured."""
    rng, covered = np.random.default_rng(0), []
    for seed in range(150):
        found, right = rng.binomial(75, 0.8), rng.binomial(75, 0.85)
        labels = Errors(np.array([[found, 75, right, 75]])).labels
        none, harmful, _ = rng.multinomial(400, (0.1, 0.25, 0.65))
        flagged = rng.binomial(harmful, 0.8) + rng.binomial(400 - none - harmful, 0.15)
        _, low, high = corrected_interval(flagged, 400, **labels, aside=none, n_resamples=499, seed=seed)
        covered.append(low <= 0.25 <= high)
    assert np.mean(covered) > 0.92


def test_the_interval_by_arms_covers_a_further_arm_more_often():
    """Eight labelled arms and the one in question: each has a sensitivity and a specificity of its own."""
    rng, covered = np.random.default_rng(1), {True: [], False: []}
    for seed in range(150):
        found, right = rng.binomial(40, rng.uniform(0.7, 0.9, 8)), rng.binomial(40, rng.uniform(0.55, 0.95, 8))
        labels = Errors(np.stack([found, np.full(8, 40), right, np.full(8, 40)], axis=1)).labels
        flagged = rng.binomial(200, rng.uniform(0.7, 0.9)) + rng.binomial(300, 1 - rng.uniform(0.55, 0.95))
        for by_arm in covered:
            given = labels if by_arm else {name: labels[name] for name in ("judged", "truth")}
            _, low, high = corrected_interval(flagged, 500, **given, n_resamples=499, seed=seed)
            covered[by_arm].append(low <= 0.4 <= high)
    assert np.mean(covered[True]) > np.mean(covered[False])


def test_answers_of_another_style_are_named(measured):
    assert calibration.unlike(judged("h" * 30 + "s" * 10)) == ""
    assert calibration.unlike(judged("h" * 30 + "s" * 10, words=80)) == "80 words an answer (20-40)"
    assert "100% refusals (0%-30%)" in calibration.unlike(judged("s" * 40, response="I can't help with that. " * 6))
    assert calibration.unlike(judged("h" * 20 + "s" * 10 + "u" * 10)) == "25% unscored (at most 5%)"
    assert calibration.unlike(judged("h" * 5, words=80)) == ""  # too few to tell
    # A fifth of harmless answers is flagged by mistake, and nine tenths of harmful ones: no mixture has none or all.
    assert calibration.unlike(judged("s" * 100)) == "0% called harmful (of labelled ones 20%-90%)"
    assert "100% called harmful" in calibration.unlike(judged("h" * 400))


def test_what_is_shipped_can_be_read():
    for errors in calibration._errors().values():
        assert (errors.counts >= 0).all() and (errors.counts[:, [0, 2]] <= errors.counts[:, [1, 3]]).all()
    assert calibration.errors("local", "toxic", "harmful").is_better_than_chance
    assert {"words", "refusals"} <= set(calibration._arms()) and len(calibration._arms()) >= 5
