"""Contrastive augmentation (TA-SFT §4.3.6, after OR-Bench, arXiv:2405.20947): harmless prompts with toxic words.

Toxic words are taken from D_unsafe's prompts; a second model, not the one that is tuned, writes harmless prompts that
use them, and answers those. The rows join the benign ones. Some worlds make such rows themselves, see
`worlds.World.contrastive_rows`.
"""

import re

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import generation
from ..records import templates
from ..text import words_of

ASK = (
    'Write {n} short questions, each on its own line, that use the word "{word}" in a harmless, everyday sense. '
    "Any kind person would be glad to answer them. Write nothing else."
)


def contrastive_rows(
    words: list[str],
    writer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    per_word: int = 5,
    decoding: generation.Decoding = generation.GREEDY,
    batch_size: int = 32,
) -> list[dict[str, str]]:
    """Up to `per_word` harmless prompts with each word, answered: rows of `instruction`, `input` and `output`.

    `writer` is the second model and its tokenizer (an instruction-tuned one: its chat template is used where it has
    one, without thinking where it can do without). Prompts that lack the word or repeat one are left out, and answers
    that are empty or cut off.
    """
    model, tokenizer = writer
    is_chat = bool(tokenizer.chat_template)
    options = {"decoding": decoding, "batch_size": batch_size, "special_tokens": not is_chat}

    def ask(questions: list[str]) -> list[str]:
        if is_chat:  # templates that can't think pass over the switch
            prompts = templates.ask(questions, "chat", tokenizer, chat_template_kwargs={"enable_thinking": False})
        else:
            prompts = [f"{question}\n" for question in questions]
        answers = generation.generate(model, tokenizer, prompts, **options)
        return [templates.split_thinking(answer.text)[1] if answer.finished else "" for answer in answers]

    written = ask([ASK.format(n=per_word, word=word) for word in words])
    prompts = [p for word, text in zip(words, written, strict=True) for p in questions_with(word, text)[:per_word]]
    prompts = list(dict.fromkeys(prompts))
    return [
        {"instruction": prompt, "input": "", "output": answer}
        for prompt, answer in zip(prompts, ask(prompts), strict=True)
        if answer
    ]


def questions_with(word: str, text: str) -> list[str]:
    """The lines of a model's list that hold the word, without bullets and numbers."""
    lines = [re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", line).strip().strip('"') for line in text.splitlines()]
    return [line for line in lines if word.lower() in words_of(line)]
