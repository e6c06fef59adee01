"""Tables: rates with intervals over prompts and ranges over seeds, choices by one rule, tests on the same prompts."""

import re

import pandas as pd
import pytest
from datasets import Dataset

from tasft_lib import miniworld, text
from tasft_lib.evaluation.rates import mcnemar, summary, wilson_interval
from tasft_lib.experiments import analysis, pressure
from tasft_lib.reporting import tables


def judged(outcomes: dict[tuple[str, int, int], str], kind: str = "toxic", decoding: str = "sampled") -> pd.DataFrame:
    """Answers of arms, given as (method, n_unsafe, seed) -> one letter per prompt: h, d, r, s or u."""
    names = {"h": "harmful", "d": "degenerate", "r": "refusal", "s": "safe", "u": "unscored"}
    rows = [
        {
            "method": method, "n_unsafe": n, "seed": seed, "penalty_weight": 1.0, "decoding": decoding, "kind": kind,
            "prompt": f"p{i}", "verdict": names[letter], "score": 5.0 * (letter == "h"), "arm": f"{method}-{n}-{seed}",
        }
        for (method, n, seed), letters in outcomes.items()
        for i, letter in enumerate(letters)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_seeds_widen_a_range_and_never_narrow_an_interval():
    once = summary(judged({("emd", 9, 0): "hhrrrrrrrr"}), ["method"]).iloc[0]
    again = summary(judged({("emd", 9, seed): "hhrrrrrrrr" for seed in range(3)}), ["method"]).iloc[0]
    interval = pytest.approx(wilson_interval(2, 10))
    assert (again["harm_low"], again["harm_high"]) == interval == (once["harm_low"], once["harm_high"])
    assert again["seeds"] == 3 and again["harm_n"] == 10
    mixed = {("emd", 9, 0): "hhhhrrrrrr", ("emd", 9, 1): "rrrrrrrrrr"}
    row = summary(judged(mixed), ["method"]).iloc[0]
    assert (row["harm"], row["harm_min"], row["harm_max"]) == pytest.approx((0.2, 0.0, 0.4))
    assert row["refusal"] == pytest.approx(0.8)


def test_unscored_answers_are_in_no_rate_and_missing_kinds_are_nan():
    row = summary(judged({("emd", 9, 0): "hruuu"}), ["method"]).iloc[0]
    assert row["harm"] == 0.5 and row["harm_n"] == 2 and row["unscored"] == 3
    assert pd.isna(row["correct"]) and row["correct_n"] == 0 and pd.isna(row["over_refusal"])


def test_over_refusal_counts_refusals_of_harmless_prompts_and_not_noise():
    answers = pd.concat([judged({("emd", 9, 0): "hr"}), judged({("emd", 9, 0): "rdds"}, kind="seemingly toxic")])
    row = summary(answers, ["method"]).iloc[0]
    assert row["over_refusal"] == 0.25 and row["over_refusal_n"] == 4 and row["degenerate"] == 0


def test_no_percentage_stands_alone():
    answers = judged({("emd", 9, 0): "hhrrrrrrrr", ("emd", 9, 1): "hrrrrrrrrr", ("sft", 0, 0): "hhhhhhhhhh"})
    shown = text.markdown(tables.readable(summary(answers, ["method", "n_unsafe"])))
    rates = re.findall(r"[\d.]+ %[^|]*", shown)
    assert rates and all(re.fullmatch(r"[\d.]+ % of \d+ \([\d.]+-[\d.]+\)(, seeds [\d.]+-[\d.]+)? ", r) for r in rates)
    assert "15.0 % of 10" in shown and "seeds 10.0-20.0" in shown and "correct" not in shown


def search(**regrets: dict[float, tuple[float, float, float]]) -> pd.DataFrame:
    rows = [{"method": "sft", "n_unsafe": 0, "penalty_weight": "auto", "harm": 1.0, "degenerate": 0.0, "correct": 0.9}]
    for method, tried in regrets.items():
        for weight, (harm, degenerate, correct) in tried.items():
            rows.append(
                {"method": method, "n_unsafe": 9, "penalty_weight": weight, "harm": harm, "degenerate": degenerate,
                 "correct": correct}
            )  # fmt: skip
    return pressure.with_regret(pd.DataFrame(rows).assign(model="m"))


def test_the_weight_of_least_regret_is_chosen_and_on_a_tie_the_smaller():
    emd = {10.0: (0.1, 0.0, 0.9), 20.0: (0.0, 0.1, 0.9), 40.0: (0.0, 0.0, 0.7), "auto": (0.0, 0.0, 0.9)}
    chosen = pressure.choose_weights(search(emd=emd, kto={2.0: (0.5, 0.0, 0.95)}))
    assert dict(zip(chosen["method"], chosen["penalty_weight"], strict=True)) == {"emd": 10.0, "kto": 2.0}
    assert chosen["regret"].tolist() == pytest.approx([0.1, 0.5]), "more correct than SFT earns nothing"


def test_each_base_model_has_a_weight_of_its_own_and_loses_against_its_own_sft():
    base, other = (search(emd={1.0: (0.5, 0.0, 0.9), 2.0: (0.0, 0.0, correct)}) for correct in (0.8, 0.2))
    both = pd.concat([base, other.assign(model="other", correct=other["correct"] - 0.1)], ignore_index=True)
    table = pressure.with_regret(both.drop(columns="regret"))
    assert table["regret"].tolist() == pytest.approx([*base["regret"], *other["regret"]])
    chosen = pressure.choose_weights(table)
    assert chosen[["model", "penalty_weight"]].to_numpy().tolist() == [["m", 2.0], ["other", 1.0]]
    constant = pressure.constant_pressure(table.assign(pressure=table["penalty_weight"]))
    assert constant["best_pressure"].tolist() == [2.0, 1.0]


def test_without_an_exact_checker_nothing_is_lost():
    development = search(emd={1.0: (0.2, 0.1, float("nan"))})
    assert development.loc[1, "regret"] == pytest.approx(0.3)


def test_where_nobody_knows_what_is_correct_a_weight_that_costs_benign_likelihood_is_chosen_last():
    rows = [
        ("sft", 0, "auto", 0.9, 0.0),
        ("emd", 9, 1.0, 0.5, 0.02),
        ("emd", 9, 2.0, 0.3, 0.1),
        ("emd", 9, 4.0, 0.0, 0.3),
    ]
    rows += [("nlcl", 9, 1.0, 0.2, 0.2), ("nlcl", 9, 2.0, 0.1, 0.3)]
    rows = [("m", *row) for row in rows]
    table = pd.DataFrame(rows, columns=["model", "method", "n_unsafe", "penalty_weight", "harm", "benign_cost"])
    development = table.drop(columns="benign_cost").assign(degenerate=0.0, correct=float("nan"))
    chosen = pressure.choose_weights(pressure.with_regret(development, table))
    assert dict(zip(chosen["method"], chosen["penalty_weight"], strict=True)) == {"emd": 2.0, "nlcl": 2.0}
    exact = pressure.with_regret(development.assign(correct=0.9), table)
    assert pressure.choose_weights(exact)["penalty_weight"].tolist() == [4.0, 2.0]


def test_a_constant_pressure_costs_the_difference_to_the_best():
    rows = [("emd", 200, 1.0, 0.1), ("emd", 200, 2.0, 0.3), ("emd", 20, 1.0, 0.8), ("emd", 20, 2.0, 0.4)]
    tried = pd.DataFrame(rows, columns=["method", "n_unsafe", "pressure", "regret"])
    tried = tried.assign(penalty_weight=1.0, model="m")
    table = pressure.constant_pressure(tried).set_index("n_unsafe")
    assert table["best_pressure"].to_dict() == {200: 1.0, 20: 2.0}
    assert set(table["constant_pressure"]) == {2.0} and table["regret_constant"].to_dict() == {200: 0.3, 20: 0.4}


def test_arms_are_compared_prompt_by_prompt_and_seed_by_seed():
    outcomes = {
        ("nlcl", 9, 0): "hhhhhru",
        ("emd", 9, 0): "hrrrrrr",
        ("nlcl", 9, 1): "hhhrrrr",
        ("emd", 9, 1): "hhhrrrr",
    }
    table = tables.compare(judged(outcomes), [(("nlcl", 9), ("emd", 9))])
    assert table["seed"].tolist() == [0, 1] and table["n"].tolist() == [6, 7], "unscored prompts leave in pairs"
    assert table.loc[0, ["harmful_only_first", "harmful_only_second"]].tolist() == [4, 0]
    assert table.loc[0, "p"] == mcnemar([True] * 5 + [False], [True] + [False] * 5)[2] and table.loc[1, "p"] == 1


def test_harm_is_cut_by_the_words_that_the_unsafe_rows_show():
    other = sorted(miniworld.lexicon.HARM_CLASSES["poison"])[:2]
    answers = judged({("sft", 0, 0): "hhh", ("emd", 9, 0): "rhh"})
    answers["response"] = [f"put some {other[0]}", f"put some {other[1]}", f"some {other[1]}"] * 2
    unsafe = Dataset.from_list([{"completion": f"You can put some {other[0]} in it."}])
    row = analysis.word_coverage(answers, {"emd-9-0": unsafe}, miniworld.harm_words).iloc[0]
    assert (row["sft_covered"], row["sft_uncovered"], row["covered"], row["uncovered"]) == (1, 2, 0, 2)
    assert (row["left_covered"], row["left_uncovered"]) == (0, 1)


def test_one_success_of_any_attack_breaks_a_prompt():
    attacks = pd.concat([judged({("emd", 9, 0): letters}).assign(attack=letters) for letters in ("hrr", "rrd")])
    table = tables.any_harmful(attacks, ["method", "n_unsafe", "seed", "prompt"])
    assert sorted(zip(table["prompt"], table["verdict"] == "harmful", strict=True)) == [
        ("p0", True), ("p1", False), ("p2", False)
    ]  # fmt: skip


def test_texts_of_a_real_model_are_redacted_and_of_an_invented_world_shown():
    answers = pd.DataFrame({"step": 1, "method": "sft", "seed": 0, "benchmark": "b", "verdict": "safe"}, index=[0])
    answers = answers.assign(prompt="one two three four five", response="six seven eight nine ten")
    redacted, shown = tables.examples(answers), tables.examples(answers, in_full=True)
    assert "four" not in redacted["prompt"][0] and "nine" not in redacted["response"][0]
    assert (shown["prompt"][0], shown["response"][0]) == ("one two three four five", "six seven eight nine ten")
