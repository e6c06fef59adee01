"""Conversations as lists of {role, content} messages, however people write them down."""

import json
import re
from typing import Any

from ..text import shown, shown_name

# ShareGPT's names of those who speak; a role of {role, content} messages is the chat template's to know.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
} | {role: role for role in ("user", "assistant", "system", "tool")}
_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def read(value: Any, *, by_arrow: bool = False) -> list[dict[str, Any]]:
    """One conversation as messages of `role`, `content` and whatever else they hold (`tool_calls`, `name` ...).

    The forms: {role, content} of OpenAI and TRL, {from, value} of ShareGPT, an object of lists as older data sets have
    it; a content in parts of text is joined. Keys that hold nothing go, but for a `content` of None.

    Args:
        by_arrow: whether Arrow may have filled in nulls inside of objects; they go too.

    Raises:
        ValueError: what is wrong, to follow a row's and a column's name.
    """
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) > 1:
            raise ValueError("has not as many roles as contents; write {role, content} messages")
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"is {shown(value)}; write text or a list of {{role, content}} messages")
    return [_message(message, by_arrow) for message in value]


def are_text(text: str) -> bool:
    """Whether a text is messages that were written as text, as CSV writers do."""
    return _AS_TEXT.match(text) is not None


def split(conversation: list[dict]) -> tuple[list[dict], list[dict]]:
    """(prompt, completion): the assistant's last turn is the completion. Raises `ValueError` as `read` does."""
    if not conversation:
        raise ValueError("is empty; fill it or remove the row")
    end = len(conversation)
    while end and conversation[end - 1]["role"] == "assistant":
        end -= 1
    if end == len(conversation):
        role = shown_name(conversation[-1]["role"])
        raise ValueError(f"ends with a message of the {role}; end it with the assistant's answer")
    if end == 0:
        raise ValueError("holds the assistant's answer alone; put the question before it")
    if any(message.get("weight") == 0 for message in conversation[end:]):
        raise ValueError("ends with an answer of weight 0, which is not to be learnt; remove the row")
    return conversation[:end], conversation[end:]


def of_text(text: str, role: str) -> list[dict[str, str]]:
    """A text as the one message of that role."""
    return [{"role": role, "content": text}]


def parts(conversation: list[dict]) -> list[str]:
    """What tells one conversation from another: roles, contents and calls of tools, in their order."""
    texts = []
    for message in conversation:
        texts += [message["role"], message["content"] or ""]
        if calls := message.get("tool_calls"):
            texts.append(json.dumps(calls, sort_keys=True))
    return texts


def is_empty(conversation: list[dict]) -> bool:
    """Whether no message holds anything but white space; a call of a tool is something."""
    return not any((m["content"] or "").strip() or m.get("tool_calls") for m in conversation)


def without_nulls(value: Any) -> Any:
    """A nested value without the keys that hold None."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _message(message: Any, by_arrow: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"holds {shown(message)}; write {{role, content}} messages")
    rest = {key: without_nulls(value) if by_arrow else value for key, value in message.items() if value is not None}
    if "role" in rest or "from" not in rest:
        role, content = rest.pop("role", None), rest.pop("content", None)
    else:
        speaker, content = rest.pop("from"), rest.pop("value", None)
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"has a message from {_shown_role(speaker)}; write one of {', '.join(_SPEAKERS)}")
    if not isinstance(role, str) or not role:
        raise ValueError(f"has a message whose role is {_shown_role(role)}; write user, assistant, system or tool")
    calls = rest.get("tool_calls", [])
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError("has a message whose tool_calls are no list of objects; write them as OpenAI does")
    return {"role": role, "content": _text(content)} | rest


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"has a message whose content is {shown(content)}; write text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"has a content with a part of {_shown_role(kind)}; training is on text alone")
    return "".join(part["text"] for part in content)


def _shown_role(role: Any) -> str:
    return shown_name(role) if isinstance(role, str) and role else shown(role)
