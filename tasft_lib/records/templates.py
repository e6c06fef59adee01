"""Prompt templates: what a model is given before its answer, what a prompt asks without it, what an answer is."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..storage.files import RECORD

# Stanford's train.py ends its prompts at "### Response:"; Alpaca-LoRA's form, which STL and so the paper use, adds the
# newline. We keep it: TRL trains on what follows the prompt's own tokens, and a newline ends a token where a space may
# not (TinyStories merges it to the left, SentencePiece and byte-level BPE to the right).
_TASK = "Below is an instruction that describes a task"
_PAIRED = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request.\n\n"
SHORT_TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
SHORT_TEMPLATE_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
ALPACA_TEMPLATE = f"{_TASK}{_WRITE}{SHORT_TEMPLATE}"
ALPACA_TEMPLATE_WITH_INPUT = f"{_TASK}{_PAIRED}{_WRITE}{SHORT_TEMPLATE_WITH_INPUT}"
# "chat" is the tokenizer's own.
Template = Literal["alpaca", "short", "none", "chat"]
TEMPLATES = ("alpaca", "short", "none", "chat")
_TEXTS = {  # without and with input
    "alpaca": (ALPACA_TEMPLATE, ALPACA_TEMPLATE_WITH_INPUT),
    "short": (SHORT_TEMPLATE, SHORT_TEMPLATE_WITH_INPUT),
    "none": ("{instruction}", "{instruction}\n\n{input}"),
}
_TEMPLATED = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*\Z", re.DOTALL)
# How answers hold their thinking, here and in most models; what other marks a model has, `read_turn` turns into these.
OPENING, CLOSING = "<think>", "</think>"
_BLOCK = re.compile(r"^\s*<think>(.*?)(</think>|\Z)", re.DOTALL | re.MULTILINE)


def format_prompt(instruction: str, input: str = "", template: Template = "alpaca") -> str:
    """The text a model is given before its response; the with-input form where `input` is not empty.

    The template "chat" is the tokenizer's: see `chat_prompt`, or `ask`, which knows them all.
    """
    if template not in _TEXTS:
        raise ValueError(f"template: {template!r} is not known; use one of {', '.join(_TEXTS)}")
    return _TEXTS[template][bool(input)].format(instruction=instruction, input=input)


def chat_prompt(tokenizer: Any, prompt: str | list[dict], **chat_template_kwargs: Any) -> str:
    """The prompt, one user message or a list of messages, in the tokenizer's chat template, up to where the answer is.

    Special tokens, BOS among them, stand in it: encode it without adding any. `chat_template_kwargs` are the template's
    own switches, such as `enable_thinking=False`.

    Raises `ValueError` where there is no chat template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; use prompt_template alpaca, short or none")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rendered = _render(tokenizer, messages, add_generation_prompt=True, **chat_template_kwargs)
    if isinstance(prompt, str) and prompt.strip() not in rendered:
        # Templates of models that see, too, read a message as parts, and pass over one that is text.
        parts = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        in_parts = _render(tokenizer, parts, add_generation_prompt=True, **chat_template_kwargs)
        rendered = in_parts if prompt.strip() in in_parts else rendered
    return rendered


