"""A checkpoint that cannot be used is told in one line, before anything is done with it."""

import json
import pickle

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file, save_file

from tasft_lib import cli
from tasft_lib.models import load_model, load_tokenizer, load_weights
from tasft_lib.storage.checkpoints import check_weights


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_config(folder, **changes):
    edit_json(folder / "config.json", **changes)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def put(name, value):
    def edit(weights):
        weights[name].view(-1)[-1] = value

    return lambda folder: edit_weights(folder, edit)


def as_pickle(value):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return edit


def in_two(folder):
    """An index of two files, of which one is missing."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-1.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(weights, "model-1.safetensors") | {"lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def another_kind(folder):
    edit_config(folder, model_type="vit")


def index_of(weight_map):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return spoil


class Evil:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return print, ("run",)


SPOILT = {
    "cut header": (lambda f: cut(f, 5), "model.safetensors: cannot be loaded"),
    "cut weights": (lambda f: cut(f, 9000), "model.safetensors: cannot be loaded"),
    "empty file": (lambda f: cut(f, 0), "model.safetensors: cannot be loaded"),
    "NaN": (put("lm_head.weight", float("nan")), "model.safetensors: lm_head.weight holds NaN"),
    "infinity": (put("model.layers.1.mlp.up_proj.weight", -float("inf")), "up_proj.weight holds NaN or infinity"),
    "a pickle that runs something": (as_pickle({"lm_head.weight": Evil()}), "something else than weights"),
    "a pickle of something else": (as_pickle([1, 2]), "something else than weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
    "a part is missing": (in_two, "model-2.safetensors"),
    "layers missing": (lambda f: edit_config(f, num_hidden_layers=5), "lacks model.layers.2."),
    "layers left out": (lambda f: edit_config(f, num_hidden_layers=1), "leaves out model.layers.1."),
    "weight missing": (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), "lacks model.norm.weight"),
    "another shape": (lambda f: edit_config(f, intermediate_size=64), "[32, 48], and config.json says [32, 64]"),
    "another vocabulary": (lambda f: edit_config(f, vocab_size=70), "lm_head.weight has the shape"),
    "own code": (lambda f: edit_config(f, model_type="mine", auto_map={"AutoConfig": "m.C"}), "code of its own"),
    "unknown architecture": (lambda f: edit_config(f, model_type="mine"), "model_type 'mine' is unknown"),
    "no architecture": (lambda f: edit_config(f, model_type=None), "model_type None is unknown"),
    "a list as architecture": (lambda f: edit_config(f, model_type=["llama"]), "is unknown"),
    "an index of nothing": (index_of({}), "names no weights"),
    "an index of numbers": (index_of({"lm_head.weight": 1}), "cannot be loaded"),
    "another kind": (another_kind, "of another kind"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: holds no JSON object"),
    "config is torn": (lambda f: (f / "config.json").write_text('{"a": 1'), "config.json: no JSON, so it is damaged"),
    "config is no text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json: no JSON, so it is damaged",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "nonsense in config": (lambda f: edit_config(f, num_hidden_layers="two"), "model"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model_is_named_before_it_is_used(name, folder, capfd):
    spoil, told = SPOILT[name]
    spoil(folder)
    for load in (check_weights, load_weights):
        with pytest.raises((ValueError, OSError)) as error:
            load(folder)
        assert told in str(error.value) and str(folder) in str(error.value)
        assert "trust_remote_code" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "nothing ran and nothing else was said"


@pytest.mark.filterwarnings("error")
def test_of_how_a_refused_pickle_was_written_nothing_is_said(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Evil()}, protocol=4))
    with pytest.raises(ValueError, match="something else than weights"):
        check_weights(folder)


@pytest.mark.parametrize("new", [True, False])
def test_pickles_of_weights_alone_are_read(new, folder, tokenizer):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    torch.testing.assert_close(load_weights(folder).state_dict(), build_model(tokenizer).state_dict())


def test_a_whole_model_passes_and_no_random_number_is_drawn(folder, tokenizer):
    state = torch.get_rng_state()
    check_weights(folder)
    assert torch.equal(torch.get_rng_state(), state)
    weights = load_file(folder / "model.safetensors")
    # a buffer of older checkpoints, which this architecture does without
    weights["model.layers.0.self_attn.masked_bias"] = torch.tensor(-float("inf"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(load_weights(folder).state_dict(), build_model(tokenizer).state_dict())


def test_tokens_beyond_the_embedding_are_refused_unless_nothing_writes_them(folder):
    def load(add):
        tokenizer = load_tokenizer(folder)
        add(tokenizer)
        tokenizer.save_pretrained(folder)
        return check_weights(folder, tokenizer=load_tokenizer(folder)) or load_model(folder)

    load(lambda t: t.add_tokens(["<image>"], special_tokens=True))
    for add in (
        lambda t: setattr(t, "chat_template", "{{ '<image>' }}"),
        lambda t: (setattr(t, "chat_template", None), t.add_tokens(["common"])),
    ):
        with pytest.raises(ValueError, match=r"knows token 6\d, the embedding has 63 rows"):
            load(add)
        with pytest.raises(ValueError, match=r"knows token 6\d, the embedding has 63 rows"):
            load_model(folder)


@pytest.mark.parametrize("name", ["NaN", "cut weights", "layers missing", "own code"])
def test_a_spoilt_model_is_not_exported(name, folder, tmp_path, capsys):
    SPOILT[name][0](folder)
    assert cli.main(["export", "--model", str(folder), "--output_dir", str(tmp_path / "copy")]) == 1
    assert SPOILT[name][1] in capsys.readouterr().err and not (tmp_path / "copy").exists()
