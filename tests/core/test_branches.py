"""Branch and recover against a dense reference written down once more, in every layout; where and how rows branch."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import build_model, make_rows
from datasets import Dataset
from test_trainer import assert_same_gradient, config, gradient_step

from tasft_lib import TASFTTrainer


def recover_rows(n=12):
    """Rows of which every third is unsafe and has a recovery of another length."""
    words = make_rows(n, seed=5)["completion"]
    return Dataset.from_list(
        [row | {"recovery": None if row["label"] else words[i]} for i, row in enumerate(make_rows(n).to_list())]
    )


def options(**changes):
    return {"penalty": "recover", "penalty_weight": 2.0, "branch_depth": 4, "per_device_train_batch_size": 12} | changes


def reference(model, tokenizer, rows, places, *, margin=1.0):
    """(NLL per benign token, Σ (pull + push) / rows, pull) of the rows, which branch after `places` tokens; float64."""
    head = model.get_output_embeddings().weight.detach()
    unit = head / head.norm(dim=1, keepdim=True).clamp(min=1e-6)
    nll, n_tokens, pulls, penalties = 0.0, 0, [], []

    def log_probs(context, answer):
        ids = torch.tensor(context + answer)
        return model(ids[None]).logits[0, len(context) - 1 : -1].log_softmax(-1)

    for row, k in zip(rows, places, strict=True):
        x, end = tokenizer(row["prompt"])["input_ids"], [tokenizer.eos_token_id]
        u = tokenizer(row["completion"])["input_ids"]
        answer = (u if row["label"] else tokenizer(row["recovery"])["input_ids"]) + end
        log_p = log_probs(x + ([] if row["label"] else u[:k]), answer)
        log_p_y = log_p[range(len(answer)), answer]
        if row["label"]:
            nll, n_tokens = nll - log_p_y.sum(), n_tokens + len(answer)
            continue
        distance = (log_p[0].exp() @ unit - unit[u[k]]).square().sum() / 2
        pulls.append(-log_p_y.mean())
        penalties.append(pulls[-1] + (0 if u[k] == answer[0] else (margin - distance).clamp(min=0)))
    return nll / n_tokens, sum(penalties) / len(rows), sum(pulls) / len(pulls)


def places_of(trainer, rows, tokenizer):
    """How many tokens of its unsafe answer each prepared row begins with."""
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    return [row["labels"].index(next(y for y in row["labels"] if y != -100)) - lengths[row["_tasft_row"]]
            for row in trainer.train_dataset]  # fmt: skip


def prepared(rows, tokenizer, tmp_path, **changes):
    args = config(tmp_path, **options(**changes))
    return TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("loss_head", ["fused", "dense"])
@pytest.mark.parametrize("margin", [1.0, 0.0])
def test_the_step_is_the_gradient_of_pull_and_push(margin, loss_head, tokenizer, tmp_path):
    rows = recover_rows()
    trainer = prepared(rows, tokenizer, tmp_path)
    places = places_of(trainer, rows, tokenizer)
    assert (
        0 in places[::3] and max(places) > 0 and not any(p for p, row in zip(places, rows, strict=True) if row["label"])
    )
    args = config(tmp_path, **options(branch_margin=margin, loss_head=loss_head))
    log, gradient = gradient_step(build_model(tokenizer), args, rows, tokenizer)
    model = build_model(tokenizer).double()
    nll, penalty, _ = reference(model, tokenizer, rows, places, margin=margin)
    loss = nll + 2 * penalty
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, parameters)
    assert_same_gradient({n: g.double() for n, g in gradient.items()}, dict(zip(names, expected, strict=True)))


def test_packed_padding_free_and_accumulated_steps_are_the_padded_one(tokenizer, tmp_path):
    rows = recover_rows()
    padded, expected = gradient_step(build_model(tokenizer), config(tmp_path, **options()), rows, tokenizer)
    layouts = {
        "padding-free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "max_length": 64},
        "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        "in eights": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
        "stratified": {"unsafe_per_batch": 4},
    }
    for layout, changes in layouts.items():
        args = config(tmp_path, **options(**changes))
        log, gradient = gradient_step(build_model(tokenizer), args, rows, tokenizer)
        for name in ("loss", "nll", "penalty", "unsafe_log_prob", "unsafe_rows"):
            assert log[name] == pytest.approx(padded[name], rel=1e-5), (layout, name)
        assert_same_gradient(gradient, expected)


def test_rows_branch_at_random_places_that_seed_and_row_decide(tokenizer, tmp_path):
    """Half of them before the answer begins, the others evenly up to the depth; the recovery is learned to its end."""
    row = {"prompt": "w1 w2 ", "completion": " ".join(f"w{i}" for i in range(10, 30)), "label": False}
    rows = Dataset.from_list([row | {"recovery": "w40 w41"}] * 400)
    trainer = prepared(rows, tokenizer, tmp_path, branch_depth=5, max_length=None)
    places = places_of(trainer, rows, tokenizer)
    counts = Counter(places)
    assert abs(counts[0] - 200) < 4 * 10 and set(counts) == set(range(6))
    assert max(counts[k] for k in range(1, 6)) < 2 * min(counts[k] for k in range(1, 6))
    ids = tokenizer.convert_tokens_to_ids
    for prepared_row, k in zip(trainer.train_dataset, places, strict=True):
        begun = ids(["w1", "w2", *(f"w{i}" for i in range(10, 10 + k))])
        assert prepared_row["input_ids"] == begun + ids(["w40", "w41", "<eos>"])
        assert prepared_row["labels"] == [-100] * len(begun) + ids(["w40", "w41", "<eos>"])
        assert prepared_row["pushed"] == [-100] * len(begun) + [ids(f"w{10 + k}"), -100, -100]
    again, other = (prepared(rows, tokenizer, tmp_path, max_length=None, seed=seed, branch_depth=5) for seed in (42, 7))
    assert places == places_of(again, rows, tokenizer) != places_of(other, rows, tokenizer)
    # No deeper than the answer, nor than leaves room for the recovery.
    short = prepared(rows.map(lambda _: {"completion": "w10 w11 w12"}), tokenizer, tmp_path, branch_depth=9)
    assert set(places_of(short, rows, tokenizer)) == {0, 1, 2}
    narrow = prepared(rows, tokenizer, tmp_path, max_length=8)
    assert set(places_of(narrow, rows, tokenizer)) == {0, 1, 2, 3}


def test_a_token_is_not_pulled_and_pushed_at_once(tokenizer, tmp_path):
    row = {"prompt": "w1 ", "completion": "w2 w3", "label": False, "recovery": "w2 w4"}
    rows = prepared(Dataset.from_list([row] * 50), tokenizer, tmp_path).train_dataset
    pushed = {tuple(y for y in row["pushed"] if y != -100) for row in rows}
    assert pushed == {(), (tokenizer.convert_tokens_to_ids("w3"),)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.remove_columns("recovery"), r"^train, row 1: unsafe, and no recovery"),
        (lambda rows: rows.map(lambda row, i: {"recovery": "" if i == 3 else row["recovery"]}, with_indices=True),
         r"^train, row 4: unsafe"),
        (lambda rows: rows.to_iterable_dataset(), "no streamed or tokenised"),
    ],
)  # fmt: skip
def test_rows_that_cannot_branch_are_refused_in_one_line(change, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        prepared(change(recover_rows()), tokenizer, tmp_path)
    assert "\n" not in str(error.value)


def test_messages_branch_inside_the_assistants_turn(tokenizer, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1' if m['role'] == 'user' else 'w2' }} {{ m['content'] }} "
        "{{ '<eos> w9 ' }}{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )

    def turn(role, text):
        return [{"role": role, "content": text}]

    row = {"prompt": turn("user", "w5"), "completion": turn("assistant", "w10 w11 w12"), "label": False}
    rows = Dataset.from_list([row | {"recovery": turn("assistant", "w40 w41")}] * 40)
    seen = {tokenizer.decode(row["input_ids"]) for row in prepared(rows, tokenizer, tmp_path).train_dataset}
    begun = ["", "w10 ", "w10 w11 "]
    assert seen == {f"w1 w5 <eos> w9 w2 {start}w40 w41 <eos> w9" for start in begun}


def test_it_is_learned_and_leaves_an_answer_that_has_begun(tokenizer, tmp_path):
    torch.manual_seed(0)
    rows = recover_rows()
    args = config(tmp_path, **options(max_steps=60, optim="adamw_torch", learning_rate=5e-3, penalty_weight="auto"))
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "penalty" in log]
    assert trainer.penalty_weight == pytest.approx(3) and logs[-1]["penalty"] < 0.2 * logs[0]["penalty"]
    assert np.isfinite(logs[-1]["loss"])
