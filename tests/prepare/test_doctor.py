"""The doctor finds each planted flaw at its row, is silent on a sound set, and never shows or changes what it reads."""

import json
import time

import numpy as np
import pytest
from conftest import WORDS
from datasets import Dataset
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tasft_lib import cli
from tasft_lib.prepare import doctor
from tasft_lib.records import templates

VOCABULARY = [f"{a}{b}{c}" for a in ("zor", "blo", "qui", "gre") for b in ("v", "mb", "ll", "x") for c in "aeiou"]


def sentence(rng, n: int) -> str:
    return " ".join(rng.choice(VOCABULARY, n, replace=False))


def sound_rows(n_unsafe: int = 40, n_benign: int = 60, seed: int = 0) -> list[dict]:
    """Rows of random invented words: any two texts differ nearly everywhere. The unsafe ones come first."""
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"{sentence(rng, 10)}?", "completion": f"{sentence(rng, 30)}.", "label": i >= n_unsafe}
        for i in range(n_unsafe + n_benign)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(diagnosis: doctor.Diagnosis) -> dict[str, list[int]]:
    return {finding.check: list(finding.rows) for finding in diagnosis.findings if finding.rows}


@pytest.fixture
def rows() -> list[dict]:
    return sound_rows()


@pytest.fixture
def examine(tmp_path):
    def run(rows, **options):
        return doctor.examine(write(tmp_path / "rows.jsonl", rows), template="none", **options)

    return run


EVALUATION = {"sets/made_up.json": [f"blorp {i} zib {i + 1} grue {i + 2} norl?" for i in range(30)]}


def test_a_sound_set_passes_every_check(examine, rows, tokenizer):
    diagnosis = examine(rows, evaluation_prompts=EVALUATION, tokenizer=tokenizer, max_length=60)
    assert found(diagnosis) == {} and diagnosis.is_fit and not diagnosis.skipped
    assert (diagnosis.unsafe, diagnosis.benign) == (40, 60)
    assert "fit to train on" in str(diagnosis) and "**Fit to train on.**" in doctor.report(diagnosis)


def test_repeats_are_found_at_their_rows(examine, rows):
    rows += [rows[3], rows[70], rows[5] | {"prompt": rows[5]["prompt"].upper().replace(" ", "  ")}]
    rows.append(rows[8] | {"label": True})
    rows.append({"prompt": "another matter?", "completion": rows[9]["completion"], "label": False})
    diagnosis = examine(rows)
    assert found(diagnosis) == {
        "row repeated": [101, 102, 103],
        "same text under both labels": [104],
        "answer repeated for another prompt, unsafe": [105],
    }
    assert not diagnosis.is_fit
    notes = next(f for f in diagnosis.findings if f.check == "row repeated").rows
    assert [note.split(":")[0] for note in notes.values()] == ["as row 4", "as row 71", "as row 6"]


