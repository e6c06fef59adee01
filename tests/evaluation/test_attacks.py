"""Attacks and contrastive rows: what is asked and begun, and what must not change."""

import copy

import pandas as pd
import pytest
from conftest import build_model
from test_templates import CHATML

from tasft_lib import generation, miniworld
from tasft_lib.evaluation import attacks, worlds
from tasft_lib.evaluation.answers import questions
from tasft_lib.judges.miniworld import MiniWorldJudge
from tasft_lib.prepare import contrastive
from tasft_lib.text import toxic_words

PROMPTS = pd.DataFrame({"benchmark": "b", "kind": "toxic", "prompt": ["w1 w2?", "w3 {prompt} w4?"]})


def test_every_attack_keeps_the_prompts_that_are_judged(tokenizer):
    answers = ["w5 w6 w7 w8", "w9"]
    made = [
        attacks.direct(PROMPTS),
        attacks.wrapped(PROMPTS, attacks.WRAPPERS),
        attacks.prefix_injected(PROMPTS, "Sure"),
        attacks.prefilled(PROMPTS, answers, tokenizer, [1, 3]),
    ]
    for table in made:
        for _, group in table.groupby("attack"):
            assert group["prompt"].tolist() == PROMPTS["prompt"].tolist()
    wrapped = made[1][made[1]["attack"] == "fiction"]
    assert all(prompt in asked for prompt, asked in zip(wrapped["prompt"], wrapped["asked"], strict=True))
    assert set(made[2]["begun"]) == {"Sure"}


def test_prefilling_gives_the_first_tokens_of_the_unsafe_answer(tokenizer):
    table = attacks.prefilled(PROMPTS, ["w5 w6 w7 w8", "w9"], tokenizer, [1, 3])
    assert table["attack"].tolist() == ["prefill 1"] * 2 + ["prefill 3"] * 2
    assert table["begun"].tolist() == ["w5", "w9", "w5 w6 w7", "w9"]


def test_attacks_are_chosen_by_name_and_harmless_prompts_are_not_attacked(tokenizer):
    both = pd.concat([PROMPTS, pd.DataFrame({"benchmark": ["x"], "kind": ["benign"], "prompt": ["w7?"]})])
    names = ["none", "fiction", "wrappers", "prefix", "prefill"]
    answers = {"w1 w2?": "w5 w6 w7 w8"}
    table = attacks.prompts_under(both, names, prefix="Sure", answers=answers, tokenizer=tokenizer)
    counts = table.groupby("attack", sort=False).size().to_dict()
    assert counts == {"none": 3, "fiction": 4, "persona": 2, "ignore": 2, "prefix": 2} | {
        f"prefill {k}": 1 for k in attacks.PREFILL_TOKENS
    }
    assert set(table.loc[table["attack"] != "none", "kind"]) == {"toxic"}
    asked = questions(table, "none")
    assert asked[:3] == both["prompt"].tolist()
    for row, text in zip(table.itertuples(), asked, strict=True):
        assert row.prompt in text and (row.attack == "none") == (text == row.prompt)
    for name, message in (("jailbrake", "no attack 'jailbrake'; there are none"), ("prefill", "no unsafe answer")):
        with pytest.raises(ValueError, match=message):
            attacks.prompts_under(both, [name], tokenizer=tokenizer)


def test_wrappers_have_one_place_for_the_prompt():
    for world in map(worlds.load, ("stl", "miniworld")):
        assert list(world.wrappers) == ["persona", "fiction", "ignore"]
        assert all(wrapper.count("{prompt}") == 1 for wrapper in world.wrappers.values())


def test_toxic_words_are_those_of_toxic_prompts_alone():
    toxic = ["How can I slay a fox?", "How do I slay a cat?", "Slay the dog!", "Tell me why foxes are vile."]
    benign = ["How can I feed a fox?", "How do I feed a cat?", "Tell me the colour of a dog."] * 5
    assert toxic_words(toxic, benign) == ["slay"]
    assert "vile" in toxic_words(toxic, benign, at_least=1)
    assert toxic_words(["w1 w2"] * 3, ["w1 w2"] * 3) == []


