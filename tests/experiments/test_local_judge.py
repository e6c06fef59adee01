"""How the judge `local` is trained and measured: nothing that tests it was trained on, and counts are the labels'."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tasft_lib.experiments import local_judge
from tasft_lib.judges import local

LABELS = ["answer", "partial", "refusal", "deflection", "off-topic"]


@pytest.fixture
def rows():
    """300 labelled answers of four arms to sixty prompts, and 40 of XSTest's."""
    draw = np.random.default_rng(0)
    ours = pd.DataFrame({"source": "arms", "group": np.repeat(["a", "b", "c", "d"], 75), "kind": "toxic"})
    ours["prompt"] = [f"p{i % 60}" for i in range(300)]
    ours["fold"] = [i % 60 % local_judge.PROMPT_FOLDS for i in range(300)]
    ours["label"] = draw.choice(LABELS, 300)
    ours["class"] = ours["label"].map(local_judge.CLASS)
    theirs = pd.DataFrame({"source": "XSTest", "group": ["m", "n"] * 20, "kind": "toxic", "fold": -1, "prompt": "x"})
    theirs["class"] = draw.choice(local.CLASSES, 40)
    return pd.concat([ours, theirs], ignore_index=True).assign(answer="an answer")


def test_an_arm_is_tested_by_a_fit_that_saw_neither_it_nor_its_prompts(rows):
    tested = pd.Series(0, index=rows.index)
    for test, train in local_judge.arm_parts(rows, pd.Series(True, index=rows.index)):
        assert not set(rows[test]["group"]) & set(rows[train]["group"])
        assert not set(rows[test]["prompt"]) & set(rows[train]["prompt"])
        tested[test] += 1
    assert tested.tolist() == [1] * 300 + [0] * 40


def test_coefficients_for_features_as_they_are_say_what_the_fit_on_scaled_ones_says(rows):
    x = np.random.default_rng(1).normal(3, 2, (len(rows), 2 * 384 + 4))
    weights = np.where(rows["source"] == "arms", 2.0, 1.0)
    shares = local.probabilities(x, *local_judge.fit(x, rows["class"], weights, 0.0005))
    scaled = StandardScaler().fit_transform(x)
    scaled[:, 2 * 384 :] *= local_judge.SHOWN
    names = rows["class"].map(local.CLASSES.index)
    model = LogisticRegression(C=0.0005, max_iter=150, tol=1e-3).fit(scaled.astype(np.float32), names, weights)
    assert np.abs(shares - model.predict_proba(scaled)).max() < 1e-4


def test_errors_are_counted_where_they_are_used(rows):
    """Those of "harmful" among the answers that the judge does not call a refusal."""
    draw = np.random.default_rng(2)
    judges = ("local", *local_judge.STRING_MATCHES)
    table = rows.assign(**{judge: draw.choice(["harmful", "refusal", "safe"], len(rows)) for judge in judges})
    errors = local_judge.errors_table(table).set_index(["judge", "verdict", "group"])
    own = table[table["group"] == "a"]
    asked = own[own["local"] != "refusal"]
    line = errors.loc[("local", "harmful", "a")]
    assert line["positives"] + line["negatives"] == len(asked)
    assert line["found"] == sum((asked["local"] == "harmful") & (asked["class"] == "answer"))
    line = errors.loc[("local", "refusal", "a")]
    assert line["positives"] + line["negatives"] == len(own)
    assert line["right"] == sum((own["local"] != "refusal") & (own["class"] != "refusal"))


def test_labels_find_their_texts_by_hash_and_one_without_is_named(tmp_path):
    texts = [("how", "so"), ("why", "thus")]
    records = [{"arm": "a", "prompt": prompt, "answer": answer} for prompt, answer in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    hashes = [list(map(local_judge.text_hash, pair)) for pair in texts]
    labels = pd.DataFrame(hashes, columns=["prompt_sha256", "answer_sha256"])
    found = local_judge.arm_answers(tmp_path, labels)
    assert list(zip(found["prompt"], found["answer"], strict=True)) == texts
    swapped = labels.assign(answer_sha256=labels["answer_sha256"].iloc[::-1].tolist())
    with pytest.raises(ValueError, match="row 1: its answer is in no file"):
        local_judge.arm_answers(tmp_path, swapped)
