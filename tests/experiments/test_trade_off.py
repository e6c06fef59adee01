"""The search of `trade_off`: which trials there are, which is chosen, and what is still answered."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from tasft_lib.experiments import pressure, settings, trade_off
from tasft_lib.experiments.study import Study


@pytest.fixture
def study():
    return Study(settings.load("trade_off", "smoke", {"n_seeds": 2}))


def search_of(*rows):
    columns = ("method", "adapter", "penalty_weight", "regret", "too_dear", "benign_cost")
    return pd.DataFrame(rows, columns=columns)


def test_every_method_has_every_strength_with_every_adapter_and_differs_in_nothing_else(study):
    trials = trade_off.trials(study)
    for adapter in study.config.adapters:
        own = [trial for trial in trials if trial.adapter == adapter["name"]]
        listed = [(tried["name"], float(s)) for tried in study.config.tried for s in tried["strengths"]]
        assert [(trial.method, trial.strength) for trial in own] == [("sft", 0.0), *listed]
        assert {trial.arm.lora["r"] for trial in own} == {adapter.get("r", study.config.lora_r)}
    assert len({trial.arm.name for trial in trials}) == len(trials)
    stl = [trial.arm for trial in trials if trial.method == "stl"]
    assert {arm.extra_visits for arm in stl} == {2}
    isotropic = [trial.arm for trial in trials if trial.method == "emd_isotropic"]
    assert {arm.training["penalty_embedding"] for arm in isotropic} == {"isotropic"}


def test_a_line_with_adapters_is_tried_with_these_alone():
    line = {"name": "emd", "method": "emd", "strengths": [1, 4], "adapters": ["all linear, rank 16"]}
    trials = trade_off.trials(Study(settings.load("trade_off", "smoke", {"tried": [line]})))
    assert [trial.adapter for trial in trials if trial.method == "emd"] == 2 * ["all linear, rank 16"]
    assert [trial.adapter for trial in trials if trial.method == "sft"] == ["q and v, rank 8", "all linear, rank 16"]
    wrong = Study(settings.load("trade_off", "smoke", {"tried": [line | {"adapters": ["rank 16"]}]}))
    with pytest.raises(ValueError, match="tried: adapters rank 16 are none of q and v, rank 8, all linear, rank 16"):
        trade_off.trials(wrong)


def test_contrastive_rows_join_the_benign_ones_and_change_nothing_else():
    plain = {"name": "nlcl", "method": "nlcl", "strengths": [2], "penalty_first_tokens": 4}
    lines = [plain, plain | {"name": "nlcl_contrastive", "contrastive": True}]
    one = {"adapters": [{"name": "narrow"}]}
    study = Study(settings.load("trade_off", "smoke", one | {"tried": lines}))
    _, without, joined = trade_off.trials(study)
    named = {"display_name": without.arm.display_name, "extra": None}
    assert joined.arm.extra == study.contrastive() and replace(joined.arm, **named) == without.arm
    with pytest.raises(ValueError, match="writer=miniworld: its grammar has no other words"):
        trade_off.trials(Study(settings.load("trade_off", "smoke", one | {"tried": lines, "model": "smollm2-135m"})))
    with pytest.raises(ValueError, match="beyond_durability has no writer"):
        trade_off.trials(Study(settings.load("beyond_durability", "smoke", one | {"tried": lines})))
    for method in ("stl", "stl_emd"):
        wrong = {"name": "safe", "method": method, "strengths": [2], "contrastive": True}
        with pytest.raises(ValueError, match=f"safe: {method} takes no contrastive rows"):
            trade_off.trials(Study(settings.load("trade_off", "smoke", one | {"tried": [wrong]})))


def test_a_line_without_its_names_is_refused():
    study = Study(settings.load("trade_off", "smoke", {"tried": [{"method": "emd"}]}))
    with pytest.raises(ValueError, match="without name, strengths"):
        trade_off.trials(study)


def test_only_the_methods_that_tested_names_go_to_the_test_split_and_to_the_verdict():
    lines = [{"name": name, "method": "emd", "strengths": [1]} for name in ("emd", "emd_wide")]
    adapter = {"adapters": [{"name": "narrow"}], "tried": lines}
    some, all_ = (Study(settings.load("trade_off", "smoke", adapter | {"tested": t})) for t in (["emd_wide"], []))
    search = search_of(("emd", "narrow", 1.0, 0.1, False, 0.0), ("emd_wide", "narrow", 1.0, 0.2, False, 0.0))
    search = search.assign(is_chosen=True)
    assert [arm.display_name for arm in trade_off.tested(some, search)["narrow"]] == ["sft", "emd_wide"]
    assert [arm.display_name for arm in trade_off.tested(all_, search)["narrow"]] == ["sft", "emd", "emd_wide"]
    two = {"tested": ["emd"], "n_seeds": 3, "tested_seeds": 2}
    kept = trade_off.tested(Study(settings.load("trade_off", "smoke", adapter | two)), search)["narrow"]
    assert [arm.seed for arm in kept if arm.display_name == "emd"] == [0, 1]
    with pytest.raises(ValueError, match="tested: npo is none of the methods that are tried"):
        trade_off.trials(Study(settings.load("trade_off", "smoke", adapter | {"tested": ["npo"]})))


def answers_of(arm, n_harmful, n=10):
    verdicts = ["harmful"] * n_harmful + ["safe"] * (n - n_harmful)
    common = {"arm": arm, "method": arm.split()[0], "n_unsafe": 20, "penalty_weight": "auto", "seed": 0, "judge": "j"}
    return pd.DataFrame({"kind": "toxic", "verdict": verdicts, "score": 0.0, **common, "step": 3})


def found_likely(arm, nll):
    common = {"arm": arm, "method": arm.split()[0], "n_unsafe": 20, "penalty_weight": "auto", "seed": 0, "step": 3}
    benign = pd.DataFrame({"kind": "benign", "row": [0, 1], "nll": [nll, nll + 0.1]})
    toxic = pd.DataFrame({"kind": "toxic", "row": [0, 1], "safe": [-1.0, -2.0], "unsafe_0": [-1.5, -1.5]})
    return pd.concat([toxic, benign]).assign(**common)


def test_a_trial_costs_against_plain_sft_with_its_own_adapters_and_none_too_dear_is_chosen():
    trials, judged, likely = [], [], []
    nlls = {("sft", "a"): 1.0, ("sft", "b"): 2.0}
    for method, adapter, strength, harmful, cost in [
        ("sft", "a", 0.0, 9, 0.0),
        ("emd", "a", 1.0, 6, 0.05),
        ("emd", "a", 2.0, 1, 0.3),
        ("nlcl", "a", 1.0, 2, 0.2),
        ("sft", "b", 0.0, 9, 0.0),
        ("emd", "b", 1.0, 4, 0.08),
        ("nlcl", "b", 1.0, 1, 0.5),
    ]:
        name = f"{method} {adapter} {strength}"
        trials.append(trade_off.Trial(method, adapter, strength, SimpleNamespace(name=name)))
        judged.append(answers_of(name, harmful))
        likely.append(found_likely(name, nlls["sft", adapter] + cost))
    search = trade_off.searched(trials, pd.concat(judged), pd.concat(likely))
    assert search["benign_cost"].tolist() == pytest.approx([0, 0.05, 0.3, 0.2, 0, 0.08, 0.5])
    chosen = search[search["is_chosen"]]
    assert dict(zip(chosen["method"], chosen["adapter"], strict=True)) == {"emd": "b", "nlcl": "b"}
    known = [table.assign(kind="benign", correct=True) for table in judged]
    exact = trade_off.searched(trials, pd.concat([*judged, *known]), pd.concat(likely))
    assert exact["benign_cost"].tolist() == search["benign_cost"].tolist() and "too_dear" not in exact
    assert chosen.set_index("method")["too_dear"].to_dict() == {"emd": False, "nlcl": True}, "where all are, the least"


def test_tested_are_the_chosen_trials_and_plain_sft_with_the_same_adapters_of_every_seed(study):
    narrow, wide = (adapter["name"] for adapter in study.config.adapters)
    rows = search_of(("emd", narrow, 4.0, 0.1, False, 0.0), ("stl", wide, 2.0, 0.1, False, 0.0))
    kept = trade_off.tested(study, rows.assign(is_chosen=True))
    names = {adapter: [(arm.display_name, arm.seed) for arm in own] for adapter, own in kept.items()}
    assert names == {
        narrow: [("sft", 0), ("emd", 0), ("sft", 1), ("emd", 1)],
        wide: [("sft", 0), ("stl", 0), ("sft", 1), ("stl", 1)],
    }
    first = [trial.arm.name for trial in trade_off.trials(study)]
    assert all(arm.name in first for own in kept.values() for arm in own if arm.seed == 0), "trained once"


def test_the_verdict_is_about_the_best_of_the_search():
    search = search_of(("emd", "a", 4.0, 0.2, False, 0.01), ("stl", "a", 2.0, 0.1, True, 0.3)).assign(is_chosen=True)
    share = {"_low": -0.01, "_high": 0.01, "_n": 100, "": 0.0}
    measures = ("harm", "degenerate", "benign_cost", "still_answered")
    row = {f"{measure}{end}": value for measure in measures for end, value in share.items()}
    table = pd.DataFrame([{"method": "emd", "adapter": "a", **row, "harm_corrected": float("nan")}])
    attacked = {"method": "emd", "adapter": "a", "attack": "prefill 4", "harm": 0.5, "harm_low": 0.4, "harm_high": 0.6}
    depths = pd.DataFrame([attacked | {"harm_n": 100}])
    rows = trade_off.verdict(search, table, depths, 4)
    assert rows[0]["criterion"].startswith("EMD at 4, a")
    assert [row["verdict"] for row in rows] == ["holds", "holds", "holds", "fails", "fails"]
    assert rows[2]["limit"] == 100 * pressure.DEAR
    corrected = {"harm_corrected": 0.0, "harm_corrected_low": 0.0, "harm_corrected_high": 0.0}
    judged = {"harm": 0.16, "harm_low": 0.13, "harm_high": 0.19}
    for unlike, said in ((float("nan"), "holds"), ("28% called harmful", "open")):
        (first, *_) = trade_off.verdict(search, table.assign(**judged, **corrected, unlike=unlike), depths, 4)
        assert first["verdict"] == said, "a correction that the answers are unlike settles nothing"
