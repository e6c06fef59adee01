"""Data in, training rows out: nothing is lost or mixed up on the way, and each flaw is refused in one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tasft_lib.records import data, forms, sources, templates, tokens

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets of ../shared/data are not here")


def refusal(function, *args, **options) -> str:
    """The message `function` refuses with, checked to be one line that ends in a remedy."""
    with pytest.raises(ValueError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and "; " in message, message
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def training_rows(n: int, label: bool, word: str = "blorp") -> Dataset:
    rows = [{"instruction": f"{word} number {i}", "output": f"answer {word} {i}"} for i in range(n)]
    return forms.to_training_rows(Dataset.from_list(rows), label=label, template="short", source="made up")


def chat(text: str, role: str = "user") -> list[dict]:
    return [{"role": role, "content": text}]


def mixture(**changes) -> Dataset:
    columns = {"prompt": ["ask a\n", "ask b\n"], "completion": ["say a", "say b"], "label": [True, False]}
    return Dataset.from_dict(columns | changes)


def test_alpaca_template_is_the_papers_to_the_letter():
    assert templates.format_prompt("Do {this}.", "to \\n that") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nDo {this}.\n\n### Input:\nto \\n that"
        "\n\n### Response:\n"
    )
    assert templates.format_prompt("Do this.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo this.\n\n### Response:\n"
    )


def test_short_and_none_templates():
    assert templates.format_prompt("Do.", template="short") == "### Instruction:\nDo.\n\n### Response:\n"
    assert templates.format_prompt("Do.", "x", template="short").endswith("\n\n### Input:\nx\n\n### Response:\n")
    assert templates.format_prompt("Do.", template="none") == "Do."
    assert "alpaca, short, none" in refusal(templates.format_prompt, "Do.", template="alpacca")


ROWS = [
    {"instruction": 'say "hi", twice', "input": "", "output": "hi\nhi"},
    {"instruction": "blorp\u2028it", "input": "a, b", "output": "né"},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ""])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        write(path, json.dumps(ROWS))
    elif suffix == ".jsonl":
        write(path, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))  # blank lines are no rows
    elif suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
    assert sources.read_rows(path).to_list() == ROWS


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_compressed_files_give_the_same_rows(tmp_path, suffix, compress):
    texts = {
        "rows.json": json.dumps(ROWS),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "list.jsonl": json.dumps(ROWS, indent=1),  # as hh-rlhf's red-team file
        "rows.csv": "prompt,completion,label\np,c,true\nq,d,0\n",
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(compress(text.encode()))
        rows = sources.read_rows(path)
        if name == "rows.csv":
            assert forms.to_training_rows(rows, label=None, source=path)["label"][:] == [True, False]
        else:
            assert rows.to_list() == ROWS
    assert forms.read_prompts(tmp_path / f"rows.json{suffix}") == ['say "hi", twice', "blorp\u2028it\n\na, b"]
    for name, content in {"cut.jsonl": path.read_bytes()[:-9], "plain.jsonl": b'{"a": "b"}'}.items():
        (tmp_path / f"{name}{suffix}").write_bytes(content)
        message = refusal(sources.read_rows, tmp_path / f"{name}{suffix}")
        assert f"{name}{suffix}" in message and "not a readable .jsonl file" in message


def zipped(*names: str, content: str = "prompt,completion\na,b\n") -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, content)
        return buffer.getvalue()


def test_a_zip_holds_one_file(tmp_path):
    for name, content in {
        "rows.csv.zip": zipped("rows.csv"),
        "rows.zip": zipped("folder/", "folder/rows.csv", "__MACOSX/folder/._rows.csv"),
        "rows.jsonl.zip": zipped("x", content='{"prompt": "a", "completion": "b"}'),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert sources.read_rows(tmp_path / name).to_list() == [{"prompt": "a", "completion": "b"}]
    for name, content in {"two.zip": zipped("a.csv", "b.csv"), "torn.zip": b"PK", "torn.csv.zip": b"PK"}.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(sources.read_rows, tmp_path / name)


@pytest.mark.parametrize(
    "name, text",
    [
        ("semicolon.csv", 'prompt;completion\n"a, b";c\n'),
        ("tab.csv", "prompt\tcompletion\na, b\tc\n"),
        ("told.csv", "sep=;\nprompt;completion\na, b;c\n"),
        ("tab.tsv", "prompt\tcompletion\na, b\tc\n"),
        ("comma.csv", 'prompt,completion\n"a, b",c\n'),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_cells_are_parted_as_the_header_has_them(tmp_path, name, text, mark):
    path = write(tmp_path / name, mark + text)
    assert sources.read_rows(path).to_list() == [{"prompt": "a, b", "completion": "c"}]
    labelled = write(tmp_path / name, text.replace("completion", "label").replace("c\n", "true\n"))
    rows = sources.read_rows(labelled).add_column("completion", ["d"])
    assert forms.to_training_rows(rows, label=None, source=labelled)["label"][:] == [True]


def test_a_long_cell_is_read(tmp_path):
    path = write(tmp_path / "rows.csv", f"prompt,completion\na,{'blorp ' * 30_000}\n")
    assert len(sources.read_rows(path)["completion"][0]) == 180_000


@pytest.mark.parametrize("name", ["Prompt", "prompt ", " PROMPT"])
def test_a_column_that_is_named_nearly_so_is_told(tmp_path, name):
    path = write(tmp_path / "rows.csv", f"{name},completion\na,b\n")
    rows = sources.read_rows(path)
    for message in (refusal(forms.to_training_rows, rows, label=True, source=path), refusal(forms.read_prompts, path)):
        assert message == f"{path}: the column {name!r} must be named prompt; rename it"


def test_a_saved_dict_is_read_by_split(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS), held=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "saved")
    assert (
        len(sources.read_rows(tmp_path / "saved")) == 2
        and len(sources.read_rows(tmp_path / "saved", split="held")) == 1
    )
    assert "train, held" in refusal(sources.read_rows, tmp_path / "saved", split="test")


def test_rows_may_differ_in_columns_and_numbers(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"output": "b", "n": 1}, ROWS[1] | {"n": 1.5}])
    assert sources.read_rows(path)["input"][:] == [None, "a, b"] and sources.read_rows(path)["n"][:] == [1, 1.5]


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("rows.json", "", "empty"),
        ("rows.json", "[]", "no rows"),
        ("rows.csv", "prompt,completion\n", "no rows"),
        ("rows.json", '{"prompt": "a"}', "list of rows"),
        ("rows.json", '[{"a": "b"},\n{"a" "b"}]', "line 2"),
        ("rows.json", '{"a": "b"}\n{"a": "b"}', "name it .jsonl"),
        ("rows.json", '[{"a": "b"}, ["c"]]', "row 2"),
        ("rows.jsonl", '{"a": "b"}\n\n{"a": \n', "line 3"),
        ("rows.jsonl", '{"a": "b"}\nnull\n', "row 2 is None"),
        ("rows.jsonl", '{"label": true}\n{"label": "yes"}\n', "row 2: label is 'yes'"),
        ("rows.jsonl", '{"a": 1}\n{"a": true}\n', "row 2: a is True"),
        ("rows.jsonl", '{"a": 1}\n{"a": %s}\n' % (30 * "1"), "row 2: a holds an integer of more than 64 bits"),
        ("rows.json", '[{"a": 1}, {"a": %s}]' % (5000 * "1"), "row 2: a holds an integer of more than 64 bits"),
        ("rows.jsonl", '{"a": [{"k": 1}]}\n{"a": [{"k": %s}]}\n' % (30 * "1"), "row 2: a holds an integer"),
        ("rows.jsonl", '{"a": "b"}\n\n{"a": "\\ud83d"}\n', "row 2: a holds half a character"),
        ("rows.json", '[{"a": "b"}, {"a": [{"b": "\\udc00"}]}]', "row 2: a is a list"),
        ("rows.json", '[{"\\ud83d": "b"}]', "a column's name holds half a character"),
        (
            "rows.json",
            '[{"a": "],["}, {"a": %s}]' % (5000 * "[" + 5000 * "]"),
            "row 2: lists or objects nested too deep",
        ),
        ("rows.jsonl", '{"a": []}\n{"a": %s}' % (5000 * "[" + 5000 * "]"), "row 2: lists or objects nested too deep"),
        ("rows.jsonl", '{"a": []}\n{"a": %s}' % (500 * "[" + 500 * "]"), "row 2: a holds lists or objects nested too"),
        ("rows.csv", "a,b,a\n1,2,3\n", "has the column a twice"),
        ("rows.csv", "a,b\n1,2\n3,4,5\n", "row 2 has more cells"),
        ("rows.csv", 'a,b\n1,2\n"3"x,4\n', "row 2: malformed CSV"),
        ("rows.parquet", "not parquet", "not a readable .parquet"),
        ("rows.txt", "a", "neither"),
    ],
)
def test_malformed_files_are_refused_by_name_and_place(tmp_path, name, text, expected):
    path = write(tmp_path / name, text)
    message = refusal(sources.read_rows, path)
    assert str(path) in message and expected in message


def test_missing_and_foreign_sources_are_refused(tmp_path):
    assert "no such file" in refusal(sources.read_rows, tmp_path / "absent.json")
    assert "save_to_disk" in refusal(sources.read_rows, tmp_path)
    (tmp_path / "latin.csv").write_bytes("prompt\nné\n".encode("latin-1"))
    assert "utf-8" in refusal(sources.read_rows, tmp_path / "latin.csv")


def test_hub_ids_must_be_pinned_and_are_passed_on(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        sources, "load_dataset", lambda *args, **options: asked.update(args=args, **options) or Dataset.from_list(ROWS)
    )
    assert "revision" in refusal(sources.read_rows, "owner/rows") and not asked
    assert "revision" in refusal(sources.read_rows, "owner/rows", revision="main") and not asked
    assert len(sources.read_rows("owner/rows", split="held", revision="0a1b2c", name="small")) == 2
    assert asked == {"args": ("owner/rows", "small"), "split": "held", "revision": "0a1b2c"}


def test_a_silent_hub_is_one_line(monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(sources, "load_dataset", fail)
    assert "owner/rows" in refusal(sources.read_rows, "owner/rows", revision="0a1b2c")


def test_a_gated_set_of_the_hub_says_what_to_do(monkeypatch):
    def fail(*args, **options):
        raise FileNotFoundError("Dataset 'owner/rows' is a gated dataset on the Hub. You must be authenticated.")

    monkeypatch.setattr(sources, "load_dataset", fail)
    message = refusal(sources.read_rows, "owner/rows", revision="0a1b2c")
    assert "accept its terms at https://huggingface.co/datasets/owner/rows" in message and "log in" in message


def test_alpaca_rows_become_prompt_completion_label():
    rows = forms.to_training_rows(Dataset.from_list(ROWS), label=False, source="rows.json")
    assert rows.to_list() == [
        {
            "prompt": templates.format_prompt(row["instruction"], row["input"]),
            "completion": row["output"],
            "label": False,
        }
        for row in ROWS
    ]
    bare = Dataset.from_list([{"instruction": "blorp", "output": "x"}])
    assert forms.to_training_rows(bare, label=True, source="f")["prompt"][:] == [templates.format_prompt("blorp")]


def test_prompt_completion_rows_pass_untouched_with_their_labels():
    rows = Dataset.from_list([{"id": 7, "label": v, "completion": f" c{v} ", "prompt": f"p{v}"} for v in (True, False)])
    assert forms.to_training_rows(rows, label=None, source="f").to_list() == [
        {"prompt": "pTrue", "completion": " cTrue ", "label": True},
        {"prompt": "pFalse", "completion": " cFalse ", "label": False},
    ]


def test_conversations_pass_untouched(tmp_path):
    prompt = chat("be", "system") + chat("blorp?")
    row = {"prompt": prompt, "completion": chat("yes", "assistant"), "label": False}
    path = write_jsonl(tmp_path / "chat.jsonl", [row, row | {"label": True}])
    rows = forms.to_training_rows(sources.read_rows(path), label=None, source=path)
    assert rows.to_list() == [row, row | {"label": True}]
    silent = row | {"completion": chat(" ", "assistant")}
    assert "row 1" in refusal(forms.to_training_rows, Dataset.from_list([silent]), label=None, source=path)
    mixed = Dataset.from_list([row | {"completion": "yes"}])
    assert "completion is text and prompt is messages" in refusal(
        forms.to_training_rows, mixed, label=None, source=path
    )


@pytest.mark.parametrize("text, expected", [("true,FALSE,True", [True, False, True]), ("1,0,0", [True, False, False])])
def test_csv_labels(tmp_path, text, expected):
    lines = [f"p{i},c{i},{label}\n" for i, label in enumerate(text.split(","))]
    path = write(tmp_path / "rows.csv", "prompt,completion,label\n" + "".join(lines))
    assert forms.to_training_rows(sources.read_rows(path), label=None, source=path)["label"][:] == expected


@pytest.mark.parametrize("value", ["yes", "2", "1.0", "", "safe"])
def test_other_csv_labels_are_refused(tmp_path, value):
    path = write(tmp_path / "rows.csv", f"prompt,completion,label\np,c,true\nq,d,{value}\n")
    message = refusal(forms.to_training_rows, sources.read_rows(path), label=None, source=path)
    assert f"{path}: row 2: label is {value!r}" in message


@pytest.mark.parametrize("value", ["yes", "false", "true", 1.0, 1, 0, None])
def test_labels_that_are_no_booleans_are_refused(tmp_path, value):
    rows = [{"prompt": "p", "completion": "c", "label": value}] * 2
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = refusal(forms.to_training_rows, sources.read_rows(path), label=None, source=path)
    assert f"{path}: row 1: label is {value!r}" in message
    assert "row 1: label" in refusal(forms.to_training_rows, Dataset.from_list(rows), label=False, source="rows.jsonl")


def test_a_missing_label_is_refused_in_its_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p"}])
    message = refusal(forms.to_training_rows, sources.read_rows(path), label=None, source=path)
    assert f"{path}: row 2: label is None" in message


def test_labels_may_not_contradict_the_file():
    rows = Dataset.from_list([{"prompt": "p", "completion": "c", "label": v} for v in (False, True)])
    assert "f.json: row 2: label is True" in refusal(forms.to_training_rows, rows, label=False, source="f.json")


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"instruction": "p"}, {"question": "p", "answer": "c"}])
def test_missing_columns_are_named(row):
    message = refusal(forms.to_training_rows, Dataset.from_list([row]), label=True, source="f.csv")
    wanted = "output" if "instruction" in row else "completion"
    assert "f.csv" in message and f"has the columns {', '.join(row)}; lacks" in message and wanted in message
    whole = Dataset.from_list([{"prompt": "p", "completion": "c"}])
    assert "lacks label" in refusal(forms.to_training_rows, whole, label=None, source="f.csv")
    rows = Dataset.from_list([{"prompt": 3, "completion": "c"}])
    assert "f: row 1: prompt is 3" in refusal(forms.to_training_rows, rows, label=True, source="f")


def test_empty_answers_are_refused_or_dropped_and_counted(caplog):
    rows = Dataset.from_list([{"instruction": f"p{i}", "output": o} for i, o in enumerate(["a", "", "b", " \n", None])])
    message = refusal(forms.to_training_rows, rows, label=True, source="f.json")
    assert "f.json: rows 2, 4, 5: output is empty" in message and "drop_empty" in message
    rows = rows.add_column("label", [True, True, False, True, True])
    kept = forms.to_training_rows(rows, label=None, template="none", source="f.json", drop_empty=True)
    assert kept.to_dict() == {"prompt": ["p0", "p2"], "completion": ["a", "b"], "label": [True, False]}
    assert "f.json: left out 3 of 5 rows" in caplog.text
    rows = Dataset.from_list([{"instruction": "a", "output": "b"}, {"instruction": " ", "output": "b"}])
    assert "row 2: instruction" in refusal(forms.to_training_rows, rows, label=True, source="f", drop_empty=True)


@pytest.mark.parametrize(
    "name, text",
    [
        ("stl.json", '{"instructions": ["b, \\"x\\"", "a", "a"], "inputs": []}'),
        ("list.json", '["b, \\"x\\"", "a", "a"]'),
        ("rows.json", '[{"prompt": "b, \\"x\\""}, {"prompt": "a"}, {"prompt": "a"}]'),
        ("rows.jsonl", '{"instruction": "b, \\"x\\"", "input": ""}\n{"instruction": "a"}\n{"instruction": "a"}'),
        ("upper.csv", 'id,Goal\n1,"b, ""x"""\n2,a\n3,a\n'),
        ("lower.csv", ',goal\n1,"b, ""x"""\n2,a\n3,a\n'),
    ],
)
def test_prompts_are_read_in_order_with_repetitions(tmp_path, name, text):
    assert forms.read_prompts(write(tmp_path / name, text)) == ['b, "x"', "a", "a"]
    path = write(tmp_path / "input.json", '[{"instruction": "Blorp this:", "input": "x"}]')
    assert forms.read_prompts(path) == ["Blorp this:\n\nx"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('["a", " "]', "row 2"),
        ('["a", 3]', "row 2"),
        ('{"instructions": []}', "list of rows"),
        ('[{"text": "a"}]', "has the columns text"),
        ('[{"prompt": "a"}, {"prompt": null}]', "row 2"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, text, expected):
    path = write(tmp_path / "prompts.json", text)
    message = refusal(forms.read_prompts, path)
    assert str(path) in message and expected in message


def test_mixtures_are_nested_and_keep_rows_together():
    benign, unsafe = training_rows(50, True), training_rows(400, False, "grue")
    small = data.mix(benign, unsafe, n_benign=20, n_unsafe=100, seed=3).to_list()
    large = data.mix(benign, unsafe, n_benign=20, n_unsafe=300, seed=3).to_list()
    assert len(small) == 120 and len(large) == 320
    assert all(row in large for row in small)
    assert sum(row["label"] for row in small) == 20
    source_rows = benign.to_list() + unsafe.to_list()
    assert all(row in source_rows for row in large)  # prompt, completion and label of one source row
    assert len({row["prompt"] for row in large}) == 320  # without replacement


def test_mixtures_follow_the_seed_and_are_shuffled():
    benign, unsafe = training_rows(100, True), training_rows(100, False, "grue")
    first, again, other = (data.mix(benign, unsafe, n_unsafe=50, seed=seed) for seed in (0, 0, 1))
    assert first.to_list() == again.to_list() and first.to_list() != other.to_list()
    assert set(first["prompt"]) != set(other["prompt"])
    assert 50 < sum(first["label"][:100]) < 85  # neither sorted nor blocked: 67 of the first 100 are expected benign


def test_visits_repeat_the_unsafe_rows_that_are_drawn_and_no_other():
    benign, unsafe = training_rows(20, True), training_rows(9, False, "grue")
    drawn = {"n_benign": 10, "n_unsafe": 4, "seed": 3}
    once, thrice = (data.mix(benign, unsafe, **drawn, unsafe_visits=n) for n in (1, 3))
    assert once.to_list() == data.mix(benign, unsafe, **drawn).to_list()
    prompts = Counter(once["prompt"])
    assert Counter(thrice["prompt"]) == {p: 3 if "grue" in p else 1 for p in prompts}
    checked = data.draw(benign, unsafe, **drawn, unsafe_visits=3, source="here")  # a visit is no repeated row
    assert checked.to_list() == thrice.to_list()
    assert "unsafe_visits=0" in refusal(data.mix, benign, unsafe, **drawn, unsafe_visits=0)


def test_mix_refuses_more_rows_than_there_are():
    benign, unsafe = training_rows(5, True), training_rows(3, False)
    message = refusal(data.mix, benign, unsafe, n_benign=5, n_unsafe=4, seed=0)
    assert "n_unsafe=4" in message and "3 unsafe rows" in message
    assert len(data.mix(benign, unsafe, n_unsafe=0, seed=0)) == 5
    message = refusal(data.mix, benign, unsafe.remove_columns("label"), seed=0)
    assert "the benign rows and the unsafe rows: differ in columns or types (label)" in message


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"prompt": ["a", "\n"]}, "row 2: prompt is empty"),
        ({"completion": ["", "b"]}, "row 1: completion is empty"),
        ({"completion": [1, 2]}, "row 1: completion is 1"),
        ({"label": [True, None]}, "row 2: label is None"),
        ({"label": ["true", "false"]}, "row 1: label is 'true'"),
        ({"label": [1, 0]}, "row 1: label is 1"),
        ({"label": [True, True]}, "no unsafe row"),
        ({"label": [False, False]}, "no benign row"),
        ({"prompt": ["a", "a"], "completion": ["b", "b"]}, "rows 1, 2: same text, labels contradict"),
        ({"prompt": ["a", "A."], "completion": ["b", " b"]}, "rows 1, 2: same text, labels contradict"),
    ],
)
def test_flawed_rows_are_refused(changes, expected):
    message = refusal(lambda: drawn(mixture(**changes)))
    assert message.startswith("f.jsonl: ") and expected in message


