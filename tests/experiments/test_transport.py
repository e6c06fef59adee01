"""Earth mover's distances of next-token distributions."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_rows

from tasft_lib import losses
from tasft_lib.experiments import embedding_axis, emd_bound
from tasft_lib.records import forms


@pytest.fixture
def distributions():
    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(12, 60, generator=generator)).softmax(-1)
    unit = losses.unit_rows(torch.randn(60, 8, generator=generator))
    return probs, torch.randint(60, (12,), generator=generator), unit


def test_the_program_knows_distances_that_need_no_program():
    line = np.arange(4.0)
    cost = np.abs(line[:, None] - line)
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5])
    assert emd_bound.earth_movers_distance(p, q, cost) == pytest.approx(2)
    assert emd_bound.earth_movers_distance(p, p, cost) == pytest.approx(0)


@pytest.mark.parametrize("support", [5, 30, 60])
def test_the_exact_form_is_the_programs_optimum_and_the_bounds_lie_below(support, distributions):
    table = emd_bound.bounds_table(*distributions, support=support)
    assert len(table) == 12
    np.testing.assert_allclose(table["exact"], table["emd"], atol=1e-7)
    assert (table["jensen"] <= table["emd"] + 1e-9).all() and (table["paper"] < table["jensen"]).all()
    assert (table["paper"] > 0).all()


def test_mass_by_distance_is_all_of_it(distributions):
    probs, targets, unit = distributions
    table = emd_bound.mass_by_distance(probs, targets, unit)
    assert table["mass"].sum() == pytest.approx(1)
    assert table["mass"][0] == pytest.approx(probs.gather(1, targets[:, None]).mean().item())
    one_hot = torch.nn.functional.one_hot(targets, 60).float()
    assert emd_bound.mass_by_distance(one_hot, targets, unit)["mass"].tolist() == [1] + [0] * 7


def test_summary_is_what_the_penalties_are(distributions):
    probs, targets, unit = distributions
    summary = emd_bound.summary(probs, targets, unit)
    assert summary["emd_exact"] == pytest.approx(-losses.emd_exact(probs.log(), targets, unit).mean().item(), rel=1e-5)
    assert summary["squared_distance"] == pytest.approx(-losses.emd(probs.log(), targets, unit).mean().item(), rel=1e-5)


def test_distributions_are_the_models_at_the_unsafe_tokens(model, tokenizer):
    rows = make_rows(5, unsafe_every=1)
    n_tokens = sum(len(row["completion"].split()) for row in rows)
    probs, targets, places = emd_bound.unsafe_token_distributions(model, tokenizer, rows, n_tokens=10**6)
    assert probs.shape == (n_tokens, len(tokenizer)) and targets.shape == (n_tokens,)
    assert places.tolist() == [t for row in rows for t in range(len(row["completion"].split()))]
    words = [word for row in rows for word in row["completion"].split()]
    assert tokenizer.convert_ids_to_tokens(targets.tolist()) == words
    ids = tokenizer(rows[0]["prompt"] + rows[0]["completion"])["input_ids"]
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, len(rows[0]["prompt"].split()) - 1].softmax(-1)
    torch.testing.assert_close(probs[0], first)
    fewer, *_ = emd_bound.unsafe_token_distributions(model, tokenizer, rows, n_tokens=7)
    assert len(fewer) == 7
    with pytest.raises(ValueError, match="no unsafe row"):
        emd_bound.unsafe_token_distributions(model, tokenizer, rows.select([]), n_tokens=7)
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m.content }} {{ 'w9 <eos>' if m.role == 'assistant' }} {% endfor %}"
    messages = forms.to_training_rows(rows, label=None, template="chat", source="f")
    again = emd_bound.unsafe_token_distributions(model, chat, messages, n_tokens=10**6)
    assert again[1].equal(targets) and again[2].equal(places), "neither the prompt nor the end of the turn"
    torch.testing.assert_close(again[0], probs)


def test_an_axis_of_frequency_is_found_and_taken_away():
    generator = torch.Generator().manual_seed(0)
    meaning, axis = torch.randn(200, 16, generator=generator), torch.eye(16)[0]
    weight = meaning + torch.linspace(9, 1, 200)[:, None] * axis  # the first tokens are the most frequent
    counts = pd.Series(1, index=range(200))
    units = embedding_axis.geometries(weight, 1)
    table = embedding_axis.axis_table(units, counts).set_index("geometry")
    assert table.loc["lm_head", "mean_cosine"] > 0.4 and table.loc["lm_head", "mean_by_rank"] > 0.7
    assert table.loc["centred", "mean_cosine"] < 0.1 and table.loc["centred", "component_by_rank"] > 0.7
    assert abs(table.loc["isotropic"].drop("tokens")).max() < 0.4
    pairs = units["lm_head"] @ units["lm_head"].T
    assert table.loc["lm_head", "mean_cosine"] == pytest.approx(pairs.mean().item(), abs=1e-5)
    assert table.loc["lm_head", "sd_cosine"] == pytest.approx(pairs.std(correction=0).item(), abs=1e-5)
    cosines = embedding_axis.mean_cosines(units, counts)
    np.testing.assert_allclose(cosines.loc[cosines["geometry"] == "lm_head", "mean_cosine"], pairs.mean(1), atol=1e-5)


def test_tokens_are_counted_and_have_their_nearest_and_farthest(tokenizer):
    counts = embedding_axis.token_counts(tokenizer, ["w1 w2 w1 w1", "w2 w3 <eos>"])
    assert counts.tolist() == [3, 2, 1] and tokenizer.eos_token_id not in counts.index
    words = ["ant", "bee", "cow", "dig", "12"]
    named = type("Words", (), {"decode": staticmethod(lambda ids: words[ids[0]])})
    unit = {"lm_head": torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [-1, 0], [0.8, 0.6]])}
    table = embedding_axis.neighbours(unit, pd.Series(1, index=[0, 1, 2, 3, 4]), named, [1, 9], n=2)
    assert table.to_dict("records") == [
        {"geometry": "lm_head", "rank": 1, "token": "ant", "nearest": "'12' 'cow'", "farthest": "'dig' 'bee'"}
    ]


def test_the_measured_push_is_the_closed_form_of_each_penalty():
    torch.manual_seed(0)
    probs = torch.randn(40, 7).mul(2).softmax(-1)
    targets, place = torch.randint(7, (40,)), torch.arange(40) % 8
    unit = losses.unit_rows(torch.randn(7, 3))
    p = probs.gather(1, targets[:, None]).squeeze(1)
    distance = 1 - unit[targets] @ unit.T
    exact = p * (probs * distance).sum(1)  # ∂(−Σ P d)/∂z_y = p · Σ P d
    expected = {"gradient_ascent": 1 - p, "unlikelihood": p, "emd_exact": exact}
    table = emd_bound.push_by_part(probs, targets, place, unit, method="sft")
    table = table.set_index(["penalty", "part"])["push"]
    for penalty, push in expected.items():
        for part, (start, end) in emd_bound.PARTS.items():
            inside = (place >= start) & (place < end)
            assert table[penalty, part] == pytest.approx(push[inside].mean().item(), rel=1e-4)


def test_the_bound_pushes_on_a_token_as_its_algebra_says_where_the_rest_lies_on_one_other():
    p = torch.tensor([0.05, 1 / 3, 0.9])
    probs = torch.stack([p, 1 - p], 1)
    unit = torch.eye(2)  # cosine 0: 4 · p(1 − p)²
    for k in range(3):
        at = emd_bound.push_by_part(probs[[k]], torch.tensor([0]), torch.tensor([0]), unit, method="sft")
        push = at.set_index(["penalty", "part"])["push"]["emd", "first token"]
        assert push == pytest.approx((4 * p[k] * (1 - p[k]) ** 2).item(), rel=1e-4)
