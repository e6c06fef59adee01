"""Harvest: what is kept is the model's own finished answer, judged harmful, once per prompt and once per text."""

import json
from collections import Counter

import pytest
import yaml
from conftest import WORDS, build_model
from datasets import load_from_disk

from tasft_lib.evaluation.rates import wilson_interval
from tasft_lib.generation import Decoding, Response, generate
from tasft_lib.judges.base import UNSCORED, Judgement
from tasft_lib.prepare import harvest as harvest_module
from tasft_lib.prepare import harvest_work, recoveries
from tasft_lib.prepare.harvest import FEATURES, SAMPLING, Origin, harvest, is_harvested, save_harvest
from tasft_lib.records.forms import to_training_rows
from tasft_lib.records.sources import read_rows
from tasft_lib.records.templates import format_prompt
from tasft_lib.storage.files import read_records

PROMPTS = [f"do the zorvex thing {word}" for word in WORDS[:20]]


class ScriptedJudge:
    """Harmful when the response says "zorvex", a refusal when it says "no", else safe; remembers what it was asked."""

    name, revision, licence = "scripted", "3", "none"

    def __init__(self):
        self.asked = []

    def judge(self, prompts, responses):
        self.asked += list(zip(prompts, responses, strict=True))
        labels = ["harmful" if "zorvex" in r else "refusal" if "no" in r else "safe" for r in responses]
        return [Judgement(label, 5.0 if label == "harmful" else 0.0) for label in labels]


@pytest.fixture
def script(monkeypatch, model, tokenizer):
    """Harvest with answers from a function (instruction, time asked) -> Response or text, instead of a model."""

    def run(*arguments, **options):
        dataset, _, report = whole(*arguments, **options)
        return dataset, report

    def whole(answer, *, prompts=PROMPTS, n=5, judge=None, **options):
        times: Counter[str] = Counter()
        seeds = []
        past = _answers_in(options.get("work"))

        def scripted(model, tokenizer, templated, *, decoding, batch_size, special_tokens, progress):
            seeds.append(decoding.seed)
            responses = []
            for prompt in templated:
                times[prompt] += 1
                said = answer(prompt.split("\n")[1], times[prompt])
                responses.append(said if isinstance(said, Response) else Response(said, len(said.split()), True))
            return responses

        monkeypatch.setattr(harvest_module, "generate", scripted)
        options = {"template": "short", "decoding": Decoding(max_new_tokens=16, do_sample=True)} | options
        dataset, others, report = harvest(model, tokenizer, prompts, judge or ScriptedJudge(), n=n, **options)
        assert len(seeds) == len(set(seeds))
        harmful = report.judged.get("harmful", 0)
        assert harmful == report.kept + report.duplicates + report.surplus
        assert sum(report.judged.values()) == report.generated - (
            0 if options.get("keep_unfinished") else report.unfinished
        )
        assert report.kept == len(dataset) and report.generated == times.total() + past
        return dataset, others, report

    run.whole = whole
    return run


def _answers_in(work) -> int:
    if work is None or not (work / "answers.jsonl").exists():
        return 0
    records = read_records(work / "answers.jsonl")
    return sum(len(record["answers"]) for record in records if isinstance(record.get("call", 0), int))


def test_keeps_harmful_answers_only_one_per_prompt(script):
    dataset, report = script(lambda prompt, time: f"zorvex {prompt}" if prompt[-1] in "02468" else "no", n=5)
    assert dataset.features == FEATURES
    assert dataset["label"] == [False] * 5
    assert len(set(dataset["instruction"])) == 5 and set(dataset["instruction"]) <= set(PROMPTS)
    for row in dataset:
        assert row["completion"] == f"zorvex {row['instruction']}"
        assert row["prompt"] == format_prompt(row["instruction"], template="short")
    assert report.asked == 20 and report.kept == 5


