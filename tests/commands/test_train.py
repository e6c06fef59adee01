"""`tasft train` on files: plain SFT, going on after a kill, options honoured or refused, what is the user's stays."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from accelerate.logging import MultiProcessAdapter
from conftest import build_model, make_rows
from datasets import DatasetDict
from safetensors.torch import load_file
from trl import ModelConfig, ScriptArguments

from tasft_lib import cli
from tasft_lib.commands import run_folder
from tasft_lib.config import TASFTConfig
from tasft_lib.trainer import TASFTTrainer

TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m['role'] == 'user' else 'w2' }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(base, tmp_path, capsys):
    """Runs `tasft train` on rows.jsonl with options, as YAML has them; gives exit code, stdout and stderr."""
    write(tmp_path / "rows.jsonl", make_rows(12))

    def run(*flags, **options):
        settings = {
            "model_name_or_path": base, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out",
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        lines = [f"{name}: {json.dumps(value, default=str)}\n" for name, value in (settings | options).items()]
        (tmp_path / "config.yaml").write_text("".join(lines))
        code = cli.main(["train", "--config", str(tmp_path / "config.yaml"), *flags])
        return code, *capsys.readouterr()

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(result, *words):
    code, _, error = result
    error = error.replace("\r", "\n").strip().splitlines()[-1]  # before it there may be bars
    assert code == 1 and error.startswith("tasft train: "), error
    assert all(word in error for word in words), error
    return True


def killed_at(step, monkeypatch):
    """Ctrl-C in the step after `step`."""
    compute_loss = TASFTTrainer.compute_loss

    def stop(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(TASFTTrainer, "compute_loss", stop)


def left_in(folder):
    """Path -> content of every file of a run; of logs without what is measured in seconds."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in files:
        if name.endswith("trainer_state.json"):
            state = json.loads(files[name])
            for entry in state["log_history"]:
                for measured in [key for key in entry if "runtime" in key or "per_second" in key]:
                    del entry[measured]
            files[name] = state
    return {name: content for name, content in files.items() if not name.endswith("SHA256SUMS")}


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_plain_sft_by_every_way_and_a_missing_unsafe_file(train, tmp_path):
    benign = make_rows(12, unsafe_every=None)
    write(tmp_path / "bare.jsonl", benign.remove_columns("label"))
    write(tmp_path / "true.jsonl", benign)
    write(tmp_path / "unsafe.jsonl", make_rows(12, seed=1).filter(lambda row: not row["label"]))
    plain = {"max_steps": 1, "save_strategy": "no"}
    results = {}
    for name, options in {
        "bare": {"dataset_name": tmp_path / "bare.jsonl"},
        "true": {"dataset_name": tmp_path / "true.jsonl", "penalty_weight": 0},
        "none drawn": {"dataset_name": tmp_path / "bare.jsonl", "unsafe_dataset_name": tmp_path / "unsafe.jsonl"}
        | {"n_unsafe": 0},
    }.items():
        code, out, _ = train(output_dir=tmp_path / name, **plain, **options)
        assert code == 0 and "nothing is penalised" in out
        results[name] = weights(tmp_path / name)
    assert results["bare"] == results["true"] == results["none drawn"]
    code, out, _ = train(penalty_weight=0, output_dir=tmp_path / "zero", **plain)
    assert code == 0 and "λ = 0: nothing is penalised" in out
    assert refused(train(unsafe_dataset_name=tmp_path / "gone.jsonl"), "gone.jsonl: no such file")


def test_recover_takes_rows_with_a_recovery_and_names_one_without(train, tmp_path):
    unsafe = make_rows(12, seed=1).filter(lambda row: not row["label"])
    write(tmp_path / "bare.jsonl", unsafe)
    write(tmp_path / "unsafe.jsonl", unsafe.map(lambda row: {"recovery": "w1 w2"}))
    write(tmp_path / "benign.jsonl", make_rows(12, unsafe_every=None))
    how = {"penalty": "recover", "penalty_weight": "auto", "unsafe_per_batch": 1, "unsafe_visits": 2, "max_steps": 1}
    how |= {"dataset_name": tmp_path / "benign.jsonl", "save_strategy": "no"}
    assert refused(train(unsafe_dataset_name=tmp_path / "bare.jsonl", **how), "bare.jsonl: row 1: no recovery")
    code, out, _ = train(unsafe_dataset_name=tmp_path / "unsafe.jsonl", **how)
    assert code == 0 and "recover, λ = " in out
    record = json.loads((tmp_path / "out" / "tasft.json").read_text())
    assert "recover" in json.dumps(record) and "unsafe_per_batch" in json.dumps(record)


