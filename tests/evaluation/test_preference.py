"""Likelihoods of held-out rows: what a loop of one row at a time gives, and means of them that say what they say."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model, make_rows

from tasft_lib.evaluation.preference import (
    DEPTHS,
    PLACES,
    HeldOut,
    benign_by_place,
    cost_by_place,
    depth_table,
    likelihoods,
    preference_table,
)
from tasft_lib.evaluation.rates import mean_interval, rate

CHAT = (
    "{% for m in messages %}{{ m['role'] | replace('user', 'w1') | replace('assistant', 'w2') }} {{ m['content'] }} "
    "<eos> w3 {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture(scope="module")
def exact(tokenizer):
    return build_model(tokenizer).double().eval()


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    """Rows of 2 to 40 tokens."""
    unsafe, other = make_rows(13), make_rows(13, seed=1)
    toxic = [
        {"prompt": row["prompt"], "unsafe": row["completion"], "safe": safe}
        for row, safe in zip(unsafe, other["completion"], strict=True)
    ]
    benign = make_rows(9, seed=2).select_columns(["prompt", "completion"]).to_list()
    return HeldOut(toxic, benign, max_tokens=20, max_length=128)


def by_hand(model, prompt: list[int], completion: list[int]) -> list[float]:
    """log p of each token of the completion, one row, float64."""
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return [log_probs[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]


def test_they_are_those_of_a_loop_over_one_row_at_a_time(exact, tokenizer, held_out):
    table = likelihoods(exact, tokenizer, held_out, batch_size=4)
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    toxic, benign = (table[table["kind"] == kind].reset_index(drop=True) for kind in ("toxic", "benign"))
    assert toxic["row"].tolist() == list(range(13)) and benign["row"].tolist() == list(range(9))
    for row, found in zip(held_out.toxic, toxic.to_dict("records"), strict=True):
        safe, unsafe = (by_hand(exact, ids(row["prompt"]), ids(row[side])[:20]) for side in ("safe", "unsafe"))
        assert found["safe"] == pytest.approx(np.mean(safe), rel=1e-12)
        for k in DEPTHS:
            rest = np.mean(unsafe[k:]) if len(unsafe) > k else np.nan
            assert found[f"unsafe_{k}"] == pytest.approx(rest, rel=1e-12, nan_ok=True), k
    for row, nll in zip(held_out.benign, benign["nll"], strict=True):
        completion = [*ids(row["completion"]), tokenizer.eos_token_id]
        assert nll == pytest.approx(-np.mean(by_hand(exact, ids(row["prompt"]), completion)), rel=1e-12)
    assert toxic["nll"].isna().all() and benign[["safe", "unsafe_0"]].isna().all(axis=None)
    assert toxic["unsafe_16"].isna().any() and toxic["unsafe_16"].notna().any()


def test_the_places_of_an_answer_make_up_its_loss(exact, tokenizer, held_out):
    places = benign_by_place(exact, tokenizer, held_out, batch_size=4).pivot(index="row", columns="place", values="nll")
    whole = likelihoods(exact, tokenizer, held_out).query("kind == 'benign'")["nll"].to_numpy()
    ended = [row["completion"] + tokenizer.eos_token for row in held_out.benign]
    lengths = np.array([len(tokenizer(text)["input_ids"]) for text in ended])
    counts = [
        np.minimum(np.maximum(lengths - place.start, 0), (place.stop or 99) - place.start) for place in PLACES.values()
    ]
    summed = places[list(PLACES)].fillna(0).to_numpy() * np.stack(counts, axis=1)
    assert summed.sum(axis=1) / lengths == pytest.approx(whole, rel=1e-12)


def test_a_cost_by_place_is_against_plain_sft_of_the_same_row_seed_and_adapter():
    rows = [
        (method, adapter, seed, row, place, base + seed + row + extra)
        for adapter, base in (("narrow", 0.0), ("wide", 10.0))
        for seed in (0, 1)
        for row in (0, 1)
        for place, more in (("first token", 1.0), ("later ones", 0.25))
        for method, extra in (("sft", 0.0), ("emd", more * (2 if adapter == "wide" else 1)))
    ]
    table = cost_by_place(
        pd.DataFrame(rows, columns=["method", "adapter", "seed", "row", "place", "nll"]), ["method", "adapter"]
    ).set_index(["method", "adapter", "place"])["cost"]
    expected = {("emd", "narrow"): (1.0, 0.25), ("emd", "wide"): (2.0, 0.5), ("sft", "wide"): (0.0, 0.0)}
    for arm, costs in expected.items():
        assert (table[(*arm, "first token")], table[(*arm, "later ones")]) == costs


def test_neither_batches_nor_padding_matter(exact, tokenizer, held_out):
    alone = likelihoods(exact, tokenizer, held_out, batch_size=1)
    pd.testing.assert_frame_equal(likelihoods(exact, tokenizer, held_out, batch_size=100), alone, rtol=1e-12)


def test_what_follows_the_cut_changes_nothing(exact, tokenizer, held_out):
    longer = [{**row, "safe": row["safe"] + "w1 w2 " * 15, "unsafe": row["unsafe"]} for row in held_out.toxic]
    cut = lambda rows: HeldOut(rows, held_out.benign[:1], max_tokens=1, max_length=128)  # noqa: E731
    first, second = (likelihoods(exact, tokenizer, cut(rows)) for rows in (held_out.toxic, longer))
    pd.testing.assert_frame_equal(first, second, rtol=1e-12)
    assert first["unsafe_0"].notna().any() and first["unsafe_1"].isna().all()


def test_messages_are_read_in_the_chat_template_without_the_end_of_the_turn(exact, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)

    def turn(role, text):
        return [{"role": role, "content": text}]

    chat = {"prompt": turn("user", "w5 w6"), "safe": turn("assistant", "w7 w8"), "unsafe": turn("assistant", "w9")}
    text = {"prompt": "w1 w5 w6 <eos> w3 w2 ", "safe": "w7 w8", "unsafe": "w9"}
    found = [
        likelihoods(exact, tokenizer, HeldOut([row], [{"prompt": "w1 ", "completion": "w2"}], 20, 128))
        for row in (chat, text)
    ]
    pd.testing.assert_frame_equal(*found, rtol=1e-12)


def told(safe: list[list[float]], unsafe: list[list[float]], nll: list[float]) -> pd.DataFrame:
    """Likelihoods of an arm: for each seed those of the answers, of one token each."""
    parts = []
    for seed, (s, u) in enumerate(zip(safe, unsafe, strict=True)):
        toxic = pd.DataFrame({"kind": "toxic", "row": range(len(s)), "safe": s, "unsafe_0": u})
        benign = pd.DataFrame({"kind": "benign", "row": range(len(nll)), "nll": nll})
        rest = {f"unsafe_{k}": np.nan for k in DEPTHS[1:]}
        parts.append(pd.concat([toxic, benign]).assign(method="emd", seed=seed, step=4, **rest))
    return pd.concat(parts, ignore_index=True)


def test_preference_counts_prompts_and_the_margin_says_by_how_much():
    safe, unsafe = [[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -1.0]], [[-2.0] * 4, [-2.0] * 4]
    row = preference_table(told(safe, unsafe, [1.0, 3.0]), ["method"]).iloc[0]
    # A tie is no preference; seeds are averaged, and the interval is theirs too.
    assert (row["preference"], row["preference_min"], row["preference_max"]) == (0.375, 0.25, 0.5)
    assert (row["preference_low"], row["preference_high"]) == rate(
        [True] + [False] * 3 + [True] * 2 + [False] * 2, [0] * 4 + [1] * 4
    )[1:3]
    assert (row["seeds"], row["preference_n"], row["margin_n"], row["benign_nll_n"]) == (2, 4, 4, 2)
    assert (row["margin"], row["margin_min"], row["margin_max"]) == (-0.125, -0.5, 0.25)
    assert row["margin_low"] < row["margin"] < row["margin_high"] and row["benign_nll"] == 2
    other = preference_table(told(unsafe, safe, [1.0, 3.0]), ["method"]).iloc[0]
    assert other["margin"] == -row["margin"] and other["preference"] == 1 - row["preference"] - 2 / 8


def test_what_it_costs_is_plain_sfts_loss_less_row_by_row():
    arm = told([[-1.0], [-1.0]], [[-2.0], [-2.0]], [1.5, 3.5])
    early, late = (arm.assign(method="sft", step=step) for step in (2, 6))
    late["nll"] = late["nll"] - 0.5 * (1 + late["seed"])
    table = preference_table(pd.concat([arm, early, late]), ["method", "step"]).set_index(["method", "step"])
    row = table.loc["emd", 4]
    assert (row["benign_cost"], row["benign_cost_min"], row["benign_cost_max"]) == (0.75, 0.5, 1.0)
    # The rows' own spread is no part of it, that of the seeds is.
    assert (row["benign_cost_low"], row["benign_cost_high"]) == pytest.approx(mean_interval([0.5, 1.0])[1:])
    assert row["benign_nll_low"] == 1.5
    assert table.loc[("sft", 6), "benign_cost"] == 0 and table.loc[("sft", 2), "benign_cost"] == 0.75
    alone = preference_table(arm, ["method"]).iloc[0]
    assert np.isnan(alone["benign_cost"]) and alone["benign_nll"] == 2.5


def test_the_margins_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(60):
        margins = rng.normal(-0.3, 1.0, 40)
        row = preference_table(told([margins.tolist()], [[0.0] * 40], [1.0, 2.0]), ["method"]).iloc[0]
        hits.append(row["margin_low"] <= -0.3 <= row["margin_high"])
    assert np.mean(hits) >= 0.87


def test_rows_that_could_not_be_read_are_in_no_mean():
    nan = float("nan")
    row = preference_table(told([[nan, -1.0, -1.0]], [[-2.0, nan, -2.0]], [nan, 2.0]), ["method"]).iloc[0]
    assert (row["preference"], row["preference_n"], row["margin"], row["margin_n"]) == (1, 1, 1, 1)
    assert (row["benign_nll"], row["benign_nll_n"]) == (2, 1) and np.isnan(row["benign_nll_low"])


def test_depth_has_a_row_for_every_place_that_an_answer_reaches(exact, tokenizer, held_out):
    table = likelihoods(exact, tokenizer, held_out).assign(method="emd", seed=0)
    depth = depth_table(table, ["method"]).set_index("k")
    assert depth.index.tolist() == list(DEPTHS) and depth["rest_n"].is_monotonic_decreasing
    assert depth["rest"].tolist() == pytest.approx([table[f"unsafe_{k}"].mean() for k in DEPTHS])
    assert depth_table(told([[-1.0]], [[-2.0]], [1.0]), ["method"])["k"].tolist() == [0]
