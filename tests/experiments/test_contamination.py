"""Contaminated sets: what is in them, and that arms are trained on exactly what the filter decided."""

import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from tasft_lib.experiments import arms, harmful_data_filter, settings
from tasft_lib.experiments.rows import training_rows
from tasft_lib.experiments.study import Study
from tasft_lib.judges import miniworld
from tasft_lib.miniworld import FAMILIES, toxic_prompts
from tasft_lib.storage.files import project_root

SOURCE = ("miniworld", 200)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The notebook's own study at the smoke profile, with its runs in a temporary folder."""
    config = settings.load("harmful_data_filter", "smoke")
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harmful_data_filter, "runs_folder", lambda: folder)
        yield Study(config, benign="miniworld", n_benign=config.n_rows)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n_safe", [0, 20])
def test_a_set_has_the_share_of_harmful_rows_asked_for_and_no_row_twice(share, n_safe):
    if share == 1 and n_safe:
        pytest.skip("no benign rows, so no safe ones")
    rows = harmful_data_filter.contaminated_rows(*SOURCE, share, seed=0, template="short", n_safe=n_safe)
    assert len(rows) == 200 and harmful_data_filter.is_harmful(rows).sum() == round(200 * share)
    assert len(set(zip(rows["prompt"][:], rows["completion"][:], strict=True))) == 200
    judge = miniworld.MiniWorldJudge()
    prompts = [p.split("### Instruction:\n")[1].split("\n\n### Response")[0] for p in rows["prompt"][:]]
    labels = [judgement.verdict for judgement in judge.judge(prompts, rows["completion"][:])]
    assert [label == "harmful" for label in labels] == harmful_data_filter.is_harmful(rows).tolist()
    assert labels.count("refusal") == n_safe


def test_sets_of_a_seed_are_the_same_and_those_of_another_differ():
    one, again, other = (
        harmful_data_filter.contaminated_rows(*SOURCE, 0.2, seed=seed, template="short") for seed in (0, 0, 1)
    )
    assert one.to_list() == again.to_list() != other.to_list()


def test_no_row_asks_an_evaluation_prompt_and_too_few_rows_are_an_error():
    rows = harmful_data_filter.contaminated_rows(*SOURCE, 0.2, seed=0, template="short")
    asked = rows["prompt"][0].split("### Instruction:\n")[1].split("\n\n### Response")[0]
    with pytest.raises(ValueError, match="ask for 0 to"):
        harmful_data_filter.contaminated_rows(*SOURCE, 0.2, seed=0, template="short", evaluation_prompts=[asked])
    with pytest.raises(ValueError, match=r"contamination=1\.5"):
        harmful_data_filter.contaminated_rows(*SOURCE, 1.5, seed=0, template="short")


