"""The card says what was measured on this model and what was not; an upload takes the model and nothing else along."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import httpx
import huggingface_hub
import pandas as pd
import pytest
from conftest import build_model, make_rows
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tasft_lib import cli
from tasft_lib.publish import hub
from tasft_lib.storage import files


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """An adapter from `tasft train`, evaluated by two judges on tiny benchmarks; shared, so copy before writing."""
    folder = tmp_path_factory.mktemp("card")
    build_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    make_rows(30).to_json(folder / "rows.jsonl")
    sets = folder / "sets"
    sets.mkdir()
    for number, name in enumerate(("I-MaliciousInstructions", "I-CoNa", "I-Controversial", "I-Alpaca")):
        prompts = [f"w{number} w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(4)]
        (sets / f"{name}.json").write_text(json.dumps({"instructions": prompts, "inputs": []}))
    (sets / "toxic_outs.json").write_text(json.dumps([f"w9 w{i} w{i} w9" for i in range(4)]))
    (sets / "xstest_prompts.csv").write_text('id,prompt,label\n1,"w1, w8 w8",safe\n2,w3 w3,safe\n')
    train = [
        *("train", "--model_name_or_path", str(folder / "base"), "--dataset_name", str(folder / "rows.jsonl")),
        *("--output_dir", str(folder / "safer"), "--prompt_template", "none", "--penalty_weight", "0.25"),
        *("--max_steps", "3", "--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj", "--report_to", "none"),
        *("--gradient_checkpointing", "false", "--learning_rate", "1e-3", "--save_steps", "2"),
    ]
    assert cli.main(train) == 0
    evaluate = ["--prompt_template", "none", "--max_new_tokens", "8", "--benchmarks", str(sets)]
    judges = ["--judges", "compliance", "miniworld", "--output_dir", str(folder / "results")]
    assert cli.main(["evaluate", "--model", str(folder / "safer"), *evaluate, *judges]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained / "safer", tmp_path / "safer")
    shutil.copytree(trained / "results", tmp_path / "results")
    return tmp_path


def write(folder, *flags):
    return cli.main(["card", "--model", str(folder / "safer"), *flags])


def read(folder):
    return (folder / "safer" / "README.md").read_text()


def with_results(folder, *flags):
    assert write(folder, "--results", str(folder / "results"), *flags) == 0
    return read(folder)


def test_the_card_holds_how_it_was_trained_and_every_measured_rate(folder):
    text = with_results(folder, "--license", "apache-2.0")
    loaded = ModelCard(text)
    assert loaded.data.license == "apache-2.0" and loaded.data.library_name == "peft"
    assert "ta-sft" in loaded.data.tags and loaded.data.base_model is None and loaded.data.datasets is None
    record = json.loads((folder / "safer" / "tasft.json").read_text())
    assert (record["benign_rows"], record["unsafe_rows"]) == (20, 10) and record["steps"] == 3
    for line in ("| penalty | emd |", "| λ | 0.25 |", "| penalty_reduction | batch |", "| unsafe rows | 10 |"):
        assert line in text
    assert "| data | rows.jsonl (local) |" in text and record["rows_sha256"] in text
    results = pd.read_csv(folder / "results" / "results.csv")
    assert len(results) == 12
    for row in results.itertuples():
        rate = f"{100 * row.rate:.1f} % ({100 * row.low:.1f}-{100 * row.high:.1f})"
        if pd.isna(row.rate):
            rate = "not scored"
        assert f"| {row.judge} | {row.benchmark} | {row.kind} | {row.n} | {rate} |" in text
    manifest = json.loads((folder / "results" / "manifest.json").read_text())
    for judge in manifest["judges"]:
        assert f"`{judge['name']}`, revision `{judge['revision']}`" in text
        assert f"({judge['licence']}): {judge['errors']}" in text
    assert "max_new_tokens 8" in text and "Prompt template: none" in text
    assert "Cohen's κ" in text and "Over-refusal: harmless prompts" in text
    assert "A low harmful rate is not safety" in text and "2412.06843" in text


def test_nothing_is_claimed_that_was_not_measured(folder):
    assert write(folder) == 0
    text = read(folder)
    assert "**Not measured.** Nothing is claimed about the safety" in text
    assert "**Not measured.** What safety cost in ability" in text and "Over-refusal was not measured" in text
    assert " % (" not in text and "| compliance |" not in text
    (folder / "safer" / "tasft.json").unlink()
    assert write(folder) == 0 and "Not recorded: there is no tasft.json" in read(folder)
    assert "trained by TA-SFT" not in read(folder) and "- ta-sft" not in read(folder)


def test_one_judge_has_no_agreement_even_where_an_old_file_lies(folder):
    manifest = json.loads((folder / "results" / "manifest.json").read_text())
    manifest["judges"] = manifest["judges"][:1]
    (folder / "results" / "manifest.json").write_text(json.dumps(manifest))
    assert "Agreement of judges: not measured" in with_results(folder)


def test_capability_and_alpaca_eval_are_taken_where_they_are(folder):
    identity = files.model_identity(str(folder / "safer"))
    scores = {"task": ["boolq"], "metric": ["acc"], "value": [0.625], "stderr": [0.01], "n": [200]}
    manifest = {"model": identity, "tasks": {"boolq": "c0ffee"}, "num_fewshot": 0, "limit": 200}
    place = folder / "capability"
    place.mkdir()
    assert write(folder, "--capability", str(place)) == 1, "an empty folder measured nothing"
    pd.DataFrame(scores).to_csv(place / "capability.csv", index=False)
    (place / "capability_manifest.json").write_text(json.dumps(manifest))
    text = with_results(folder, "--capability", str(place))
    assert "| boolq | acc | 0.625 | 0.01 | 200 |" in text and "only the first 200 questions" in text
    assert "boolq at c0ffee" in text and "AlpacaEval" not in text
    board = {"name": ["safer"], "win_rate": [41.25], "stderr": [1.7], "n": [805], "annotator": ["some_judge"]}
    other = folder / "alpaca"
    other.mkdir()
    pd.DataFrame(board).to_csv(other / "alpaca_eval.csv", index=False)
    manifest = {"model": identity, "annotator": "some_judge", "instructions": 805}
    (other / "alpaca_eval_manifest.json").write_text(json.dumps(manifest))
    text = with_results(folder, "--capability", str(place), str(other))
    assert "| boolq |" in text and "| safer | 41.25 | 1.7 | 805 | some_judge |" in text
    (other / "alpaca_eval_manifest.json").write_text(json.dumps(manifest | {"model": "another"}))
    assert write(folder, "--capability", str(other)) == 1, "win rates of another model"


def test_what_was_measured_is_metadata_that_the_hub_reads(folder):
    assert ModelCard(with_results(folder)).data.model_name == "safer"
    results = pd.read_csv(folder / "results" / "results.csv").dropna(subset=["rate"])
    harmful = {(r.benchmark, r.judge): r.rate for r in results.itertuples() if r.kind != "seemingly toxic"}
    read_back = ModelCard(read(folder)).data.eval_results
    assert len(read_back) == len(results) and {r.task_type for r in read_back} == {"text-generation"}
    for result in read_back:
        if result.metric_type == "harmful_rate":
            judge = result.metric_name.rsplit(" ", 1)[1]
            assert result.metric_value == pytest.approx(harmful.pop((result.dataset_name, judge)), abs=1e-6)
        else:
            assert result.metric_type == "refusal_rate" and "seemingly toxic" in result.metric_name
    assert not harmful
    place = folder / "alpaca"
    place.mkdir()
    board = {"name": ["safer"], "win_rate": [41.25], "length_controlled_win_rate": [38.5], "n": [805]}
    pd.DataFrame(board).to_csv(place / "alpaca_eval.csv", index=False)
    manifest = {"model": files.model_identity(str(folder / "safer")), "annotator": "some_judge", "instructions": 805}
    (place / "alpaca_eval_manifest.json").write_text(json.dumps(manifest))
    assert write(folder, "--capability", str(place)) == 0
    values = {r.metric_type: r.metric_value for r in ModelCard(read(folder)).data.eval_results}
    assert values == {"win_rate": 41.25, "length_controlled_win_rate": 38.5}
    assert write(folder) == 0 and ModelCard(read(folder)).data.eval_results is None


def test_a_rate_under_attack_is_no_plain_rate(folder, trained):
    (answers,) = trained.glob("results/responses-*.jsonl")
    evaluate = ["evaluate", "--model", str(folder / "safer"), "--prompt_template", "none", "--max_new_tokens", "8"]
    attacks = ["--attacks", "none", "persona", "prefill", "--prefill_answers", str(answers)]
    evaluate += ["--benchmarks", str(trained / "sets"), *attacks, "--output_dir", str(folder / "attacked")]
    assert cli.main(evaluate) == 0
    assert "- Jailbreaks, further fine-tuning" in with_results(folder) and "no test in this card" in read(folder)
    assert write(folder, "--results", str(folder / "attacked")) == 0
    text = read(folder)
    results = pd.read_csv(folder / "attacked" / "results.csv")
    for row in results.itertuples():
        name = row.benchmark if row.attack == "none" else f"{row.benchmark} under {row.attack}"
        assert text.count(f"| {row.judge} | {name} | {row.kind} | {row.n} |") == 1
    assert "I-CoNa under persona" in text and "I-CoNa under prefill 1" in text
    names = [(r.dataset_name, r.metric_name) for r in ModelCard(text).data.eval_results]
    assert len(names) == len(set(names)) > 0
    assert "- Attacks beyond those in the table, further fine-tuning" in text
    assert 'unless a row "under prefill" above says otherwise' in text


def test_results_of_other_weights_are_refused(folder, capsys):
    before = read(folder)
    path = folder / "safer" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    files.model_identity.cache_clear()
    files.file_hash.cache_clear()
    assert write(folder, "--results", str(folder / "results")) == 1
    assert "results of other weights" in capsys.readouterr().err
    assert read(folder) == before


def test_the_cards_own_file_does_not_make_it_another_model(folder):
    first = with_results(folder)
    files.model_identity.cache_clear()
    files.file_hash.cache_clear()
    assert with_results(folder) == first


def test_a_merged_model_may_carry_its_adapters_results(folder):
    merged = folder / "merged"
    assert cli.main(["export", "--model", str(folder / "safer"), "--output_dir", str(merged)]) == 0
    assert "Nothing is claimed about the safety" in (merged / "README.md").read_text()
    assert cli.main(["card", "--model", str(merged), "--results", str(folder / "results")]) == 0
    text = (merged / "README.md").read_text()
    assert "library_name: transformers" in text and "merged into its base, in float32" in text
    assert "measured before merging" in text


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "results" / "results.csv").unlink(), "results.csv: no such file"),
        (lambda f: (f / "results" / "results.csv").write_text("judge,n\nx,1\n"), "lacks the column kind"),
        (lambda f: (f / "results" / "manifest.json").write_text("{"), "manifest.json: malformed JSON"),
        (lambda f: (f / "safer" / "tasft.json").write_text("["), "tasft.json: malformed JSON"),
        (lambda f: (f / "safer" / "tasft.json").write_text("[]"), "tasft.json: holds no JSON object; remove it"),
        (lambda f: (f / "safer" / "tasft.json").write_text('"text"'), "tasft.json: holds no JSON object"),
        (lambda f: (f / "safer" / "tasft.json").write_text('{"method": ["emd"]}'), "tasft.json: lacks method, or"),
        (
            lambda f: (f / "safer" / "tasft.json").write_text('{"method": {"penalty": "emd"}}'),
            "tasft.json: lacks benign_",
        ),
        (lambda f: (f / "safer" / "tasft.json").write_text('{"merged": [1]}'), "tasft.json: damaged"),
        (lambda f: (f / "results" / "manifest.json").write_text("[]"), "manifest.json: holds no JSON object; measure"),
        (lambda f: (f / "results" / "manifest.json").write_text("{}"), "manifest.json: lacks judges"),
        (lambda f: (f / "safer" / "adapter_config.json").write_text("[]"), "adapter_config.json: holds no JSON object"),
        (lambda f: (f / "safer" / "README.md").write_text("# Mine\n"), "say --overwrite"),
        (lambda f: (f / "safer" / "adapter_model.safetensors").unlink(), "no model here"),
    ],
)
def test_bad_input_is_one_line_and_the_old_card_stays(spoil, message, folder, capsys):
    spoil(folder)
    before = read(folder)
    assert write(folder, "--results", str(folder / "results")) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and read(folder) == before
    if "overwrite" in message:
        assert write(folder, "--overwrite") == 0 and "# Mine" not in read(folder)


def test_hub_ids_are_named_and_local_paths_are_not(folder):
    path = folder / "safer" / "tasft.json"
    record = json.loads(path.read_text())
    sets = [
        {"name": "owner/rows", "hub": True, "revision": "abc"},
        {"name": "mine.jsonl", "hub": False, "revision": None},
    ]
    base = {"base_model": "owner/base", "base_model_revision": "def"}
    path.write_text(json.dumps(record | base | {"datasets": sets}))
    text = with_results(folder)
    data = ModelCard(text).data
    assert data.base_model == "owner/base" and data.datasets == ["owner/rows"]
    assert "at commit `def`" in text and "owner/rows at abc; mine.jsonl (local)" in text
    assert str(folder) not in text


def test_no_prompt_and_no_response_is_in_a_card_even_where_a_file_was_made_to_hold_one(folder):
    (file,) = (folder / "results").glob("responses-*.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    long = " ".join(["zorvex"] * 40)
    table = pd.read_csv(folder / "results" / "results.csv")
    table.loc[0, "benchmark"] = long
    table.to_csv(folder / "results" / "results.csv", index=False)
    text = with_results(folder)
    assert long not in text and "zorvex" not in text and "40 words]" in text
    assert answers and not any(row["prompt"] in text or row["response"] in text for row in answers)


class Api:
    """Stands for HfApi: chooses files by the hub's own rule and keeps them."""

    private, fails, uploaded = True, None, None

    def create_repo(self, repo_id, *, private, exist_ok):
        Api.asked = private
        if Api.fails:
            raise Api.fails

    def repo_info(self, repo_id):
        return type("Info", (), {"private": Api.private})()

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns, ignore_patterns):
        paths = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        Api.uploaded = set(filter_repo_objects(paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))


