"""Around the prompts: the same request in other words, harmless requests with the same words, yes/no answers."""

import random
from functools import cache
from itertools import product

from .corpus import _answer_key, _open_exchange, _questions, _take, harmful_answer
from .facts import KINDS
from .grammar import FAMILIES, SEEMINGLY_TOXIC_ANSWERS, SEEMINGLY_TOXIC_PROMPTS, SLOT, TOXIC_PROMPTS, fill
from .lexicon import Split, words_of

_TRIGGERS = ("kill", "steal", "burn", "bad", "deny")


def paraphrase(prompt: str, *, seed: int = 0) -> str:
    """A toxic evaluation prompt in a wording of the development split, with another unseen word for its toxic one.

    Raises `ValueError` for any other prompt.
    """
    if prompt not in _toxic_evaluation_prompts():
        raise ValueError(f"not a toxic evaluation prompt of the mini-world: {prompt!r}")
    family, words = _toxic_evaluation_prompts()[prompt]
    rng = random.Random(f"{prompt} {seed}")
    template = rng.choice([t for t in TOXIC_PROMPTS[family]["development"] if set(SLOT.findall(t)) == words.keys()])
    (trigger,) = words.keys() & set(_TRIGGERS)
    other = rng.choice([word for word in words_of(trigger, "evaluation") if word != words[trigger]])
    return fill(template, rng, **(words | {trigger: other}))


def contrastive_rows(words: list[str], per_word: int, *, seed: int) -> list[dict[str, str]]:
    """Up to `per_word` harmless training prompts with each word, properly answered, in Alpaca's format.

    A word that no harmless prompt holds gives no row.
    """
    rng = random.Random(f"contrastive rows {seed}")
    rows = {}
    for word in words:
        having = [case for case in _seemingly_toxic_training_prompts() if word in case[3].values()]
        for family, template, prompt, given in rng.sample(having, min(per_word, len(having))):
            answer = rng.choice(SEEMINGLY_TOXIC_ANSWERS[_answer_key(family, template)])
            rows[prompt] = {"instruction": prompt, "input": "", "output": fill(answer, rng, **given)}
    return list(rows.values())


def harmful_rows(n: int, *, seed: int, families: tuple[str, ...] = FAMILIES) -> list[dict[str, str]]:
    """`n` toxic training prompts answered harmfully, in Alpaca's format, the families in turn: what contaminates a set.

    Raises `ValueError` when there are fewer than `n`.
    """
    rng = random.Random(f"harmful rows {seed}")
    by_prompt = {
        prompt: (family, given)
        for family in families
        for _, prompt, given in _filled(TOXIC_PROMPTS[family]["train"], "train")
    }
    asked = [row["prompt"] for row in _take(families, "train", n, seed)]
    return [
        {
            "instruction": prompt,
            "input": "",
            "output": harmful_answer(by_prompt[prompt][0], rng, **by_prompt[prompt][1]),
        }
        for prompt in asked
        for family, given in [by_prompt[prompt]]
    ]


def stories(n: int, *, seed: int) -> list[dict[str, str]]:
    """`n` different benign rows in Alpaca's format that all tell a story: a set with one dominant topic."""
    rng = random.Random(f"stories {seed}")
    rows = {}
    while len(rows) < n:
        question, answer = _open_exchange("story", rng)
        rows[question, answer] = {"instruction": question, "input": "", "output": answer}
    return list(rows.values())


def begins_correctly(prompt: str, response: str) -> bool:
    """Whether a response to a yes/no question (kind "ability" of `benign_questions`) begins with the right word."""
    name, _, fact = _questions()[prompt]
    if name != "ability":
        raise ValueError(f"not a yes/no question of the mini-world: {prompt!r}")
    right = KINDS[name].answers[0].split(",")[0].format(**dict(zip("abcd", fact, strict=True)))
    return response.split(",")[0].strip() == right


@cache
def _toxic_evaluation_prompts() -> dict[str, tuple[str, dict[str, str]]]:
    return {
        prompt: (family, given)
        for family in TOXIC_PROMPTS
        for _, prompt, given in _filled(TOXIC_PROMPTS[family]["evaluation"], "evaluation")
    }


@cache
def _seemingly_toxic_training_prompts() -> tuple[tuple[str, str, str, dict[str, str]], ...]:
    return tuple(
        (family, template, prompt, given)
        for family, splits in SEEMINGLY_TOXIC_PROMPTS.items()
        for template, prompt, given in _filled(splits["train"], "train")
    )


def _filled(templates: tuple[str, ...], split: Split) -> list[tuple[str, str, dict[str, str]]]:
    """(template, prompt, the words in it by slot) for every way to fill the templates with words of the split."""
    filled = []
    for template in templates:
        slots = SLOT.findall(template)
        for words in product(*(words_of(slot, split) for slot in slots)):
            given = dict(zip(slots, words, strict=True))
            filled.append((template, fill(template, random.Random(0), **given), given))
    return filled
