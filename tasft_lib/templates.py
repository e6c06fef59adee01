"""Prompt templates: the text a model is given before its answer, and what a prompt asks without it."""

import re
from typing import Literal

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
Template = Literal["alpaca", "short", "none"]
_TEMPLATES = {  # without and with input
    "alpaca": (ALPACA_TEMPLATE, ALPACA_TEMPLATE_WITH_INPUT),
    "short": (SHORT_TEMPLATE, SHORT_TEMPLATE_WITH_INPUT),
    "none": ("{instruction}", "{instruction}\n\n{input}"),
}
_TEMPLATED = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*\Z", re.DOTALL)


def format_prompt(instruction: str, input: str = "", template: Template = "alpaca") -> str:
    """The text a model is given before its response; the with-input form where `input` is not empty."""
    if template not in _TEMPLATES:
        raise ValueError(f"template: {template!r} is not known; use one of {', '.join(_TEMPLATES)}")
    return _TEMPLATES[template][bool(input)].format(instruction=instruction, input=input)


def questions(prompt: str | list[dict]) -> list[str]:
    """What a prompt may be said to ask, without template or speaker's name, the fullest reading first."""
    if not isinstance(prompt, str):
        return [message["content"] or "" for message in prompt if message["role"] == "user"]
    if templated := _TEMPLATED.search(prompt):
        instruction, context = templated.groups()
        return [f"{instruction} {context}", instruction] if context else [instruction]
    return [prompt, *(re.sub(r"^\s*\w+:\s", "", line) for line in prompt.splitlines())]
