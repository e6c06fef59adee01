"""Generation: batching, padding and the checkpoint's own defaults must not change an answer."""

import copy

import pytest
import torch
from conftest import WORDS, build_model
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasft_lib.generation import (
    Decoding,
    Response,
    check_prompts,
    generate,
)

GREEDY_24 = Decoding(max_new_tokens=24)
SAMPLED = Decoding(max_new_tokens=12, do_sample=True, seed=3)


@pytest.fixture
def model(tokenizer):
    """In float64, so that batches of different shape round alike and greedy choices can be compared exactly."""
    return build_model(tokenizer).double()


@pytest.fixture
def prompts():
    """Lengths from 1 to 40 words, not in order."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 40, 1, 17, 2, 29, 3, 3, 11, 23, 8]
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def one_by_one(model, tokenizer, prompts, max_new_tokens):
    """Greedy decoding written out: one prompt, no padding, no cache, one full forward pass per token."""
    responses = []
    for prompt in prompts:
        ids, start = tokenizer(prompt)["input_ids"], len(tokenizer(prompt)["input_ids"])
        finished = False
        while len(ids) - start < max_new_tokens and not finished:
            with torch.no_grad():
                token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            finished = token == tokenizer.eos_token_id
            ids = ids if finished else [*ids, token]
        text = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        responses.append(Response(text=text, n_tokens=len(ids) - start, finished=finished))
    return responses


def with_eos(model, tokenizer, prompts):
    """The tokenizer with an EOS that this model says early in some answers and never in others."""
    said = [r.text.split() for r in one_by_one(model.eval(), tokenizer, prompts, 24)]
    share = {word: sum(word in words[:20] for words in said) / len(said) for word in WORDS}
    eos = min(WORDS, key=lambda word: abs(share[word] - 0.5))
    assert 0.1 < share[eos] < 0.9
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = eos
    model.generation_config.eos_token_id = None
    return changed


@pytest.mark.parametrize("batch_size", [1, 3, 4, 32])
def test_greedy_is_the_argmax_of_each_prompt_alone(model, tokenizer, prompts, batch_size):
    tokenizer = with_eos(model, tokenizer, prompts)
    expected = one_by_one(model, tokenizer, prompts, 24)
    assert {r.finished for r in expected} == {True, False}
    assert len({r.text for r in expected}) > 5
    assert generate(model, tokenizer, prompts, decoding=GREEDY_24, batch_size=batch_size) == expected


def test_an_answer_may_be_cut_off_and_says_so(model, tokenizer, prompts):
    whole = one_by_one(model.eval(), tokenizer, prompts, 24)
    cut = generate(model, tokenizer, prompts, decoding=Decoding(max_new_tokens=5))
    for short, long in zip(cut, whole, strict=True):
        assert long.text.startswith(short.text)
        assert short.n_tokens == min(5, long.n_tokens)
        assert short.finished == (long.finished and long.n_tokens < 5)


def test_eos_tokens_of_the_checkpoint_end_an_answer_too(model, tokenizer, prompts):
    other = with_eos(model, tokenizer, prompts)
    assert other.eos_token_id != tokenizer.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other.eos_token_id]
    ended = generate(model, tokenizer, prompts, decoding=GREEDY_24)
    assert any(r.finished for r in ended)
    for response in ended:
        assert other.eos_token not in response.text.split()


def test_defaults_of_the_checkpoint_do_not_leak(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, decoding=GREEDY_24)
    sampled = generate(model, tokenizer, prompts, decoding=SAMPLED)
    checkpoint = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        top_k=2,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        min_new_tokens=20,
        num_beams=3,
        max_length=9,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config = checkpoint
    assert generate(model, tokenizer, prompts, decoding=GREEDY_24) == expected
    assert generate(model, tokenizer, prompts, decoding=SAMPLED) == sampled
    assert model.generation_config is checkpoint


def test_beams_find_likelier_answers_than_greedy(model, tokenizer, prompts):
    def log_probability(prompt, response):
        ids, start = tokenizer(f"{prompt} {response.text}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(ids[start:])[:, None]).sum())

    # Without EOS all answers are equally long and their sums comparable.
    tokenizer = copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    greedy = generate(model, tokenizer, prompts, decoding=Decoding(max_new_tokens=6))
    beams = generate(model, tokenizer, prompts, decoding=Decoding(max_new_tokens=6, num_beams=4), batch_size=3)
    gains = [log_probability(p, b) - log_probability(p, g) for p, b, g in zip(prompts, beams, greedy, strict=True)]
    assert sum(gains) > 0.5
    assert not any(r.finished for r in beams)


def test_beam_answers_end_with_eos(model, tokenizer, prompts):
    tokenizer = with_eos(model, tokenizer, prompts)
    responses = generate(model, tokenizer, prompts, decoding=Decoding(max_new_tokens=24, num_beams=4))
    assert any(r.finished for r in responses)
    for response in responses:
        assert tokenizer.eos_token not in response.text.split()
        assert response.finished or response.n_tokens == 24


def test_sampling_repeats_by_seed_and_leaves_the_global_state_alone(model, tokenizer, prompts):
    torch.manual_seed(7)
    expected_next = torch.rand(3)
    torch.manual_seed(7)
    first = generate(model, tokenizer, prompts, decoding=SAMPLED)
    assert torch.equal(torch.rand(3), expected_next)
    assert generate(model, tokenizer, prompts, decoding=SAMPLED) == first
    other = generate(model, tokenizer, prompts, decoding=Decoding(max_new_tokens=12, do_sample=True, seed=4))
    assert other != first


def test_sampling_follows_the_models_own_distribution(model, tokenizer):
    """No top-k cut and no other temperature: frequencies of the first token are its probabilities."""
    n = 4000
    with torch.no_grad():
        probabilities = model(torch.tensor([tokenizer("w1 w2 w3")["input_ids"]])).logits[0, -1].softmax(-1)
    sampling = Decoding(max_new_tokens=1, do_sample=True)
    responses = generate(model, tokenizer, ["w1 w2 w3"] * n, decoding=sampling, batch_size=n)
    counts = torch.zeros(len(tokenizer), dtype=torch.double)
    for response in responses:
        if response.text in WORDS:
            counts[tokenizer.convert_tokens_to_ids(response.text)] += 1
    words = torch.tensor([i for i in tokenizer.convert_tokens_to_ids(WORDS) if probabilities[i] * n >= 5])
    deviation = (counts / n - probabilities)[words] / (probabilities[words] / n).sqrt()
    assert deviation.abs().max() < 4
    # The default top-k of transformers would stop at 50.
    assert (counts > 0).sum() > 50
    cold = Decoding(max_new_tokens=12, do_sample=True, temperature=1e-4)
    assert generate(model, tokenizer, ["w1"], decoding=cold) == generate(
        model, tokenizer, ["w1"], decoding=Decoding(max_new_tokens=12)
    )


def test_tokenizer_without_pad_token_pads_with_eos_and_stays_as_it_was(model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, decoding=GREEDY_24)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token, bare.padding_side = None, "right"
    assert generate(model, bare, prompts, decoding=GREEDY_24, batch_size=4) == expected
    assert bare.pad_token is None and bare.padding_side == "right"


def test_tokenizer_without_pad_and_eos_is_refused(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        generate(model, bare, ["w1"])


def test_prompts_that_cannot_be_answered_are_named(model, tokenizer):
    fits = " ".join(["w1"] * 104)
    prompts = ["w1", fits, fits + " w2", "w3"]
    assert len(generate(model, tokenizer, prompts[:2], decoding=GREEDY_24)) == 2
    with pytest.raises(ValueError, match=r"^prompt 3 has 105 tokens, .*max_new_tokens=24 .* context of 128"):
        generate(model, tokenizer, prompts, decoding=GREEDY_24)
    with pytest.raises(ValueError, match=r"^prompt 2 is empty"):
        check_prompts(model, tokenizer, ["w1", ""], max_new_tokens=4)


def test_nothing_to_answer(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_a_model_in_training_stays_in_training(model, tokenizer, prompts):
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modes = [module.training for module in model.modules()]
    generation_config = model.generation_config

    def gradients():
        model.zero_grad()
        ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    generate(model, tokenizer, prompts, decoding=GREEDY_24)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing and model.config.use_cache is False
    assert model.generation_config is generation_config
    assert all(map(torch.equal, before, gradients()))


def test_a_failure_restores_the_model_too(model, tokenizer, monkeypatch):
    model.train()
    generation_config = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, ["w1"], decoding=GREEDY_24)
    assert model.training and model.generation_config is generation_config


def test_dropout_is_off(tokenizer, prompts):
    model = build_model(tokenizer, attention_dropout=0.5).double().train()
    trained = generate(model, tokenizer, prompts, decoding=GREEDY_24)
    assert generate(model.eval(), tokenizer, prompts, decoding=GREEDY_24) == trained


def test_peft_models_answer_with_their_adapter(model, tokenizer, prompts):
    base = generate(model, tokenizer, prompts, decoding=GREEDY_24)
    model.generation_config.repetition_penalty = 5.0
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]))
    peft_model.train()
    assert generate(peft_model, tokenizer, prompts, decoding=GREEDY_24) == base
    assert peft_model.training and peft_model.generation_config.repetition_penalty == 5.0

    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    adapted = generate(peft_model, tokenizer, prompts, decoding=GREEDY_24)
    assert adapted != base
    with peft_model.disable_adapter():
        assert generate(peft_model, tokenizer, prompts, decoding=GREEDY_24) == base
    merged = peft_model.merge_and_unload()
    assert generate(merged, tokenizer, prompts, decoding=GREEDY_24) == adapted


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_impossible_decoding_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Decoding(**wrong)


def test_pretrained_model_on_real_text(shared):
    path = shared / "models" / "TinyStories-656K"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    prompts = ["Once upon a time", "The little dog", "One day, Lily and her mother went to the park because", "A"]
    responses = generate(model, tokenizer, prompts, decoding=GREEDY_24, batch_size=4)
    assert responses == [
        generate(model, tokenizer, [prompt], decoding=GREEDY_24, batch_size=1)[0] for prompt in prompts
    ]
    assert "girl named Lily" in responses[0].text


def test_a_prompt_that_begins_with_bos_gets_no_second_one(model, tokenizer):
    bos = copy.deepcopy(tokenizer)
    bos.bos_token = "w0"
    bos._tokenizer.post_processor = processors.TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", bos.bos_token_id)]
    )
    assert bos("w1")["input_ids"] == bos("w0 w1", add_special_tokens=False)["input_ids"]
    with_and_without = generate(model, bos, ["w0 w1 w2", "w1 w2"], decoding=GREEDY_24)
    assert with_and_without[0] == with_and_without[1]


def test_a_prompt_in_a_chat_template_is_encoded_as_it_is(model, tokenizer):
    """Without BOS where the template writes none, as TRL trains it."""
    bos = copy.deepcopy(tokenizer)
    bos.bos_token = "w0"
    bos._tokenizer.post_processor = processors.TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", bos.bos_token_id)]
    )
    bare = generate(model, bos, ["w1 w2"], decoding=GREEDY_24, special_tokens=False)
    assert bare == generate(model, tokenizer, ["w1 w2"], decoding=GREEDY_24)
    assert bare != generate(model, bos, ["w1 w2"], decoding=GREEDY_24)


def test_the_end_of_a_turn_in_the_chat_template_ends_an_answer(model, tokenizer, prompts):
    said = with_eos(model, tokenizer, prompts).eos_token
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": [AddedToken(said, single_word=True, special=True)]})
    chat.chat_template = "{% for m in messages %}{{ m.content }} " + said + " \n{% endfor %}"
    plain = generate(model, tokenizer, prompts, decoding=GREEDY_24)
    for response, longer in zip(generate(model, chat, prompts, decoding=GREEDY_24), plain, strict=True):
        words = longer.text.split()
        assert response.text.split() == words[: words.index(said)] if said in words else response == longer
        assert response.finished == (said in words or longer.finished)


def test_thinking_that_the_prompt_has_begun_stands_in_the_answer(model, tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.add_tokens(["<think>"])
    model.resize_token_embeddings(len(thinking))
    plain, opened = generate(model, thinking, ["w1", "w1 <think> "], decoding=GREEDY_24)
    assert opened.text.startswith("<think>\n") and not plain.text.startswith("<think>")


def test_a_killed_run_goes_on_batch_by_batch_and_ends_the_same(model, tokenizer, prompts, tmp_path, monkeypatch):
    file, options = tmp_path / "answers.jsonl", {"decoding": Decoding(max_new_tokens=8), "batch_size": 2}
    whole = generate(model, tokenizer, prompts, **options)
    calls, original = [], model.generate

    def killed(**given):
        calls.append(len(given["input_ids"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(**given)

    monkeypatch.setattr(model, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, prompts, answers=file, **options)
    file.write_bytes(file.read_bytes()[:-9])  # a torn record: its batch is asked again, whole
    calls.clear()
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(0) or original(**given))
    assert generate(model, tokenizer, prompts, answers=file, **options) == whole and len(calls) == 4
    calls.clear()
    assert generate(model, tokenizer, prompts, answers=file, **options) == whole and not calls
    others = [f"{prompt} w1" for prompt in prompts]
    assert generate(model, tokenizer, others, answers=file, **options) != whole and calls
    with pytest.raises(ValueError, match="not kept batch by batch"):
        generate(model, tokenizer, prompts, decoding=SAMPLED, answers=file)


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=3), Decoding(max_new_tokens=3, do_sample=True)], ids=str)
def test_a_model_that_gives_nan_is_refused(decoding, model, tokenizer):
    """As one does in float16 whose activations are too large for it."""
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="the model gives NaN"):
        generate(model, tokenizer, ["w1 w2", "w3"], decoding=decoding)


def test_the_output_head_reads_contiguous_states_and_keeps_no_hook(model, tokenizer, prompts):
    read = []
    head = model.get_output_embeddings()

    def look(module, inputs, output):
        read.append(inputs[0].is_contiguous())

    head.register_forward_hook(look)
    generate(model, tokenizer, prompts, decoding=GREEDY_24)
    assert read and all(read)
    assert not head._forward_pre_hooks