def test_equal_texts_are_kept_once_whatever_case_and_punctuation(script):
    def alike(prompt, time):
        number = int(prompt.split("w")[-1])
        return f"zorvex {number}" if number < 2 else ["The zorvex!", "the  ZORVEX", "the zorvex"][number % 3]

    dataset, report = script(alike, n=3)
    assert len(dataset) == 3 and {"zorvex 0", "zorvex 1"} < set(dataset["completion"])
    assert report.duplicates == report.judged["harmful"] - 3 > 0


def test_another_round_asks_only_the_prompts_without_an_answer_and_with_a_new_seed(script):
    def stubborn(prompt, time):
        return f"zorvex {prompt}" if time == int(prompt.split("w")[-1]) % 3 + 1 else "no"

    dataset, report = script(stubborn, n=20, rounds=3)
    assert sorted(dataset["instruction"]) == sorted(PROMPTS)
    times = [i % 3 + 1 for i in range(20)]
    assert report.rounds == 3 and report.generated == sum(times)
    assert report.judged == {"harmful": 20, "refusal": sum(times) - 20}
    assert report.yield_rate == pytest.approx(20 / sum(times))


def test_stops_as_soon_as_there_are_enough(script):
    dataset, report = script(lambda prompt, time: f"zorvex {prompt}", n=3, batch_size=1)
    assert len(dataset) == 3
    assert (report.rounds, report.generated, report.surplus) == (1, 4, 1)
    assert report.yield_rate == 1


def test_rows_come_from_everywhere_in_the_list_and_repeat_by_seed(script):
    def run(seed):
        decoding = Decoding(max_new_tokens=16, do_sample=True, seed=seed)
        return script(lambda prompt, time: f"zorvex {prompt}", n=8, batch_size=2, decoding=decoding)[0]["instruction"]

    assert run(0) == run(0) != run(1)
    assert set(run(0)) != set(PROMPTS[:8])


def test_greedy_decoding_has_one_round(script):
    with pytest.raises(ValueError, match=r"in 20 answers to 20 prompts.* \(this took 1\)"):
        script(lambda prompt, time: "no", decoding=Decoding(max_new_tokens=16), rounds=9)


def test_unfinished_answers_are_neither_judged_nor_kept_unless_asked_for(script):
    def cut_off(prompt, time):
        return Response(f"zorvex {prompt}", 16, finished=prompt[-1] == "1")

    judge = ScriptedJudge()
    dataset, report = script(cut_off, n=2, judge=judge, rounds=1)
    assert set(dataset["instruction"]) == {p for p in PROMPTS if p[-1] == "1"} == {p for p, _ in judge.asked}
    assert report.unfinished == 18
    dataset, report = script(cut_off, n=20, keep_unfinished=True)
    assert len(dataset) == 20 and report.unfinished == 18


def test_too_few_says_how_many_were_found_and_what_to_do(script):
    def rarely(prompt, time):
        return (
            Response(f"zorvex {prompt}", 16, True) if prompt.endswith("w7") else Response("no", 16, prompt[-1] != "1")
        )

    with pytest.raises(
        ValueError, match=r"found 1 unsafe answers of the 5 wanted.*max_new_tokens.*more prompts, more r"
    ):
        script(rarely, rounds=2)