def drawn(rows: Dataset, **options) -> Dataset:
    sides = data.by_label(forms.to_training_rows(rows, label=None, source="f.jsonl", with_place=True))
    return data.draw(*sides, seed=0, source="f.jsonl", **options)


def test_sound_rows_pass_and_one_sided_ones_where_asked():
    assert drawn(mixture(), evaluation_prompts=["ask c"]).column_names == ["prompt", "completion", "label"]
    assert len(data.draw(training_rows(3, True), None, seed=0, source="f")) == 3
    assert "has no benign row" in refusal(lambda: data.check(training_rows(3, False), source="f"))
    assert "lacks label" in refusal(lambda: drawn(mixture().remove_columns("label")))


def test_a_drawn_row_is_named_by_its_own_file_and_number():
    """However the rows were drawn and shuffled, and whatever was left out before."""
    columns = {"source": "a.jsonl", "template": "none", "with_place": True}
    texts = [f"text {i}" for i in range(40)]
    answers = ["" if i == 2 else f"answer {i}" for i in range(40)]
    rows = Dataset.from_dict({"prompt": texts, "completion": answers})
    benign = forms.to_training_rows(rows, label=True, drop_empty=True, **columns)
    unsafe = Dataset.from_dict({"prompt": ["x", "y", "text 30"], "completion": ["x", "y", "answer 30!"]})
    unsafe = forms.to_training_rows(unsafe, label=False, **(columns | {"source": "b.jsonl"}))
    for seed in range(3):
        message = refusal(data.draw, benign, unsafe, seed=seed, source="a.jsonl with b.jsonl")
        assert {"a.jsonl: row 31", "b.jsonl: row 3"} == set(message.split(": same text")[0].split(" and ")), message
        message = refusal(data.draw, benign, unsafe.select([0]), seed=seed, source="a", evaluation_prompts=texts[3:])
        assert message.startswith("a.jsonl: rows ") and "and 32 more: the prompt is an evaluation" in message
        data.draw(benign, unsafe, n_benign=1, n_unsafe=1, seed=seed, source="a", evaluation_prompts=["zib"])


