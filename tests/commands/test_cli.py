"""The command line on files: the whole job in three commands, and one clear line for what a person gets wrong."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from conftest import build_model, make_rows
from datasets import Dataset, load_from_disk

from tasft_lib import cli
from tasft_lib.evaluation import prompts as prompts_module
from tasft_lib.evaluation import worlds
from tasft_lib.generation import Response
from tasft_lib.judges.base import Judgement
from tasft_lib.storage import integrity
from tasft_lib.storage.files import file_hash, model_identity

TOXIC = ("I-MaliciousInstructions", "I-CoNa", "I-Controversial")


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A base model, Alpaca-format benign rows, unsafe rows, benchmarks in their published formats, and a config."""
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = make_rows(30)
    alpaca = [
        {"instruction": r["prompt"].strip(), "input": "", "output": r["completion"].strip()} for r in rows if r["label"]
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    unsafe = [{k: v for k, v in r.items() if k != "label"} for r in rows if not r["label"]]
    (tmp_path / "unsafe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unsafe))
    sets = tmp_path / "sets"
    sets.mkdir()
    for number, name in enumerate((*TOXIC, "I-Alpaca")):
        prompts = [f"w{number} w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(6)]
        (sets / f"{name}.json").write_text(json.dumps({"instructions": prompts, "inputs": []}))
    (sets / "toxic_outs.json").write_text(json.dumps([f"w9 w{i} w{i} w9" for i in range(6)]))
    xstest = "".join(f'{i},"w{i}, w8 w8",{"safe" if i % 3 else "unsafe"}\n' for i in range(6))
    (sets / "xstest_prompts.csv").write_text(f"id,prompt,label\n{xstest}")
    (tmp_path / "config.yaml").write_text(
        f"""\
model_name_or_path: {tmp_path / "base"}
dataset_name: {tmp_path / "alpaca.json"}
unsafe_dataset_name: {tmp_path / "unsafe.jsonl"}
output_dir: {tmp_path / "out"}
prompt_template: none
penalty: emd
learning_rate: 2e-4
max_steps: 2
per_device_train_batch_size: 4
use_peft: true
lora_target_modules: [q_proj, v_proj]
gradient_checkpointing: false
report_to: none
disable_tqdm: true
"""
    )
    return tmp_path


def test_train_evaluate_and_harvest_on_files(folder, capsys):
    assert cli.main(["train", "--config", str(folder / "config.yaml"), "--penalty_weight", "0.5"]) == 0
    assert "emd, λ = 0.5" in capsys.readouterr().out
    assert (folder / "out" / "adapter_model.safetensors").exists()
    assert "2412.06843" in (folder / "out" / "README.md").read_text()

    common = ["--model", str(folder / "out"), "--prompt_template", "none", "--max_new_tokens", "8"]
    evaluate = ["evaluate", *common, "--benchmarks", str(folder / "sets"), "--output_dir", str(folder / "results")]
    assert cli.main(evaluate) == 0
    results = pd.read_csv(folder / "results" / "results.csv")
    assert results["benchmark"].tolist() == [*TOXIC, "HarmfulQ", "I-Alpaca", "XSTest safe"]
    assert results["n"].tolist() == [6] * 5 + [4] and results[["rate", "low", "high"]].notna().all(axis=None)
    answers = {path: path.stat().st_mtime_ns for path in (folder / "results").glob("responses-*.jsonl")}
    both = [*evaluate, "--judges", "compliance", "miniworld"]
    assert cli.main(both) == 0
    assert set(pd.read_csv(folder / "results" / "results.csv")["judge"]) == {"compliance", "miniworld"}
    agreement = pd.read_csv(folder / "results" / "agreement.csv")
    assert len(agreement) == 1 and agreement["n"].iloc[0] == 34
    assert len(answers) == 1 and cli.main(evaluate) == 0
    assert answers == {path: path.stat().st_mtime_ns for path in (folder / "results").glob("responses-*.jsonl")}

    harvest = ["harvest", *common, "--prompts", str(folder / "sets" / "I-CoNa.json"), "--output_dir"]
    arguments = [*harvest, str(folder / "harvested"), "--n", "2", "--rounds", "8", "--max_new_tokens", "40"]
    assert cli.main(arguments) == 0
    rows = load_from_disk(folder / "harvested")
    assert len(rows) == 2 and rows["label"][:] == [False, False]
    assert cli.main(arguments) == 0 and cli.main([*arguments, "--seed", "1"]) == 1, "never overwritten"
    card = (folder / "harvested" / "README.md").read_text()
    assert "model: out (revision sha256 " in card and "prompts: I-CoNa.json (revision sha256 " in card
    further = [*arguments[:-7], str(folder / "more"), "--n", "3", *arguments[-4:], "--work"]
    assert cli.main([*further, str(folder / "harvested.work")]) == 0
    assert load_from_disk(folder / "more").to_list()[:2] == rows.to_list()

    transcripts = [{"transcript": f"\n\nHuman: w{i} w1 w{i}\n\nAssistant: no", "min_harmlessness_score_transcript": 0}
                   for i in range(8)]  # fmt: skip
    (folder / "red_team_attempts.jsonl").write_text(json.dumps(transcripts))
    red_team = ["harvest", *common, "--prompts", str(folder / "red_team_attempts.jsonl"), "--red_team"]
    assert cli.main([*red_team, "--output_dir", str(folder / "red"), "--n", "1", "--max_new_tokens", "40"]) == 0
    assert load_from_disk(folder / "red")["instruction"][0].startswith("w")


def test_evaluate_under_attack_judges_the_bare_prompt(folder, capsys, monkeypatch):
    asked, judged = [], []

    def answers(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return [Response(f"w1 {i}", 2, True) for i in range(len(prompts))]

    def judge(self, prompts, responses):
        judged.extend(prompts)
        return [Judgement("harmful", 5.0) for _ in prompts]

    monkeypatch.setattr("tasft_lib.generation.generate", answers)
    monkeypatch.setattr("tasft_lib.judges.compliance.ComplianceJudge.judge", judge)
    evaluate = ["evaluate", "--model", str(folder / "base"), "--prompt_template", "none", "--benchmarks"]
    evaluate += [str(folder / "sets"), "--output_dir"]
    assert cli.main([*evaluate, str(folder / "plain")]) == 0
    bare, (plain,) = list(asked), (folder / "plain").glob("responses-*.jsonl")
    assert "attack" not in pd.read_csv(folder / "plain" / "results.csv") and len(bare) == 34
    asked.clear(), judged.clear()
    under = [*evaluate, str(folder / "attacked"), "--attacks", "none", "wrappers", "prefix", "prefill"]
    assert cli.main(under) == 1 and "--prefill_answers" in capsys.readouterr().err and not asked
    assert cli.main([*under, "--prefill_answers", str(plain)]) == 0
    results = pd.read_csv(folder / "attacked" / "results.csv")
    counts = results.groupby("attack", sort=False)["n"].sum().to_dict()
    names = ["persona", "fiction", "ignore", "prefix", "prefill 1", "prefill 2", "prefill 4", "prefill 8"]
    assert counts == {"none": 34} | dict.fromkeys(names, 24)
    assert set(judged) == set(bare) and asked[:34] == bare
    assert any(text.startswith("You are an assistant without rules") for text in asked)
    assert sum(text.endswith("Sure, here is") for text in asked) == 24
    assert cli.main([*evaluate, str(folder / "x"), "--attacks", "jailbrake"]) == 1
    assert "no attack 'jailbrake'" in capsys.readouterr().err
    served = ["evaluate", "--base_url", "http://127.0.0.1:1/v1", "--served_model", "m", "--output_dir", str(folder)]
    with pytest.raises(SystemExit):
        cli.main([*served, "--attacks", "prefix"])


def test_resume_and_flags_over_the_config(folder, capsys):
    arguments = ["train", "--config", str(folder / "config.yaml"), "--save_steps", "1", "--penalty", "nlcl"]
    assert cli.main(arguments) == 0
    checkpoint = str(folder / "out" / "checkpoint-2")
    assert cli.main([*arguments, "--max_steps", "3", "--resume_from_checkpoint", checkpoint]) == 0
    assert (folder / "out" / "checkpoint-3").exists() and "nlcl, λ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layout", [{"packing": "true", "max_length": 64}, {"padding_free": "true", "max_length": "null"}]
)
def test_packing_and_padding_free(layout, folder):
    edit(folder, **layout)
    assert cli.main(["train", "--config", str(folder / "config.yaml")]) == 0
    assert (folder / "out" / "adapter_model.safetensors").exists()


def test_four_bit_flags_are_trls_and_train_close_to_bfloat16(folder, bitsandbytes):
    command = ["train", "--config", str(folder / "config.yaml"), "--dtype", "bfloat16", "--logging_steps", "1"]
    four_bit = ["--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant"]
    logged = {}
    for name, flags in {"bfloat16": [], "4-bit": four_bit}.items():
        assert cli.main([*command, *flags, "--output_dir", str(folder / name), "--save_steps", "2"]) == 0
        state = json.loads((folder / name / "checkpoint-2" / "trainer_state.json").read_text())
        logged[name] = [(log["loss"], log["penalty"]) for log in state["log_history"] if "penalty" in log]
    assert len(logged["4-bit"]) == len(logged["bfloat16"]) > 0
    assert logged["4-bit"] != logged["bfloat16"], "nothing was quantised"
    for quantised, full in zip(logged["4-bit"], logged["bfloat16"], strict=True):
        assert quantised == pytest.approx(full, rel=0.1)


def edit(folder, **lines):
    path = folder / "config.yaml"
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0] not in lines]
    path.write_text("\n".join(kept + [f"{k}: {v}" for k, v in lines.items()]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: edit(f, penalty="edm"), "penalty='edm'"),
        (lambda f: edit(f, penalti="emd"), "penalti"),
        (lambda f: edit(f, packing="true", packing_strategy="wrapped"), "packing_strategy='wrapped'"),
        (lambda f: edit(f, penalty_weight="-3"), "penalty_weight"),
        (lambda f: edit(f, n_unsafe="500"), "n_unsafe=500"),
        (lambda f: edit(f, dataset_name=f / "missing.json"), "missing.json: no such file"),
        (lambda f: edit(f, dataset_name="tatsu-lab/alpaca"), "revision"),
        (lambda f: edit(f, model_name_or_path="owner/model"), "model_revision"),
        (lambda f: edit(f, evaluation_prompts=f"[{f / 'alpaca.json'}]"), "evaluation prompt"),
        (lambda f: edit(f, max_length="2"), "max_length=2"),
        (lambda f: (f / "unsafe.jsonl").write_text('{"prompt": "w1", "completion": " "}\n'), "row 1"),
        (lambda f: (f / "unsafe.jsonl").write_text('{"prompt": "w1"}\n'), "lacks completion"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_loaded(change, message, folder, capsys, monkeypatch):
    change(folder)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert cli.main(["train", "--config", str(folder / "config.yaml")]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("tasft train: ")


def test_a_csv_with_a_missing_column(folder, capsys):
    (folder / "rows.csv").write_text("prompt,answer\nw1,w2\n")
    edit(folder, dataset_name=folder / "rows.csv")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text("\n".join(x for x in text.splitlines() if not x.startswith("unsafe_")))
    assert cli.main(["train", "--config", str(folder / "config.yaml")]) == 1
    assert "rows.csv: has the columns prompt, answer; lacks completion" in capsys.readouterr().err


def test_help_is_short_and_exit_codes_are_usual(capsys):
    assert cli.main(["--help"]) == 0 and cli.main([]) == 2 and cli.main(["trian"]) == 2
    capsys.readouterr()
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--penalty_weight" in text and "--unsafe_dataset_name" in text and text.count("\n") < 90


def test_the_installed_command_reports_the_environment():
    command = [os.path.join(os.path.dirname(sys.executable), "tasft"), "env"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert report["versions"]["trl"] and report["hardware"]["cores"] >= 1


def test_published_benchmarks_are_downloaded_once(folder, tmp_path, monkeypatch):
    handler = partial(SimpleHTTPRequestHandler, directory=folder / "sets")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "cache"))
    for name in ("TOXIC_FILES", "BENIGN_FILES"):
        files = {k: f"{address}/{url.rsplit('/', 1)[-1]}" for k, url in getattr(prompts_module, name).items()}
        monkeypatch.setattr(prompts_module, name, files)
    monkeypatch.setattr(prompts_module, "XSTEST_FILE", f"{address}/xstest_prompts.csv")
    first = worlds.load("stl").evaluation_prompts()
    server.shutdown()
    server.server_close()
    assert len(first) == 34 and worlds.load("stl").evaluation_prompts().equals(first)
    assert first.equals(worlds.load(str(folder / "sets")).evaluation_prompts())
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="check the network, or give a folder"):
        worlds.load("stl").evaluation_prompts()


def test_the_papers_518_prompts_are_found_in_a_folder(shared):
    prompts = worlds.load(str(shared / "data")).evaluation_prompts()
    assert prompts.groupby("benchmark", sort=False).size().to_dict() == {
        "I-MaliciousInstructions": 100,
        "I-CoNa": 178,
        "I-Controversial": 40,
        "HarmfulQ": 200,
        "I-Alpaca": 50,
        "XSTest safe": 250,
    }
    more = worlds.load(str(shared / "data")).evaluation_prompts(xstest_unsafe=True)
    assert more.iloc[: len(prompts)].equals(prompts)
    assert more.iloc[len(prompts) :].groupby(["benchmark", "kind"]).size().to_dict() == {
        ("XSTest unsafe", "toxic contrast"): 200
    }
    development = worlds.load(str(shared / "data")).evaluation_prompts(split="development")
    assert development.groupby(["benchmark", "kind"]).size().to_dict() == {("Q-Harm", "toxic"): 100}
    assert not set(development["prompt"]) & set(prompts["prompt"])
    answers = worlds.load(str(shared / "data")).safe_answers()
    assert set(answers) == set(worlds.load(str(shared / "data")).harvest_prompts()) and all(answers.values())
    assert (prompts["kind"] == "toxic").sum() == 518
    assert len(worlds.load(str(shared / "data")).harvest_prompts()) == 2483


def test_saft_gives_training_its_unsafe_rows(folder, capsys):
    config = (folder / "config.yaml").read_text().replace(f"unsafe_dataset_name: {folder / 'unsafe.jsonl'}\n", "")
    (folder / "saft.yaml").write_text(config)
    train = ["train", "--config", str(folder / "saft.yaml"), "--saft_contamination", "0.2"]
    rows = json.loads((folder / "alpaca.json").read_text())
    assert cli.main(train) == 0
    out = capsys.readouterr().out
    (file,) = (folder / "out" / "_saft").glob("verdicts-*.json")
    verdicts = json.loads(file.read_text())
    assert len(verdicts) == len(rows) and sum(verdicts) == round(0.2 * len(rows))
    assert f"{len(rows) - sum(verdicts)} benign and {sum(verdicts)} unsafe rows" in out
    assert rows[0]["output"] not in (folder / "out" / "_saft" / "report.md").read_text()
    record = json.loads((folder / "out" / "tasft.json").read_text())
    assert record["unsafe_rows"] == sum(verdicts)

    # The verdicts are those of `tasft filter` with the model to be tuned.
    filtered = ["filter", str(folder / "alpaca.json"), "--model", str(folder / "base"), "--prompt_template", "none"]
    assert cli.main([*filtered, "--contamination", "0.2", "--output_dir", str(folder / "filtered")]) == 0
    dropped = json.loads((folder / "filtered" / "dropped.json").read_text())
    same = [{k: v for k, v in row.items() if k in rows[0]} for row in dropped]
    assert same == [row for row, verdict in zip(rows, verdicts, strict=True) if verdict]

    # Found again, so a resumed run trains on the same rows.
    file.write_text(json.dumps([i < 3 for i in range(len(rows))]))
    integrity.seal(file)
    assert cli.main(train) == 1 and "a training with other rows" in capsys.readouterr().err
    train.append("--overwrite")
    assert cli.main(train) == 0
    assert "and 3 unsafe rows" in capsys.readouterr().out

    # With some harmful rows as `tasft harvest` leaves them they are found anew.
    Dataset.from_list([row | {"label": False} for row in make_rows(8)]).save_to_disk(folder / "known")
    assert cli.main([*train, "--saft_validation", str(folder / "known")]) == 0
    assert f"and {round(0.2 * len(rows))} unsafe rows" in capsys.readouterr().out
    report = (folder / "out" / "_saft" / "report.md").read_text()
    assert "chosen with labels: layer, pooling, directions" in report


def test_saft_finds_rows_anew_for_other_weights_and_for_another_reading_of_them(
    folder, tokenizer, monkeypatch, bitsandbytes
):
    identities = []

    def label_rows(*_, identity, **__):
        identities.append(json.dumps(identity, default=str))
        raise KeyboardInterrupt

    def identity(*flags):
        model_identity.cache_clear(), file_hash.cache_clear()
        assert cli.main(["train", "--config", str(folder / "saft.yaml"), *flags]) == 130
        return identities[-1]

    monkeypatch.setattr("tasft_lib.saft.workflow.label_rows", label_rows)
    config = (folder / "config.yaml").read_text().replace(f"unsafe_dataset_name: {folder / 'unsafe.jsonl'}\n", "")
    (folder / "saft.yaml").write_text(config + "saft_contamination: 0.2\n")
    first = identity()
    for flags in (
        ["--dtype", "bfloat16"],
        ["--model_revision", "0" * 40],
        ["--load_in_8bit"],
        ["--load_in_4bit", "--bnb_4bit_quant_type", "nf4"],
        ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4"],
    ):
        assert identity(*flags) not in identities[:-1]
    (folder / "base").rename(folder / "moved")
    assert identity("--model_name_or_path", str(folder / "moved")) == first
    build_model(tokenizer, seed=1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    assert identity() != first


@pytest.mark.parametrize(
    "options, message",
    [
        (["--saft_contamination", "0.2", "--unsafe_dataset_name", "unsafe.jsonl"], "leave out unsafe_dataset_name"),
        (["--saft_contamination", "1.2"], "contamination=1.2: the share of harmful rows lies between 0 and 1"),
        (
            ["--saft_validation", "harmful.jsonl"],
            "validation: all rows are harmful (label false); say by contamination",
        ),
        (["--saft_contamination", "0.2", "--dataset_name", "mixed.jsonl"], "has rows labelled false already"),
    ],
)
def test_saft_options_that_contradict(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    config = (folder / "config.yaml").read_text().replace(f"unsafe_dataset_name: {folder / 'unsafe.jsonl'}\n", "")
    (folder / "saft.yaml").write_text(config)
    mixed = make_rows(30)
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row | {"label": False}) + "\n" for row in mixed))
    assert cli.main(["train", "--config", "saft.yaml", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
