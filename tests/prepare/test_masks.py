"""What `doctor --show` shows is what the trainer does to the rows: the trainer itself is asked."""

import json

import pytest
from datasets import Dataset

from tasft_lib import cli
from tasft_lib.prepare.masks import first_of_each, masks
from tasft_lib.records import data, forms


@pytest.fixture(scope="module")
def rows() -> Dataset:
    rows = [
        {"prompt": "w1 w2 ", "completion": "w3 w4 w5", "label": False},
        {"prompt": "w1 ", "completion": "w6 w7", "label": True},
        {"prompt": "w2 w3 w4 w5 w6 w7 w8 w9 ", "completion": "w1", "label": False},
    ]
    return forms.to_training_rows(Dataset.from_list(rows), label=None, source="f.json", with_place=True)


def uses(row) -> list[tuple[str, str]]:
    return list(zip(row.tokens, row.uses, strict=True))


def test_masks_are_those_of_training(rows, tokenizer):
    unsafe, benign, dropped = masks(rows, tokenizer, max_length=8)
    read, learnt, penalised = ([(word, use) for word in words.split()] for words, use in (
        ("w1 w2", "read"), ("w6 w7 <eos>", "learnt"), ("w3 w4 w5", "penalised")
    ))  # fmt: skip
    assert uses(unsafe) == [*read, *penalised, ("<eos>", "read")]
    assert uses(benign) == [read[0], *learnt]
    assert dropped.tokens == [] and dropped.title.startswith("f.json: row 3: left out, max_length=8")
    assert unsafe.title == "f.json: row 1: unsafe, 6 tokens: 3 read, 3 penalised"

    unsafe, benign, _ = masks(rows, tokenizer, max_length=5, penalize_eos=True, penalty_first_tokens=2)
    assert uses(unsafe) == [*read, *penalised[:2], ("w5", "read")] and unsafe.title.endswith("ends at max_length=5")
    assert uses(benign) == [read[0], *learnt], "benign rows keep their end"
    assert uses(masks(rows, tokenizer, max_length=8, penalize_eos=True)[0])[-1] == ("<eos>", "penalised")


def test_a_pull_is_learnt_and_a_recovery_stands_behind_what_it_leaves(tokenizer):
    rows = [
        {"prompt": "w1 ", "completion": "w2 w3 w4 w5", "label": False, "recovery": f"w{10 + i} w9"} for i in range(8)
    ]
    rows = forms.to_training_rows(Dataset.from_list(rows), label=None, source="f.json", with_place=True)
    assert {use for row in masks(rows, tokenizer, penalty="imitation") for use in row.uses[1:]} == {"learnt"}
    shown = masks(rows, tokenizer, penalty="recover", branch_depth=2)
    depths = set()
    for i, row in enumerate(shown):
        depth = len(row.tokens) - 4
        depths.add(depth)
        assert row.tokens == ["w1", *["w2", "w3"][:depth], f"w{10 + i}", "w9", "<eos>"]
        assert row.uses == ["read"] * (1 + depth) + ["learnt"] * 3
        assert f"'w{2 + depth}' pushed away where the recovery begins" in row.title
    assert len(depths) > 1 and max(depths) <= 2
    plain = masks(rows, tokenizer)
    assert masks(rows, tokenizer, penalty="npo") == plain and not plain[0].pushed, "all that push away read alike"


def test_rows_that_training_packs_are_shown_packed(rows, tokenizer):
    alone = {row.place: row for row in masks(rows, tokenizer, max_length=12)}
    packed = masks(rows, tokenizer, max_length=12, packing=True)
    assert sorted(place for row in packed for place in row.place.split(", ")) == sorted(alone)
    together = next(row for row in packed if ", " in row.place)
    assert uses(together) == [pair for place in together.place.split(", ") for pair in uses(alone[place])]
    assert together.title.startswith(f"{together.place}: packed, {len(together.tokens)} tokens: ")


