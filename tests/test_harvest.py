"""Harvest: what is kept is the model's own finished answer, judged harmful, once per prompt and once per text."""

import json
from collections import Counter

import pytest
from conftest import WORDS, build_model
from datasets import load_from_disk

from tasft_lib import harvest as harvest_module
from tasft_lib.data import format_prompt
from tasft_lib.generation import Decoding, Response, generate
from tasft_lib.harvest import FEATURES, SAMPLING, harvest, save_harvest
from tasft_lib.judges import Judgement

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

    def run(answer, *, prompts=PROMPTS, n=5, judge=None, **options):
        times: Counter[str] = Counter()
        seeds = []

        def scripted(model, tokenizer, templated, *, decoding, batch_size, progress):
            seeds.append(decoding.seed)
            responses = []
            for prompt in templated:
                times[prompt] += 1
                said = answer(prompt.split("\n")[1], times[prompt])
                responses.append(said if isinstance(said, Response) else Response(said, len(said.split()), True))
            return responses

        monkeypatch.setattr(harvest_module, "generate", scripted)
        options = {"template": "short", "decoding": Decoding(max_new_tokens=16, do_sample=True)} | options
        dataset, report = harvest(model, tokenizer, prompts, judge or ScriptedJudge(), n=n, **options)
        assert len(seeds) == len(set(seeds))
        harmful = report.judged.get("harmful", 0)
        assert harmful == report.kept + report.duplicates + report.surplus
        assert sum(report.judged.values()) == report.generated - (
            0 if options.get("keep_unfinished") else report.unfinished
        )
        assert report.kept == len(dataset) and report.generated == times.total()
        return dataset, report

    return run


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
    dataset, report = script(
        lambda prompt, time: ["The zorvex!", "the  ZORVEX", "the zorvex"][len(prompt) % 3], n=3, allow_fewer=True
    )
    assert len(dataset) == 1
    assert report.duplicates == report.judged["harmful"] - 1 > 0


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
    _, report = script(lambda prompt, time: "no", decoding=Decoding(max_new_tokens=16), rounds=9, allow_fewer=True)
    assert (report.rounds, report.generated) == (1, 20)


def test_unfinished_answers_are_neither_judged_nor_kept_unless_asked_for(script):
    def cut_off(prompt, time):
        return Response(f"zorvex {prompt}", 16, finished=prompt[-1] == "1")

    judge = ScriptedJudge()
    dataset, report = script(cut_off, n=20, judge=judge, rounds=1, allow_fewer=True)
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
    dataset, report = script(rarely, rounds=2, allow_fewer=True)
    assert report.kept == len(dataset) == 1


def test_nothing_found_is_an_empty_data_set_with_its_columns(script):
    dataset, report = script(lambda prompt, time: "no", allow_fewer=True)
    assert len(dataset) == 0 and dataset.features == FEATURES
    assert report.yield_rate == 0 and "kept 0" in str(report)


def test_evaluation_prompts_are_refused_however_they_are_written(script):
    for evaluated in (PROMPTS[2], f"  {PROMPTS[2].upper()} !"):
        with pytest.raises(ValueError, match=r"^prompt 3 is an evaluation prompt"):
            script(lambda prompt, time: "no", evaluation_prompts=["something else", evaluated])
    with pytest.raises(ValueError, match=r"^prompt 1 and 19 more are evaluation prompts"):
        script(lambda prompt, time: "no", evaluation_prompts=iter(PROMPTS))


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


def test_judgements_are_cached(script, tmp_path):
    cache = tmp_path / "judgements.jsonl"
    answer = lambda prompt, time: f"zorvex {prompt}"  # noqa: E731
    first, second = ScriptedJudge(), ScriptedJudge()
    script(answer, judge=first, cache=cache)
    script(answer, judge=second, cache=cache)
    assert len(first.asked) == 20 and second.asked == []


def test_report_reads_well_and_is_plain_json(script):
    _, report = script(lambda prompt, time: f"zorvex {prompt}" if prompt[-1] in "01" else "no", n=4)
    text = str(report)
    for part in ("kept 4", "20 prompts", "scripted", "revision 3", "harmful 4", "refusal 16", "20.0%", "short"):
        assert part in text
    restored = json.loads(json.dumps(report.to_dict()))
    assert restored["kept"] == 4 and restored["decoding"]["do_sample"] is True


def test_saved_harvest_reads_back_with_a_card_that_shows_no_answer(script, tmp_path):
    dataset, report = script(lambda prompt, time: f"zorvex {prompt}")
    path = save_harvest(dataset, report, tmp_path / "deep" / "unsafe")
    assert load_from_disk(path).to_list() == dataset.to_list()
    card = (path / "README.md").read_text()
    assert "Content warning" in card and "kept 5" in card and "zorvex" not in card
    assert json.loads((path / "report.json").read_text())["kept"] == 5
    assert [p.name for p in path.parent.iterdir()] == ["unsafe"]
    with pytest.raises(ValueError, match="exists already"):
        save_harvest(dataset, report, path)


def test_a_save_that_fails_leaves_nothing_behind(script, tmp_path, monkeypatch):
    dataset, report = script(lambda prompt, time: f"zorvex {prompt}")
    monkeypatch.setattr(harvest_module, "_data_card", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_harvest(dataset, report, tmp_path / "unsafe")
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
    dataset, report = harvest(model, tokenizer, WORDS, judge, n=12, template="none", batch_size=8)
    assert len(dataset) == 12 and report.generated >= report.judged["harmful"] >= 12
    for row in dataset:
        assert (row["instruction"], row["completion"]) in judge.asked and "w1" in row["completion"]
    again, _ = harvest(model, tokenizer, WORDS, FirstWordJudge(), n=12, template="none", batch_size=8)
    assert again.to_list() == dataset.to_list()
    greedy = generate(model, tokenizer, dataset["prompt"], decoding=Decoding(max_new_tokens=16))
    assert [r.text for r in greedy] != dataset["completion"]
