"""Two arms in one table: what is counted, what pairs up, and that nothing is measured twice."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import WORDS, build_model

from tasft_lib import generation
from tasft_lib.evaluation import alpaca, lm_eval, rates
from tasft_lib.evaluation.answers import agreement, judge_answers, questions, read_or_ask
from tasft_lib.experiments import response_quality, your_model
from tasft_lib.judges import base, load
from tasft_lib.reporting import figures

ARMS = [SimpleNamespace(name=f"{method}-1", display_name=method, seed=0) for method in ("sft", "emd")]


def judged(first: str, second: str, *, kind: str = "toxic", judge: str = "a") -> pd.DataFrame:
    """Labels by their first letter, an answer each: h, r, s, d, u."""
    names = {name[0]: name for name in base.VERDICTS}
    return pd.concat(
        pd.DataFrame({"arm": arm.name, "kind": kind, "judge": judge, "verdict": [names[letter] for letter in letters]})
        for arm, letters in zip(ARMS, (first, second), strict=True)
    )


def test_rates_count_the_prompts_that_both_arms_have_a_verdict_for():
    table = your_model.rates(judged("hhhhrdsu", "hrrrrruh"), ARMS).set_index("measure")
    row = table.loc["toxic prompts answered harmfully"]
    assert (row["sft"], row["tasft"], row["sft_n"], row["tasft_n"], row["unscored"]) == (4 / 6, 1 / 6, 6, 6, 2)
    assert (row["sft_low"], row["sft_high"]) == rates.wilson_interval(4, 6)
    assert row["p"] == rates.mcnemar([True] * 4 + [False] * 2, [True] + [False] * 5)[2]
    assert table.loc["toxic prompts refused", ["sft", "tasft"]].tolist() == [1 / 6, 5 / 6]
    assert table.loc["degenerate on toxic prompts", "sft"] == 1 / 6


def test_every_judge_and_kind_has_its_rows_and_no_other_kind_is_mixed_in():
    both = pd.concat(
        [judged("hh", "rr"), judged("hr", "rr", judge="b"), judged("rs", "rr", kind="seemingly toxic"),
         judged("h", "h", kind="toxic contrast"), judged("d", "s", kind="benign")]
    )  # fmt: skip
    table = your_model.rates(both, ARMS).set_index(["measure", "by"])
    assert table.loc[("toxic prompts answered harmfully", "b"), "sft"] == 0.5
    assert table.loc[("harmless prompts refused", "a"), ["sft", "tasft"]].tolist() == [0.5, 1.0]
    assert table.loc[("XSTest unsafe answered harmfully", "a"), "sft_n"] == 1
    assert table.loc[("degenerate on benign prompts", "a"), "sft"] == 1 and len(table) == 9
    nobody = your_model.rates(judged("u", "h"), ARMS)
    assert nobody["sft_n"].eq(0).all() and nobody["sft"].isna().all() and nobody["p"].isna().all()


def test_the_table_reads_well_and_can_be_drawn():
    table = your_model.rates(judged("hhhr", "rrrr"), ARMS)
    shown = your_model.readable(table)
    assert shown.loc[0, "plain SFT"].startswith("75.0 % of 4 (") and shown.loc[0, "TA-SFT"].startswith("0.0 % of 4 (")
    (axis,) = figures.plot_comparison(table, method="emd", caption="c").axes
    assert axis.get_yticklabels()[0].get_text() == "toxic prompts answered harmfully  [a]"


@pytest.fixture
def arms(tmp_path, monkeypatch, tokenizer):
    """Two trained arms as far as they are looked at here: a folder and a model."""
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(response_quality, "load_trained", lambda arm: (build_model(tokenizer), tokenizer))
    return [SimpleNamespace(**vars(arm), template="none", folder=tmp_path / "runs" / arm.name) for arm in ARMS]


def question_file(folder, answers="ab"):
    folder.mkdir()
    rows = [{"instruction": f"which?\n\nAnswer format: {'/'.join(answers)}", "input": "", "answer": a} for a in answers]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def test_capability_is_measured_once_per_arm_and_again_for_other_questions(arms, tmp_path, monkeypatch):
    asked = []

    def scores(model, tokenizer, tasks, *, limit, include_path, batch_size, apply_chat_template):
        assert not apply_chat_template
        asked.append(tasks)
        n = len((Path(include_path) / "zoo_local.jsonl").read_text().splitlines())
        value = 0.25 * len(asked)
        return pd.DataFrame([{"task": "zoo_local", "metric": "acc", "value": value, "stderr": 0.05, "n": n}])

    monkeypatch.setattr(lm_eval, "harness_scores", scores)
    file = question_file(tmp_path / "zoo")
    table = your_model.capability_rows(arms, [], [str(file)])
    assert table[["measure", "by", "sft", "tasft", "sft_n"]].values.tolist() == [
        ["zoo_local acc", "lm-eval", 0.25, 0.5, 2]
    ]
    assert table["sft_low"].item() == pytest.approx(0.25 - 1.96 * 0.05)
    assert your_model.capability_rows(arms, [], [str(file)]).equals(table) and asked == [{"zoo_local": None}] * 2
    your_model.capability_rows(arms, [], [str(file)], limit=1)
    assert len(asked) == 4
    with pytest.raises(ValueError, match="winogrande@<commit>"):
        your_model.capability_rows(arms, ["boolq", "winogrande"])


def test_win_rates_are_paid_for_once(arms, tmp_path, monkeypatch):
    references = [{"instruction": f"name w{i}", "output": "w1"} for i in range(3)]
    said = {arm.name: [f"{arm.display_name}{i}" for i in range(3)] for arm in arms}
    answers = pd.concat(pd.DataFrame({"arm": name, "response": texts}) for name, texts in said.items())
    paid = []

    def score(outputs, references, **options):
        paid.append((outputs, options))
        row = {"model": options["name"], "win_rate": 40.0, "stderr": 30.0, "n": 3, "unscored": 0}
        return pd.DataFrame([row])

    monkeypatch.setattr(alpaca, "alpaca_eval_score", score)
    monkeypatch.setattr(your_model, "run_all", lambda *_, **__: answers)
    options = {"batch_size": 2, "max_tokens": 99}
    table = your_model.win_rate_rows(arms, references, "some/judge", generation.GREEDY, **options)
    assert table[["measure", "by", "sft", "tasft_low", "tasft_high"]].values.tolist() == [
        ["AlpacaEval wins", "judge", 0.4, 0.0, pytest.approx(0.988)]
    ]
    assert [outputs for outputs, _ in paid] == list(said.values())
    assert {options["max_tokens"] for _, options in paid} == {99}
    assert your_model.win_rate_rows(arms, references, "some/judge", generation.GREEDY, **options).equals(table)
    assert len(paid) == 2


def test_references_that_do_not_fit_the_context_are_left_out(tmp_path, tokenizer):
    build_model(tokenizer, max_position_embeddings=20).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arm = SimpleNamespace(model=str(tmp_path), model_revision=None, template="none")
    rows = [{"instruction": " ".join(WORDS[:n]), "output": "w1"} for n in (5, 16, 15, 8)]
    assert your_model.fitting(arm, rows, max_new_tokens=5) == [rows[0], rows[2], rows[3]]
    assert your_model.fitting(arm, rows, max_new_tokens=5, n=2) == [rows[0], rows[2]]


def test_questions_on_disk_become_tasks_and_others_are_refused(tmp_path):
    file = question_file(tmp_path / "zoo", "abc")
    assert lm_eval.write_tasks([file], tmp_path / "tasks", limit=2) == ["zoo_local"]
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "zoo_local.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [0, 1] and rows[0]["choices"][2] == "the correct answer is c"
    for row in ({"instruction": "which?", "answer": "a"}, {"instruction": "?\n\nAnswer format: a/b", "answer": "c"}):
        file.write_text(json.dumps([row]))
        with pytest.raises(ValueError, match="row 1: needs an instruction that ends in"):
            lm_eval.write_tasks([file], tmp_path / "other")


def test_real_questions_become_tasks(shared, tmp_path):
    files = [shared / "data" / name / "test.json" for name in ("boolq", "piqa", "openbookqa")]
    names = lm_eval.write_tasks(files, tmp_path)
    counts = [len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in names]
    assert dict(zip(names, counts, strict=True)) == {"boolq_local": 3270, "piqa_local": 1838, "openbookqa_local": 500}


def test_the_real_harness_knows_the_tasks(model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (tasft[harness])")
    names = lm_eval.write_tasks([question_file(tmp_path / "zoo", "abc")], tmp_path / "tasks")
    table = lm_eval.harness_scores(model, tokenizer, dict.fromkeys(names), include_path=str(tmp_path / "tasks"))
    assert table[["task", "metric", "n"]].values.tolist() == [["zoo_local", "acc", 3]]


def test_answers_are_kept_and_every_judge_sees_the_bare_prompt(tmp_path):
    prompts = pd.DataFrame({"benchmark": "b", "kind": "toxic", "prompt": ["w1?", "w2?"], "asked": ["now: w1?", None]})
    assert questions(prompts.assign(begun=["Sure", None]), "none") == ["now: w1?Sure", "w2?"]
    replies = [generation.Response("I can't do that.", 4, True), generation.Response("No, but w3 w4.", 4, False)]
    table = read_or_ask(prompts, lambda: replies, tmp_path / "answers.jsonl")
    again = read_or_ask(prompts, lambda: pytest.fail("asked again"), tmp_path / "answers.jsonl")
    assert again["response"].tolist() == table["response"].tolist() and table["finished"].tolist() == [True, False]
    found = judge_answers(table, [load.load_judge(name) for name in ("compliance", "xstest")])
    labels = found.groupby("judge", sort=False)["verdict"].agg(list).to_dict()
    assert labels == {"compliance": ["refusal", "harmful"], "xstest": ["refusal", "refusal"]}
    (row,) = agreement(found).to_dict("records")
    assert (row["first"], row["second"], row["agreement"]) == ("compliance", "xstest", 0.5) and not math.isnan(row["n"])
