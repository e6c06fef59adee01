"""Two gloo processes take the step that one process takes: DDP, FSDP2 and ZeRO-3, padded and packed, full and LoRA.

DeepSpeed is no dependency of the project; where it is not installed its part is skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model, make_rows
from peft import LoraConfig, get_peft_model
from test_trainer import LORA, assert_same_gradient, config, gradient_step

# Two processes take two of the eight rows at a time: 0, 1, 4, 5 and 2, 3, 6, 7. With every fourth row unsafe the second
# process has none; with every row unsafe neither has a benign one.
CASES = {
    "emd": {},
    "nlcl": {"penalty": "nlcl", "penalty_reduction": "unsafe"},
    "dense": {"loss_head": "dense"},
    "LoRA": {"lora": True},
    "npo": {"lora": True, "penalty": "npo"},
    "a rank without unsafe rows": {"unsafe_every": 4},
    "a rank without unsafe rows, nlcl": {"unsafe_every": 4, "penalty": "nlcl"},
    "no unsafe rows": {"unsafe_every": None},
    "no benign rows": {"unsafe_every": 1},
    "a head in a group of its own": {"wrap": ["LlamaDecoderLayer", "Linear", "Embedding"]},
    "embed_tokens in a group of its own": {
        "wrap": ["LlamaDecoderLayer", "Linear", "Embedding"],
        "penalty_embedding": "embed_tokens",
        "lora": True,
    },
    "isotropic": {"penalty_embedding": "isotropic", "penalty": "emd_exact"},
    "padding-free": {"padding_free": True, "max_length": None, "penalty": "emd_exact"},
    "packed": {"packing": True, "max_length": 48, "per_device_train_batch_size": 1, "unsafe_every": 4},
    "packed, LoRA, nlcl": {
        "packing": True,
        "max_length": 48,
        "per_device_train_batch_size": 1,
        "penalty": "nlcl",
        "lora": True,
    },
}


def cases(strategy: str) -> dict[str, dict]:
    """The cases that a strategy can run."""
    return {name: case for name, case in CASES.items() if strategy != "zero3" or name not in ("dense", "isotropic")}


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    build_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero3"])
def results(request, base):
    """(logs, gradients) by case, of two processes."""
    if request.param == "zero3":
        pytest.importorskip("deepspeed")
    # Two processes take six CPU seconds each to import what they need, so they do it for two strategies.
    strategies = ["zero3"] if request.param == "zero3" else ["ddp", "fsdp2"]
    if not (base / f"{request.param}.json").exists():
        take_steps(base, *strategies)
    logs = json.loads((base / f"{request.param}.json").read_text())
    return logs, torch.load(base / f"{request.param}.pt", weights_only=True)


def take_steps(folder, *strategies):
    """Every case's step by two processes, for `results` to read."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).resolve().parents[1] / "distributed_step.py"
    run = subprocess.run(
        [*command, str(script), str(folder), *strategies], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_step_of_one(name, results, tokenizer, tmp_path):
    options = {**CASES[name], "per_device_train_batch_size": 8}
    rows = make_rows(8, unsafe_every=options.pop("unsafe_every", 3))
    model = build_model(tokenizer)
    options.pop("wrap", None)
    if options.pop("lora", False):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    logs, gradients = results
    if name not in logs:
        pytest.skip("refused under ZeRO-3")
    log, expected = gradient_step(model, config(tmp_path, **options), rows, tokenizer)
    for metric in ("loss", "nll", "penalty", "unsafe_rows", "unsafe_log_prob"):
        assert (metric in log) == (metric in logs[name])
        if metric in log:
            assert logs[name][metric] == pytest.approx(log[metric], rel=1e-5), metric
    assert_same_gradient(gradients[name], expected)