@pytest.fixture
def api(monkeypatch):
    Api.private, Api.fails, Api.uploaded = True, None, None
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def test_an_upload_is_private_and_takes_the_model_alone(folder, api, capsys):
    model = folder / "safer"
    for name in ("_samples.jsonl", "samples.jsonl", "responses-1.jsonl", "notes.txt", "optimizer.pt", "rows.arrow"):
        (model / name).write_text("zorvex")
    (model / "runs").mkdir()
    (model / "runs" / "config.json").write_text("zorvex")
    assert (model / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert write(folder, "--push_to_hub", "me/safer-1") == 0
    assert api.asked is True and "https://huggingface.co/me/safer-1" in capsys.readouterr().out
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= api.uploaded
    assert all(any(fnmatch(name, pattern) for pattern in hub.PUBLISHED) for name in api.uploaded)
    assert not any("/" in name or "zorvex" in (model / name).read_text(errors="ignore") for name in api.uploaded)
    assert "# safer-1" in read(folder)


def test_a_public_repository_is_not_used_unawares(folder, api, capsys):
    api.private = False
    assert write(folder, "--push_to_hub", "me/safer") == 1 and api.uploaded is None
    assert "say --public" in capsys.readouterr().err
    assert write(folder, "--push_to_hub", "me/safer", "--public") == 0 and api.uploaded and api.asked is False


def test_weights_that_nobody_can_use_are_not_uploaded(folder, api, capsys):
    weights = load_file(file := folder / "safer" / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, file)
    assert write(folder, "--push_to_hub", "me/safer") == 1 and api.uploaded is None
    assert "adapter_model.safetensors: " in (error := capsys.readouterr().err) and "holds NaN" in error


def test_without_a_network_an_upload_is_one_line(folder, api, capsys):
    class ConnectError(HTTPError):
        pass

    api.fails = ConnectError("[Errno 111] Connection refused")
    assert write(folder, "--push_to_hub", "me/safer") == 1 and api.uploaded is None
    told = "tasft card: me/safer: the hub is not reached (ConnectError); check the network.\n"
    assert capsys.readouterr().err.endswith(told)


def test_what_the_hub_writes_back_is_not_repeated(folder, api, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary77")
    response = httpx.Response(401, request=httpx.Request("POST", "http://x"), text="bad token hf_canary77")
    api.fails = HfHubHTTPError("401: bad token hf_canary77", response=response)
    assert write(folder, "--push_to_hub", "me/safer") == 1
    shown = capsys.readouterr()
    assert "the hub refused (401)" in shown.err and "canary77" not in shown.err + shown.out
