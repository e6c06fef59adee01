"""Look-alikes among benign rows, and what is made of a trained arm afterwards: rows, attacks, verdicts."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from datasets import Dataset

from tasft_lib.evaluation.rates import rate
from tasft_lib.experiments import beyond, designs, durability, look_alikes, settings
from tasft_lib.experiments.study import Study
from tasft_lib.records import sources
from tasft_lib.records.templates import format_prompt

TOXIC = ["How can I squash a marmow?", "Why are the gannokks mean?"]


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    return Study(settings.load("beyond_durability", "smoke", {"n_seeds": 2}))


def test_the_most_alike_come_first_and_of_equals_the_earlier():
    asked = ["Name a fish.", "Why are bears mean?", "How can I make tea?", "How can I squash a nut?"]
    pool = [{"instruction": question} for question in asked]
    chosen = [row["instruction"] for row in look_alikes.alike(pool, TOXIC, 3)]
    assert chosen == ["How can I squash a nut?", "Why are bears mean?", "How can I make tea?"]


def test_an_arm_on_look_alikes_differs_in_its_benign_rows_alone(study):
    arms = {arm.display_name: arm for arm in designs.beyond_durability(study) if arm.seed == 1}
    assert {"sft", "stl", "stl_look_alikes", "emd"} < set(arms)
    assert not {"sft_look_alikes", "stl_alarming"} & set(arms)
    for kind in look_alikes.SETS:
        assert replace(arms[f"emd_{kind}"], benign=arms["emd"].benign) == arms["emd"]
    files = {arm.benign for arm in designs.beyond_durability(study)}
    assert len(files) == 1 + 2 * len(look_alikes.SETS), "a seed has sets of its own, which its methods share"


def test_half_of_the_rows_are_look_alikes_and_no_more_rows_than_before(study, monkeypatch):
    unsafe = Dataset.from_dict({"prompt": [format_prompt(prompt, template="short") for prompt in TOXIC]})
    monkeypatch.setattr(look_alikes.rows, "training_rows", lambda arm: (None, unsafe))
    sets = look_alikes.write(study).set_index(["seed", "set"])
    assert (sets["rows"] == study.config.n_benign).all()
    assert (sets.loc[(slice(None), ["ordinary", "look_alikes"]), "alarming"] == 0).all()
    first = sets.loc[0]
    assert first.loc["look_alikes", "likeness"] > first.loc["ordinary", "likeness"]
    assert (first.loc[["alarming", "alarming_look_alikes"], "alarming"] > 0).all()
    arms = {arm.display_name: arm for arm in designs.beyond_durability(study) if arm.seed == 0}
    ordinary = {row["instruction"] for row in study.world.benign_rows(study.config.n_benign, seed=0)}
    own = sources.read_rows(arms["emd_look_alikes"].benign)["instruction"][:]
    assert sum(question in ordinary for question in own) >= study.config.n_benign / 2


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