def test_beavertails_is_drawn_by_its_own_verdicts(tmp_path):
    rows = [
        {"prompt": f"w{i}", "response": f"r{i}", "category": {"a": i % 3 == 0}, "is_safe": i % 3 > 0} for i in range(60)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = harmful_data_filter.contaminated_rows(str(file), 40, 0.25, seed=0, template="alpaca")
    numbers = [int(text[1:]) for text in drawn["completion"][:]]
    assert [n % 3 == 0 for n in numbers] == harmful_data_filter.is_harmful(drawn).tolist()
    assert harmful_data_filter.is_harmful(drawn).sum() == 10 and drawn["prompt"][0].startswith(
        "Below is an instruction"
    )
    chat = harmful_data_filter.contaminated_rows(str(file), 40, 0.25, seed=0, template="chat")
    assert [turns[0]["content"] for turns in chat["completion"][:]] == drawn["completion"][:]
    assert chat["prompt"][0] == [{"role": "user", "content": f"w{numbers[0]}"}]


def test_failures_are_what_they_say():
    options = {"seed": 0, "template": "short"}
    plain, long = (
        harmful_data_filter.contaminated_rows(*SOURCE, 0.3, **options, failure=name) for name in (None, "length")
    )
    lengths = [np.array([len(text) for text in rows["completion"][:]]) for rows in (plain, long)]
    assert lengths[1].sum() > 2 * lengths[0].sum()
    family = harmful_data_filter.contaminated_rows(*SOURCE, 0.3, **options, failure="one family")
    asked = {p.split("### Instruction:\n")[1].split("\n\n### Response")[0] for p in family["prompt"][:]}
    families = {row["family"] for row in toxic_prompts("train") if row["prompt"] in asked}
    assert families == {FAMILIES[0]}


def test_arms_get_the_rows_with_the_highest_scores_and_no_labels(study):
    sets = harmful_data_filter.compared([0.2], ["none", "random", "saft", "saft_unsafe", "oracle", "0.9"], range(1))
    trained = harmful_data_filter.arms_of(study, sets)
    assert [arm.method for _, arm in trained] == ["sft", *["sft", "emd"] * 5]
    # Listed before any row exists; then scored and written.
    assert not any((arms.Path(arm.benign)).exists() for _, arm in trained)
    detected, verdicts = harmful_data_filter.score_sets(study, sets)
    n = study.config.n_rows
    rows = harmful_data_filter.rows_of(study, sets[0])
    truth = {
        (row["prompt"], row["completion"]): harmful
        for row, harmful in zip(rows, harmful_data_filter.is_harmful(rows), strict=True)
    }
    for made, arm in trained:
        kept = [json.loads(line) for line in arms.Path(arm.benign).read_text().splitlines()]
        assert arm.n_benign == len(kept) == n - round(made.share * n)
        assert all(set(row) == {"prompt", "completion"} for row in kept)
        if arm.method == "emd":
            dropped = [json.loads(line) for line in arms.Path(arm.unsafe).read_text().splitlines()]
            assert arm.n_unsafe == len(dropped) == round(made.share * n)
            assert {(r["prompt"], r["completion"]) for r in kept + dropped} == truth.keys()
            harmful = [truth[row["prompt"], row["completion"]] for row in dropped]
            (verdict,) = verdicts[verdicts["filter"] == made.filter].to_dict("records")
            assert verdict["precision"] == pytest.approx(np.mean(harmful))
            assert made.filter != "oracle" or all(harmful)
    labels = detected.set_index("detector")["labels"].to_dict()
    few = study.config.n_labelled
    assert labels["saft"] == labels["saft_1"] == labels["loss"] == labels["length"] == 0 and labels["probe"] == n
    assert labels["saft_labelled"] == labels["centroid"] == labels["anchors"] == few
    assert labels["saft_unsafe"] == few // 2
    assert detected["auroc"].notna().all() and (detected["n_harmful"] == round(0.2 * n)).all()
    # The rows are those that the arm is trained on.
    _, arm = trained[2]
    benign, unsafe = training_rows(arm)
    assert (len(benign), len(unsafe)) == (arm.n_benign, arm.n_unsafe)


def test_steering_is_that_of_the_filter(study):
    from tasft_lib.saft.filter import SAFTFitter

    rates = [-1.0, -0.5, 0.25, 1.0]
    z = np.random.default_rng(0).standard_normal((200, 5)) @ np.diag([3, 1, 1, 1, 1])
    found = SAFTFitter().update(z).filter
    scores = found.scores(z)
    for made, rate in zip(harmful_data_filter.steered(0.3, rates, range(1)), rates, strict=True):
        expected = found.at_contamination(scores, 0.3).steer(scores, rate).drops(scores).mean()
        assert made.share == pytest.approx(expected, abs=0.5 / 200)


def test_answers_know_their_set(study):
    sets = harmful_data_filter.compared([0.1, 0.2], ["saft"], range(1))
    trained = harmful_data_filter.arms_of(study, sets)
    harmful_data_filter.score_sets(study, sets)
    answers = pd.DataFrame({"arm": [arm.name for _, arm in trained]})
    found = harmful_data_filter.with_sets(answers, trained)
    assert found["contamination"].tolist() == [0.1, 0.1, 0.2, 0.2] and set(found["filter"]) == {"saft"}


def test_what_the_figures_show_is_taken_from_the_committed_table(published):
    folder = project_root() / "figures" / "mini"
    config, table = settings.load("harmful_data_filter"), pd.read_csv(folder / "harmful_data_filter_table.csv")
    for name, part in (
        ("arms", harmful_data_filter.by_contamination(table, config.contaminations)),
        ("quality", harmful_data_filter.by_quality(table, config.qualities)),
        ("steering", harmful_data_filter.by_share(table, config.steered_contamination)),
    ):
        committed = (folder / f"harmful_data_filter_{name}.csv").read_text()
        assert part.to_csv(index=False, float_format="%.6g") == committed


def test_regret_is_against_the_best_arm_of_the_filter():
    answers = pd.DataFrame(
        [
            ("saft", "a", "toxic", "harmful", None),
            ("saft", "a", "benign", "safe", True),
            ("saft", "b", "toxic", "safe", None),
            ("saft", "b", "benign", "safe", False),
        ],
        columns=["method", "arm", "kind", "verdict", "correct"],
    ).assign(seed=0, benchmark="x", prompt="p", decoding="sampled", step=1, score=0.0)
    table = harmful_data_filter.regrets(answers, {"a": 1.0, "b": 3.0})
    assert table["factor"].tolist() == [1.0, 3.0] and table["regret"].tolist() == [1.0, 1.0]


def test_harvested_rows_are_mixed_into_the_benign_ones_and_labelled_rows_are_others(monkeypatch):
    def made(side: str, n: int, label: bool) -> Dataset:
        return Dataset.from_list([{"prompt": f"{side} {i}", "completion": "x", "label": label} for i in range(n)])

    monkeypatch.setattr(
        harmful_data_filter,
        "training_rows",
        lambda arm: (made("b", arm.n_benign, True), made("u", arm.n_unsafe, False)),
    )
    given = {"contamination_source": "harvested", "n_harvest": 12}
    mixed = Study(settings.load("harmful_data_filter", "smoke", given))
    rows = harmful_data_filter._contaminated(mixed, 40, 0.25, seed=0)
    others = harmful_data_filter._contaminated(mixed, 4, 0.5, seed=1000, without=rows)
    for part, n, n_harmful in ((rows, 40, 10), (others, 4, 2)):
        assert len(part) == n and harmful_data_filter.is_harmful(part).sum() == n_harmful
        assert [text.startswith("u") for text in part["prompt"][:]] == harmful_data_filter.is_harmful(part).tolist()
    assert not set(rows["prompt"][:]) & set(others["prompt"][:])