def test_repeated_rows_are_refused_and_can_be_removed():
    for again in (mixture(), mixture(prompt=["Ask a", "ask  b?"], completion=["“say A”", "Say b."])):
        repeated = Dataset.from_list([*mixture().to_list(), *again.to_list()])
        assert re.search("rows 1, 3: same text; remove|rows 2, 4: same text; remove", refusal(drawn, repeated))
        once, dropped = data.deduplicate(repeated)
        assert once.to_list() == mixture().to_list() == data.clean(repeated).to_list() and dropped == 2
    other_answer = mixture(prompt=["a", "a"])  # one prompt, two answers: no repetition
    assert data.deduplicate(other_answer)[1] == 0
    drawn(other_answer)
    contradiction = mixture(prompt=["a", "a"], completion=["b", "b"])  # is for `check` to refuse
    assert data.deduplicate(contradiction)[1] == 0
    sums = mixture(prompt=["a", "a"], completion=["2 + 2", "2 - 2"], label=[True, True])
    assert data.deduplicate(sums)[1] == 0


def test_messages_are_the_same_text_only_with_the_same_roles():
    rows = mixture(prompt=[chat("a"), chat("A!")], completion=[chat("b", "assistant")] * 2, label=[True, True])
    assert data.deduplicate(rows)[1] == 1
    rows = mixture(prompt=[chat("a"), chat("a", "system")], completion=[chat("b", "assistant")] * 2, label=[True, True])
    assert data.deduplicate(rows)[1] == 0


