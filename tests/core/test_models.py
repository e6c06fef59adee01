"""What is loaded: adapters on their base, from the hub too, tokenizers, dtypes; what cannot be loaded is one line."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoints import edit_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasft_lib import cli
from tasft_lib.commands.flags import template_of
from tasft_lib.models import load_model, load_tokenizer, load_weights, torch_dtype

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
TOKENS = torch.arange(3, 43).view(2, 20)


def train_adapter(base, path, *, added=0, revision=None, name=None, **lora):
    """An adapter of some weight, as if trained; its logits on TOKENS. `added`: tokens more than the base has."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    if added:
        tokenizer.add_tokens([f"added{i}" for i in range(added)])
        model.resize_token_embeddings(len(tokenizer))
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
        logits = model.eval()(input_ids=TOKENS + added).logits
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if name is not None:
        edit_json(path / "adapter_config.json", base_model_name_or_path=name, revision=revision)
    return logits


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(input_ids=tokens).logits


def edit_adapter(edit):
    def spoil(adapter):
        weights = load_file(adapter / "adapter_model.safetensors")
        edit(weights)
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    return spoil


def without(layer):
    return edit_adapter(lambda w: [w.pop(name) for name in list(w) if f".layers.{layer}." in name])


def with_layer(weights):
    weights |= {name.replace(".1.", ".2."): value.clone() for name, value in weights.items() if ".layers.1." in name}


def wider(weights):
    weights |= {name: torch.ones(4, 40) for name in weights if "lora_A" in name}


SPOILT_ADAPTERS = {
    "cut": (
        lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:700]),
        "adapter_model.safetensors: cannot be loaded",
    ),
    "NaN": (edit_adapter(lambda w: [v.view(-1)[:1].fill_(float("nan")) for v in w.values()]), "holds NaN"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "an adapter without weights"),
    "a list as configuration": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "torn configuration": (lambda a: (a / "adapter_config.json").write_text('{"r": '), "no JSON, so it is damaged"),
    "no kind": (lambda a: edit_json(a / "adapter_config.json", peft_type=None), "knows no adapter None"),
    "an unknown kind": (
        lambda a: edit_json(a / "adapter_config.json", peft_type="NONE_SUCH"),
        "knows no adapter 'NONE_SUCH'",
    ),
    "no base": (lambda a: edit_json(a / "adapter_config.json", base_model_name_or_path=None), "names no base"),
    "base elsewhere": (
        lambda a: edit_json(a / "adapter_config.json", base_model_name_or_path="/gone/base"),
        "its base '/gone/base' is not there",
    ),
    "base of no commit": (
        lambda a: edit_json(a / "adapter_config.json", base_model_name_or_path="owner/base"),
        "give the base's commit as --model_revision",
    ),
    "base is no text": (lambda a: edit_json(a / "adapter_config.json", base_model_name_or_path=[1]), "is no text"),
    "a wider base": (edit_adapter(wider), "is [4, 32] and not [4, 40]"),
    "a deeper base": (edit_adapter(with_layer), "which has no base_model.model.model.layers.2."),
    "a shallower base": (without(1), "which has base_model.model.model.layers.1."),
    "other modules": (lambda a: edit_json(a / "adapter_config.json", target_modules=["c_attn"]), "does not fit"),
}


