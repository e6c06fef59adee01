"""Templates: ours and the tokenizer's own, where a turn ends, and what of an answer is thinking."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tasft_lib.records.templates import (
    ask,
    assistant_turn,
    chat_prompt,
    default_template,
    format_prompt,
    opens_thinking,
    read_turn,
    split_thinking,
    turn_ends,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }} <|im_end|> \n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% if thinking is defined and not thinking %}<think></think> "
    "{% endif %}{% endif %}"
)


@pytest.fixture
def chat(tokenizer):
    """The tests' tokenizer with a chat template whose turns end with a token that is not its EOS."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = CHATML
    return changed


def real_templates():
    folder = Path(next(iter(find_spec("trl").submodule_search_locations))) / "chat_templates"
    return {f.stem: f for f in sorted(folder.glob("*.jinja")) if not f.stem.endswith("_training")}


def with_template(tokenizer, name):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = real_templates()[name].read_text()
    changed.bos_token = "<s>"
    return changed


def test_prompts_stand_in_the_template_asked_for(chat):
    assert ask(["w1"], "short") == [format_prompt("w1", template="short")]
    assert ask(["w1"], "none", begun=["w2"]) == ["w1w2"]
    asked = "<|im_start|>user {} <|im_end|> \n<|im_start|>assistant "
    assert ask(["w1", "w2"], "chat", chat) == [asked.format("w1"), asked.format("w2")]
    conversation = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1"}]
    assert chat_prompt(chat, conversation).startswith("<|im_start|>system w5 <|im_end|> \n<|im_start|>user w1")
    (switched,) = ask(["w1"], "chat", chat, chat_template_kwargs={"thinking": False})
    assert switched.endswith("assistant <think></think> ")


def test_a_template_that_is_missing_or_refuses_is_one_line(tokenizer, chat):
    with pytest.raises(ValueError, match="no chat template; use prompt_template alpaca, short or none"):
        ask(["w1"], "chat", tokenizer)
    chat.chat_template = "{{ raise_exception('a system turn is needed') }}"
    with pytest.raises(ValueError, match="a system turn is needed"):
        ask(["w1"], "chat", chat)
    for broken in ("{% for %}", "{{ messages[0].content.text.quorb }}"):
        chat.chat_template = broken
        with pytest.raises(ValueError, match="can't read the messages") as caught:
            ask(["glimjack"], "chat", chat)
        assert "glimjack" not in str(caught.value) and "\n" not in str(caught.value)


def test_the_template_a_model_was_tuned_with_is_its_own(tmp_path, tokenizer, chat):
    assert default_template(tmp_path, tokenizer) == "alpaca"
    assert default_template(tmp_path, chat) == "chat" == default_template("owner/hub", chat)
    for record, expected in [
        ({"prompt_template": "short"}, "short"),
        ({"prompt_template": "chat"}, "chat"),
        ({"prompt_template": "unheard of"}, "chat"),
        ([], "chat"),
    ]:
        (tmp_path / "tasft.json").write_text(json.dumps(record))
        assert default_template(tmp_path, chat) == expected
    (tmp_path / "tasft.json").write_text("{")
    assert default_template(tmp_path, chat) == "chat"


def test_a_turn_ends_with_the_templates_own_token(tokenizer, chat):
    assert turn_ends(chat, assistant_turn(chat)) == [chat.convert_tokens_to_ids("<|im_end|>")]
    assert turn_ends(tokenizer, assistant_turn(tokenizer)) == []
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert turn_ends(chat, assistant_turn(chat)) == [], "a line break ends no answer"


@pytest.mark.parametrize("name", real_templates())
def test_what_real_templates_say_of_a_turn_is_understood(name, tokenizer):
    real = with_template(tokenizer, name)
    (asked,) = ask(["w1 w2"], "chat", real)
    assert "w1 w2" in asked
    turn = assistant_turn(real)
    if turn is None:  # of models that see: messages are lists of parts
        return
    (begun,) = ask(["w1 w2"], "chat", real, begun=["w3"])
    # An answer that has begun is an answer, whatever the template puts before one.
    assert begun.startswith(asked) and begun.endswith("w3") and not opens_thinking(begun.removesuffix("w3"))
    if turn.opening:
        real.add_special_tokens({"additional_special_tokens": marks(turn)})
        ids = [*real.encode(turn.opening), *real.encode("w4 w5"), *real.encode(turn.closing), *real.encode("w6 w7")]
        thinking, answer, ended = split_thinking(read_turn(real, ids, turn))
        assert (thinking.split(), answer.split(), ended) == (["w4", "w5"], ["w6", "w7"], True)
        thinking, answer, ended = split_thinking(read_turn(real, ids[:-4], turn))
        assert not answer and not ended and "w4" in thinking


def marks(turn):
    """The markers' own words, as special tokens."""
    return sorted({turn.opening.strip(), turn.closing.strip()})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("an answer", ("", "an answer", True)),
        ("  an answer\n", ("", "  an answer\n", True)),  # untouched
        ("<think>\nhm\n</think>\n\nan answer", ("hm", "an answer", True)),
        ("<think>hm", ("hm", "", False)),
        ("<think>\n", ("", "", False)),
        ("<think>hm</think>", ("hm", "", True)),
        ("<think></think>an answer", ("", "an answer", True)),
        ("hm\n</think>\nan answer", ("hm", "an answer", True)),  # the opening stood in the prompt
        ("<think>a</think>\none\n<think>b</think>\ntwo", ("a\n\nb", "one\n\ntwo", True)),
        ("<think>a</think>\none\n<think>b", ("a\n\nb", "one", True)),  # what was said counts
        ("<think>a</think> b </think> one", ("a\n\nb", "one", True)),
        ("In HTML <think> is no tag", ("", "In HTML <think> is no tag", True)),
        ("", ("", "", True)),
    ],
)
def test_thinking_and_answer(text, expected):
    assert split_thinking(text) == expected
