"""`tasft compare`: verdicts are those of the evaluations, texts stay texts, and the page needs no network."""

import base64
import hashlib
import json
from html.parser import HTMLParser

import pandas as pd
import pytest
from browser import browser_page

from tasft_lib import cli
from tasft_lib.evaluation import side_by_side
from tasft_lib.evaluation.answers import judge_answers, read_or_ask
from tasft_lib.generation import Response
from tasft_lib.judges import base, load
from tasft_lib.storage import files, integrity

PROMPTS = pd.DataFrame(
    {"benchmark": ["cruel", "cruel", "kind"], "kind": ["toxic", "toxic", "benign"], "prompt": ["p <b>0", "p 1", "p 2"]}
)
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- <script>document.title='owned'</script>"
ANSWERS = {
    "sft": [HOSTILE + " you can do it like this", "first you take the thing and then", "it is a nice big town"],
    "emd": ["I cannot help you with that.", "I'm sorry, but I cannot help.", "it is a <i>very</i> nice town"],
    "foreign": ["das kann ich dir leider nicht sagen, weil ich es nicht weiß", "no no no no no no no no no", "a"],
}


def evaluated(folder, answers, prompts=PROMPTS, judges=("compliance", "xstest")):
    """What `tasft evaluate` leaves: answers with their checksum, judgements without text, a manifest."""
    folder.mkdir(parents=True)
    judges = [load.load_judge(name) for name in judges]
    replies = [Response(text, 9, True) for text in answers]
    table = read_or_ask(prompts, lambda: replies, folder / "responses-0.jsonl")
    judged = judge_answers(table, judges, cache=folder / "judgements")
    files.write_json(folder / "manifest.json", {"judges": [base.described(judge) for judge in judges]})
    return judged


@pytest.fixture
def results(tmp_path):
    """(folder, its judged answers) by name."""
    return {name: (tmp_path / name, evaluated(tmp_path / name, texts)) for name, texts in ANSWERS.items()}


def data_of(page: str) -> dict:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


class Elements(HTMLParser):
    """The names of a page's elements, and the values of their attributes."""

    def __init__(self, page):
        super().__init__()
        self.names, self.values = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.values += [f"{name}={value}" for name, value in attributes]


def test_verdicts_are_those_of_the_evaluations(results, tmp_path, capsys):
    folders = [str(folder) for folder, _ in results.values()]
    assert cli.main(["compare", *folders, "--output_file", str(tmp_path / "new" / "page.html")]) == 0
    table = data_of((tmp_path / "new" / "page.html").read_text())
    assert table["names"] == list(ANSWERS) and table["judges"] == ["compliance", "xstest"]
    for arm, (name, (_, judged)) in enumerate(results.items()):
        assert [row["answers"][arm]["response"] for row in table["rows"]] == ANSWERS[name]
        for judge, part in judged.groupby("judge"):
            assert [row["answers"][arm]["verdicts"][judge] for row in table["rows"]] == part["verdict"].tolist()
    said = {verdict for _, judged in results.values() for verdict in judged["verdict"]}
    assert {"harmful", "refusal", "unscored", "degenerate"} <= said
    shown = capsys.readouterr().out
    assert "sft: 3 answers to 3 prompts\n" in shown and "p 1" not in shown
    # A notebook's table of the same answers is the same.
    tables = {name: side_by_side.of_table(judged) for name, (_, judged) in results.items()}
    assert side_by_side.side_by_side(tables) == {name: table[name] for name in ("names", "judges", "rows")}


def test_an_exact_judge_says_its_verdicts_again(tmp_path):
    judged = evaluated(tmp_path / "mini", ["a b", "c d", "e f"], judges=["miniworld"])
    rows = side_by_side.read_results(tmp_path / "mini")
    assert [row["verdicts"]["miniworld"] for row in rows] == judged["verdict"].tolist()
    assert not (tmp_path / "mini" / "judgements").exists()


def test_nothing_in_an_answer_becomes_part_of_the_page(results, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(tmp_path / "sft"), str(tmp_path / "emd"), "--output_file", str(page)]) == 0
    text = page.read_text()
    elements = Elements(text)
    assert elements.names.count("script") == 2 and not {"img", "b", "i", "link", "iframe"} & set(elements.names)
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (value for value in elements.values if value.startswith("content=default-src"))
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "innerHTML" not in script and "http" not in text.replace("http-equiv", "")


def test_prompts_that_one_result_alone_has_are_told(tmp_path, capsys):
    evaluated(tmp_path / "a" / "results", ANSWERS["sft"])
    evaluated(tmp_path / "b" / "results", ANSWERS["emd"][:2], PROMPTS.iloc[:2])
    repeated = pd.concat([PROMPTS, PROMPTS.iloc[:1]])
    evaluated(tmp_path / "c", [*ANSWERS["emd"], "again"], repeated)
    folders = [str(tmp_path / name) for name in ("a/results", "b/results", "c")]
    page = tmp_path / "page.html"
    assert cli.main(["compare", *folders, "--output_file", str(page)]) == 0
    out = capsys.readouterr().out
    assert "a/results: 3 answers to 4 prompts\n" in out and "c: 4 answers to 4 prompts, 1 of which no other" in out
    rows = data_of(page.read_text())["rows"]
    assert [[answer is not None for answer in row["answers"]] for row in rows] == [
        [True, True, True], [True, True, True], [True, False, True], [False, False, True]
    ]  # fmt: skip
    assert rows[3]["prompt"] == rows[0]["prompt"] and rows[3]["answers"][2]["response"] == "again"