@pytest.mark.parametrize(
    "prompt",
    [
        templates.format_prompt("how  to blorp\nA grue?"),
        templates.format_prompt("How to blorp a grue", template="short"),
        templates.format_prompt("How to blorp a grue", "some input"),
        templates.format_prompt("How to", "blorp a grue"),
        "HOW TO BLORP A GRUE.",
        "Human: How to blorp a grue?\n\nAssistant:",
        chat("be kind", "system") + chat("How to blorp a grue?"),
    ],
)
def test_leaks_are_found_inside_templates(prompt):
    harmless = "How to blorp a grue without a zib?"
    is_chat = isinstance(prompt, list)
    other = chat(harmless) if is_chat else templates.format_prompt(harmless)
    completion = [chat("a", "assistant"), chat("b", "assistant")] if is_chat else ["a", "b"]
    rows = mixture(prompt=[other, prompt], completion=completion)
    evaluation = ["Where is the zib?", "How to blorp a grue?", "?"]
    message = refusal(data.check, rows, source="f", evaluation_prompts=evaluation)
    assert "f: row 2: " in message and "remove the row" in message and "grue" not in message
    kept, dropped = data.drop_leaks(rows, evaluation)
    assert kept.to_list() == rows.to_list()[:1] and dropped == 1
    data.check(kept, source="f", evaluation_prompts=evaluation, require_unsafe=False)


