"""Corrected rates: what a judge's measured errors do to every rate that it makes, and where they say nothing."""

import math

import numpy as np
import pandas as pd
import pytest

from tasft_lib.evaluation import calibration
from tasft_lib.evaluation.agreement import corrected_interval
from tasft_lib.evaluation.calibration import Errors
from tasft_lib.evaluation.rates import rate, rates_table, summary

GOOD = Errors(found=90, positives=100, right=80, negatives=100)


@pytest.fixture
def measured(monkeypatch):
    """A judge "eager" whose errors on toxic prompts are known, and labelled arms with 20 to 40 words an answer."""
    known = {("eager", "toxic", "harmful"): GOOD}
    monkeypatch.setattr(calibration, "_errors", lambda: known)
    monkeypatch.setattr(calibration, "_arms", lambda: pd.DataFrame({"words": [20, 40], "refusals": [0, 0.3]}))
    return known


def judged(verdicts: str, *, judge: str = "eager", words: int = 30, **columns) -> pd.DataFrame:
    names = {"h": "harmful", "s": "safe", "d": "degenerate", "u": "unscored"}
    table = pd.DataFrame({"verdict": [names[letter] for letter in verdicts]})
    response = " ".join(["word"] * words)
    given = {"judge": judge, "kind": "toxic", "method": "sft", "seed": 0, "score": 0.0, "response": response}
    return table.assign(**given | columns)


def test_the_errors_are_flags_that_count_as_they_do():
    errors = Errors(3, 4, 5, 7)
    assert (errors.judged & errors.truth).sum() == 3 and errors.truth.sum() == 4
    assert (~errors.judged & ~errors.truth).sum() == 5 and (~errors.truth).sum() == 7


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
    measured["eager", "toxic", "harmful"] = Errors(30, 100, 70, 100)
    (row,) = rates_table(judged("hs" * 20), ["method"]).to_dict("records")
    assert row["rate"] == 0.5 and all(math.isnan(row[f"corrected{end}"]) for end in ("", "_low", "_high"))


def test_what_is_no_language_is_never_flagged_by_mistake():
    """All harmless, half of them no language: the judge flags a fifth of the other half, and the true rate is 0."""
    flags, no_language = [True] * 10 + [False] * 90, [False] * 50 + [True] * 50
    assert rate(flags, errors=GOOD, degenerate=no_language).corrected[0] == 0
    assert rate([True] * 20 + [False] * 80, errors=GOOD).corrected[0] == 0
    with_all = rate([False] * 10, errors=GOOD, degenerate=[True] * 10).corrected
    assert with_all[0] == 0 and with_all[2] < 0.5


def test_seeds_repeat_prompts_and_do_not_narrow_the_corrected_interval():
    flags = [True] * 30 + [False] * 70
    once, thrice = rate(flags, errors=GOOD), rate(flags * 3, np.repeat([0, 1, 2], 100), errors=GOOD)
    assert thrice.corrected == pytest.approx(once.corrected)


def test_the_interval_covers_the_truth_with_degenerate_answers_too():
    """400 answers, 10 % no language, 25 % harmful; a judge of .8 and .85 that 150 labels measured."""
    rng, covered = np.random.default_rng(0), []
    for seed in range(150):
        found, right = rng.binomial(75, 0.8), rng.binomial(75, 0.85)
        errors = Errors(found, 75, right, 75)
        none, harmful, _ = rng.multinomial(400, (0.1, 0.25, 0.65))
        flagged = rng.binomial(harmful, 0.8) + rng.binomial(400 - none - harmful, 0.15)
        _, low, high = corrected_interval(
            flagged, 400, errors.judged, errors.truth, degenerate=none, n_resamples=499, seed=seed
        )
        covered.append(low <= 0.25 <= high)
    assert np.mean(covered) > 0.92


def test_answers_of_another_style_are_named(measured):
    assert calibration.unlike(judged("h" * 40)) == ""
    assert calibration.unlike(judged("h" * 40, words=80)) == "80 words an answer (20-40)"
    assert "100% refusals (0%-30%)" in calibration.unlike(judged("s" * 40, response="I can't help with that. " * 6))
    assert calibration.unlike(judged("h" * 30 + "u" * 10)) == "25% unscored (at most 5%)"
    assert calibration.unlike(judged("h" * 5, words=80)) == ""  # too few to tell


def test_what_is_shipped_can_be_read():
    for errors in calibration._errors().values():
        assert 0 <= errors.found <= errors.positives and 0 <= errors.right <= errors.negatives
    assert calibration.errors("local", "toxic", "harmful").is_better_than_chance
    assert {"words", "refusals"} <= set(calibration._arms()) and len(calibration._arms()) >= 5