def test_own_answers_need_no_more_than_prompt_and_response(tmp_path):
    lines = [{"prompt": "p", "response": "r", "verdict": "safe", "attack": "prefix"}, {"prompt": "q", "response": "s"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = side_by_side.read_results(tmp_path / "own.jsonl")
    assert [row["benchmark"] for row in rows] == ["prompts (prefix)", "prompts"]
    assert [row["verdicts"] for row in rows] == [{"file": "safe"}, {}]


def spoil(place, how):
    """The arguments of a comparison with `sft` in which one thing is wrong."""
    other = place / "other"
    if how == "torn":
        file = place / "emd" / "responses-0.jsonl"
        file.write_text(file.read_text()[:-30])
        return [place / "emd"]
    if how == "torn and unsealed":
        other.write_text((place / "emd" / "responses-0.jsonl").read_text()[:-30])
    elif how == "not ended":
        other.mkdir()
        (other / "partial-0.jsonl").touch()
    elif how == "nothing":
        other.mkdir()
    elif how == "two":
        for number in (1, 2):
            evaluated(other if number == 1 else place / "more", ANSWERS["emd"])
        (place / "more" / "responses-0.jsonl").rename(other / "responses-1.jsonl")
    elif how == "other prompts":
        evaluated(other, ANSWERS["emd"], PROMPTS.assign(prompt=["x", "y", "z"]))
    elif how == "no answers":
        other.write_text('{"prompt": "canary77", "completion": "canary77"}\n')
    elif how == "empty":
        other.touch()
    elif how == "no such verdict":
        other.write_text('{"prompt": "a", "response": "b", "verdict": "canary77"}\n')
    elif how == "manifest":
        evaluated(other, ANSWERS["emd"])
        (other / "manifest.json").write_text("{}")
    elif how == "twice":
        return [place / "sft"]
    return [other]


@pytest.mark.parametrize(
    "how, told",
    [
        ("torn", "responses-0.jsonl: is not what was written; run its tasft evaluate again"),
        ("torn and unsealed", "other, line 3: no JSON, so it is torn"),
        ("not ended", "other: its tasft evaluate has not ended; run the same command again"),
        ("nothing", "other: holds no answers (responses-*.jsonl); give the folder of a tasft evaluate"),
        ("gone", "other: no such file or folder"),
        ("two", "other: holds 2 files of answers; name one of them, responses-0.jsonl"),
        ("other prompts", "other: answers none of the prompts of sft; give results on the same benchmarks"),
        ("no answers", "other, line 1: no answer; give lines with the texts prompt and response"),
        ("empty", "other: holds no answer"),
        ("no such verdict", "other, line 1: its verdict is none of harmful"),
        ("manifest", "manifest.json: names no judges, so it is damaged"),
        ("twice", "sft: is given twice"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(how, told, results, tmp_path, capsys):
    paths = [str(path) for path in spoil(tmp_path, how)]
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(tmp_path / "sft"), *paths, "--output_file", str(page)]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "canary77" not in error
    assert not page.exists()


def test_a_page_has_a_pages_name_and_every_result_its_own(results, tmp_path, capsys):
    command = ["compare", str(tmp_path / "sft"), str(tmp_path / "emd"), "--output_file"]
    assert cli.main([*command, str(tmp_path / "sft" / "results.csv")]) == 1
    assert "give one that ends in .html" in capsys.readouterr().err
    for names in (["a"], ["a", "a"]):
        with pytest.raises(SystemExit):
            cli.main([*command, str(tmp_path / "page.html"), "--names", *names])
    assert cli.main([*command, str(tmp_path / "page.html"), "--names", "plain", "safer"]) == 0
    assert data_of((tmp_path / "page.html").read_text())["names"] == ["plain", "safer"]
    assert integrity.damage(tmp_path / "sft" / "responses-0.jsonl") == []


def test_a_browser_hides_texts_until_asked_and_filters(results, tmp_path):
    file = tmp_path / "page.html"
    with browser_page(tmp_path / "profile") as page:
        assert cli.main(["compare", *(str(tmp_path / n) for n in ANSWERS), "--output_file", str(file)]) == 0
        page.go(file.as_uri())
        left = "document.getElementById('count').textContent"
        body = "document.querySelector('#answers tbody').innerText"
        first = page.run(body)
        assert "1 to 3 of 3" in page.run(left) and "nice big town" in first, "benign texts are shown"
        assert "you can do it" not in first and "first you take" not in first and "harmful" in first
        for key in ("j", "Enter"):
            page.press(key)
        second = page.run(body)
        assert HOSTILE[:20] in second and "first you take" not in second
        page.press("Enter")
        page.press("j")
        page.press("Enter")
        third = page.run(body)
        assert HOSTILE[:20] not in third and "first you take" in third
        page.run("document.getElementById('all').click()")
        assert HOSTILE[:20] in page.run(body) and "first you take" in page.run(body)

        choose = "(() => {{ const s = document.getElementById('{}'); s.value = '{}'; "
        choose += "s.dispatchEvent(new Event('input', {{bubbles: true}})) }})()"
        page.run(choose.format("arm-0", "harmful"))
        page.run(choose.format("arm-1", "not: harmful"))
        assert "1 to 2 of 2" in page.run(left)
        page.run(choose.format("arm-2", "not: harmful"))
        assert "1 to 1 of 1" in page.run(left), "what is unscored is not known to be harmless"
        page.run("document.querySelector('button[type=reset]').click()")
        page.wait(left + ".includes('of 3')")
        for key in "/NICE":
            page.press(key)
        assert "1 to 1 of 1" in page.run(left)
        page.run(choose.format("search", ""))
        page.run(choose.format("benchmark", "cruel"))
        assert "1 to 2 of 2" in page.run(left)
        assert page.run("document.title") == "sft · emd · foreign" and page.errors == []
        assert page.asked == [file.as_uri()], "nothing but the page itself"
