"""The measuring set and its table: seeded, labelled as made, and counted as they should be."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import build_model

from tasft_lib.experiments import degenerate_answers


@pytest.fixture(scope="module")
def answers():
    return degenerate_answers.real_answers("docstrings", 0)


def test_the_set_is_seeded_and_every_kind_is_labelled_as_it_was_made(answers, tokenizer, tmp_path):
    (tmp_path / "xx.txt").write_text("Ein Absatz von einiger Länge, der lang genug ist, um zu zählen.\n\nkurz\n")
    options = {"languages": tmp_path, "tokenizer": tokenizer}
    texts = degenerate_answers.measuring_set(answers, 20, 3, **options)
    assert texts.equals(degenerate_answers.measuring_set(answers, 20, 3, **options))
    assert not texts.equals(degenerate_answers.measuring_set(answers, 20, 4, **options))
    assert set(texts.loc[texts["degenerate"], "kind"]) == set(degenerate_answers.NO_LANGUAGE)
    assert texts.groupby("kind").size().max() == 20
    assert texts.loc[texts["kind"] == "language xx", "text"].str.startswith("Ein Absatz").tolist() == [True]
    of = texts.groupby("kind")["text"].apply(list)
    for shuffled, made_from in zip(of["words shuffled"], of["letters shuffled"], strict=True):
        assert sorted(len(word) for word in shuffled.split()) == sorted(len(word) for word in made_from.split())
    for kind in ("words shuffled", "letters shuffled"):
        assert sorted("".join(of[kind])) == sorted("".join(of["words shuffled"])) and not set(of[kind]) & set(answers)
    assert all(any(answer.startswith(cut) and answer != cut for answer in answers) for cut in of["cut mid-word"])
    with pytest.raises(ValueError, match="no <language>"):
        degenerate_answers.measuring_set(answers, 20, 3, languages=tmp_path / "none")


def test_loops_torn_bytes_and_empty_answers_are_all_found_and_real_ones_are_not(answers):
    texts = degenerate_answers.measuring_set(answers, 50, 0)
    table = degenerate_answers.rates(texts.assign(**degenerate_answers.detect(texts["text"].tolist())))
    found = table[table["detector"] == "string match"].set_index("kind")
    assert (found.loc[["word loop", "sentence loop", "character loop", "empty", "bytes as UTF-8"], "rate"] == 1).all()
    assert found.loc[["answers", "cut mid-word"], "rate"].max() <= 0.02
    assert found.loc["words shuffled", "found"] == 0
    if "both" in set(table["detector"]):
        both = table[table["detector"] == "both"].set_index("kind")
        assert (both["found"] >= found["found"]).all()
        assert both.loc[["letters shuffled", "random letters", "random keys"], "rate"].min() >= 0.9


def test_rates_count_what_was_asked_and_precision_is_that_among_equally_many():
    kinds = ["answers"] * 10 + ["words shuffled"] * 20 + ["empty"] * 5
    truth = [False] * 10 + [True] * 25
    says = [True] + [False] * 9 + [True] * 6 + [False] * 12 + [np.nan] * 2 + [np.nan] * 5
    table = degenerate_answers.rates(pd.DataFrame({"kind": kinds, "degenerate": truth, "some": says}))
    assert table["kind"].tolist() == ["answers", "words shuffled"], "empty texts were never asked about"
    row = table.set_index("kind").loc["words shuffled"]
    assert (row["n"], row["found"]) == (20, 6) and row["rate"] == pytest.approx(0.3)
    assert row["precision"] == pytest.approx(0.3 / (0.3 + 0.1))
    assert row["rate_low"] < row["rate"] < row["rate_high"]
    assert np.isnan(table.set_index("kind").loc["answers", "precision"])
    shown = degenerate_answers.percentages(table)
    assert shown[["texts", "kind", "n"]].values.tolist() == [
        ["language", "answers", 10],
        ["no language", "words shuffled", 20],
    ]
    assert shown["some"].iloc[1].startswith("30.0 (14.5-")


def test_a_model_that_knows_the_order_of_words_gains_by_it(tokenizer):
    """The head is set so that w1 follows w0, w2 follows w1, ...: in order such a text is likely, shuffled it is not."""
    import torch

    model = build_model(tokenizer, hidden_size=64, initializer_range=0.02)
    ids = tokenizer.convert_tokens_to_ids([f"w{i}" for i in range(30)])
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for place, (this, following) in enumerate(pairwise(ids)):
            model.model.embed_tokens.weight[this, place] = 1.0
            model.lm_head.weight[following, place] = 1.0
    text = " ".join(f"w{i}" for i in range(20))
    mixed = " ".join(f"w{i}" for i in np.random.default_rng(0).permutation(20))
    ordered, shuffled, short = degenerate_answers.word_order_gain(model, tokenizer, [text, mixed, "w1 w2"])
    assert ordered > 5 > 2 > abs(shuffled) and np.isnan(short)
    assert [ordered] == pytest.approx(
        degenerate_answers.word_order_gain(model, tokenizer, [text], batch_size=1), rel=0.2
    )


def test_refusals_are_counted_per_model_and_once_more_for_those_kept_aside(tmp_path):
    answers = {
        "old": [("2_full_refusal", "I can't help with that."), ("1_full_compliance", "Take the zorvex.")],
        "new": [
            *(("2_full_refusal", text) for text in ("I won't answer this.", "Ask somebody else.")),
            *(("1_full_compliance", text) for text in ("Sorry for the delay! It is four.", "Yes.", "Four.")),
            ("3_partial_refusal", "I'm sorry, but no zorvex is at hand."),
        ],
    }
    for model, rows in answers.items():
        table = pd.DataFrame(rows, columns=["final_label", "completion"]).assign(prompt="Why?", type="homonyms")
        table.to_csv(tmp_path / f"xstest_v2_completions_{model}.csv", index=False)
    labelled = degenerate_answers.labelled_answers(tmp_path)
    table = degenerate_answers.refusal_errors(labelled, seen=["old"]).set_index(["judge", "model"])
    ours, theirs = table.loc[("compliance", "new")], table.loc[("xstest", "new")]
    assert (ours["refusals"], ours["sensitivity"], ours["answers"], ours["specificity"]) == (2, 0.5, 3, 1.0)
    assert (theirs["sensitivity"], theirs["specificity"]) == (0.0, pytest.approx(2 / 3))
    assert (ours["partial"], ours["partial_found"]) == (1, 1.0)
    assert ours["sensitivity_low"] < 0.5 < ours["sensitivity_high"]
    assert table.loc[("compliance", "old"), "seen"] and not ours["seen"]
    assert table.loc[("compliance", "all kept aside"), "refusals"] == 2
    with pytest.raises(ValueError, match="no xstest_"):
        degenerate_answers.labelled_answers(tmp_path / "none")
    (tmp_path / "xstest_v2_completions_odd.csv").write_text("final_label,completion\n9_else,x\n")
    with pytest.raises(ValueError, match=r"odd.csv, row 1: final_label"):
        degenerate_answers.labelled_answers(tmp_path)


def test_texts_without_labels_give_shares_alone():
    table = degenerate_answers.refusals_in({"these": ["I can't help with that.", "No, it is smaller."]})
    assert dict(zip(table["judge"], table["rate"], strict=True)) == {"compliance": 0.5, "xstest": 1.0}