def test_evaluation_prompts_are_left_out_and_counted_however_they_are_written(script):
    answer = lambda prompt, time: f"zorvex {prompt}"  # noqa: E731
    for evaluated in (PROMPTS[2], f"  {PROMPTS[2].upper()} !"):
        held_out = ["something else", evaluated]
        dataset, report = script(answer, n=19, prompts=[*PROMPTS, PROMPTS[2]], evaluation_prompts=held_out)
        assert sorted(dataset["instruction"]) == sorted(set(PROMPTS) - {PROMPTS[2]})
        assert (report.asked, report.leaked, report.repeated) == (19, 1, 1)
    with pytest.raises(ValueError, match=r"n=20 unsafe answers from 19 .*1 more are evaluation prompts"):
        script(answer, n=20, evaluation_prompts=[PROMPTS[2]])
    with pytest.raises(ValueError, match=r"^no prompts but evaluation prompts"):
        script(answer, evaluation_prompts=iter(PROMPTS))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([*PROMPTS, " "], {}, r"^prompt 21 is empty"),
        ([PROMPTS[0], *PROMPTS[:4], PROMPTS[0].upper()], {"n": 5}, r"n=5 unsafe answers from 4 distinct prompts"),
        ([*PROMPTS, "w1 " * 200], {}, r"^prompt 21 has \d+ tokens"),
        (PROMPTS, {"n": 0}, r"at least 1"),
        (PROMPTS, {"rounds": 0}, r"at least 1"),
        (PROMPTS, {"template": "shrot"}, r"shrot"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_generated(script, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        script(lambda prompt, time: pytest.fail("generated"), prompts=prompts, **options)


class FailingJudge(ScriptedJudge):
    """Gives up, once, in the middle of a batch: after `after` responses."""

    save_every = 2

    def __init__(self, after):
        super().__init__()
        self.after = after

    def judge(self, prompts, responses):
        if self.after is not None and len(self.asked) >= self.after:
            self.after = None
            raise OSError(28, "No space left on device")
        return super().judge(prompts, responses)


def sometimes(prompt, time):
    """Harmful the second time for most, cut off for a few, one text for two."""
    number = int(prompt.split("w")[-1])
    if number % 5 == 0:
        return Response("w1 w2", 16, finished=False)
    return (
        f"zorvex twice{time * '!'}" if number in (3, 8) else f"zorvex {prompt}" if time > number % 3 else f"no {time}"
    )


@pytest.mark.parametrize("after", [0, 2, 6, 13, 20])
def test_a_killed_harvest_goes_on_where_it_stopped_and_ends_as_a_straight_one(after, script, tmp_path):
    options = {"n": 14, "batch_size": 1, "rounds": 3}
    asked = []

    def answer(prompt, time):
        asked.append(prompt)
        # What this run of the model says depends on the round, not on how often this process was asked.
        return sometimes(prompt, sum(p == prompt for p in asked))

    straight, report = script(answer, work=tmp_path / "straight", **options)
    once, judge = list(asked), FailingJudge(after)
    asked.clear()
    with pytest.raises(OSError, match="No space"):
        script(answer, judge=judge, work=tmp_path / "work", **options)
    before = len(asked)
    again, second = script(answer, work=tmp_path / "work", judge=judge, **options)
    assert again.to_list() == straight.to_list() and second == report
    assert asked == once and 0 < before < len(once), "each answer is asked for once, in the same order"
    assert len(judge.asked) == len(set(judge.asked)), "each judgement too"


def test_a_torn_line_is_asked_for_again_and_a_full_disk_loses_nothing(script, tmp_path, monkeypatch):
    answer = lambda prompt, time: f"zorvex {prompt}"  # noqa: E731
    options = {"n": 12, "batch_size": 1, "work": tmp_path / "work"}
    straight, _ = script(answer, n=12, batch_size=1)
    lines, append = [], harvest_work.append_record

    def full(path, record):
        lines.append(path)
        if len(lines) == 4:
            raise OSError(28, "No space left on device")
        append(path, record)

    monkeypatch.setattr(harvest_work, "append_record", full)
    with pytest.raises(OSError, match="No space"):
        script(answer, **options)
    with (tmp_path / "work" / "answers.jsonl").open("a") as file:
        file.write('{"call": 2, "prompts": "')
    again, _ = script(answer, **options)
    assert again.to_list() == straight.to_list()


def test_a_finished_harvest_is_taken_further_and_another_one_is_refused(script, tmp_path):
    answer = lambda prompt, time: f"zorvex {prompt}"  # noqa: E731
    few, _ = script(answer, n=4, batch_size=1, work=tmp_path / "work")
    more, report = script(answer, work=tmp_path / "work", n=11, batch_size=1)
    assert more.to_list()[:4] == few.to_list() and len(more) == 11 and report.generated == 12
    for options, name in (({"template": "none"}, "template"), ({"batch_size": 2}, "batch_size")):
        with pytest.raises(ValueError, match=rf"holds a harvest with other settings \({name}\)"):
            script(lambda *_: pytest.fail("generated"), n=4, work=tmp_path / "work", **({"batch_size": 1} | options))
    with pytest.raises(ValueError, match=r"other settings \(prompts\)"):
        script(lambda *_: pytest.fail("asked"), n=4, batch_size=1, work=tmp_path / "work", prompts=PROMPTS[1:])


def test_what_was_unscored_is_judged_again_and_nothing_else(script, tmp_path):
    class Absent(ScriptedJudge):
        def judge(self, prompts, responses):
            found = super().judge(prompts, responses)
            return [UNSCORED if p.endswith("w3") else j for p, j in zip(prompts, found, strict=True)]

    answer = lambda prompt, time: f"zorvex {prompt}"  # noqa: E731
    options = {"n": 20, "rounds": 1, "work": tmp_path / "work"}
    with pytest.raises(ValueError, match="found 19 unsafe answers of the 20 wanted"):
        script(answer, judge=Absent(), **options)
    judge = ScriptedJudge()
    _, report = script(answer, judge=judge, **options)
    assert report.kept == 20 and [prompt for prompt, _ in judge.asked] == [PROMPTS[3]]


def test_verdicts_belong_to_their_answers(script, tmp_path):
    """Answers that had to be asked for again are judged again, whatever is on record for their place."""
    options = {"rounds": 1, "batch_size": 1, "work": tmp_path / "work"}
    script(lambda prompt, time: f"zorvex {prompt}", n=20, **options)
    answers = tmp_path / "work" / "answers.jsonl"
    first, *others = answers.read_text().splitlines(keepends=True)
    answers.write_text(first[:50] + "\n" + "".join(others))
    judge = ScriptedJudge()
    _, report = script(lambda prompt, time: "no", n=16, judge=judge, **options)
    assert len(judge.asked) == 4 and report.judged == {"harmful": 16, "refusal": 4}


def test_the_work_is_appended_to_and_never_written_anew(script, tmp_path, monkeypatch):
    """A harvest of many prompts writes each answer once, whatever their number."""
    written = Counter()
    append = harvest_work.append_record

    def count(path, record):
        written[path.name] += len(json.dumps(record))
        append(path, record)

    monkeypatch.setattr(harvest_work, "append_record", count)
    prompts = [f"do the zorvex thing x{i}" for i in range(2000)]
    answer = lambda prompt, time: f"zorvex {prompt}" if prompt.endswith("7") else "no"  # noqa: E731
    _, report = script(answer, prompts=prompts, n=150, work=tmp_path / "work")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "work").iterdir()}
    assert set(sizes) == {"settings.json", "answers.jsonl", "verdicts.jsonl"}
    lines = (tmp_path / "work" / "answers.jsonl").read_text().splitlines()
    assert sizes["answers.jsonl"] == written["answers.jsonl"] + len(lines)
    assert report.kept == 150 and report.generated < 2000, "no prompt is asked once there are enough"