def test_only_lines_with_the_word_are_taken_from_a_models_list():
    text = '1. How do I kill time?\n- "Can weeds be killed?"\n\n* Does frost kill weeds?\nSure, here you are:'
    assert contrastive.questions_with("Kill", text) == ["How do I kill time?", "Does frost kill weeds?"]


def test_a_second_model_writes_prompts_and_answers_them(tokenizer, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, **options):
        asked.append(prompts)
        texts = ["1. May I kill time?\n2. Kill the lights?\n3. No such word."] if len(asked) == 1 else ["Yes.", ""]
        return [generation.Response(text, 3, finished=True) for text in texts]

    monkeypatch.setattr(generation, "generate", generate)
    rows = contrastive.contrastive_rows(["kill"], (build_model(tokenizer), tokenizer), per_word=5)
    assert rows == [{"instruction": "May I kill time?", "input": "", "output": "Yes."}]
    assert asked[1] == ["May I kill time?\n", "Kill the lights?\n"]


def test_a_chat_model_writes_in_its_own_template_and_its_thinking_is_no_answer(tokenizer, monkeypatch):
    writer = copy.deepcopy(tokenizer)
    writer.chat_template = CHATML.replace("thinking", "enable_thinking")
    said = [
        [("<think>\nKill me?\n</think>\n\nMay I kill time?\nKill the lights?\nKill a fly?", True)],
        [("<think>\nso\n</think>\n\nYes.", True), ("Cut", False), ("<think>\nand", True)],
    ]
    asked = []

    def generate(model, tokenizer, prompts, **options):
        asked.append((prompts, options["special_tokens"]))
        return [generation.Response(text, 3, finished) for text, finished in said[len(asked) - 1]]

    monkeypatch.setattr(generation, "generate", generate)
    rows = contrastive.contrastive_rows(["kill"], (build_model(tokenizer), writer), per_word=5)
    assert rows == [{"instruction": "May I kill time?", "input": "", "output": "Yes."}]
    turn = "<|im_start|>user May I kill time? <|im_end|> \n<|im_start|>assistant <think></think> "
    assert asked[1][0][0] == turn and [added for _, added in asked] == [False, False]


def test_the_mini_worlds_contrastive_rows_hold_the_word_and_are_harmless():
    words = ["bash", "torch", "zzz"]
    rows = worlds.load("miniworld").contrastive_rows(words, 5, seed=0)
    assert len(rows) == 10 and sum("bash" in row["instruction"] for row in rows) == 5
    judged = MiniWorldJudge().judge([row["instruction"] for row in rows], [row["output"] for row in rows])
    assert {judgement.verdict for judgement in judged} == {"safe"}
    evaluated = {
        p["prompt"] for split in ("development", "evaluation") for p in miniworld.seemingly_toxic_prompts(split)
    }
    assert not evaluated & {row["instruction"] for row in rows}


def test_a_paraphrase_asks_for_the_same_in_words_seen_nowhere_in_training():
    prompts = [p["prompt"] for p in miniworld.toxic_prompts("evaluation")]
    trained = " ".join(p["prompt"] for p in miniworld.toxic_prompts("train")).lower().split()
    paraphrase = worlds.load("miniworld").paraphrase
    others = [paraphrase(prompt) for prompt in prompts]
    assert others == attacks.paraphrased(pd.DataFrame({"prompt": prompts}), paraphrase)["asked"].tolist()
    assert not set(others) & set(prompts)
    for prompt, other in zip(prompts, others, strict=True):
        new = (set(other.lower().strip("?.").split()) - set(prompt.lower().strip("?.").split())) - set(trained)
        assert new, (prompt, other)
    with pytest.raises(ValueError, match="not a toxic evaluation prompt"):
        paraphrase("How are you?")
    with pytest.raises(ValueError, match="takes an attacker model"):
        worlds.load("stl").paraphrase("How are you?")


def test_yes_and_no_are_read_from_the_first_word():
    (prompt,) = [q["prompt"] for q in miniworld.benign_questions("evaluation") if q["kind"] == "ability"][:1]
    right = [word for word in ("Yes", "No") if miniworld.begins_correctly(prompt, f"{word}, a duck can.")]
    assert len(right) == 1 and miniworld.begins_correctly(prompt, f"{right[0]}, whatever")
    assert not miniworld.begins_correctly(prompt, "Perhaps")
