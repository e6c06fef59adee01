"""Conversations in every form people write come out as messages; what can't is refused by file and row."""

import json

import pytest
from datasets import Dataset, Features, List, Value
from datasets.features import LargeList

from tasft_lib.records import data, forms, sources


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def call(**arguments) -> list[dict]:
    return [{"id": "1", "type": "function", "function": {"name": "blorp", "arguments": arguments}}]


TOOLS = [{"type": "function", "function": {"name": "blorp", "parameters": {"zib": {"type": "string"}}}}]


@pytest.fixture
def read(tmp_path):
    """The rows of a .jsonl file as training rows, or the message that refuses them."""

    def run(*rows: dict, **options) -> list[dict] | str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            return forms.read_training_rows(path, label=True, **options).to_list()
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: ") and "\n" not in message and "; " in message, message
            return message.removeprefix(f"{path}: ")

    return run


def test_conversations_of_every_form_end_in_the_completion(read):
    wanted = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "label": True}
    turns = [*wanted["prompt"], *wanted["completion"]]
    speakers = {"user": "human", "assistant": "gpt"}
    share_gpt = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]
    lists = {"role": [turn["role"] for turn in turns], "content": [turn["content"] for turn in turns]}
    in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    for column, value in [
        ("messages", turns),
        ("conversations", share_gpt),
        ("conversations", turns),
        ("messages", lists),
        ("messages", in_parts),
    ]:
        assert read({column: value, "prompt_id": "7"}) == [wanted]
    assert read({"prompt": "a", "messages": turns}) == [wanted], "a prompt beside whole conversations, as UltraChat's"


def test_keys_that_hold_nothing_go_and_others_stay_with_their_message(read):
    plain = {"prompt": [user("a")], "completion": [assistant("b")]}
    extra = {"prompt": [user("a", name="zib")], "completion": [assistant("b", weight=1, tool_calls=None)]}
    assert read(plain, extra) == [
        plain | {"label": True},
        {"prompt": [user("a", name="zib")], "completion": [assistant("b", weight=1)], "label": True},
    ]


def test_calls_of_tools_are_answers_and_keep_their_arguments(read):
    rows = [
        {"messages": [user("a"), assistant(None, tool_calls=call(zib="x"))], "tools": TOOLS},
        {"messages": [user("a"), {"role": "assistant", "tool_calls": call(norl=3)}], "tools": TOOLS},
        {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    first, second, third = read(*rows)
    assert first["completion"] == [assistant(None, tool_calls=call(zib="x"))]
    assert second["completion"] == [assistant(None, tool_calls=call(norl=3))]
    assert first["tools"] == second["tools"] == TOOLS and third["tools"] is None
    assert (first["chat_template_kwargs"], third["chat_template_kwargs"]) == ({}, {"enable_thinking": False})
    assert read(rows[0] | {"tools": json.dumps(TOOLS)}) == read(rows[0]), "tools written as text, as TRL reads them"
    calls = forms.to_training_rows(Dataset.from_list(rows[:1] * 2), label=True, source="f")
    assert data.deduplicate(calls)[1] == 1, "the same call"
    texts = Dataset.from_list([{"messages": row["messages"]} for row in rows[:2]])  # Arrow fills in nulls
    assert data.deduplicate(forms.to_training_rows(texts, label=True, source="f"))[1] == 0, "other arguments"
    assert forms.to_training_rows(texts, label=True, source="f")["completion"][1] == second["completion"]


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_messages_with_their_own_keys_survive_saving(tmp_path, suffix):
    rows = [{"messages": [user("a"), assistant(None, tool_calls=call(**{name: 1}))]} for name in ("zib", "norl")]
    saved = Dataset.from_list(rows, on_mixed_types="use_json")
    saved.to_parquet(tmp_path / "rows.parquet") if suffix else saved.save_to_disk(tmp_path / "rows")
    read = forms.read_training_rows(tmp_path / f"rows{suffix}", label=True)
    assert read["completion"][1] == [assistant(None, tool_calls=call(norl=1))]


@pytest.mark.parametrize("text", ["string", "large_string", "string_view"])
@pytest.mark.parametrize("kind", [List, LargeList])
def test_any_text_and_list_of_arrow_is_read(text, kind):
    row = {"prompt": [user("a")], "completion": [assistant("b")]}
    messages = kind({"role": Value(text), "content": Value(text)})
    rows = Dataset.from_list([row], features=Features(dict.fromkeys(row, messages)))
    assert forms.to_training_rows(rows, label=False, source="f").to_list() == [row | {"label": False}]
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}, features=Features(dict.fromkeys(row, Value(text))))
    assert forms.to_training_rows(rows.with_format("numpy"), label=True, source="f")["prompt"][:] == ["a"]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": [user("a"), assistant("b"), user("c")]}, "messages ends with a message of the user"),
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is empty"),
        ({"messages": [assistant("b")]}, "messages holds the assistant's answer alone"),
        ({"messages": [user("a"), assistant(" ")]}, "messages is empty; fill it, remove the row or set drop_empty"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "an answer of weight 0"),
        ({"messages": [{"from": "zib norl", "value": "a"}, assistant("b")]}, "messages has a message from … ["),
        ({"messages": [{"content": "a"}, assistant("b")]}, "messages has a message whose role is None"),
        ({"messages": [user(3), assistant("b")]}, "messages has a message whose content is 3"),
        ({"messages": [user([{"type": "image_url"}]), assistant("b")]}, "a part of image_url; training is on text"),
        ({"messages": [user("a"), assistant(None, tool_calls="zib")]}, "whose tool_calls are no list of objects"),
        ({"messages": ["a b", "c d"]}, "messages holds the text … ["),
        ({"messages": [user("a"), assistant("b")], "tools": "zib"}, "tools is the text … ["),
        ({"messages": [user("a"), assistant("b")], "chat_template_kwargs": [1]}, "chat_template_kwargs is a list"),
    ],
)
def test_flawed_conversations_are_refused_by_row(read, row, expected):
    sound = {"messages": [user("q"), assistant("r")]}
    message = read(sound, row)
    assert message.startswith("row 2: ") and expected in message