def test_prompts_that_only_look_alike_are_no_leaks():
    quoting = chat("How to blorp a grue?", "assistant") + chat("What?")
    chats = Dataset.from_list([{"prompt": quoting, "completion": [], "label": True}])
    lines = mixture(prompt=["Human: zib\n\nAssistant:", "Tell how to blorp a grue\n\n"])
    for rows in (chats, lines):
        assert data.drop_leaks(rows, ["How to blorp a grue?", "?!"])[1] == 0


def test_templated_evaluation_prompts_match_too():
    rows = mixture(prompt=[templates.format_prompt("blorp"), templates.format_prompt("zib")])
    assert data.drop_leaks(rows, [templates.format_prompt("zib", template="short")])[1] == 1
    assert data.drop_leaks(rows, [])[1] == 0


def word_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}>{% endif %}",
    )


@pytest.mark.parametrize("conversational", [False, True])
def test_completions_that_max_length_cuts_away_are_refused(conversational):
    rows = mixture(prompt=["one two", "one two three"])
    if conversational:
        columns = {"prompt": chat, "completion": lambda text: chat(text, "assistant")}
        rows = mixture(**{name: [into(text) for text in rows[name]] for name, into in columns.items()})
    full = 3 + conversational  # the chat template adds the token that opens the answer
    data.check(rows, source="f", tokenizer=word_tokenizer(), max_length=full + 1)
    data.check(rows, source="f", tokenizer=word_tokenizer(), max_length=None)
    message = refusal(data.check, rows, source="f", tokenizer=word_tokenizer(), max_length=full)
    assert "f: row 2: " in message and f"max_length={full}" in message