@pytest.mark.parametrize("name", SPOILT_ADAPTERS)
def test_a_spoilt_adapter_is_named_and_nothing_is_answered_or_exported(name, folder, tmp_path, capsys):
    spoil, told = SPOILT_ADAPTERS[name]
    adapter = tmp_path / "adapter"
    train_adapter(folder, adapter)
    spoil(adapter)
    with pytest.raises((ValueError, OSError)) as error:
        load_model(adapter)
    assert told in str(error.value) and str(adapter) in str(error.value)
    assert cli.main(["export", "--model", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 1
    assert str(adapter) in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_added_tokens_brings_its_embeddings(tied, lora, tokenizer, tmp_path):
    build_model(tokenizer, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained = train_adapter(tmp_path / "base", tmp_path / "adapter", added=4, **lora)
    model, own = load_model(tmp_path / "adapter")
    assert own.convert_tokens_to_ids("added3") == 66
    torch.testing.assert_close(logits(model, TOKENS + 4), trained)
    assert cli.main(["export", "--model", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")[0], TOKENS + 4), trained, atol=1e-4, rtol=1e-4)


def test_half_of_the_added_rows_is_refused(folder, tmp_path):
    train_adapter(folder, tmp_path / "adapter", added=4)
    edit_adapter(lambda w: w.pop("base_model.model.lm_head.weight"))(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"of embedding and head, it has but model\.embed_tokens for 67 tokens"):
        load_model(tmp_path / "adapter")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a folder where the hub's cache would have it, under `owner/NAME` at a commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(folder, name, commit):
        shutil.copytree(folder, tmp_path / "cache" / f"models--owner--{name}" / "snapshots" / commit)
        return f"owner/{name}"

    return put


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=str)
def test_an_adapter_on_the_hub_answers_as_from_its_folder_on_the_base_at_the_commit_that_it_names(
    lora, folder, tmp_path, hub, tokenizer
):
    base = hub(folder, "base", COMMIT)
    build_model(tokenizer, seed=5).save_pretrained(tmp_path / "later")
    hub(tmp_path / "later", "base", OTHER_COMMIT)
    trained = train_adapter(folder, tmp_path / "adapter", name=base, revision=COMMIT, **lora)
    adapter = hub(tmp_path / "adapter", "adapter", OTHER_COMMIT)
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter")[0]), trained)
    torch.testing.assert_close(logits(load_model(adapter, OTHER_COMMIT)[0]), trained)
    export = ["export", "--model", adapter, "--model_revision", OTHER_COMMIT, "--output_dir", str(tmp_path / "merged")]
    assert cli.main(export) == 0
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")[0]), trained, atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "merged" / "tasft.json").read_text())
    assert (record["base_model"], record["base_model_revision"]) == (base, COMMIT)


def test_a_model_on_the_hub_is_exported_too_and_an_adapter_without_its_base_is_told(folder, tmp_path, hub, capsys):
    base = hub(folder, "base", COMMIT)
    export = ["export", "--model", base, "--model_revision", COMMIT, "--output_dir", str(tmp_path / "copy")]
    assert cli.main(export) == 0
    torch.testing.assert_close(load_weights(tmp_path / "copy").state_dict(), load_weights(folder).state_dict())
    train_adapter(folder, tmp_path / "adapter", name=base, revision=None)
    adapter = hub(tmp_path / "adapter", "adapter", OTHER_COMMIT)
    export = ["export", "--model", adapter, "--model_revision", OTHER_COMMIT, "--output_dir", str(tmp_path / "merged")]
    assert cli.main(export) == 1
    assert f"hf download owner/adapter --revision {OTHER_COMMIT}" in capsys.readouterr().err
    assert cli.main([*export, "--base", str(folder)]) == 0


def test_the_tokenizer_of_an_adapter_without_one_is_its_bases(folder, tmp_path):
    train_adapter(folder, tmp_path / "adapter")
    for file in tmp_path.glob("adapter/*token*"):
        file.unlink()
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == load_tokenizer(folder).get_vocab()


SPOILT_TOKENIZERS = {
    "torn": (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", '), "tokenizer.json: no JSON"),
    "a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json: holds no JSON object"),
    "empty": (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer cannot be loaded"),
    "lost": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "lost, and guessed": (
        lambda f: [
            (f / "tokenizer.json").unlink(),
            edit_json(f / "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        ],
        "has no words",
    ),
    "own code": (
        lambda f: edit_json(
            f / "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["a.C", None]}
        ),
        "needs code of its own",
    ),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: holds no JSON"),
    "a torn configuration": (lambda f: (f / "config.json").write_text("{"), "config.json: no JSON"),
}


@pytest.mark.parametrize("name", SPOILT_TOKENIZERS)
def test_a_spoilt_tokenizer_is_named(name, folder):
    spoil, told = SPOILT_TOKENIZERS[name]
    spoil(folder)
    with pytest.raises((ValueError, OSError)) as error:
        load_tokenizer(folder)
    assert told in str(error.value) and str(folder) in str(error.value)
    assert "trust_remote_code" not in str(error.value)


def test_a_short_name_is_told_though_its_letter_stands_in_the_reason(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    monkeypatch.chdir(folder.rename(folder.with_name("m")).parent)
    with pytest.raises(ValueError, match=r"^m: its tokenizer cannot be loaded"):
        load_tokenizer("m")


def test_short_names_of_types_are_understood_and_others_are_told(folder, tmp_path, capsys):
    assert torch_dtype("bf16") is torch.bfloat16 and torch_dtype("auto") == "auto"
    assert load_weights(folder, dtype="fp16").dtype is torch.float16
    for name in ("float99", "int8", "bool", "Tensor", "float8_e4m3fn", ""):
        with pytest.raises(ValueError, match="use one of float32, bfloat16"):
            torch_dtype(name)
    for command in ("harvest", "evaluate", "capability", "filter", "export"):
        with pytest.raises(SystemExit):
            cli.main([command, "--dtype", "float99"])
        assert "choose from auto, float32" in capsys.readouterr().err.replace("'", "")
    export = ["export", "--model", str(folder), "--output_dir", str(tmp_path / "half"), "--dtype", "bf16"]
    assert cli.main(export) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("record, template", [({"prompt_template": "short"}, "short"), (None, "alpaca")])
def test_the_template_of_a_model_on_the_hub_is_that_of_its_folder(record, template, folder, hub, capsys):
    if record is not None:
        (folder / "tasft.json").write_text(json.dumps(record))
    args = Namespace(prompt_template=None, chat_template_kwargs=None, model_revision=COMMIT)
    tokenizer = load_tokenizer(folder)
    assert (
        template_of(args, str(folder), tokenizer)
        == template_of(args, hub(folder, "base", COMMIT), tokenizer)
        == template
    )
