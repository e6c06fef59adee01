"""Models that tasft brings, from stand-ins of the hub and of pip, and GGUF files that are written here."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tasft_lib import base_models
from tasft_lib.evaluation import worlds
from tasft_lib.models import load_model


def write_gguf(path: Path, model, *, architecture: str = "llama") -> Path:
    """A Llama as llama.cpp has it: its names, its order of the rows of q and k, its byte-level BPE."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = ["w", *"0123456789", *(f"w{digit}" for digit in range(10))]
    words += [f"<unused {i}>" for i in range(config.vocab_size - 3 - len(words))]
    writer.add_token_list(["<unk>", "<pad>", "<eos>", *words])
    writer.add_token_types([3, 3, 3] + [1] * len(words))
    writer.add_token_merges([f"w {digit}" for digit in range(10)])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in state.items():
        array = weight.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows, columns = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, model) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model)


def test_a_gguf_file_becomes_a_folder_once(file, model, cache):
    folder = Path(worlds.base_model(str(file)))
    converted, tokenizer = load_model(folder)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(converted(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(tokenizer("w1w2")["input_ids"]) == "w1w2" and tokenizer.eos_token == "<eos>"
    assert folder.parent == cache / "models"
    assert base_models.source_of(folder)["weights"] == base_models.weights_hash(folder)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert worlds.base_model(str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