def test_rows_that_max_length_fills_can_be_dropped(caplog):
    rows = mixture(prompt=["one two", "one two three"])
    kept = tokens.drop_long(rows, word_tokenizer(), 3, source="f.json")
    assert kept["prompt"][:] == ["one two"] and "f.json: left out 1 of 2 rows" in caplog.text
    assert "drop_long" in refusal(data.check, rows, source="f", tokenizer=word_tokenizer(), max_length=3)
    assert tokens.drop_long(rows, word_tokenizer(), None, source="f") is rows


def test_messages_that_the_template_cannot_read_are_refused_by_row():
    tokenizer = word_tokenizer()
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = strict + "{{ m.content + ' ' }}{% endfor %}"
    answers = [chat("b", "assistant"), chat("c", "assistant")]
    rows = mixture(prompt=[chat("a"), chat("s", "system") + chat("a")], completion=answers)
    message = refusal(data.check, rows, source="f", tokenizer=tokenizer)
    assert message.startswith("f: row 2: the chat template can't read the messages (no system)")
    tokenizer.chat_template = None
    assert "f: row 1: messages, and the tokenizer has no chat template" in refusal(
        data.check, rows, source="f", tokenizer=tokenizer
    )


def test_a_call_that_the_template_passes_over_is_refused_by_row():
    tokenizer = word_tokenizer()
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zib", "arguments": {}}}]}]
    rows = Dataset.from_list([{"messages": [*chat("a"), *calls]}])
    rows = forms.to_training_rows(rows, label=True, source="f", with_place=True)
    message = refusal(tokens.prompt_lengths, rows, tokenizer, source="f")
    assert message.startswith("f: row 1: the answer calls a tool, and the chat template passes over calls")
    tokenizer.chat_template += "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endfor %}"
    assert tokens.prompt_lengths(rows, tokenizer, source="f") == [2]


