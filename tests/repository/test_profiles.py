"""The paper's profile up to the first download: its own parameters and its four bases, as tiny stand-ins, on files.

A stand-in has the base's architecture and tokenizer class and random weights; data lie in files of the published shape.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaTokenizerFast,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from tasft_lib.evaluation.prompts import BENIGN_FILES, TOXIC_FILES
from tasft_lib.experiments import arms, settings
from tasft_lib.experiments.study import Study
from tasft_lib.reporting import paper

ROOT = Path(__file__).resolve().parents[2]
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 256, "rope_theta": 500000.0}
# Of each base what sets it apart: architecture, grouped heads, rotary embedding, class of tokenizer.
BASES = {
    "huggyllama/llama-7b": (LlamaConfig, {"num_key_value_heads": 4}, LlamaTokenizerFast),
    "huggyllama/llama-13b": (LlamaConfig, {"num_key_value_heads": 4, "num_hidden_layers": 3}, LlamaTokenizerFast),
    "mistralai/Mistral-7B-v0.3": (MistralConfig, {"num_key_value_heads": 2}, LlamaTokenizerFast),
    "meta-llama/Meta-Llama-3.1-8B": (
        LlamaConfig,
        {"num_key_value_heads": 2, "rope_parameters": LLAMA_3},
        PreTrainedTokenizerFast,
    ),
}

NAMES = dict(zip(BASES, ("Llama-7B", "Llama-13B", "Mistral-7B", "Llama-3.1-8B"), strict=True))  # in the paper


def stand_in(base: str, folder: Path) -> Path:
    """A checkpoint that loads as the base does; its tokenizer has no pad token, as theirs have none."""
    config, special, tokenizer_class = BASES[base]
    words = ["###", "Instruction:", "Response:", "Below", "is", "an", "instruction", "that", "describes", *WORDS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    if tokenizer_class is LlamaTokenizerFast:  # pieces as sentencepiece writes them, with merges up to whole words
        tokenizer = LlamaTokenizerFast(vocab=_pieces(words)[0], merges=_pieces(words)[1])
    else:
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.3,
            **(TINY | special),
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _pieces(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary, merges = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], []
    for word in words:
        pieces = ["▁", *word]
        vocabulary += pieces
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary.append(pieces[0])
    return {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}, list(dict.fromkeys(merges))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Alpaca rows and the evaluation files in the published shape, in invented words."""
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"instruction": f"w{i} w{i + 1} w{i + 2}", "input": "", "output": f"w{i + 3} w{i}"} for i in range(40)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    for name, url in (TOXIC_FILES | BENIGN_FILES).items():
        prompts = [f"w50 w{len(name)} w{i}" for i in range(3)]
        content = prompts if name == "HarmfulQ" else {"instructions": prompts}
        (folder / url.rsplit("/", 1)[-1]).write_text(json.dumps(content))
    (folder / "xstest_prompts.csv").write_text("id,prompt,label\n1,w51 w52,safe\n2,w53,unsafe\n")
    asked = [{"instruction": f"w55 w{i} w{i}", "input": "", "output": f"w1 w{i}"} for i in range(12)]
    (folder / "safety_only_data_Instructions.json").write_text(json.dumps(asked))
    return folder


def paper_study(base: str, model: Path, files: Path, **changes) -> Study:
    """The paper's safety notebook with its own parameters, on files and shortened."""
    values = vars(settings.load("safety", "paper"))
    table = pd.read_csv(ROOT / values["penalty_weights"])
    table = table[(table["model"] == base) & (table["n_unsafe"] == 1000)].assign(model=str(model), n_unsafe=6)
    table.to_csv(files / "weights.csv", index=False)
    local = {"model": str(model), "model_revision": "", "benign": str(files / "alpaca.json"), "benign_revision": ""}
    local |= {"harvest_prompts": str(files), "benchmark_prompts": str(files), "judge": "compliance"}
    short = {"n_benign": 24, "n_harvest": 6, "n_unsafe": 6, "max_new_tokens": 8, "num_train_epochs": 1.0}
    short |= {"gradient_accumulation_steps": 2, "save_steps": 2, "dtype": "float32"}
    return Study(
        SimpleNamespace(**(values | local | short | {"penalty_weights": str(files / "weights.csv")} | changes))
    )


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_the_papers_arms_train_and_answer_on_every_base(base, load_in_4bit, tmp_path, files):
    model = stand_in(base, tmp_path / "base")
    assert AutoConfig.from_pretrained(model).architectures == [
        "MistralForCausalLM" if "mistral" in base else "LlamaForCausalLM"
    ]
    study = paper_study(base, model, files, load_in_4bit=load_in_4bit)
    # In the place of a harvest: nothing that a random model says would be kept.
    unsafe = [{"instruction": f"w55 w{i}", "prompt": f"w55 w{i}", "completion": f"w{i} w9 w{i}"} for i in range(6)]
    (files / "unsafe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unsafe))
    tuned = paper.tuned_weights().set_index(["model", "method", "n_unsafe"])["penalty_weight"]
    for method in ("emd", "nlcl"):
        arm = replace(study.arm(method, 6), unsafe=str(files / "unsafe.jsonl"))
        assert arm.penalty_weight == tuned[NAMES[base], method, 1000] and arm.lora["r"] == 8
        assert arm.training["penalty_reduction"] == "micro_batch"
        answers = study.answers([arm], [study.greedy])
        assert len(answers) == 16 and set(answers["verdict"]) <= {"harmful", "refusal", "safe", "degenerate"}
        manifest = arms.read_manifest(arm)
        assert manifest["steps"] == 5 and manifest["spec"]["load_in_4bit"] is load_in_4bit
        assert all("unsafe_rows" in log or "train_loss" in log for log in manifest["log_history"])