def test_the_same_command_goes_on_and_ends_where_an_undisturbed_one_ends(train, tmp_path, monkeypatch, caplog):
    code, out, _ = train(output_dir=tmp_path / "straight")
    assert code == 0 and "going on" not in out
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train()[0] == 130
    assert refused(train(max_steps=1), "checkpoint-2: is past max_steps=1", "--overwrite")
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train(max_steps=9)[0] == 130  # how long it lasts may change while it is unfinished
    code, out, _ = train()
    assert code == 0 and f"going on from {tmp_path / 'out' / 'checkpoint-2'}" in out
    assert weights(tmp_path / "out") == weights(tmp_path / "straight")

    # Finished: nothing is done, whatever the other words for going on.
    for flags in ([], ["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint", "True"]):
        code, out, _ = train(*flags)
        assert code == 0 and "holds this training, finished" in out and "λ" not in out
    # What has no effect on the result may change.
    assert "finished" in train(logging_steps=2, save_total_limit=3)[1]
    assert refused(train("--penalty", "nlcl", learning_rate=1.0), "other learning_rate, penalty", "--overwrite")
    assert refused(train(max_steps=5), "other max_steps", "--overwrite")
    write(tmp_path / "rows.jsonl", make_rows(12, seed=5))
    assert refused(train(), "other rows", "--overwrite")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, out, _ = train("--overwrite", save_steps=3)
    assert code == 0 and "going on" not in out and weights(tmp_path / "out") != weights(tmp_path / "straight")
    assert not (tmp_path / "out" / "checkpoint-2").exists() and (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    "tear", ["trainer_state.json", "model.safetensors", "optimizer.pt", "unsealed", "nothing left"]
)
def test_a_torn_checkpoint_is_named_and_set_aside(tear, train, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train(save_steps=1)[0] == 130
    newest = tmp_path / "out" / "checkpoint-3"
    if tear == "unsealed":
        (newest / "SHA256SUMS").unlink()
    elif tear == "nothing left":
        for number in (1, 2, 3):
            (tmp_path / "out" / f"checkpoint-{number}" / "trainer_state.json").unlink()
    else:
        file = newest / tear
        file.write_bytes(file.read_bytes()[:-9])
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        code, out, _ = train("--resume_from_checkpoint", "true", save_steps=1)
    assert code == 130 and str(newest) in caplog.text
    assert tear in caplog.text or tear in ("unsealed", "nothing left")
    assert ("going on from" in out) == (tear != "nothing left")
    assert tear == "nothing left" or f"{tmp_path / 'out' / 'checkpoint-2'}" in out
    assert (tmp_path / "out" / "checkpoint-3.damaged").exists() and newest.exists()


def test_a_run_that_was_killed_leaves_every_file_of_one_that_was_not(train, tmp_path, monkeypatch):
    DatasetDict(train=make_rows(12), test=make_rows(8, seed=2).remove_columns("label")).save_to_disk(tmp_path / "saved")
    write(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2"}])
    options = {
        "dataset_name": tmp_path / "saved", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 9,
        "load_best_model_at_end": True, "learning_rate": 3.0, "early_stopping_patience": 3, "logging_steps": 5,
        "save_total_limit": 3, "sample_prompts": tmp_path / "prompts.jsonl", "sample_max_new_tokens": 4,
    }  # fmt: skip
    assert train(**options)[0] == 0
    expected = left_in(tmp_path / "out")
    assert any("checkpoint" in name for name in expected)
    shutil.rmtree(tmp_path / "out")
    for step in (2, 4):  # while it is evaluated; both checkpoints before are in the midst of a window of the log
        with monkeypatch.context() as patch:
            killed_at(step, patch)
            assert train(**options)[0] == 130
        assert max((tmp_path / "out").glob("checkpoint-*")).name == f"checkpoint-{step - 1}"
    assert refused(train(**options | {"early_stopping_patience": 2}), "other early_stopping_patience")
    assert train(**options)[0] == 0
    assert left_in(tmp_path / "out") == expected


def test_only_whole_checkpoints_count_and_old_ones_go_when_the_new_one_is_sealed(train, tmp_path, monkeypatch):
    limited = {"save_steps": 1, "save_total_limit": 2}
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train(**limited)[0] == 130
    out = tmp_path / "out"
    (out / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    with monkeypatch.context() as patch:  # a kill while the new one is sealed
        patch.setattr("tasft_lib.storage.resume.seal", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(**limited)
    assert (out / "checkpoint-3.damaged").is_dir() and (out / "checkpoint-2" / "SHA256SUMS").exists()
    (out / "checkpoint-1").mkdir()  # half of an old one
    code, stdout, _ = train(**limited)
    assert code == 0 and f"going on from {out / 'checkpoint-2'}" in stdout
    assert sorted(path.name for path in out.glob("checkpoint-?")) == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_may_be_named_and_must_be_whole_and_of_these_settings(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train(save_steps=1)[0] == 130
    first = tmp_path / "out" / "checkpoint-1"
    assert refused(train("--resume_from_checkpoint", "gone"), "gone: no such checkpoint")
    elsewhere = {"output_dir": tmp_path / "elsewhere"}
    assert refused(train("--resume_from_checkpoint", str(first), "--penalty", "nlcl", **elsewhere), "other penalty")
    assert refused(train("--resume_from_checkpoint", "false"), "resume_from_checkpoint is false", "--overwrite")
    code, out, _ = train("--resume_from_checkpoint", str(first))
    assert code == 0 and f"going on from {first}" in out
    (first / "model.safetensors").write_bytes(b"")
    assert refused(train("--resume_from_checkpoint", str(first), **elsewhere), "checkpoint-1: torn (model.safetensors)")
    assert not (tmp_path / "elsewhere").exists()


def test_checkpoints_without_an_optimizer_are_not_gone_on_from(train, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train(save_only_model=True)[0] == 130
    code, out, _ = train(save_only_model=True)
    assert code == 0 and "going on" not in out and "checkpoint-2 holds no optimizer" in caplog.text
    assert train(output_dir=tmp_path / "straight")[0] == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "straight")


def test_a_full_disk_is_one_line_whoever_notices_it(train, tmp_path, monkeypatch):
    class TokenizersError(Exception):
        pass

    def full(*_, **__):
        raise TokenizersError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(TASFTTrainer, "save_model", full)
        assert refused(train(), "out: no space left on the disk", "run the same command again")
    assert train()[0] == 0


def test_rows_labelled_unsafe_beside_a_file_of_unsafe_rows_are_counted(train, tmp_path, caplog):
    write(tmp_path / "unsafe.jsonl", make_rows(12, seed=1).filter(lambda row: not row["label"]))
    code, out, _ = train(unsafe_dataset_name=tmp_path / "unsafe.jsonl", max_steps=1)
    assert code == 0 and "rows.jsonl: left out 4 rows labelled false" in caplog.text and "8 benign and 4 unsafe" in out


def test_no_warning_shows_the_end_of_a_prompt(train, tmp_path, caplog):
    caplog.set_level("WARNING", logger="trl")  # which `models.quiet` of an earlier test may have silenced
    MultiProcessAdapter.warning_once.cache_clear()  # an earlier test of this process may have had the same text
    rows = [{"prompt": f"w{i} w1", "completion": "2 w3", "label": i % 3 > 0} for i in range(20, 32)]
    write(tmp_path / "rows.jsonl", rows)
    assert train(max_steps=1)[0] == 0
    assert "left out of the training sequence: (not shown). The model" in caplog.text


def test_a_folder_with_a_model_is_refused_and_the_base_is_never_written_over(train, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    before = (base / "model.safetensors").read_bytes()
    assert refused(train(), "out: holds config.json", "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert refused(train("--overwrite", output_dir=base), "the base model's own folder")
    assert train("--overwrite", max_steps=1)[0] == 0
    assert (base / "model.safetensors").read_bytes() == before != (tmp_path / "out" / "model.safetensors").read_bytes()


def test_overwrite_removes_nothing_that_the_training_reads(train, base, tokenizer, tmp_path, monkeypatch):
    assert train()[0] == 0
    tokenizer.save_pretrained(tmp_path / "out" / "checkpoint-2")
    write(tmp_path / "out" / "checkpoint-2" / "rows.jsonl", make_rows(12))
    (tmp_path / "out" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    before = left_in(tmp_path / "out")
    for option, place in {
        "model_name_or_path": "checkpoint-2",
        "resume_from_checkpoint": "checkpoint-2",
        "dataset_name": "checkpoint-2/rows.jsonl",
        "chat_template_path": "chat_template.jinja",
    }.items():
        path = tmp_path / "link" / place
        assert refused(train("--overwrite", seed=3, **{option: path}), f"{path}: {option} lies in what --overwrite")
        assert left_in(tmp_path / "out") == before
    # A folder of the user's own is not removed, and may be read.
    own = shutil.copytree(base, tmp_path / "out" / "own")
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        assert train("--overwrite", model_name_or_path=own)[0] == 130
    resume = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    assert train("--overwrite", model_name_or_path=own, **resume)[0] == 0, "the same training, of which nothing goes"


@pytest.mark.parametrize("options", [{}, {"use_peft": True, "lora_target_modules": ["q_proj"]}])
def test_a_readme_of_the_users_stays_as_it_is(options, train, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my notes")
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        assert train(**options)[0] == 130
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"
    assert train(**options)[0] == 0
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"
    assert train("--overwrite", seed=3, **options)[0] == 0
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"


@pytest.mark.parametrize("targets", [["q_proj"], "q_proj", "q_proj, v_proj", ["q_proj", "v_proj"], ".*q_proj"])
def test_lora_modules_are_taken_as_they_are_written(targets, train, tmp_path):
    assert train(use_peft=True, lora_target_modules=targets, max_steps=1)[0] == 0
    names = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert names == ({"q_proj", "v_proj"} if "v_proj" in targets else {"q_proj"})


def test_every_script_argument_of_trl_is_honoured_or_refused(train, tmp_path):
    """A flag that is accepted and ignored is a surprise."""
    halves = DatasetDict(train=make_rows(12), test=make_rows(8, seed=2), other=make_rows(12, seed=3))
    halves.save_to_disk(tmp_path / "saved")
    effects = {
        "dataset_name": lambda: refused(train(dataset_name="gone.jsonl"), "gone.jsonl"),
        "dataset_config": lambda: refused(train(dataset_config="none-such"), "rows.jsonl", "configuration"),
        "dataset_train_split": lambda: (
            refused(train(dataset_train_split="none-such"), "none-such")
            and refused(train(dataset_name=tmp_path / "saved", dataset_train_split="none-such"), "no split 'none-such'")
        ),
        "dataset_test_split": lambda: (
            refused(train(dataset_test_split="none-such"), "eval_strategy")
            and refused(train(eval_strategy="steps"), "rows.jsonl: a file has no split 'test'")
            and refused(
                train(dataset_name=tmp_path / "saved", dataset_test_split="none-such", eval_strategy="steps"),
                "no split 'none-such'",
            )
        ),
        "dataset_streaming": lambda: refused(train(dataset_streaming=True), "dataset_streaming"),
        "ignore_bias_buffers": lambda: refused(train(ignore_bias_buffers=True), "ignore_bias_buffers"),
    }
    assert set(effects) == {argument.name for argument in dataclasses.fields(ScriptArguments)}
    assert all(effect() for effect in effects.values())
    for name in ("unsafe_dataset_split", "unsafe_dataset_config", "unsafe_dataset_revision"):
        assert refused(train(**{name: "none-such"}), f"{name} needs unsafe_dataset_name")
    saved = {"unsafe_dataset_name": tmp_path / "saved", "dataset_name": tmp_path / "bare.jsonl"}
    write(tmp_path / "bare.jsonl", make_rows(12, unsafe_every=None).remove_columns("label"))
    assert refused(train(unsafe_dataset_split="none-such", **saved), "no split 'none-such'")


def test_a_folder_of_a_version_without_an_option_goes_on_with_its_default(tmp_path):
    def begin(**options):
        args = TASFTConfig(output_dir=str(tmp_path), **options)
        asked = run_folder.settings(args, ModelConfig(), "rows", "base")
        return run_folder.begin(tmp_path, asked, overwrite=False, resume=None)

    begin()
    recorded = json.loads((tmp_path / run_folder.SETTINGS).read_text())
    del recorded["penalty_floor"], recorded["unsafe_per_batch"]
    (tmp_path / run_folder.SETTINGS).write_text(json.dumps(recorded))
    begin()
    with pytest.raises(ValueError, match="holds a training with other penalty_floor; give another output_dir"):
        begin(penalty_floor=0.05)


def test_in_yaml_the_home_folder_is_understood_and_its_rows_are_no_data_set_of_the_hub(
    train, base, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    write(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2 w3 w4 w5 w6"}])
    home = {
        "model_name_or_path": "~/base",
        "dataset_name": "~/rows.jsonl",
        "evaluation_prompts": ["~/prompts.jsonl"],
        "chat_template_path": "~/chat.jinja",
    }
    code, _, error = train(max_steps=1, save_strategy="no", **home)
    assert code == 0, error
    record = json.loads((tmp_path / "out" / "tasft.json").read_text())
    assert record["datasets"] == [{"name": "rows.jsonl", "hub": False, "revision": None}]
    assert record["base_model"] == "base" and record["base_model_revision"] is None
    assert refused(train(eval_strategy="steps", **home), "rows.jsonl: a file has no split 'test'")


@pytest.mark.parametrize(
    "option, changes",
    [
        ({"dataloader_drop_last": True}, True),
        ({"dataloader_in_order": False}, True),
        ({"dataloader_num_workers": 2}, False),
        ({"dataloader_pin_memory": False}, False),
        ({"dataloader_persistent_workers": True}, False),
        ({"dataloader_prefetch_factor": 4}, False),
        ({"dataloader_multiprocessing_context": "spawn"}, False),
    ],
)
def test_how_rows_are_loaded_may_change_and_which_and_when_may_not(option, changes, tmp_path):
    workers = {"dataloader_num_workers": 1}  # without any some of these are refused
    configs = [TASFTConfig(output_dir=str(tmp_path), **workers | options) for options in ({}, option)]
    plain, other = (run_folder.settings(config, ModelConfig(), "rows", "base") for config in configs)
    assert (other != plain) is changes


@pytest.mark.parametrize(
    "options, words",
    [
        ({"unsafe_visits": 0}, "unsafe_visits=0: give"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: give"),
        ({"max_steps": 0}, "nothing would be trained"),
        ({"max_steps": -1, "num_train_epochs": -1}, "nothing would be trained"),
        ({"prompt_template": "alpacca"}, "prompt_template='alpacca': choose one of alpaca"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "needs an eval_strategy"),
        ({"saft_contamination": 0.1, "saft_validation_revision": "0" * 40}, "needs saft_validation; add it, or leave"),
        ({"sample_steps": 2}, "sample_steps needs sample_prompts; add it, or leave it out"),
        ({"sample_max_new_tokens": 9}, "sample_max_new_tokens needs sample_prompts; add it"),
    ],
)
def test_what_would_train_nothing_or_be_passed_over_is_refused_at_once(options, words, train, tmp_path):
    assert refused(train(**options), words) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, None),
        ({"trust_remote_code": True}, "trust_remote_code: a model's own code"),
        ({"model_init_kwargs": {"trust_remote_code": True}}, "trust_remote_code: a model's own code"),
        (
            {"trust_remote_code": True, "model_init_kwargs": {"trust_remote_code": False}},
            "trust_remote_code: a model's own code",
        ),
        ({"model_init_kwargs": {"weights_only": False}}, "weights_only: a pickle of something else"),
    ],
)
def test_code_of_the_models_own_is_never_run(options, told, train, base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    for name, classes in {
        "config.json": {"AutoConfig": "evil.Own", "AutoModelForCausalLM": "evil.Own"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Own", None]},
    }.items():
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | {"auto_map": classes}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    result = train(model_name_or_path=model, max_steps=1, save_strategy="no", **options)
    assert result[0] == 0 if told is None else refused(result, told)
    assert not (tmp_path / "ran").exists()


def test_the_test_split_is_evaluated_and_the_best_step_kept(train, tmp_path):
    DatasetDict(train=make_rows(12), test=make_rows(8, seed=2).remove_columns("label")).save_to_disk(tmp_path / "saved")
    options = {
        "dataset_name": tmp_path / "saved", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 9,
        "load_best_model_at_end": True, "learning_rate": 3.0, "early_stopping_patience": 2,
    }  # fmt: skip
    code, _, error = train(**options)
    assert code == 0, error
    states = sorted((tmp_path / "out").glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    state = json.loads(states[-1].read_text())
    evaluated = [log for log in state["log_history"] if "eval_loss" in log]
    assert evaluated and all(log["eval_unsafe_rows"] == 0 for log in evaluated)
    assert state["global_step"] < 9 and state["best_global_step"] < state["global_step"]
    best = tmp_path / "out" / f"checkpoint-{state['best_global_step']}"
    assert weights(tmp_path / "out") == weights(best)
    assert refused(train(early_stopping_patience=2, output_dir=tmp_path / "new"), "load_best_model_at_end")


def test_a_chat_template_of_another_model_is_seen_by_the_checks_as_by_trl(train, tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    other = tmp_path / "chat"
    build_model(tokenizer).save_pretrained(other)
    tokenizer.save_pretrained(other)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"].strip()}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            "label": row["label"],
        }
        for row in make_rows(12)
    ]
    write(tmp_path / "messages.jsonl", messages)
    chat = {"dataset_name": tmp_path / "messages.jsonl", "max_steps": 1, "save_strategy": "no"}
    assert refused(train(**chat), "messages.jsonl: messages, and the model", "give chat_template_path")
    for name, path in {"file": tmp_path / "chat.jinja", "folder": other}.items():
        code, _, error = train(chat_template_path=path, output_dir=tmp_path / name, **chat)
        assert code == 0, error
        assert (tmp_path / name / "chat_template.jinja").read_text() == TEMPLATE
    assert refused(train(chat_template_path="owner/model", **chat), "owner/model: chat_template_path is neither")
    assert refused(train(chat_template_path=other, max_length=4, **chat), "fills max_length=4")


SECRET = "hf_canary77"


@pytest.mark.parametrize(
    "options, flags, words",
    [
        ({"hub_tokn": SECRET}, [], ("config.yaml: hub_tokn is no option", "did you mean hub_token?")),
        ({"qqqq": {"deep": [SECRET]}}, [], ("config.yaml: qqqq is no option", "--help_all")),
        ({}, ["--hub_tokn", SECRET], ("--hub_tokn is no option", "did you mean hub_token?")),
        ({}, [f"--hub-tokn={SECRET}"], ("--hub-tokn is no option",)),
        ({}, [SECRET], ("a value without its option",)),
    ],
)
def test_an_unknown_option_is_told_by_its_name_without_its_value(options, flags, words, train):
    result = train(*flags, **options)
    assert refused(result, *words) and SECRET not in "".join(result[1:])


@pytest.mark.parametrize("name", ["token", "use_auth_token"])
def test_a_token_for_loading_goes_into_the_environment_and_nowhere_else(name, train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    loading = {"use_cache": False, name: SECRET}
    result = train(model_init_kwargs=loading, hub_token="hf_other")
    assert refused(result, "hub_token and the token in model_init_kwargs differ") and SECRET not in "".join(result[1:])
    code, out, error = train(model_init_kwargs=loading)
    assert code == 0 and os.environ["HF_TOKEN"] == SECRET and SECRET not in out + error
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left and not any(SECRET.encode() in path.read_bytes() for path in left)
    assert json.loads((tmp_path / "out" / "_settings.json").read_text())["model_init_kwargs"] == {"use_cache": False}
    assert refused(train("--model_init_kwargs", "token"), "model_init_kwargs: give")


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: &a [x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
        ), "aliases"),
        ("a: &a {x: 1}\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]}}\n" for i in range(9)
        ), "aliases"),
        ("a: &a [*a]\n", "aliases"),
        ("a: 1\nb: 2\na: 3\n", "a stands there twice"),
        ("- a\n", "holds no options"),
        ("", "holds no options"),
        ("a: \x00\n", "no readable YAML"),
        ("a: b\nrun_name: 2024-13-45\n", "line 2: no valid YAML (it looks like a date or a number and is none: put"),
        ("run_name: [0x_]\n", "line 1: no valid YAML (it looks like a date"),
        ("run_name: !!timestamp x\n", "line 1: no valid YAML (it looks like a date"),
        ("output_dir: 2024-05-13\n", "output_dir is no text; put it in quotes"),
        ("dataset_name: 7\n", "dataset_name is no text; put it in quotes"),
        ("evaluation_prompts: [a.json, 7]\n", "evaluation_prompts is no text; put it in quotes"),
        ("a: [" * 5000, "no readable YAML"),
    ],
)  # fmt: skip
def test_a_configuration_that_explodes_or_holds_nothing_is_refused_at_once(text, words, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    code = cli.main(["train", "--config", str(tmp_path / "config.yaml")])
    assert refused((code, *capsys.readouterr()), "config.yaml: ", words)


def test_a_few_aliases_are_read_and_the_file_may_follow_an_equals_sign(train, tmp_path, capsys):
    assert train(max_steps=1, save_strategy="no")[0] == 0
    text = (tmp_path / "config.yaml").read_text().replace("output_dir: ", "output_dir: &place ")
    (tmp_path / "config.yaml").write_text(text + "run_name: *place\n")
    assert cli.main(["train", f"--config={tmp_path / 'config.yaml'}"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_names_the_files_rows(train, tokenizer, tmp_path, monkeypatch):
    compute_loss = TASFTTrainer.compute_loss
    monkeypatch.setattr(TASFTTrainer, "compute_loss", lambda self, *a, **k: compute_loss(self, *a, **k) * float("nan"))
    code, _, error = train(per_device_train_batch_size=2)
    assert code == 1 and "step 1: loss or gradient is not finite" in error.splitlines()[-1]
    assert error.splitlines()[-1].count("rows.jsonl: row ") == 2


def test_tools_and_template_switches_reach_the_template(train, base, tokenizer, tmp_path):
    template = "{{ 'w7 ' * (tools or []) | length }}{{ 'w8 ' if polite else '' }}" + TEMPLATE
    (tmp_path / "tools.jinja").write_text(template)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{i}"}],
            "completion": [{"role": "assistant", "content": f"w{i} w3"}],
            "label": i % 3 > 0,
        }
        for i in range(12)
    ]
    tools = [{"type": "function", "function": {"name": "w9", "parameters": {}}}] * 2
    counts = []
    for name, extra in {
        "bare": {}, "tools": {"tools": tools}, "both": {"tools": tools, "chat_template_kwargs": {"polite": True}}
    }.items():  # fmt: skip
        write(tmp_path / f"{name}.jsonl", [row | extra for row in rows])
        code, out, error = train(
            dataset_name=tmp_path / f"{name}.jsonl", chat_template_path=tmp_path / "tools.jinja", max_steps=1,
            per_device_train_batch_size=12, output_dir=tmp_path / name,
        )  # fmt: skip
        assert code == 0, error
        counts.append(int(float(out.split("'num_tokens': '")[1].split("'")[0])))
    assert counts[1] == counts[0] + 2 * 12 and counts[2] == counts[1] + 12


@pytest.mark.parametrize("own", [False, True])
def test_trls_card_has_its_tags_in_order_and_the_users_is_left(own, tmp_path):
    card = "---\nname: x\ntags:\n- trl\n- sft\n- ta-sft\n- generated_from_trainer\nlicence: y\n---\n\n- z\n- a\n"
    (tmp_path / "_settings.json").write_text(json.dumps({"own_readme": own}))
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        model=None,
        is_world_process_zero=lambda: True,
        create_model_card=lambda name: (tmp_path / "README.md").write_text(card),
    )
    run_folder.keep_readme(trainer)
    trainer.create_model_card("x")
    if own:
        assert not (tmp_path / "README.md").exists()
    else:
        text = (tmp_path / "README.md").read_text()
        assert "tags:\n- generated_from_trainer\n- sft\n- ta-sft\n- trl\nlicence" in text and "- z\n- a\n" in text


def test_short_names_of_types_are_understood_and_a_spoilt_base_is_named_before_training(train, base, tmp_path):
    assert refused(train(dtype="float99"), "no dtype 'float99'", "bfloat16")
    with pytest.raises(SystemExit) as usage:
        train("--dtype", "float99")
    assert usage.value.code == 2
    for name, (flags, options) in {"file": ((), {"dtype": "bf16"}), "flag": (("--dtype", "bf16"), {})}.items():
        assert train(*flags, max_steps=1, output_dir=tmp_path / name, **options)[0] == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
    spoilt = shutil.copytree(base, tmp_path / "spoilt")
    (spoilt / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:9000])
    assert refused(
        train(model_name_or_path=spoilt, output_dir=tmp_path / "other"), "model.safetensors: cannot be loaded"
    )
    assert not [*tmp_path.glob("other/_settings*")], "the folder is free for the whole model"