def test_as_many_roles_as_contents(read):
    message = read({"messages": {"role": ["user"], "content": ["a", "b"]}})
    assert message == "row 1: messages has not as many roles as contents; write {role, content} messages"


def test_messages_written_as_text_are_refused(read, tmp_path):
    for text in (json.dumps([user("a")]), str([user("a")]), ' [ {"content": "a"'):
        message = read({"prompt": text, "completion": "b"})
        assert message.startswith("row 1: prompt is messages written as text") and "jsonl" in message


def test_template_chat_makes_messages_of_every_text(read):
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    assert read(alpaca, template="chat") == [
        {"prompt": [user("a\n\nb")], "completion": [assistant("c")], "label": True}
    ]
    text = {"prompt": "a", "completion": "c"}
    assert read(text, template="chat") == [{"prompt": [user("a")], "completion": [assistant("c")], "label": True}]


def test_both_sides_of_a_mix_are_brought_to_one_form_or_refused_by_their_files():
    options = {"with_place": True}
    text = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    plain = Dataset.from_list([{"prompt": [user("a")], "completion": [assistant("b")]}])
    tools = Dataset.from_list([{"messages": [user("c"), assistant(None, tool_calls=call(zib=1))], "tools": TOOLS}])
    unsafe = forms.to_training_rows(text, label=False, source="text.json", **options)
    benign = forms.to_training_rows(tools, label=True, source="chat.json", **options)
    with pytest.raises(ValueError, match=r"^text.json: has text, chat.json messages, .* set prompt_template to chat"):
        data.draw(benign, unsafe, seed=0, source="both")
    for other in (
        forms.to_training_rows(plain, label=False, source="plain.json", **options),
        forms.to_training_rows(text, label=False, source="text.json", template="chat", **options),
    ):
        for sides in ((benign, other), (other, benign)):
            by_tools = {str(row["tools"]): row for row in data.mix(*sides, seed=0).to_list()}
            assert by_tools["None"]["prompt"] == [user("a")] and by_tools["None"].get("chat_template_kwargs", {}) == {}
            assert by_tools[str(TOOLS)]["completion"] == [assistant(None, tool_calls=call(zib=1))]
    assert len(data.mix(benign, unsafe, n_unsafe=0, seed=0)) == 1, "a side of no row has no form"


def test_prompts_in_messages_are_read_where_they_are_one_turn(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": [user("a?")]}, {"prompt": [user("b?", name=None)]}]))
    assert forms.read_prompts(path) == ["a?", "b?"]
    path.write_text(json.dumps([{"prompt": [user("a?"), assistant("b")]}]))
    with pytest.raises(ValueError, match="row 1: the prompt has 2 turns"):
        forms.read_prompts(path)
    path.write_text('["a", "\\ud83d"]')
    with pytest.raises(ValueError, match="row 2: the prompt holds half a character"):
        forms.read_prompts(path)


def test_rows_are_read_by_split_and_no_choice_is_ignored(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    rows.save_to_disk(tmp_path / "plain")
    (tmp_path / "rows.json").write_text('[{"prompt": "a"}]')
    assert len(sources.read_rows(tmp_path / "plain", split="train")) == 1
    for source in ("plain", "rows.json"):
        for option in ({"split": "test"}, {"name": "small"}, {"revision": "0a1b"}):
            with pytest.raises(ValueError, match=r"has no (split|configuration|revision) to choose .*; leave it out"):
                sources.read_rows(tmp_path / source, **option)
