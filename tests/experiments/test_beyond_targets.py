"""The notebook `beyond_targets`: which β is chosen, how far regret moves over λ, and the verdicts."""

import pandas as pd

from tasft_lib.experiments import beyond_targets, designs, settings
from tasft_lib.experiments.study import Study


def search_of(regrets: dict[tuple, float]) -> pd.DataFrame:
    rows = [(*key, regret) for key, regret in regrets.items()]
    return pd.DataFrame(rows, columns=["method", "seed", "beta", "penalty_weight", "regret"])


def test_beta_is_chosen_by_its_regret_and_a_spread_is_per_method_and_seed():
    table = search_of(
        {
            ("sft", 0, 0.0, "auto"): 0.9,
            ("target_lm_head", 0, 1.0, 16.0): 0.85,
            ("target_lm_head", 0, 3.0, 16.0): 0.2,
            ("target_lm_head", 0, 3.0, 64.0): 0.3,
            ("target_reference", 0, 0.0, 16.0): 0.0,
        }
    )
    assert beyond_targets.chosen(table).to_numpy().tolist() == [["target_lm_head", 3.0, 16.0, 0.2]]
    spreads = beyond_targets.spread(table[table["beta"] != 1.0]).set_index("method")
    assert spreads["spread"].to_dict() == {"target_lm_head": 0.1, "target_reference": 0.0}
    assert set(spreads["sft"]) == {0.9}


def test_the_claim_is_dead_unless_lm_head_leaves_five_points_less_on_words_that_no_row_shows():
    methods = ["target_lm_head", "target_one_hot"]
    spreads = pd.DataFrame({"method": methods * 2, "spread": [0.01, 0.04, 0.02, 0.01]})
    shares = {("target_lm_head", 4.0): 0.2, ("target_one_hot", 4.0): 0.5}
    shares |= dict.fromkeys(((method, 16.0) for method in methods), 0.2)
    rows = [(*key, seed, share, 300) for key, share in shares.items() for seed in range(3)]
    names = ["method", "penalty_weight", "seed", "left_uncovered", "sft_uncovered"]
    verdicts = beyond_targets.verdict(spreads, pd.DataFrame(rows, columns=names), [4.0, 16.0])
    assert [row["verdict"] for row in verdicts] == ["holds", "fails", "holds", "open"]
    assert verdicts[2]["measured"] == 30.0 and verdicts[3]["measured"] == 0.0


def test_targets_differ_in_embedding_and_beta_alone():
    study = Study(settings.load("beyond_targets", "beyond", {"n_seeds": 3}))
    arms = designs.beyond_targets(study)
    searched = [arm for arm in arms if arm.method == "target"]
    assert len(searched) == 3 * 3 + 1 and {arm.seed for arm in searched} == {0}
    assert len({arm.name for arm in arms}) == len(arms) == 11
    varied = ("penalty_beta", "penalty_embedding")
    others = {str({k: v for k, v in arm.training.items() if k not in varied}) for arm in searched}
    assert len(others) == 1 and searched[0].training["unsafe_per_batch"] == 6