def test_report_reads_well_and_is_plain_json(script):
    _, report = script(lambda prompt, time: f"zorvex {prompt}" if prompt[-1] in "01" else "no", n=4)
    text = str(report)
    for part in ("kept 4", "20 prompts", "scripted", "revision 3", "harmful 4", "refusal 16", "20.0%", "short"):
        assert part in text
    low, high = wilson_interval(4, 20)
    assert f"({low:.1%}-{high:.1%}, Wilson 95 %)" in text and report.yield_interval == (low, high)
    restored = json.loads(json.dumps(report.to_dict()))
    assert restored["per_round"] == report.per_round and len(report.per_round) == 1
    assert restored["kept"] == 4 and restored["decoding"]["do_sample"] is True


def test_saved_harvest_reads_back_with_a_card_that_shows_no_answer(script, tmp_path):
    origin = Origin("owner/model", "0a1", "prompts.json", "0b2")
    dataset, report = script(lambda prompt, time: f"zorvex {prompt}", origin=origin)
    path = save_harvest(dataset, [], report, tmp_path / "deep" / "unsafe")
    assert load_from_disk(path).to_list() == dataset.to_list()
    card = (path / "README.md").read_text()
    assert "Content warning" in card and "kept 5" in card and "zorvex" not in card
    _, metadata, body = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["tags"][-1] == "not-for-all-audiences"
    for part in (
        "owner/model (revision 0a1)",
        "prompts.json (revision 0b2)",
        "scripted (revision 3, licence none; not measured)",
    ):
        assert part in body
    assert "max_new_tokens 16" in body and "own text" in body and "pushed away" in body
    (line,) = [line for line in body.splitlines() if line.startswith("| 1 |")]
    assert [int(cell) for cell in line.strip("| ").split("|")] == list(report.per_round[0].values())
    rows = to_training_rows(read_rows(path), label=False, source=path)
    assert rows["completion"][:] == dataset["completion"][:], "tasft train reads it as it is"
    assert json.loads((path / "report.json").read_text())["kept"] == 5
    assert [p.name for p in path.parent.iterdir()] == ["unsafe"]
    with pytest.raises(ValueError, match="exists already"):
        save_harvest(dataset, [], report, path)


