"""Samples along training: what is written and said, and that training does not notice them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.trainer
from conftest import build_model, make_rows
from huggingface_hub.utils import filter_repo_objects
from test_cli import edit, folder  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasft_lib import TASFTConfig, TASFTTrainer, cli
from tasft_lib.evaluation.samples import FILE, SampleCallback
from tasft_lib.generation import Decoding, generate

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["w7 w8 w9 w10 w11 w12", "w1", "w2 w3 w4"]


@pytest.fixture
def prompts(folder):  # noqa: F811
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return ["--sample_prompts", str(path), "--sample_max_new_tokens", "8"]


def train(folder, *flags):  # noqa: F811
    return cli.main(["train", "--config", str(folder / "config.yaml"), "--logging_steps", "1", *flags])


def samples(folder):  # noqa: F811
    return [json.loads(line) for line in (folder / "out" / FILE).read_text().splitlines()]


def history(folder, step):  # noqa: F811
    return json.loads((folder / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def test_text_goes_to_the_file_rates_to_the_log_and_a_redacted_line_to_the_screen(folder, prompts, capsys):  # noqa: F811
    assert train(folder, *prompts, "--max_steps", "4", "--save_steps", "2") == 0
    found = samples(folder)
    assert [(record["step"], record["prompt"]) for record in found] == [(s, p) for s in (2, 4) for p in PROMPTS]
    assert all(record["response"] and not record["finished"] for record in found)
    shown = capsys.readouterr().out
    assert "step 2: w7 w8 w9… [" in shown and not any(record["response"] in shown for record in found)
    assert PROMPTS[0] not in shown
    logged = [log for log in history(folder, 4) if "sample_degenerate" in log]
    assert [log["step"] for log in logged] == [2, 4][: len(logged)] and logged
    share = sum(record["degenerate"] for record in found if record["step"] == 2) / len(PROMPTS)
    assert logged[0]["sample_degenerate"] == pytest.approx(share) and logged[0]["sample_refusal"] == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_checkpointing": True},
        {"bf16": True, "use_cpu": True, "lora_dropout": 0.2},
        {"load_in_4bit": True, "dtype": "bfloat16", "gradient_checkpointing": True},
        {"use_peft": False, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_training_is_bit_identical_with_and_without_samples(setting, folder, prompts, request):  # noqa: F811
    if "load_in_4bit" in setting:
        request.getfixturevalue("bitsandbytes")
    edit(folder, logging_steps="3", **{name: str(value).lower() for name, value in setting.items()})
    run = ["train", "--config", str(folder / "config.yaml"), "--max_steps", "6", "--save_steps", "6"]
    logs = {}
    for name, flags in {"plain": [], "sampled": [*prompts, "--sample_steps", "2"]}.items():
        assert cli.main([*run, *flags, "--output_dir", str(folder / name)]) == 0
        state = json.loads((folder / name / "checkpoint-6" / "trainer_state.json").read_text())
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
        logs[name] = [
            {key: value for key, value in log.items() if key not in timed}
            for log in state["log_history"]
            if "sample_refusal" not in log
        ]
    assert len(logs["plain"]) == 2 and logs["plain"] == logs["sampled"]
    rng = [torch.load(folder / n / "checkpoint-6" / "rng_state.pth", weights_only=False) for n in ("plain", "sampled")]
    assert rng[0]["python"] == rng[1]["python"] and torch.equal(rng[0]["cpu"], rng[1]["cpu"])
    for file in (folder / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "sampled" / file.name).read_bytes()


def test_the_answers_are_those_of_the_saved_model(folder, prompts):  # noqa: F811
    assert train(folder, *prompts, "--learning_rate", "0.05", "--max_steps", "4", "--sample_steps", "3") == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    expected = generate(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=8))
    found = samples(folder)
    assert [record["step"] for record in found] == [3] * 3 + [4] * 3
    assert [record["response"] for record in found[3:]] == [answer.text for answer in expected]
    assert [r["response"] for r in found[:3]] != [r["response"] for r in found[3:]], "the model did not move"


def test_a_resumed_run_adds_and_repeats_no_step(folder, prompts):  # noqa: F811
    run = [*prompts, "--sample_steps", "1", "--save_steps", "2"]
    assert train(folder, *run, "--max_steps", "4") == 0
    before = samples(folder)
    with (folder / "out" / FILE).open("a") as file:
        file.write('{"step": 4, "prom')  # torn by a kill
    checkpoint = ["--resume_from_checkpoint", str(folder / "out" / "checkpoint-2")]
    assert train(folder, *run, "--max_steps", "5", *checkpoint) == 0
    after = samples(folder)
    assert [record["step"] for record in after] == [step for step in range(1, 6) for _ in PROMPTS]
    assert after[:6] == before[:6]
    assert train(folder, *run, "--max_steps", "1", "--overwrite") == 0
    assert [record["step"] for record in samples(folder)] == [1] * 3, "another run begins anew"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sample_steps", "0"], "sample_steps=0"),
        (["--sample_max_new_tokens", "500"], "sample_prompts: row 1: the prompt has 6 tokens"),
        (["--sample_prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_training(flags, message, folder, prompts, capsys):  # noqa: F811
    assert train(folder, *prompts, *flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("tasft train: ")
    assert not list((folder / "out").glob("checkpoint-*"))


def test_sharded_models_are_refused(tokenizer, tmp_path, monkeypatch):
    args = TASFTConfig(str(tmp_path), penalty_weight=1, report_to="none", gradient_checkpointing=False)
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=make_rows(), processing_class=tokenizer)
    short = Decoding(max_new_tokens=4)
    SampleCallback(trainer, PROMPTS, PROMPTS, decoding=short)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP or ZeRO-3; leave it out"):
        SampleCallback(trainer, PROMPTS, PROMPTS, decoding=short)
    trainer.is_fsdp_enabled = False
    monkeypatch.setattr("tasft_lib.evaluation.samples.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="FSDP or ZeRO-3; leave it out"):
        SampleCallback(trainer, PROMPTS, PROMPTS, decoding=short)


def test_of_two_processes_one_answers(folder, prompts):  # noqa: F811
    edit(folder, per_device_train_batch_size="2", gradient_checkpointing="false")

    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    command = [*launch, "-m", "tasft_lib.cli", "train", "--config", str(folder / "config.yaml"), "--use_cpu", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    flags = [*prompts, "--sample_steps", "1", "--logging_steps", "1", "--ddp_backend", "gloo"]
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [record["step"] for record in samples(folder)] == [1] * 3 + [2] * 3
    assert done.stdout.count("step 1:") == 3


class Hub:
    """Stands for HfApi: keeps what would be uploaded, chosen by the hub's own function."""

    def __init__(self):
        self.uploaded: dict[str, bytes] = {}

    def create_repo(self, repo_id, **_):
        return type("Url", (), {"repo_id": f"me/{repo_id}"})()

    def upload_folder(self, *, folder_path, ignore_patterns=None, run_as_future=False, path_in_repo="", **_):
        paths = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns):
            self.uploaded[f"{path_in_repo}/{path}"] = (Path(folder_path) / path).read_bytes()
        return type("Future", (), {"done": lambda self: True, "is_done": lambda self: True})()


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints", "end"])
def test_push_to_hub_uploads_neither_samples_nor_token(strategy, folder, prompts, monkeypatch):  # noqa: F811
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "before")
    push = ["--push_to_hub", "true", "--hub_strategy", strategy, "--hub_token", "hf_canary51", "--save_steps", "1"]
    assert train(folder, *prompts, *push) == 0
    assert os.environ["HF_TOKEN"] == "hf_canary51", "the token is where the hub's client looks for it"
    assert any(path.endswith("adapter_model.safetensors") for path in hub.uploaded)
    said = {record["response"] for record in samples(folder)}
    assert said and not any("sample" in path for path in hub.uploaded)
    for path, content in hub.uploaded.items():
        assert b"hf_canary51" not in content, path
        if not path.endswith(("tokenizer.json", ".safetensors")):
            assert not any(text.encode() in content for text in [*said, PROMPTS[0]]), path
    assert str(folder).encode() not in hub.uploaded.get("/README.md", b""), "a local path is no data set id"


