"""One forward pass: activations are the model's own, whatever the batch."""

import numpy as np
import pytest
import torch
from conftest import WORDS, build_model, make_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from tasft_lib.saft import activations as module
from tasft_lib.saft.activations import POOLINGS, activations, n_layers, token_lengths
from tasft_lib.saft.filter import SAFTFitter

CHAT = (
    "{% for m in messages %}{{ m['role'] | replace('user', 'w1') | replace('assistant', 'w2') }} {{ m['content'] }} "
    "<eos> {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)


def llama(tokenizer):
    return build_model(tokenizer, num_hidden_layers=3).eval()


def gpt2(tokenizer):
    torch.manual_seed(1)
    size = dict(n_embd=32, n_layer=3, n_head=2, n_positions=128, initializer_range=0.3)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **ends)).eval()


def peft(tokenizer):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(tokenizer), lora).eval()


MODELS = (llama, gpt2, peft)


def by_hand(model, tokenizer, rows, layers, poolings, max_length=None):
    """Row by row, from the layers' own outputs."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"][:max_length]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        values = []
        for layer in layers:
            for pooling in poolings:
                start = len(ids) - 1 if pooling == "last" else min(len(prompt), len(ids) - 1)
                values.append(states[layer][0, start:].mean(0).numpy())
        found.append(values)
    return np.array(found)


@pytest.mark.parametrize("make", MODELS)
def test_they_are_the_models_hidden_states_in_the_order_of_the_rows(make, tokenizer):
    model, rows = make(tokenizer), make_rows(21)
    found = activations(model, tokenizer, rows, layers=[2, 1], poolings=POOLINGS, batch_size=4, progress=False)
    assert found.shape == (21, 4, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(model, tokenizer, rows, [2, 1], POOLINGS), atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_the_last_layer_is_taken_before_the_final_norm(make, tokenizer):
    model, rows = make(tokenizer), make_rows(5)
    assert n_layers(model) == 3
    found = activations(model, tokenizer, rows, layers=[3], progress=False)[:, 0]
    normed = by_hand(model, tokenizer, rows, [3], ("last",))[:, 0]  # Hugging Face puts its norm in the last one
    decoder = model.get_decoder()
    norm = decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm
    with torch.no_grad():
        np.testing.assert_allclose(norm(torch.tensor(found)).numpy(), normed, atol=1e-5)
    assert abs(found - normed).max() > 1e-2


def test_the_batch_size_does_not_matter(tokenizer):
    model, rows = llama(tokenizer), make_rows(70)
    first = activations(model, tokenizer, rows, layers=[2], poolings=POOLINGS, batch_size=1, progress=False)
    scores = SAFTFitter(2).update(first[:, 0]).filter.scores(first[:, 0])
    for batch_size in (3, 16, 100):
        other = activations(
            model, tokenizer, rows, layers=[2], poolings=POOLINGS, batch_size=batch_size, progress=False
        )
        np.testing.assert_allclose(other, first, atol=1e-5 * abs(first).max())
        found = SAFTFitter(2).update(other[:, 0]).filter.scores(other[:, 0])
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5 * scores.max())


@pytest.mark.parametrize("max_length", [5, 12])
def test_long_rows_are_cut_and_short_prompts_keep_their_place(max_length, tokenizer):
    model, rows = llama(tokenizer), make_rows(20)
    settings = dict(layers=[2], poolings=POOLINGS, max_length=max_length, batch_size=4, progress=False)
    found = activations(model, tokenizer, rows, **settings)
    np.testing.assert_allclose(found, by_hand(model, tokenizer, rows, [2], POOLINGS, max_length), atol=1e-5)
    lengths = token_lengths(tokenizer, rows)
    assert lengths.tolist() == [len((r["prompt"] + r["completion"]).split()) for r in rows]
    full = [i for i, row in enumerate(rows) if len(row["prompt"].split()) >= max_length]
    assert bool(full) == (max_length == 5)
    assert (found[full, 0] == found[full, 1]).all() and np.isfinite(found).all()


def test_rows_longer_than_the_context_are_cut_there(tokenizer):
    model = build_model(tokenizer, max_position_embeddings=16)
    rows = Dataset.from_list([{"prompt": "w1 ", "completion": " ".join(WORDS[:40])}])
    found = activations(model, tokenizer, rows, layers=[1], progress=False)
    np.testing.assert_allclose(found, by_hand(model, tokenizer, rows, [1], ("last",), 16), atol=1e-5)


def test_bfloat16_models_give_float32_activations(tokenizer):
    rows = make_rows(8)
    exact = activations(llama(tokenizer), tokenizer, rows, layers=[2], poolings=POOLINGS, progress=False)
    rounded = activations(llama(tokenizer).bfloat16(), tokenizer, rows, layers=[2], poolings=POOLINGS, progress=False)
    assert rounded.dtype == np.float32
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05


def test_chat_rows_are_read_in_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    model = llama(tokenizer)
    pairs = [("w5 w6", "w7 w8 w9"), ("w10", "w11 w12")]
    chat = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
         for q, a in pairs]
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": f"w1 {q} <eos> w2 ", "completion": f"{a} <eos> "} for q, a in pairs])
    for function in (
        lambda rows: activations(model, tokenizer, rows, layers=[1, 2], poolings=POOLINGS, progress=False),
        lambda rows: token_lengths(tokenizer, rows),
    ):
        # The text ends in the end token already, but for a space.
        closed = text.map(lambda row: {"completion": row["completion"].strip()})
        np.testing.assert_allclose(function(chat), function(closed), rtol=1e-6)


@pytest.mark.parametrize("at_layer", [1, 2])
def test_no_hook_is_left_behind_and_a_model_in_training_is_again(at_layer, tokenizer, monkeypatch):
    model, rows = llama(tokenizer).train(), make_rows(5)
    hooks = lambda: sum(len(m._forward_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    activations(model, tokenizer, rows, layers=[at_layer], progress=False)
    assert hooks() == before and model.training
    monkeypatch.setattr(module, "_pool", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        activations(model, tokenizer, rows, layers=[at_layer], progress=False)
    assert hooks() == before and model.training


def test_no_layer_is_run_that_nobody_asked_for(tokenizer):
    model, called = llama(tokenizer), []
    for i, block in enumerate(model.model.layers, start=1):
        block.register_forward_pre_hook(lambda *_, i=i: called.append(i))
    activations(model, tokenizer, make_rows(4), layers=[1, 2], progress=False)
    assert called == [1, 2]


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    model, rows = llama(tokenizer), make_rows(40)
    monkeypatch.setattr(module, "WINDOW", 2)
    settings = dict(layers=[1, 2], batch_size=3, progress=False)
    whole = tmp_path / "deep" / "whole"
    expected = activations(model, tokenizer, rows, **settings, file=whole)
    assert (expected == activations(model, tokenizer, rows, **settings)).all()
    row_bytes = 2 * 32 * 4
    for size in (0, 5, row_bytes * 6, row_bytes * 13 + 7, row_bytes * 39, row_bytes * 40 - 1):
        torn = tmp_path / f"torn{size}"
        torn.write_bytes(whole.read_bytes()[:size])
        encoded = []
        original = module.encode
        monkeypatch.setattr(module, "encode", lambda *a, **k: encoded.append(a[2:4]) or original(*a, **k))  # noqa: B023
        activations(model, tokenizer, rows, **settings, file=torn)
        monkeypatch.setattr(module, "encode", original)
        assert torn.read_bytes() == whole.read_bytes(), size
        assert encoded[0][0] == size // row_bytes // 6 * 6, "finished windows are not made again"

    def forbidden(*_, **__):
        pytest.fail("a complete file is read, not made")

    monkeypatch.setattr(module, "encode", forbidden)
    again = activations(model, tokenizer, rows, **settings, file=whole)
    assert (again == expected).all() and not again.flags.writeable


def test_an_interrupted_run_leaves_whole_windows(tokenizer, tmp_path, monkeypatch):
    model, rows = llama(tokenizer), make_rows(30)
    monkeypatch.setattr(module, "WINDOW", 2)
    settings = dict(layers=[1], batch_size=4, progress=False)
    calls, original = [], module._append

    def kill(file, part):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(part))
        original(file, part)

    monkeypatch.setattr(module, "_append", kill)
    with pytest.raises(KeyboardInterrupt):
        activations(model, tokenizer, rows, **settings, file=tmp_path / "a")
    monkeypatch.setattr(module, "_append", original)
    found = activations(model, tokenizer, rows, **settings, file=tmp_path / "a")
    assert (found == activations(model, tokenizer, rows, **settings)).all() and calls == [8, 8]


def test_wrong_settings_are_named(tokenizer):
    model, rows = llama(tokenizer), make_rows(3)
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match=f"layer {layer}: the model has the layers 1 to 3"):
            activations(model, tokenizer, rows, layers=[1, layer])
    with pytest.raises(ValueError, match="pooling 'max' is none of last, mean"):
        activations(model, tokenizer, rows, layers=[1], poolings=("max",))
    rows = Dataset.from_list([{"prompt": "w1 ", "completion": "w2"}, {"prompt": "\u2003", "completion": "\u2003"}])
    with pytest.raises(ValueError, match="row 2: the tokenizer makes no token"):
        activations(model, tokenizer, rows, layers=[1], progress=False)
    assert activations(model, tokenizer, rows.select([]), layers=[1], progress=False).shape == (0, 1, 32)