def ask(
    prompts: list[str],
    template: Template,
    tokenizer: Any = None,
    *,
    begun: list[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """What a model is given for each bare prompt: the prompt in the template, then what its answer has `begun` with.

    An answer that has begun stands where a chat template puts it: after an empty thinking, if it puts one there.
    `tokenizer` is for "chat".
    """
    begun = [""] * len(prompts) if begun is None else begun
    if template != "chat":
        return [format_prompt(text, template=template) + start for text, start in zip(prompts, begun, strict=True)]
    options = chat_template_kwargs or {}
    turn, asked = assistant_turn(tokenizer, **options), []
    for prompt, start in zip(prompts, begun, strict=True):
        text = chat_prompt(tokenizer, prompt, **options)
        lead = (turn and turn.lead) or (f"\n{CLOSING}\n\n" if opens_thinking(text) else "")
        asked.append(text + lead + start if start else text)
    return asked


def default_template(model: str | Path, tokenizer: Any) -> Template:
    """The template in the record of a model's training, `tasft.json`; else "chat" if it has one, else "alpaca"."""
    try:
        record = json.loads((Path(model) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    recorded = record.get("prompt_template") if isinstance(record, dict) else None
    return recorded if recorded in TEMPLATES else "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"


def questions(prompt: str | list[dict]) -> list[str]:
    """What a prompt may be said to ask, without template or speaker's name, the fullest reading first."""
    if not isinstance(prompt, str):
        return [message["content"] or "" for message in prompt if message["role"] == "user"]
    if templated := _TEMPLATED.search(prompt):
        instruction, context = templated.groups()
        return [f"{instruction} {context}", instruction] if context else [instruction]
    return [prompt, *(re.sub(r"^\s*\w+:\s", "", line) for line in prompt.splitlines())]


def split_thinking(text: str) -> tuple[str, str, bool]:
    """(thinking, answer, whether the thinking has ended) of an answer with its thinking in <think> and </think>.

    Thinking begins at the start of a line; what stands before a lone </think> is thinking too, since some servers and
    templates keep the opening to themselves. A text without either is an answer, as it is.
    """
    if OPENING not in text and CLOSING not in text:
        return "", text, True
    thoughts, answers, last, ended = [], [], 0, True
    for block in [*_BLOCK.finditer(text), None]:
        between = text[last : block.start() if block else len(text)]
        more_thinking, _, answer = between.rpartition(CLOSING)
        thoughts.append(more_thinking)
        answers.append(answer.strip())
        if block:
            thoughts.append(block[1])
            last, ended = block.end(), bool(block[2])
    answer = "\n\n".join(filter(None, answers))
    return "\n\n".join(filter(None, map(str.strip, thoughts))), answer, ended or bool(answer)


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends within a thinking, as some chat templates have it."""
    return prompt.rstrip().endswith(OPENING)


@dataclass(frozen=True)
class Turn:
    """How a chat template writes an assistant's turn, after the prompt.

    Attributes:
        lead: what stands before an answer without thinking, mostly nothing.
        opening, closing: what stands before and after a thinking; None where the template knows none.
        end: what stands after the answer.
    """

    lead: str
    opening: str | None
    closing: str | None
    end: str


def assistant_turn(tokenizer: Any, **chat_template_kwargs: Any) -> Turn | None:
    """The `Turn` of the tokenizer's chat template, read from what it makes of messages; None where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    question, thinking, answer = [{"role": "user", "content": "q0"}], "t0t", "a0a"
    said = {"role": "assistant", "content": answer}
    # One name or another; a template passes over those it does not know.
    thought = said | dict.fromkeys(("reasoning_content", "thinking", "reasoning"), thinking)
    try:
        prompt = _render(tokenizer, question, add_generation_prompt=True, **chat_template_kwargs)
        plain, full = (_render(tokenizer, [*question, m], **chat_template_kwargs) for m in (said, thought))
    except ValueError:
        return None
    if answer not in plain:
        return None
    before, _, end = plain.rpartition(answer)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    opening = closing = None
    if full.startswith(prompt) and thinking in full and full.index(thinking) < full.find(answer):
        before, _, after = full.partition(thinking)
        opening = before.removeprefix(prompt) or (OPENING if opens_thinking(prompt) else None)
        closing = after[: after.index(answer)]
    return Turn(lead, opening, closing, end)


def turn_ends(tokenizer: Any, turn: Turn | None) -> list[int]:
    """The special tokens by which the chat template ends an assistant's turn, whichever is the tokenizer's EOS."""
    if turn is None or not turn.end:
        return []
    special = _special_tokens(tokenizer)
    ids = tokenizer(turn.end, add_special_tokens=False)["input_ids"]
    return [token for token in ids if token in special]


def read_turn(tokenizer: Any, ids: list[int], turn: Turn | None) -> str:
    """The text of generated tokens, without special ones, stripped; a thinking stands in <think> and </think>.

    Without that, marks that are special tokens would go, and thinking and answer be one text.
    """
    special = [name for name in _special_tokens(tokenizer).values() if turn and name in f"{turn.opening}{turn.closing}"]
    if not special or turn.opening is None:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    text = tokenizer.decode(ids)
    text = text.replace(turn.closing.strip(), f"\n{CLOSING}\n\n").replace(turn.opening.strip(), f"{OPENING}\n")
    text = text.removeprefix(turn.lead)
    for name in set(_special_tokens(tokenizer).values()) - {OPENING, CLOSING}:
        text = text.replace(name, "")
    return text.strip()


@contextmanager
def template_errors(place: str = "", *, remedy: str) -> Iterator[None]:
    """What a chat template raises on messages becomes a `ValueError` in one line, from `place` to `remedy`."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        # Of jinja's own errors only the template's words (raise_exception) say something.
        words = " ".join(str(error).split())[:120] if type(error) is TemplateError else type(error).__name__
        raise ValueError(f"{place}the chat template can't read the messages ({words}); {remedy}") from None


def _render(tokenizer: Any, messages: list[dict], **options: Any) -> str:
    with template_errors(remedy="use another prompt_template"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Token -> text of all that decoding leaves out."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