def test_a_prompt_that_begins_with_bos_has_it_once():
    tokenizer = word_tokenizer()
    inner = tokenizer.backend_tokenizer
    inner.add_special_tokens(["<bos>"])
    bos = inner.token_to_id("<bos>")
    inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")
    rows = mixture(prompt=["<bos>a", "a <bos>"])
    drawn = data.draw(*data.by_label(rows), seed=0, source="f", tokenizer=tokenizer)
    assert sorted(drawn["prompt"][:]) == ["a", "a <bos>"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in sorted(drawn["prompt"][:])]
    assert [of.count(bos) for of in ids] == [1, 2]
    assert tokens.without_bos(rows, word_tokenizer()) is rows, "a tokenizer that adds none"


def test_fingerprint_is_of_the_contents_alone(tmp_path):
    rows = mixture()
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    reordered = rows.select_columns(["label", "completion", "prompt"])
    picked = Dataset.from_list([*rows.to_list(), *rows.to_list()]).select([2, 1])
    same = [sources.read_rows(tmp_path / "saved"), sources.read_rows(tmp_path / "rows.parquet"), reordered, picked]
    assert {data.fingerprint(other) for other in same} == {data.fingerprint(rows)}
    assert re.fullmatch("[0-9a-f]{64}", data.fingerprint(rows))
    changed = [mixture(label=[False, False]), mixture(completion=["say a", "say b "]), rows.select([1, 0])]
    assert len({data.fingerprint(other) for other in [rows, *changed]}) == 4