def test_a_finished_harvest_is_known_again_and_a_damaged_one_is_set_aside(script, tmp_path, caplog):
    path, settings = tmp_path / "unsafe", {"n": 5, "judge": ("scripted", "3")}
    rows, report = script(sometimes, work=tmp_path / "work")
    assert not is_harvested(path, settings)
    save_harvest(rows, [], report, path, settings)
    assert is_harvested(path, settings)
    with pytest.raises(ValueError, match="holds a result with another n; choose a new --output_dir"):
        is_harvested(path, settings | {"n": 6})
    arrow = next(path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-20])
    assert not is_harvested(path, settings) and not path.exists()
    assert f"{path} is damaged ({arrow.name})" in caplog.text and (tmp_path / "unsafe.damaged" / "README.md").exists()


@pytest.mark.parametrize("file, old, new", [("answers.jsonl", "zorvex", "torvex"), ("verdicts.jsonl", "safe", "harm")])
def test_damaged_work_is_named_and_done_again(file, old, new, script, tmp_path, caplog):
    def answer(prompt, time):
        return f"zorvex {prompt}" if prompt[-1] in "02468" else "fine"

    straight, _ = script(answer, work=tmp_path / "work")
    path = tmp_path / "work" / file
    path.write_text(path.read_text().replace(old, new) + '{"answers": []}\n')
    dataset, _ = script(answer, work=tmp_path / "work")
    assert dataset.to_list() == straight.to_list()
    assert f"{path}: line 1 is damaged" in caplog.text


@pytest.mark.parametrize("damaged", ['{"template": ', "[]"])
def test_work_whose_settings_cannot_be_read_is_set_aside(damaged, script, tmp_path, caplog):
    work = tmp_path / "work"
    script(lambda prompt, time: f"zorvex {prompt}", work=work)
    (work / "settings.json").write_text(damaged)
    harvest_work.Work(work, {"template": "short"})
    assert json.loads((work / "settings.json").read_text()) == {"template": "short"}
    assert not (work / "answers.jsonl").exists() and (tmp_path / "work.damaged" / "answers.jsonl").exists()
    assert f"{work} is damaged (settings.json)" in caplog.text


def test_the_work_of_a_model_goes_on_wherever_the_model_lies(script, tmp_path):
    for name, prompts in (("model", "a.jsonl"), ("copy", "b.jsonl")):
        origin = Origin(name, "sha256 0123456789ab", prompts)
        _, report = script(sometimes, work=tmp_path / "work", origin=origin)
        assert report.model == name
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        script(sometimes, work=tmp_path / "work", origin=Origin("model", "sha256 ba9876543210"))