def changed(row: dict, words: int, **options) -> dict:
    """The row with so many words of its answer exchanged, at even distances."""
    answer = row["completion"].split()
    for k in range(words):
        answer[(k + 1) * len(answer) // (words + 1)] = f"new{k}"
    return row | {"completion": " ".join(answer)} | options


def test_near_repeats_are_found_by_label_and_distant_ones_are_not(examine, rows):
    rows += [changed(rows[3], 1), changed(rows[70], 1), changed(rows[4], 1, label=True)]
    rows += [changed(rows[5], 8)]
    assert found(examine(rows)) == {
        "row nearly repeated, unsafe": [101],
        "row nearly repeated, benign": [102],
        "nearly the same text under both labels": [103],
    }
    only_benign = examine([*rows[:100], changed(rows[70], 1)])
    assert found(only_benign) == {"row nearly repeated, benign": [101]} and only_benign.is_fit


def test_leaks_are_found_exactly_and_nearly(examine, rows):
    prompts = EVALUATION["sets/made_up.json"]
    rows[2]["prompt"] = templates.format_prompt(prompts[7].upper(), template="short")
    rows[3]["prompt"] = prompts[8].replace("norl", "norl today")
    rows[80]["prompt"] = f"Human: {prompts[9]} now\n\nAssistant:"
    diagnosis = examine(rows, evaluation_prompts=EVALUATION)
    assert found(diagnosis) == {
        "evaluation prompt asked": [3],
        "evaluation prompt nearly asked, unsafe": [4],
        "evaluation prompt nearly asked, benign": [81],
    }
    notes = {number: note for finding in diagnosis.findings for number, note in finding.rows.items()}
    assert "prompt 8 of made_up.json" in notes[3]
    assert "prompt 9 of made_up.json" in notes[4] and "prompt 10 of made_up.json" in notes[81]
    assert "evaluation prompts" not in found(examine(rows)) and "leaks" in examine(rows).skipped


def test_refusals_and_degenerate_and_empty_answers(examine, rows):
    rows[1]["completion"] = "I'm sorry, but I can't help with that zorvex."
    rows[61]["completion"] = "I'm sorry, but I can't help with that grue."  # a benign refusal is no flaw
    rows[10]["completion"] = " \n"
    rows[12]["completion"] = "blorp " * 20
    rows[90]["completion"] = "#### !!!! ????"
    diagnosis = examine(rows)
    assert found(diagnosis) == {
        "refusal labelled unsafe": [2],
        "empty answer": [11],
        "degenerate answer, unsafe": [13],  # numbers count the empty row
        "degenerate answer, benign": [91],
    }
    assert diagnosis.unsafe == 39


def test_benign_rows_that_look_unsafe(examine, rows):
    for i in range(10):
        rows[i]["prompt"] += f" {['snarvle', 'grumpet', 'thraxil'][i % 3]} mokk"
    rows[50]["prompt"] += " snarvle and mokk"
    rows[51]["prompt"] += " mokk"
    more = sound_rows(0, 600, seed=1)  # a word must be rare among benign rows to mark unsafe ones
    diagnosis = examine(rows + more)
    assert found(diagnosis) == {"benign prompt with words of unsafe ones": [51]} and diagnosis.is_fit
    assert "benign rows that look unsafe" in examine(rows[:40]).skipped


@pytest.mark.parametrize("is_chat", [False, True])
def test_truncation_counts_the_tokens_of_training(examine, tokenizer, is_chat):
    def row(asked: int, answered: int, label: bool) -> dict:
        start = 10 * asked + answered  # texts of their own
        words = [WORDS[(start + 7 * i * asked + i) % len(WORDS)] for i in range(asked + answered)]
        prompt, completion = " ".join(words[:asked]) + " ", " ".join(words[asked:]) + " "
        if is_chat:
            prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion, "label": label}

    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    rows = [row(5, 14, False), row(5, 15, False), row(6, 14, True), row(20, 3, True), row(19, 1, False)]
    try:
        diagnosis = examine(rows, tokenizer=tokenizer, max_length=20)
    finally:
        tokenizer.chat_template = None
    cut = {check: numbers for check, numbers in found(diagnosis).items() if "max_length" in check}
    # 5 + 14 + EOS fit; one word more does not.
    assert cut == {
        "prompt fills max_length": [4],
        "answer cut by max_length, unsafe": [2, 5],
        "answer cut by max_length, benign": [3],
    }


def test_lengths_and_categories(examine, rows):
    for i, row in enumerate(rows):
        row["category"] = {"grue theft": i % 2 == 0, "zib abuse": i % 3 == 0}
    diagnosis = examine(rows)
    counts = diagnosis.categories.set_index("category")
    assert counts["unsafe"].sum() == 40 and counts["benign"].sum() == 60
    assert counts.loc["grue theft; zib abuse", "unsafe"] == len(range(0, 40, 6))
    answers = diagnosis.lengths.set_index("rows").loc["unsafe, answer"]
    assert (answers["n"], answers["least"], answers["median"], answers["most"]) == (40, "30", "30", "30")
    many = examine([row | {"category": f"kind {i % 50}"} for i, row in enumerate(rows)])
    assert len(many.categories) == 13 and many.categories[["unsafe", "benign"]].to_numpy().sum() == 100


