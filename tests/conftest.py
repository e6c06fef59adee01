"""A tiny random Llama, a word-level tokenizer and mixed rows of very different lengths, shared by the tests."""

import gc
import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Not the developer's own: where it lies, `local` is the judge of commands that name none.
os.environ.setdefault("TASFT_MINILM", "no encoder here")

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_garbage():
    """Every training ends with a search for garbage; what imports and word lists left, a million objects, is spared."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and the pretrained tiny model that lies beside a developer's checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("../shared (real data sets, TinyStories-656K) is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def published() -> None:
    """Skips where `figures/` is not as it was committed: `make reproduce` has put a run of the reader's own there."""
    root = Path(__file__).resolve().parents[1]
    changed = subprocess.run(["git", "status", "--porcelain", "figures"], cwd=root, capture_output=True, text=True)
    if changed.stdout:
        pytest.skip("figures/ holds a run that is not committed; `git stash -u -- figures` puts it aside")


@pytest.fixture
def bitsandbytes(monkeypatch):
    """Skips where it is missing. On a CPU with AVX512-BF16 it repacks weights for evaluation, for which layers as small
    as the tests' are too small, and rounds their scales for good; the tests ask what happens everywhere else."""
    module = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(module.nn.modules, "has_avx512bf16", lambda: False)
    return module


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<unk>", "<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def build_model(tokenizer, *, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random two-layer Llama (untied head) whose next-token distributions are far from uniform."""
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return build_model(tokenizer)


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    """A whole model and its tokenizer, for a test to spoil."""
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def make_rows(n: int = 24, *, unsafe_every: int | None = 3, seed: int = 0) -> Dataset:
    """`n` rows with prompts of 1-9 and completions of 1-30 words; every `unsafe_every`-th is unsafe (None: none is)."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    rows = [
        {
            "prompt": words(1, 10) + " ",
            "completion": words(1, 31) + " ",
            "label": unsafe_every is None or i % unsafe_every != 0,
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def rows() -> Dataset:
    return make_rows()


@pytest.fixture
def interrupt_after(monkeypatch):
    """A function of n: Ctrl-C comes when n batches of answers are kept; returns the list of those kept so far."""
    from tasft_lib import generation

    def begin(n):
        written, original = [], generation.append_records

        def keep(*arguments):
            original(*arguments)
            written.append(1)
            if len(written) == n:
                raise KeyboardInterrupt

        monkeypatch.setattr(generation, "append_records", keep)
        return written

    return begin