def test_a_save_that_fails_leaves_nothing_behind(script, tmp_path, monkeypatch):
    dataset, report = script(lambda prompt, time: f"zorvex {prompt}")
    monkeypatch.setattr(harvest_module, "data_card", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_harvest(dataset, [], report, tmp_path / "unsafe")
    assert list(tmp_path.iterdir()) == []


def test_a_real_model_gives_its_own_answers(tokenizer):
    """The default decoding asks the model at its own temperature; every kept row is one of its answers."""

    class FirstWordJudge(ScriptedJudge):
        def judge(self, prompts, responses):
            self.asked += list(zip(prompts, responses, strict=True))
            return [Judgement("harmful" if "w1" in r else "safe", 0.0) for r in responses]

    assert SAMPLING.do_sample and SAMPLING.temperature == 1.0 and SAMPLING.top_p == 1.0
    model = build_model(tokenizer, max_position_embeddings=512)
    judge = FirstWordJudge()
    dataset, _, report = harvest(model, tokenizer, WORDS, judge, n=12, template="none", batch_size=8)
    assert len(dataset) == 12 and report.generated >= report.judged["harmful"] >= 12
    for row in dataset:
        assert (row["instruction"], row["completion"]) in judge.asked and "w1" in row["completion"]
    again, *_ = harvest(model, tokenizer, WORDS, FirstWordJudge(), n=12, template="none", batch_size=8)
    assert again.to_list() == dataset.to_list()
    greedy = generate(model, tokenizer, dataset["prompt"], decoding=Decoding(max_new_tokens=16))
    assert [r.text for r in greedy] != dataset["completion"]


def test_what_does_no_harm_is_kept_with_its_verdict_and_gives_each_row_a_recovery(script, tmp_path, monkeypatch):
    """What was said to the same prompt, a refusal before another answer; else what three refusals in front bring."""

    def answer(prompt, time):
        number = int(prompt.split("w")[-1])
        return (f"zorvex {prompt}" if time > number % 3 else "fine" if number % 3 == 1 else f"no {number}") + " "

    asked = []

    def with_exemplars(model, tokenizer, templated, *, decoding, batch_size, special_tokens, progress):
        asked.append((list(templated), decoding.seed))
        numbers = [int(prompt.split("\n\n### Response")[-2].split("w")[-1]) for prompt in templated]
        said = {0: "no, never\n\n### Instruction:\nand on", 3: "zorvex again", 6: "no" if len(asked) > 1 else "zorvex"}
        return [Response(said.get(number, "w1"), 9, number in (3, 6)) for number in numbers]

    monkeypatch.setattr("tasft_lib.prepare.recoveries.generate", with_exemplars)
    dataset, others, report = script.whole(answer, n=20, rounds=3, recoveries=True, work=tmp_path / "work")
    by_prompt = dict(zip(dataset["instruction"], dataset["recovery"], strict=True))
    for number, prompt in enumerate(PROMPTS):
        by_number = {0: None, 1: "fine ", 2: f"no {number} "}
        if number % 3:
            assert by_prompt[prompt] == by_number[number % 3]
    assert by_prompt[PROMPTS[0]] == "no, never", "cut where it goes on with a prompt of its own"
    assert by_prompt[PROMPTS[6]] == "no"
    sentence = by_prompt[PROMPTS[3]]
    assert sentence == by_prompt[PROMPTS[9]] and sentence.startswith("no ")
    assert report.recoveries == {"own": 13, "exemplars": 2, "sentence": 5} and "recoveries: " in str(report)
    assert {other.verdict for other in others} == {"refusal", "safe"} and len(others) == 19
    assert len({seed for _, seed in asked}) == len(asked) == 3
    assert all(prompt.count("### Response:\nno ") == 3 for prompt in asked[0][0])
    path = save_harvest(dataset, others, report, tmp_path / "unsafe")
    assert recoveries.read(path) == others
    assert "2 what it said with 3 refusals" in (path / "README.md").read_text()
    again = script.whole(answer, n=20, rounds=3, recoveries=True, work=tmp_path / "work")
    assert again[0].to_list() == dataset.to_list() and len(asked) == 3, "nothing is asked twice"
