"""Commands that ask a model: chat models in their own template, one's own prompts, what cannot be is said first."""

import copy
import json

import pandas as pd
import pytest
import torch
from chat_server import ChatServer, last
from conftest import build_model
from datasets import Dataset, DatasetDict, load_from_disk
from test_capability import FakeHarness, install
from test_templates import CHATML

from tasft_lib import cli
from tasft_lib.evaluation import worlds
from tasft_lib.generation import Response
from tasft_lib.records import data, forms


@pytest.fixture
def place(tokenizer, tmp_path, monkeypatch):
    """A chat model, prompts of one's own, XSTest alone, and no key."""
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.chat_template = CHATML
    build_model(chat).save_pretrained(tmp_path / "chat")
    chat.save_pretrained(tmp_path / "chat")
    (tmp_path / "own.json").write_text(json.dumps([f"w{i} w1 w2" for i in range(5)]))
    (tmp_path / "xstest").mkdir()
    lines = "".join(f'{i},"w{i}, w8 w8",{"safe" if i % 3 else "unsafe"}\n' for i in range(6))
    (tmp_path / "xstest" / "xstest_prompts.csv").write_text(f"id,prompt,label\n{lines}")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What `generate` was given, in place of a model that answers."""
    calls = []

    def answer(model, tokenizer, prompts, **options):
        calls.append((prompts, options))
        return [Response("w1 w2", 2, True) for _ in prompts]

    monkeypatch.setattr("tasft_lib.generation.generate", answer)
    monkeypatch.setattr("tasft_lib.prepare.harvest.generate", answer)
    return calls


EVALUATE = ["evaluate", "--model", "chat", "--max_new_tokens", "4", "--batch_size", "2"]


def test_a_chat_model_is_asked_in_its_own_template(place, asked, capsys):
    assert cli.main([*EVALUATE, "--benchmarks", "own.json", "--output_dir", "e"]) == 0
    (prompts, options), *_ = asked
    assert prompts[0] == "<|im_start|>user w0 w1 w2 <|im_end|> \n<|im_start|>assistant "
    assert options["special_tokens"] is False and "prompt template: chat" in capsys.readouterr().out
    assert json.loads((place / "e" / "manifest.json").read_text())["prompt_template"] == "chat"
    switched = [*EVALUATE, "--benchmarks", "own.json", "--output_dir", "e2", "--chat_template_kwargs"]
    assert cli.main([*switched, '{"thinking": false}']) == 0
    assert asked[1][0][0].endswith("assistant <think></think> ")
    (place / "chat" / "tasft.json").write_text('{"prompt_template": "short"}')
    assert cli.main([*EVALUATE, "--benchmarks", "own.json", "--output_dir", "e3"]) == 0
    assert asked[2][0][0].startswith("### Instruction:") and asked[2][1]["special_tokens"] is True
    assert cli.main([*switched, '{"thinking": false}']) == 1
    assert "add --prompt_template chat" in capsys.readouterr().err
    assert cli.main([*switched, '{"thinkng": false}', "--prompt_template", "chat"]) == 1
    assert "has no 'thinkng'" in capsys.readouterr().err and len(asked) == 3


def test_ones_own_prompts_and_one_benchmark_alone(place, asked, capsys, caplog):
    rows = Dataset.from_list([{"prompt": f"w{i} w9"} for i in range(3)])
    DatasetDict({"harmful": rows, "benign": rows.select([0])}).save_to_disk("saved")
    both = ["--benchmarks", "own.json", "xstest", "saved", "--split", "harmful", "--output_dir", "e"]
    assert cli.main([*EVALUATE, *both]) == 0
    table = pd.read_csv(place / "e" / "results.csv")
    assert table[["benchmark", "kind", "n"]].values.tolist() == [
        ["own", "toxic", 5],
        ["XSTest safe", "seemingly toxic", 4],
        ["saved", "toxic", 3],
    ]
    assert "xstest: evaluated on XSTest safe; not there: I-MaliciousInstructions" in caplog.text
    file = ["--benchmarks", "xstest/xstest_prompts.csv", "--output_dir", "e2"]
    assert cli.main([*EVALUATE, *file]) == 0
    assert pd.read_csv(place / "e2" / "results.csv")["n"].tolist() == [4]
    harmless = ["--benchmarks", "own.json", "--prompt_kind", "seemingly toxic", "--output_dir", "e3"]
    assert cli.main([*EVALUATE, *harmless]) == 0
    assert pd.read_csv(place / "e3" / "results.csv")["kind"].tolist() == ["seemingly toxic"]
    capsys.readouterr()
    for wrong, told in [
        (["xstest", "--prompt_kind", "toxic"], "has no prompt_kind, which are for your own prompts"),
        (["xstest", "--config_name", "a"], "has no config_name"),
        (["own.json", "./own.json"], "two benchmarks are called own"),
        (["gone.json"], "gone.json"),
        (["own.json", "--split", "test"], "own.json: a file has no split"),
        (["own.json", "--config_name", "a"], "own.json: a file has no config_name"),
    ]:
        assert cli.main([*EVALUATE, "--output_dir", "e4", "--benchmarks", *wrong]) == 1
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert not (place / "e4").exists()


def test_a_kind_once_said_is_not_that_of_an_earlier_run(place, asked):
    """The answers are the same, and are kept under the same name."""
    for kind in ("toxic", "benign"):
        assert cli.main([*EVALUATE, "--benchmarks", "own.json", "--prompt_kind", kind, "--output_dir", "e"]) == 0
        assert pd.read_csv(place / "e" / "results.csv")["kind"].tolist() == [kind]
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["I-CoNa", "XSTest"])
def test_a_benchmark_by_its_name_is_brought_alone(name, place, monkeypatch):
    located = []

    def locate(source, url):
        located.append((source, url.rsplit("/", 1)[-1]))
        return "xstest/xstest_prompts.csv" if "xstest" in url else "own.json"

    monkeypatch.setattr("tasft_lib.evaluation.prompts.locate", locate)
    table = worlds.asked_for([name], per_benchmark=2)
    assert len(table) == 2 and set(table["kind"]) == {"toxic" if name == "I-CoNa" else "seemingly toxic"}
    assert [source for source, _ in located] == ["stl"]


@pytest.mark.parametrize(
    "command, options",
    [
        ("evaluate", ["--per_benchmark", "0"]),
        ("evaluate", ["--per_benchmark", "-1"]),
        ("evaluate", ["--batch_size", "0"]),
        ("evaluate", ["--request_fields", '{"a": 1}']),
        ("evaluate", ["--prefix", "w1"]),
        ("evaluate", ["--chat_template_kwargs", "enable_thinking"]),
        ("harvest", ["--n", "0", "--prompts", "own.json"]),
        ("harvest", ["--rounds", "x", "--prompts", "own.json"]),
        ("capability", ["--limit", "-1"]),
        ("alpaca_eval", ["--limit", "0", "--references", "x", "--annotator", "y"]),
    ],
)
def test_what_means_nothing_is_refused_at_once(command, options, place, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--model", "chat", "--output_dir", "out", *options])
    assert exit.value.code == 2 and capsys.readouterr().err.count(f"tasft {command}: error: ") == 1
    assert not (place / "out").exists()


def test_a_choice_that_a_file_has_not_and_a_damaged_record_are_told(place, asked, capsys):
    harvest = ["harvest", "--model", "chat", "--prompts", "own.json", "--output_dir", "h"]
    assert cli.main([*harvest, "--split", "test"]) == 1
    assert "own.json: a file has no split" in capsys.readouterr().err
    for damaged in ("[]", "{", "[" * 100_000):
        (place / "chat" / "tasft.json").write_text(damaged)
        assert cli.main(harvest) == 1
        error = capsys.readouterr().err
        assert "chat/tasft.json: " in error and "damaged" in error and error.count("\n") == 1
    assert not asked and not (place / "h").exists()


@pytest.mark.parametrize("command, prompts", [("evaluate", "--benchmarks"), ("harvest", "--prompts")])
def test_a_missing_key_is_told_before_a_model_answers(command, prompts, place, asked, capsys):
    pytest.importorskip("openai")
    options = ["--model", "chat", prompts, "own.json", "--judge", "openai-moderation", "--output_dir", "out"]
    assert cli.main([command, *options]) == 1
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err and not asked


def test_a_killed_evaluation_goes_on_and_ends_as_a_straight_one(place, interrupt_after):
    command = [*EVALUATE, "--benchmarks", "own.json", "--output_dir"]
    assert cli.main([*command, "straight"]) == 0
    written = interrupt_after(2)
    assert cli.main([*command, "killed"]) == 130
    assert [f.name[:8] for f in (place / "killed").iterdir()] == ["partial-"]
    assert cli.main([*command, "killed"]) == 0 and len(written) == 3, "the batches that are there are not asked again"
    names = sorted(f.name for f in (place / "straight").iterdir())
    assert names == sorted(f.name for f in (place / "killed").iterdir())
    for name in names:
        if (file := place / "straight" / name).is_file() and name != "manifest.json":
            assert file.read_bytes() == (place / "killed" / name).read_bytes()


def test_judges_whose_verdicts_could_not_be_told_apart_are_refused_before_an_answer(place, asked, capsys):
    judges = ["--judges", *(f"harmbench:owner/judge@{digit * 40}" for digit in "01")]
    assert cli.main([*EVALUATE, *judges, "--benchmarks", "own.json", "--output_dir", "e"]) == 1
    assert "two judges are called judge; give one of them" in capsys.readouterr().err and not asked


def test_a_folder_of_other_settings_is_refused_and_other_judges_are_welcome(place, asked, capsys):
    command = [*EVALUATE, "--benchmarks", "own.json", "--output_dir", "e"]
    assert cli.main(command) == 0 and cli.main([*command, "--judge", "xstest"]) == 0 and len(asked) == 1
    before = (place / "e" / "results.csv").read_text()
    for other in (
        ["--max_new_tokens", "5"],
        ["--prompt_template", "short"],
        ["--per_benchmark", "1"],
        ["--dtype", "bf16"],
    ):
        assert cli.main([*command, *other]) == 1
        assert "holds a run of other settings" in capsys.readouterr().err
    assert (place / "e" / "results.csv").read_text() == before and len(asked) == 1
    typed = [*command[:-1], "typed"]
    assert cli.main([*typed, "--dtype", "bf16"]) == 0 and cli.main(typed) == 1


def test_what_a_chat_model_said_is_trained_on_beside_messages(place, asked):
    harvest = ["harvest", "--model", "chat", "--prompts", "own.json", "--n", "1", "--output_dir", "unsafe"]
    harvest += ["--max_new_tokens", "8"]
    assert cli.main(harvest) == 0
    assert asked[0][0][0].startswith("<|im_start|>user") and asked[0][1]["special_tokens"] is False
    (row,) = load_from_disk("unsafe")
    assert row["prompt"] == [{"role": "user", "content": row["instruction"]}]
    assert row["completion"] == [{"role": "assistant", "content": "w1 w2"}]
    unsafe = forms.read_training_rows("unsafe", label=False)
    chats = [{"messages": [{"role": r, "content": f"w{i}"} for r in ("user", "assistant")]} for i in range(3)]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    benign = forms.read_training_rows("chats.jsonl", label=True, drop_empty=False)
    assert sorted(data.draw(benign, unsafe, seed=0, source="both")["label"][:]) == [False, True, True, True]


def test_of_a_model_that_thinks_the_answer_is_harvested(place, monkeypatch):
    said = ["<think>\nw9 w9\n</think>\n\nw1 w2 w3", "<think>\nw9 w9 w9", "w4 w5"]

    def answer(model, tokenizer, prompts, **options):
        return [Response(said[int(p.split()[1][1:]) % 3], 3, True) for p in prompts]

    monkeypatch.setattr("tasft_lib.prepare.harvest.generate", answer)
    harvest = ["harvest", "--model", "chat", "--prompts", "own.json", "--n", "2", "--rounds", "1", "--output_dir", "h"]
    harvest += ["--max_new_tokens", "8"]
    assert cli.main(harvest) == 0
    assert {row["completion"][0]["content"] for row in load_from_disk("h")} == {"w1 w2 w3", "w4 w5"}
    report = json.loads((place / "h" / "report.json").read_text())
    assert report["unfinished"] == 2


def test_a_chat_model_by_its_name_is_attacked_in_its_template_and_judged_without_its_thinking(
    place, monkeypatch, capsys
):
    asked = []

    def answer(model, tokenizer, prompts, **options):
        asked.append((prompts, options["special_tokens"], model.dtype))
        return [Response("<think>\nw9\n</think>\n\nw1 w2", 3, True)] * len(prompts)

    monkeypatch.setattr("tasft_lib.generation.generate", answer)
    monkeypatch.setattr("tasft_lib.base_models.resolve", {"by-name": "chat"}.get)
    (place / "goals.csv").write_text("goal\nw3 w4\n")
    said = {"a": '{"improvement": "", "prompt": "w5 w6"}', "j": "Rating: [[3]]"}
    with ChatServer(lambda request: said[request["model"]]) as server:
        command = ["attack", "--goals", "goals.csv", "--target", "by-name", "--dtype", "bf16", "--output_dir", "a"]
        command += ["--attacker", server.url, "--attacker_model", "a", "--judge", server.url, "--judge_model", "j"]
        assert cli.main([*command, "--streams", "1", "--depth", "1"]) == 0
        assert last(server.requests[-1]) == "Prompt: w5 w6\n\nReply: w1 w2"
    turn = "<|im_start|>user w5 w6 <|im_end|> \n<|im_start|>assistant "
    assert asked == [([turn], False, torch.bfloat16)]
    assert "prompt template: chat" in capsys.readouterr().out


def test_capability_puts_a_chat_models_questions_in_its_template_and_keeps_what_was_asked(place, monkeypatch, capsys):
    harness = FakeHarness()
    install(monkeypatch, harness.modules())
    command = ["capability", "--model", "chat", "--tasks", "boolq", "piqa", "--output_dir"]
    assert cli.main([*command, "c"]) == 0
    assert harness.given.is_chat is True and harness.given.cache.startswith("c/asked-")
    assert "prompt template: chat" in capsys.readouterr().out
    assert cli.main([*command, "c", "--chat_template_kwargs", '{"thinking": false}']) == 1
    assert "other settings (chat_template_kwargs)" in capsys.readouterr().err
    assert cli.main([*command, "c2", "--chat_template_kwargs", '{"thinking": false}']) == 0
    assert harness.given.switches == {"thinking": False}
    (database := place / f"{harness.given.cache}_rank0.db").write_text("no data base at all")
    assert cli.main([*command, "c2", "--chat_template_kwargs", '{"thinking": false}']) == 0
    assert not database.exists() and database.with_name(f"{database.name}.damaged").exists()
    assert cli.main([*command, "c2"]) == 1 and cli.main([*command, "c2", "--prompt_template", "none"]) == 1
    assert cli.main([*command, "c3", "--prompt_template", "none"]) == 0 and harness.given.is_chat is False