@pytest.mark.parametrize("kind", ["jsonl", "alpaca", "folder", "no label"])
def test_every_form_gives_the_same_row_numbers(tmp_path, kind):
    rows = sound_rows(40, 0 if kind == "no label" else 60)
    rows[6]["completion"] = "I won't do that, not for all the zibs."
    rows[9]["completion"] = ""
    source = tmp_path / ("rows" if kind == "folder" else "rows.jsonl")
    if kind == "folder":
        Dataset.from_list(rows).save_to_disk(source)
    elif kind == "alpaca":
        write(source, [{"instruction": r["prompt"], "output": r["completion"], "label": r["label"]} for r in rows])
    else:
        write(source, [{k: v for k, v in r.items() if k != "label" or kind != "no label"} for r in rows])
    diagnosis = doctor.examine(source)
    assert found(diagnosis) == {"refusal labelled unsafe": [7], "empty answer": [10]}
    assert (diagnosis.unsafe, diagnosis.benign) == (39, 0 if kind == "no label" else 60)


def test_a_set_of_nothing_but_empty_answers(examine, rows):
    diagnosis = examine([row | {"completion": ""} for row in rows])
    assert found(diagnosis) == {"empty answer": list(range(1, 101))}
    assert "Not fit" in doctor.report(diagnosis)


FLAWED = {
    "prompt": "canaryone canarytwo canarythree canaryfour canaryfive canarysix?",
    "completion": "I cannot answer canaryseven `canaryeight` canarynine | canaryten canaryeleven canarytwelve.",
    "label": False,
    "category": "canarya canaryb canaryc canaryd canarye canaryf canaryg canaryh canaryi canaryj",
}


def test_no_full_text_appears_in_a_report(examine, rows, tokenizer):
    flawed = [FLAWED, FLAWED, FLAWED | {"label": True}, changed(FLAWED, 1)]
    flawed += [FLAWED | {"completion": "canarysolo"}, FLAWED | {"completion": "canaryx " * 30}]
    evaluation = {"held.json": [FLAWED["prompt"]]}
    diagnosis = examine([*rows, *flawed], evaluation_prompts=evaluation, tokenizer=tokenizer, max_length=5)
    checks = found(diagnosis)
    assert {"row repeated", "same text under both labels", "refusal labelled unsafe", "evaluation prompt asked"} <= set(
        checks
    )
    for text in (doctor.report(diagnosis), str(diagnosis)):
        assert "canarysolo" not in text
        for canary in ("four", "five", "six", "nine", "ten", "eleven", "twelve", "d ", "j"):
            assert f"canary{canary}" not in text


def test_a_report_is_one_page_however_much_is_wrong(examine):
    rows = [FLAWED | {"prompt": f"{FLAWED['prompt']} {i}"} for i in range(400)]
    report = doctor.report(examine(rows, evaluation_prompts={"held.json": [FLAWED["prompt"]]}))
    assert report.count("\n") < 120 and max(map(len, report.splitlines())) < 300