@pytest.fixture(scope="module")
def alpaca() -> Dataset:
    path = SHARED / "alpaca" / "alpaca_data.json"
    return forms.to_training_rows(sources.read_rows(path), label=True, source=path, drop_empty=True)


@needs_shared
def test_the_official_alpaca_file(alpaca):
    path = SHARED / "alpaca" / "alpaca_data.json"
    raw = sources.read_rows(path)
    assert len(raw) == 52_002 and len(alpaca) == 52_002 - 28
    message = refusal(forms.to_training_rows, raw, label=True, source=path)
    assert "and 23 more: output is empty" in message
    assert sum("### Input:" in prompt for prompt in alpaca["prompt"]) > 20_000
    assert data.deduplicate(alpaca)[1] == 0


@needs_shared
@pytest.mark.parametrize(
    "name, count, distinct",
    [
        ("safety_tuned_llamas/evaluation/I-MaliciousInstructions.json", 100, 98),
        ("safety_tuned_llamas/evaluation/I-CoNa.json", 178, 178),
        ("safety_tuned_llamas/evaluation/I-Controversial.json", 40, 40),
        ("safety_tuned_llamas/evaluation/I-Alpaca.json", 50, 50),
        ("safety_tuned_llamas/training/safety_only_data_Instructions.json", 2_483, 2_479),
        ("harmfulq/toxic_outs.json", 200, 200),
        ("xstest/xstest_prompts.csv", 450, 450),
        ("alpaca_eval/text_davinci_003_model_outputs.json", 805, 805),
        ("jailbreakbench/behaviors_harmful.csv", 100, 100),
        ("pair_advbench50/harmful_behaviors_custom.csv", 50, 50),
    ],
)
def test_the_real_prompt_files(name, count, distinct):
    prompts = forms.read_prompts(SHARED / name)
    assert (len(prompts), len(set(prompts))) == (count, distinct)
    if "xstest" in name:
        labels = sources.read_rows(SHARED / name)["label"][:]
        assert (labels.count("safe"), labels.count("unsafe")) == (250, 200)


@needs_shared
def test_evaluation_prompts_in_the_real_training_files(alpaca):
    stl = SHARED / "safety_tuned_llamas"
    held_out = forms.read_prompts(stl / "evaluation" / "I-Alpaca.json")
    options = {"source": "alpaca_data.json", "require_unsafe": False}
    message = refusal(data.check, alpaca, evaluation_prompts=held_out, **options)
    assert "and 45 more: the prompt is an evaluation prompt" in message
    kept, dropped = data.drop_leaks(alpaca, held_out)
    assert dropped == 50 and data.drop_leaks(kept, held_out)[1] == 0
    names = ("I-MaliciousInstructions", "I-CoNa", "I-Controversial")
    toxic = [prompt for name in names for prompt in forms.read_prompts(stl / "evaluation" / f"{name}.json")]
    toxic += forms.read_prompts(SHARED / "harmfulq" / "toxic_outs.json")
    assert len(toxic) == 518 and data.drop_leaks(alpaca, toxic)[1] == 0
    alpaca_eval = forms.read_prompts(SHARED / "alpaca_eval" / "text_davinci_003_model_outputs.json")
    assert data.drop_leaks(alpaca, alpaca_eval)[1] == 1
    path = stl / "training" / "safety_only_data_Instructions.json"
    answers = forms.to_training_rows(sources.read_rows(path), label=True, source=path)
    assert len(answers) == 2_483 and data.drop_leaks(answers, toxic)[1] == 0