def test_tensorboard_gets_the_metrics_of_the_penalty(folder, prompts, monkeypatch):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
    assert train(folder, *prompts, "--sample_steps", "1", "--report_to", "tensorboard") == 0
    events = EventAccumulator(str(folder / "board"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{n}" for n in ("nll", "penalty", "unsafe_log_prob", "unsafe_rows", "sample_refusal")} <= tags
    assert [event.step for event in events.Scalars("train/sample_degenerate")] == [1, 2]
    logged = {log["step"]: log for log in history(folder, 2) if "penalty" in log}
    for event in events.Scalars("train/penalty"):
        assert event.value == pytest.approx(logged[event.step]["penalty"], rel=1e-6)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_them_too(tracker, folder, prompts):  # noqa: F811
    """In a process of its own: transformers looks for trackers once, and wandb starts a service."""
    pytest.importorskip(tracker)
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-m", "tasft_lib.cli", "train", "--config", str(folder / "config.yaml")]
    done = subprocess.run(
        [*command, *prompts, "--sample_steps", "1", "--logging_steps", "1", "--report_to", tracker],
        env=os.environ | offline | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = [*folder.glob("wandb/offline-run-*/*.wandb"), *folder.glob("trackio/*.db*")]
    written = b"".join(path.read_bytes() for path in files)
    for name in ("nll", "penalty", "unsafe_log_prob", "sample_refusal", "sample_degenerate"):
        assert f"train/{name}".encode() in written
    assert not any(record["response"].encode() in written for record in samples(folder))