def test_masks_of_messages_are_in_the_chat_template(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' w9 ' }}{% endfor %}"
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    turns += [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]
    row = Dataset.from_list([{"messages": turns}])
    (shown,) = masks(forms.to_training_rows(row, label=False, source="f", with_place=True), tokenizer, max_length=64)
    assert shown.tokens == ["w1", "w9", "w2", "w9", "w3", "w9", "w4", "w5", "w9"]
    assert [i for i, use in enumerate(shown.uses) if use == "penalised"] == [6, 7], "neither earlier turns nor the end"


def test_tools_and_options_of_a_row_reach_the_template(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    options = "{% if tools %}w7 {{ tools[0].name }} {% endif %}{% if shy %}w8 {% endif %}"
    turns = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }} {% endfor %}"
    tokenizer.chat_template = options + turns
    asked = {"role": "user", "content": "w1"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "w2", "arguments": {"w": 1}}]}
    plain = Dataset.from_list([{"prompt": [asked], "completion": [{"role": "assistant", "content": "w3"}]}])
    called = Dataset.from_list(
        [{"messages": [asked, call], "tools": [{"name": "w5"}], "chat_template_kwargs": {"shy": True}}]
    )
    sides = [
        forms.to_training_rows(rows, label=label, source=f"{label}", with_place=True)
        for rows, label in ((plain, True), (called, False))
    ]
    shown = {row.label: row for row in masks(data.mix(*sides, seed=0), tokenizer, max_length=64)}
    assert uses(shown[True]) == [("w1", "read"), ("w3", "learnt")]
    assert uses(shown[False]) == [*((word, "read") for word in ("w7", "w5", "w8", "w1")), ("w2", "penalised")]


def test_rows_are_shown_in_colours_in_words_and_in_html(rows, tokenizer):
    shown = masks(first_of_each(rows, 1), tokenizer, max_length=64)
    assert [row.place for row in shown] == ["f.json: row 1", "f.json: row 2"]
    plain = shown[0].text(colours=False).splitlines()
    assert [line.split() for line in plain[1:]] == [["read", "w1|w2"], ["penalised", "w3|w4|w5"], ["read", "<eos>"]]
    assert "\033[31;1mw3\033[0m" in shown[0].text(colours=True)
    page = shown._repr_html_()
    assert page.count('title="penalised"') == 3 and "&lt;eos&gt;" in page and "<eos>" not in page


def test_doctor_shows_rows_and_says_of_a_doubled_bos(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    rows = [{"prompt": "w1 ", "completion": "w2 w3", "label": i > 0} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_name_or_path": str(tmp_path / "model"), "max_length": 16, "penalty_first_tokens": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"prompt_template": "none"}))
    doctor = ["doctor", str(tmp_path / "rows.jsonl"), "--show", "1"]
    cli.main([*doctor, "--config", str(tmp_path / "config.yaml")])
    out = capsys.readouterr().out
    assert "row 1: unsafe, 4 tokens: 3 read, 1 penalised" in out and "row 2: benign, 4 tokens: 1 read, 3 learnt" in out
    assert cli.main(doctor) == 1 and "--show needs --tokenizer" in capsys.readouterr().err

    (tmp_path / "config.yaml").write_text(json.dumps(config | {"prompt_template": "none", "penalty": "recover"}))
    assert cli.main([*doctor, "--config", str(tmp_path / "config.yaml")]) == 1
    assert "rows.jsonl: row 1: no recovery" in capsys.readouterr().err

    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w4 w5"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "label": False}))
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content + ' w9 ' }}{% endfor %}")
    config |= {"chat_template_path": str(tmp_path / "own.jinja"), "penalty_first_tokens": None}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    cli.main([*doctor, "--config", str(tmp_path / "config.yaml")])
    assert "row 1: unsafe, 5 tokens: 3 read, 2 penalised" in capsys.readouterr().out
