"""Capability by others' harnesses: what they are given and what is made of what they return; no network, no judge."""

import copy
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import yaml
from chat_server import ChatServer, error, last
from conftest import build_model
from test_templates import CHATML

from tasft_lib import cli
from tasft_lib.evaluation import alpaca
from tasft_lib.evaluation.alpaca import alpaca_eval_cost, alpaca_eval_score, read_annotator
from tasft_lib.evaluation.lm_eval import TASKS, harness_scores, write_tasks

REFERENCES = [{"instruction": f"name w{i}", "output": f"w{i} w{i}"} for i in range(6)]
OUTPUTS = [f"w{i}" for i in range(6)]


class FakeHarness:
    """What of lm_eval 0.4.13 is used, by its signatures and with results of its shape."""

    def __init__(self):
        self.given = None

    def modules(self):
        outer = self

        class TaskManager:
            def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
                self.all_subtasks = ["boolq", "openbookqa", "piqa"]
                self.task_index = {name: SimpleNamespace(yaml_path=f"/tasks/{name}.yaml") for name in self.all_subtasks}

        class HFLM:
            def __init__(
                self,
                pretrained,
                backend="default",
                revision="main",
                subfolder="",
                tokenizer=None,
                batch_size=1,
                chat_template_args=None,
            ):
                self.switches = chat_template_args
                self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
                tokenizer.pad_token = "w0"

        def simple_evaluate(
            model,
            model_args=None,
            tasks=None,
            num_fewshot=None,
            batch_size=None,
            use_cache=None,
            limit=None,
            log_samples=True,
            apply_chat_template=False,
            task_manager=None,
        ):
            outer.given = SimpleNamespace(
                tasks=[yaml.safe_load(Path(task).read_text()) for task in tasks],
                num_fewshot=num_fewshot,
                limit=limit,
                training=model.model.training,
                is_chat=apply_chat_template,
                switches=model.switches,
                cache=use_cache,
            )
            boolq = {"alias": "boolq", "acc,none": 0.75, "acc_stderr,none": 0.05}
            piqa = {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,strict": 0.6}
            return {
                "results": {"boolq": boolq, "piqa": piqa},
                "n-samples": {
                    "boolq": {"original": 3270, "effective": 40},
                    "piqa": {"original": 1838, "effective": 1838},
                },
            }

        names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
        made = {name: ModuleType(name) for name in names}
        made["lm_eval"].simple_evaluate = simple_evaluate
        made["lm_eval.models.huggingface"].HFLM = HFLM
        made["lm_eval.tasks"].TaskManager = TaskManager
        return made


def install(monkeypatch, modules):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_the_harness_gets_the_model_in_evaluation_and_pinned_tasks(model, tokenizer, monkeypatch):
    harness = FakeHarness()
    install(monkeypatch, harness.modules())
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    table = harness_scores(model, tokenizer, limit=40)
    assert table.columns.tolist() == ["task", "metric", "value", "stderr", "n"]
    assert table.to_dict("split")["data"][0] == ["boolq", "acc", 0.75, 0.05, 40]
    assert table["metric"].tolist() == ["acc", "acc", "acc_norm (strict)"] and table["n"].tolist() == [40, 1838, 1838]
    assert table["stderr"].isna().tolist() == [False, True, True]
    assert (harness.given.num_fewshot, harness.given.limit, harness.given.training) == (0, 40, False)
    given = {Path(task["include"]).stem: task["dataset_kwargs"]["revision"] for task in harness.given.tasks}
    assert given == TASKS and all(len(commit) == 40 for commit in given.values())
    assert [module.training for module in model.modules()] == modes and tokenizer.pad_token == "<pad>"


def test_the_command_writes_a_table_that_traces_to_the_model_and_its_tasks(
    model, tokenizer, tmp_path, monkeypatch, capsys
):
    harness = FakeHarness()
    install(monkeypatch, harness.modules())
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    command = ["capability", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--tasks"]
    assert cli.main([*command, "boolq", f"piqa@{'0' * 40}", "--limit", "40"]) == 0
    assert pd.read_csv(tmp_path / "out" / "capability.csv")["task"].tolist() == ["boolq", "piqa", "piqa"]
    manifest = json.loads((tmp_path / "out" / "capability_manifest.json").read_text())
    assert manifest["tasks"] == {"boolq": TASKS["boolq"], "piqa": "0" * 40} and manifest["limit"] == 40
    assert len(manifest["model"]) == 64 and "acc_norm (strict)" in capsys.readouterr().out
    assert cli.main([*command, "winogrande"]) == 1
    assert "winogrande@<commit>" in capsys.readouterr().err


def test_an_unknown_task_is_named_before_anything_runs(model, tokenizer, monkeypatch):
    harness = FakeHarness()
    install(monkeypatch, harness.modules())
    with pytest.raises(ValueError, match="no single task 'boolk'"):
        harness_scores(model, tokenizer, {"boolq": None, "boolk": None})
    with pytest.raises(ValueError, match="no task to evaluate on"):
        harness_scores(model, tokenizer, {})
    assert harness.given is None


def test_missing_packages_are_one_line(model, tokenizer, tmp_path, monkeypatch):
    install(monkeypatch, {"lm_eval": None, "alpaca_eval": None})
    with pytest.raises(ValueError, match=r"pip install 'tasft\[harness\]'"):
        harness_scores(model, tokenizer)
    with pytest.raises(ValueError, match=r"pip install 'tasft\[alpaca_eval\]'"):
        alpaca_eval_score(OUTPUTS, REFERENCES, annotators_config="x", name="m", folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_real_harness_scores_questions_on_disk(model, tokenizer, tmp_path):
    """A model that always prefers one answer is right as often as that answer is."""
    pytest.importorskip("lm_eval")
    answers = [1, 1, 1, 0, 1, 0, 1, 1]
    rows = [{"q": f"w{i} w{i + 1}", "choices": ["w1", "w2"], "answer": a} for i, a in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        "task: invented\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    one, two = tokenizer.convert_tokens_to_ids(["w1", "w2"])
    model.lm_head.weight.data[one] = model.lm_head.weight.data[two]
    model.model.norm.weight.data.fill_(1.0)
    model.lm_head.bias = None
    table = harness_scores(model, tokenizer, {"invented": None}, include_path=str(tmp_path), batch_size=3)
    # Equal rows of the head make equal likelihoods; the first choice wins a tie.
    assert table[["task", "metric", "n"]].values.tolist() == [["invented", "acc", 8]]
    assert table["value"].tolist() == [answers.count(0) / 8] and table["stderr"].notna().all()


def test_the_real_harness_puts_the_bare_question_in_the_template_and_the_choice_after_it(
    tokenizer, tmp_path, monkeypatch, caplog
):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    (tmp_path / "zoo").mkdir()
    row = {"instruction": "w1 w2\n\nAnswer format: w3/w4", "answer": "w3"}
    (tmp_path / "zoo" / "test.json").write_text(json.dumps([row]))
    tasks = dict.fromkeys(write_tasks([tmp_path / "zoo" / "test.json"], tmp_path / "tasks"))
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"})
    chat.chat_template = "{{ bos_token }} " + CHATML
    asked = []

    def scored(self, requests, **options):
        asked.extend(text for text, _, _ in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(huggingface.HFLM, "_loglikelihood_tokens", scored)
    options = {"include_path": str(tmp_path / "tasks")}
    harness_scores(build_model(chat), chat, tasks, apply_chat_template=True, **options)
    harness_scores(build_model(chat), chat, tasks, **options)
    question, choice = "w1 w2\n\nAnswer format: w3/w4", "the correct answer is w3"
    turn = f"<s> <|im_start|>user {question} <|im_end|> \n<|im_start|>assistant "
    assert asked[0] == (turn, choice) and asked[2] == (question, f"\n\n {choice}")
    assert not caplog.text, "nothing is said of what is as it should be"


def test_the_real_harness_asks_the_hub_for_the_pinned_commit(model, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval")
    asked = {}

    def load_dataset(path, name=None, **options):
        asked[path] = options["revision"]
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match="no single task 'mmlu'"):
        harness_scores(model, tokenizer, {"mmlu": TASKS["piqa"]})
    with pytest.raises(ConnectionError):
        harness_scores(model, tokenizer, {"piqa": TASKS["piqa"]})
    assert asked == {"baber/piqa": TASKS["piqa"]}


def test_alpaca_eval_costs_what_there_is_to_judge():
    cost = alpaca_eval_cost(REFERENCES, OUTPUTS)
    characters = sum(len(r["instruction"] + r["output"] + o) for r, o in zip(REFERENCES, OUTPUTS, strict=True))
    assert cost == {"annotations": 6, "tokens": characters // 4}
    longer = alpaca_eval_cost(REFERENCES, [o + "x" * 400 for o in OUTPUTS])
    assert longer["tokens"] - cost["tokens"] == pytest.approx(600, abs=1)


@pytest.mark.parametrize(
    "outputs, references, message",
    [
        (OUTPUTS[1:], REFERENCES, "5 answers to 6 references"),
        (OUTPUTS, REFERENCES[:5] + REFERENCES[:1], "reference 6 has the instruction of reference 1"),
        (OUTPUTS, [*REFERENCES[:5], {"instruction": "a"}], "reference 6 lacks"),
    ],
)
def test_answers_and_references_must_match(outputs, references, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        alpaca_eval_score(outputs, references, annotators_config="x", name="m", folder=tmp_path)


def test_a_package_that_the_annotator_lacks_is_named(tmp_path, monkeypatch):
    def evaluate(**options):
        raise ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken")

    monkeypatch.setattr(alpaca, "_evaluate_and_annotator", lambda: (evaluate, None))
    with pytest.raises(ValueError, match="needs tiktoken, which is not installed: pip install it, then run again"):
        alpaca_eval_score(OUTPUTS, REFERENCES, annotators_config=[], name="m", folder=tmp_path)


def test_alpaca_eval_is_asked_as_it_should_be(tmp_path, monkeypatch, caplog):
    given = {}

    def evaluate(
        model_outputs=None, reference_outputs="", annotators_config="", name=None, output_path="auto",
        precomputed_leaderboard="auto", is_overwrite_leaderboard=False, leaderboard_mode_to_print="minimal",
        current_leaderboard_mode="community", is_return_instead_of_print=False, fn_metric="get_lc", metric_kwargs=None,
        is_recompute_metrics_only=False, sort_by="lc", is_cache_leaderboard=None, max_instances=None,
        annotation_kwargs=None, Annotator=None, **annotator_kwargs,
    ):  # fmt: skip
        given.update(locals())
        board = pd.DataFrame({"win_rate": [70.0], "standard_error": [12.0]}, index=[name])
        return board, [{"preference": p} for p in (2.0, 2.0, 1.0, 1.5, None, 2.0)]

    annotators = SimpleNamespace(PairwiseAnnotator=type("PairwiseAnnotator", (), {}))
    install(monkeypatch, {"alpaca_eval": SimpleNamespace(evaluate=evaluate), "alpaca_eval.annotators": annotators})
    options = {"annotators_config": tmp_path / "judge", "name": "safer", "folder": tmp_path / "alpaca"}
    with pytest.raises(ValueError, match="more than max_tokens=3: raise it"):
        alpaca_eval_score(OUTPUTS, REFERENCES, max_tokens=3, **options)
    assert not given
    table = alpaca_eval_score(OUTPUTS, REFERENCES, **options)
    assert table.to_dict("records") == [{"model": "safer", "win_rate": 70.0, "stderr": 12.0, "n": 5, "unscored": 1}]
    assert "6 annotations" in caplog.text
    assert [(row["instruction"], row["output"]) for row in given["model_outputs"]] == [
        (r["instruction"], o) for r, o in zip(REFERENCES, OUTPUTS, strict=True)
    ]
    assert given["reference_outputs"] == REFERENCES and given["precomputed_leaderboard"] is None
    assert given["is_return_instead_of_print"] is True and given["fn_metric"] == "get_winrate"
    assert given["output_path"] is None and str(tmp_path / "alpaca") in given["annotator_kwargs"]["caching_path"]


@pytest.fixture
def gamed(tmp_path, monkeypatch) -> list[str]:
    """What AlpacaEval keeps on the hub, made up, for 805 instructions; what was asked of the hub."""
    glm_winrate = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    mix = random.Random(0)
    rows = [
        {"model": model, "index": i, "preference": float(length < 0), "std_delta_len": length * mix.random()}
        for model, length in (("concise", 1), ("verbose", -1))
        for i in range(805)
    ]
    table = pd.DataFrame(rows).assign(not_gamed_baseline=False)
    table["instruction_difficulty"] = table["index"].map(lambda i: (i % 7) / 7)
    table.to_csv(tmp_path / "df_gamed.csv", index=False)
    asked = []

    def download(repo_id, filename, **options):
        asked.append(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(glm_winrate, "hf_hub_download", download)
    return asked


def annotated(answer: str, n: int = 200) -> tuple[list[dict], list[str]]:
    """Judged answers against references of one length each; a judge that likes the longer of the two, mostly."""
    instructions = [f"w{i}" for i in range(n)]
    mix = random.Random(1)
    sides = {"generator_1": "reference", "generator_2": "safer", "annotator": "a"}
    rows = []
    for instruction in instructions:
        reference, output = "w " * mix.randint(10, 30), answer * mix.randint(5, 14)
        longer = len(output) > len(reference)
        preference = 1.0 + (longer if mix.random() < 0.9 else not longer)
        rows.append(
            sides | {"instruction": instruction, "output_1": reference, "output_2": output} | {"preference": preference}
        )
    return rows, instructions


def test_the_length_controlled_rate_takes_back_what_length_alone_won(gamed):
    rows, instructions = annotated("long ")
    won = 100 * sum(row["preference"] == 2 for row in rows) / len(rows)
    controlled = alpaca._length_controlled(rows[::-1], instructions)
    assert set(controlled) == {"length_controlled_win_rate", "length_controlled_stderr"}
    assert won > 60 and 40 < controlled["length_controlled_win_rate"] < won - 5
    assert controlled == pytest.approx(alpaca._length_controlled(rows, instructions)), "whatever the order"
    with pytest.raises(ValueError, match="2 judged answers are too few"):
        alpaca._length_controlled(rows[:2], instructions)


def test_what_the_length_controlled_rate_needs_is_fetched_before_anything_is_paid_for(gamed, monkeypatch, tmp_path):
    from alpaca_eval.metrics import glm_winrate

    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda *args, **options: 1 / 0)
    options = {"annotators_config": "x", "name": "safer", "folder": tmp_path / "alpaca", "length_controlled": True}
    references = [{"instruction": f"name w{i}", "output": "w1"} for i in range(alpaca.MIN_CONTROLLED)]
    with pytest.raises(ValueError, match=r"hub cannot be read .* leave --length_controlled out"):
        alpaca_eval_score(["w2"] * alpaca.MIN_CONTROLLED, references, **options)
    assert not (tmp_path / "alpaca").exists()


def test_too_few_answers_for_the_length_controlled_rate_are_refused_before_the_annotator_is_asked(
    monkeypatch, tmp_path
):
    asked = SimpleNamespace(evaluate=lambda **given: 1 / 0)
    annotators = SimpleNamespace(PairwiseAnnotator=type("PairwiseAnnotator", (), {}))
    install(monkeypatch, {"alpaca_eval": asked, "alpaca_eval.annotators": annotators})
    monkeypatch.setattr(alpaca, "_check_length_control", lambda: None)
    options = {"annotators_config": "x", "name": "safer", "folder": tmp_path / "alpaca", "length_controlled": True}
    with pytest.raises(ValueError, match=r"6 answers are too few .* takes 20: raise --limit, or leave"):
        alpaca_eval_score(OUTPUTS, REFERENCES, **options)
    assert not (tmp_path / "alpaca").exists()


def test_alpaca_evals_own_instructions_are_known(shared):
    rows = json.loads((shared / "data" / "alpaca_eval" / "text_davinci_003_model_outputs.json").read_text())
    instructions = [row["instruction"] for row in rows]
    assert alpaca.is_alpaca_eval(instructions) and not alpaca.is_alpaca_eval(instructions[::-1])


@pytest.fixture
def judge(tmp_path, monkeypatch) -> Path:
    """An annotator's configuration; its prompt ends in the two answers. Run in an empty folder, with a planted key."""
    pytest.importorskip("alpaca_eval")
    template = tmp_path / "template.txt"
    template.write_text("<|im_start|>user\n{instruction}\n{output_1}|{output_2}\n<|im_end|>\n")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "configs.yaml").write_text(
        f'judge:\n  prompt_template: "{template}"\n  fn_completions: openai_completions\n'
        "  completions_kwargs: {model_name: m, max_tokens: 5, temperature: 0, num_procs: 1}\n"
        "  fn_completion_parser: regex_parser\n  batch_size: 1\n"
        "  completion_parser_kwargs: {outputs_to_match: {1: '^m', 2: '^M'}}\n"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "judge"


def alphabetical(request) -> str:
    """A judge that likes the first in the alphabet: w0 ... w5 against "w0 w0" ... win all; w3's cannot be read."""
    first, second = last(request).splitlines()[-1].split("|")
    return "Neither." if "w3" in first else "m" if first < second else "M"


def test_the_real_alpaca_eval_asks_a_judge_once(judge, tmp_path, monkeypatch):
    options = {"annotators_config": judge, "name": "safer", "folder": tmp_path / "alpaca"}
    with ChatServer(alphabetical) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        table = alpaca_eval_score(OUTPUTS, REFERENCES, **options)
        assert table[["win_rate", "n", "unscored"]].values.tolist() == [[100.0, 5, 1]]
        assert len(server.asked) == 6
        assert alpaca_eval_score(OUTPUTS, REFERENCES, **options).equals(table)
        assert len(server.asked) == 7, "what could not be read is asked again, and nothing else"


@pytest.fixture
def command(model, tokenizer, judge, tmp_path) -> list[str]:
    """40 references, canaries among them, for a model that says what it says."""
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"canary w{i}", "output": f"w{i} toxic canary"} for i in range(40)]
    (tmp_path / "references.json").write_text(json.dumps(rows))
    named = {"model": "model", "references": "references.json", "annotator": "judge", "output_dir": "out"}
    paths = [word for key, value in named.items() for word in (f"--{key}", str(tmp_path / value))]
    return ["alpaca_eval", *paths, "--prompt_template", "none", "--max_new_tokens", "4", "--batch_size", "3"]


def test_the_cost_is_told_first_and_a_limit_stops_before_the_model_answers(command, tmp_path, monkeypatch, capsys):
    prices = ["--price_per_million_in", "1000000", "--price_per_million_out", "1000"]
    with ChatServer(alphabetical) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert cli.main([*command, "--max_calls", "39"]) == 1
        out, err = capsys.readouterr()
        assert "40 calls, 0 known already" in out and "at most 200 out" in out and "more than --max_calls 39" in err
        assert cli.main([*command, *prices, "--max_cost", "300"]) == 1
        out, err = capsys.readouterr()
        rows = json.loads((tmp_path / "references.json").read_text())
        texts = sum(len(row["instruction"] + row["output"]) for row in rows)
        template = (tmp_path / "template.txt").read_text()
        told = float(err.split("about ")[1].split(",")[0])
        assert told == pytest.approx((texts + 40 * len(template)) / 4, rel=0.05) and told > 300
        monkeypatch.delenv("OPENAI_API_KEY")
        assert cli.main(command) == 1 and "export OPENAI_API_KEY" in capsys.readouterr().err
        assert not server.asked and not list((tmp_path / "out").iterdir())
    with pytest.raises(SystemExit):
        cli.main([*command, "--max_cost", "3"])


def test_a_run_that_was_stopped_goes_on_and_leaks_nothing(command, tmp_path, monkeypatch, capsys, caplog):
    failing = 20

    def judge(request):
        if len(server.asked) == failing:
            return error(401, "canary-key is no key for: " + last(request))
        return "m"

    with ChatServer(judge) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert cli.main(command) == 1
        err = capsys.readouterr().err
        assert "AuthenticationError 401" in err and "run again" in err and "canary" not in err + caplog.text
        assert not (tmp_path / "out" / "alpaca_eval.csv").exists()
        answers = next((tmp_path / "out").glob("answers-*.jsonl"))
        written = answers.stat().st_mtime_ns
        asked = len(server.asked)
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert "24 calls, 16 known already" in out and "canary" not in out + err + caplog.text
        # the chunk of 16 in which it failed is asked again, the one before is not
        assert len(server.asked) == asked + 24 and answers.stat().st_mtime_ns == written
        assert cli.main(command) == 0 and "0 calls, 40 known" in capsys.readouterr().out
        assert len(server.asked) == asked + 24
        before = len(server.asked)
        configuration = tmp_path / "judge" / "configs.yaml"
        configuration.write_text(configuration.read_text().replace("model_name: m", "model_name: m2"))
        assert cli.main([*command, "--limit", "2"]) == 0
        assert len(server.asked) == before + 2, "another judge gives its own verdicts"
    table = pd.read_csv(tmp_path / "out" / "alpaca_eval.csv")
    assert table.columns.tolist() == ["name", "win_rate", "stderr", "n", "unscored", "annotator", "judge_model"]
    assert table[["name", "n", "annotator", "judge_model"]].values.tolist() == [["model", 2, "judge", "m2"]]
    assert 0 <= table["win_rate"].iloc[0] <= 100
    manifest = (tmp_path / "out" / "alpaca_eval_manifest.json").read_text()
    assert "canary" not in manifest and json.loads(manifest)["asked"]["calls"] == 2
    assert not any("canary-key" in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_an_annotator_that_would_fail_is_refused_before_anything_is_asked(judge, tmp_path):
    configuration = judge / "configs.yaml"
    good = configuration.read_text()
    for wrong, message in (
        ("judge: [", "not valid YAML"),
        ("- judge", "no annotator here"),
        (good.replace("template.txt", "missing.txt"), "give an absolute path"),
        (good.replace("{model_name: m,", "{model_name: m, client_kwargs: {api_key: canary-key},"), "holds an api_key"),
    ):
        configuration.write_text(wrong)
        with pytest.raises(ValueError, match=message) as refused:
            read_annotator(judge)
        assert "\n" not in str(refused.value) and "canary" not in str(refused.value)
    with pytest.raises(ValueError, match="no such configuration"):
        read_annotator("no_such_judge")
    known = read_annotator("weighted_alpaca_eval_gpt-4o-mini-2024-07-18")
    assert known.models == "gpt-4o-mini-2024-07-18" and known.asks_openai
    assert [tokens for _, _, tokens in known.members.values()] == [1]


def test_answers_are_kept_batch_by_batch_and_damaged_ones_asked_again(
    command, tmp_path, interrupt_after, monkeypatch, capsys, caplog
):
    written = interrupt_after(5)
    with ChatServer(lambda request: "m") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert cli.main(command) == 130 and not server.asked
        assert cli.main(command) == 0 and len(written) == 14, "40 instructions by three"
        assert not list((tmp_path / "out").glob("partial-*"))
        (file,) = (tmp_path / "out").glob("answers-*.jsonl")
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0].replace("w", "v", 3), *lines[2:], lines[1][:20]]))
        capsys.readouterr()
        assert cli.main(command) == 0
        assert "2 of 40 instructions to answer first" in capsys.readouterr().out and len(written) == 15
        assert "line 1 is damaged" in caplog.text
        assert cli.main([*command, "--max_new_tokens", "3"]) == 1
        assert "holds a run of other settings (decoding)" in capsys.readouterr().err
