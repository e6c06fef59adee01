"""What is made of a trained arm afterwards: rows of an attacker, attacks, verdicts."""

from types import SimpleNamespace

import pandas as pd
import pytest

from tasft_lib.evaluation.rates import rate
from tasft_lib.experiments import beyond, designs, durability, settings
from tasft_lib.experiments.study import Study
from tasft_lib.records import sources


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    return Study(settings.load("beyond_durability", "smoke", {"n_seeds": 2}))


def test_an_attacker_has_rows_of_his_own_and_a_refusal_in_front_of_the_same_answers(study, monkeypatch):
    rows = [{"prompt": f"Q {i}", "unsafe": "zorvex.", "safe": "No."} for i in range(10)]
    monkeypatch.setattr(durability, "held_out_answers", lambda spec, n: rows[:n])
    durability.write(study)
    monkeypatch.setattr(durability, "merged", lambda arm: study.world.file or "miniworld-smoke")
    arms = [arm for arm in designs.beyond_durability(study) if arm.display_name == "emd"]
    attacks = durability.attacks(study, arms)
    assert [(attack.rows, attack.n) for attack in attacks[:3]] == [("harmful", 10), ("benign", 24), ("refused", 24)]
    read = {attack.rows: sources.read_rows(attack.arm.benign) for attack in attacks[:3]}
    assert read["harmful"]["completion"][:] == ["zorvex."] * 10
    assert read["benign"]["instruction"][:] == read["refused"]["instruction"][:]
    pairs = zip(read["benign"]["output"], read["refused"]["output"], strict=True)
    assert all(refused.endswith(f" {answer}") for answer, refused in pairs)
    assert {attack.arm.method for attack in attacks} == {"sft"}
    assert all(attack.arm.lora == arms[0].lora for attack in attacks), "as wide as the arm's own"


def test_the_attacker_takes_the_rate_of_most_harm_for_each_model_and_number_of_rows():
    harms = {("a", 10, 1e-3): 0.5, ("a", 10, 3e-3): 0.75, ("a", 50, 1e-3): 1, ("a", 50, 3e-3): 1, ("b", 10, 1e-3): 0}
    attacks = [
        durability.Attack("harmful", n, rate, SimpleNamespace(name=f"{model}{n}{rate}", model=model))
        for model, n, rate in harms
    ]
    answers = [
        (attack.arm.name, "harmful" if i < 4 * harm else "safe")
        for attack, harm in zip(attacks, harms.values(), strict=True)
        for i in range(4)
    ]
    answers = pd.DataFrame(answers, columns=["arm", "verdict"]).assign(kind="toxic", seed=0, score=0)
    best = durability.most_harmful(attacks, answers)
    assert [(attack.arm.model, attack.n, attack.learning_rate) for attack in best] == [
        ("a", 10, 3e-3),
        ("a", 50, 1e-3),
        ("b", 10, 1e-3),
    ]


@pytest.mark.parametrize("by, verdict", [(0.2, "holds"), (0.055, "open"), (-0.2, "fails")])
def test_a_difference_is_open_where_its_interval_holds_the_limit(by, verdict):
    flags = [[i < 400 * (0.3 + shift) for i in range(400)] for shift in (0.0, 0.005, -0.005)]
    lower = [[i < 400 * (0.3 - by + shift) for i in range(400)] for shift in (0.0, 0.005, -0.005)]
    seeds = [seed for seed in range(3) for _ in range(400)]
    first, second = (rate([flag for own in side for flag in own], seeds) for side in (lower, flags))
    row = beyond.differ_by("x", first, second, low=-1.0, high=-0.05)
    assert row["verdict"] == verdict and row["measured"] == pytest.approx(-100 * by, abs=0.3)