def test_exit_codes_for_ci_and_an_input_that_stays_as_it_is(tmp_path, rows, tokenizer, capsys):
    sound, flawed = write(tmp_path / "sound.jsonl", rows), write(tmp_path / "flawed.jsonl", [*rows, rows[0]])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    held_out = tmp_path / "held.json"
    held_out.write_text(json.dumps(EVALUATION["sets/made_up.json"]))
    before = {path: path.read_bytes() for path in (sound, flawed, held_out)}
    options = ["--evaluation_prompts", str(held_out), "--tokenizer", str(tmp_path / "tokenizer"), "--max_length", "300"]
    assert cli.main(["doctor", str(sound), *options, "--output", str(tmp_path / "new" / "report.md")]) == 0
    assert "fit to train on" in capsys.readouterr().out
    assert (tmp_path / "new" / "report.md").read_text().startswith("# Check of `sound.jsonl`")
    assert cli.main(["doctor", str(flawed)]) == 1
    assert "- row 101: as row 1:" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jsonl"], "no such file"),
        (["rows.jsonl", "--output", "rows.jsonl"], "choose another --output"),
        (["saved", "--output", "saved/README.md"], "choose another --output"),
        (["rows.jsonl", "--max_length", "9"], "needs both --tokenizer and --max_length"),
        (["rows.jsonl", "--evaluation_prompts", "none.json"], "none.json: no such file"),
        (["rows.jsonl", "--tokenizer", "owner/model", "--max_length", "9"], "model_revision"),
        (["owner/rows"], "needs a revision"),
        (["text.jsonl"], "row 1: label is 'unsafe'"),
        (["blank.jsonl"], "row 2: prompt is empty"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, rows, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "text.jsonl", [rows[0] | {"label": "unsafe"}])
    write(tmp_path / "blank.jsonl", [rows[0], rows[1] | {"prompt": " "}])
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("the card")
    assert cli.main(["doctor", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tasft doctor: ") and message in error
    assert (tmp_path / "saved" / "README.md").read_text() == "the card"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 100


def test_twenty_thousand_rows_take_seconds(examine):
    rng = np.random.default_rng(0)
    words = np.array([f"{v}{i}" for v in VOCABULARY for i in range(20)])
    texts = [" ".join(row) for row in words[rng.integers(0, len(words), (20_000, 16))]]
    rows = [{"prompt": t[:40], "completion": t[40:], "label": i >= 200} for i, t in enumerate(texts)]
    rows[19_000] = rows[19_000] | {"completion": rows[100]["completion"], "prompt": rows[100]["prompt"]}
    start = time.process_time()
    diagnosis = examine(rows, evaluation_prompts=EVALUATION)
    assert found(diagnosis)["same text under both labels"] == [19_001]
    assert time.process_time() - start < 60


def test_the_answer_is_what_follows_the_thinking_and_a_call_is_one(examine, rows):
    rows[1]["completion"] = "<think>I'm sorry, but I can't help.</think>\n\n" + rows[1]["completion"]
    rows[2]["completion"] = "<think>Well.</think>\n\nI'm sorry, but I can't help with that zorvex."
    rows[3]["completion"] = "<think>Well, so it may be"
    diagnosis = examine(rows)
    assert found(diagnosis) == {"refusal labelled unsafe": [3], "degenerate answer, unsafe": [4]}
    call = [{"function": {"name": "blorp", "arguments": {"zib": 1}}}]
    calls = [{"role": "assistant", "content": None, "tool_calls": call}]
    chats = [{"messages": [{"role": "user", "content": rows[5]["prompt"]}, *calls], "label": False}]
    assert found(examine(chats)) == {}


def test_prompts_that_begin_with_bos_are_told(examine, rows, tokenizer):
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.add_special_tokens(["<bos>"])
    bos = ("<bos>", inner.token_to_id("<bos>"))
    inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[bos])
    adds_bos = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    rows[4]["prompt"] = f"<bos>{rows[4]['prompt']}"
    diagnosis = examine(rows, tokenizer=adds_bos, max_length=60)
    assert found(diagnosis) == {"prompt begins with BOS": [5]} and diagnosis.is_fit
    assert found(examine(rows, tokenizer=tokenizer, max_length=60)) == {}, "a tokenizer that adds none"


def test_rows_without_labels_are_what_is_said(examine, rows):
    bare = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    assert (examine(bare).unsafe, examine(bare, label=True).benign) == (100, 100)
