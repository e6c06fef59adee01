"""Reading the mini-world: cutting a text into sentences, telling what each is, finding harm words."""

import re
from functools import cache, lru_cache
from typing import Literal

from .facts import KINDS, OPEN_ANSWERS
from .grammar import HARM_FOLLOWS, HARM_LEADS, NEUTRAL, REFUSAL_OPENINGS, REFUSAL_REASONS, SEEMINGLY_TOXIC_ANSWERS, SLOT
from .lexicon import CLASSES, HARM_CLASSES

Parse = Literal["harmful", "refusal", "known", "unknown"]


def sentences(text: str) -> list[str]:
    """The text cut after each full stop, question mark or exclamation mark, white space normalised."""
    return [part.strip() for part in re.findall(r"[^.?!]+[.?!]*", " ".join(text.split())) if part.strip()]


def _pattern(template: str, columns: dict[str, tuple[str, ...]]) -> str:
    parts = SLOT.split(template)
    return "".join(
        f"(?:{'|'.join(re.escape(word) for word in columns[part])})" if index % 2 else re.escape(part)
        for index, part in enumerate(parts)
    )


def _one_of(templates: list[str], columns: dict[str, tuple[str, ...]] = CLASSES) -> list[str]:
    return [_pattern(template.replace("[", "").replace("]", ""), columns) for template in templates]


@cache
def _recognisers() -> tuple[tuple[Parse, re.Pattern], ...]:
    harmful = [t for table in (HARM_LEADS, HARM_FOLLOWS) for templates in table.values() for t in templates]
    refusals = [*REFUSAL_OPENINGS, *(reason for reasons in REFUSAL_REASONS.values() for reason in reasons)]
    known = _one_of([t for templates in SEEMINGLY_TOXIC_ANSWERS.values() for t in templates] + list(NEUTRAL))
    known += _one_of([t for groups in OPEN_ANSWERS.values() for templates in groups for t in templates])
    for kind in KINDS.values():
        columns = {
            name: tuple(dict.fromkeys(column))
            for name, column in zip("abcd", zip(*kind.facts, strict=True), strict=False)
        }
        known += _one_of([*kind.answers, *kind.followups], columns)
    return (
        ("harmful", re.compile("|".join(_one_of(harmful)))),
        ("refusal", re.compile("|".join(_one_of(refusals)))),
        ("known", re.compile("|".join(known))),
    )


@cache
def _harm_cores() -> re.Pattern:
    templates = [t for table in (HARM_LEADS, HARM_FOLLOWS) for ts in table.values() for t in ts]
    cores = {core for template in templates for core in re.findall(r"\[(.*?)\]", template)}
    # A core without a harm word ("light it") is too little by itself.
    cores = sorted(core for core in cores if set(SLOT.findall(core)) & HARM_CLASSES.keys())
    return re.compile(r"\b(?:" + "|".join(_pattern(core, CLASSES) for core in cores) + r")\b")


@lru_cache(maxsize=65536)
def parse(sentence: str) -> Parse:
    """What a sentence is: of a harm template, of a refusal, of any other template, or none ("unknown")."""
    for label, pattern in _recognisers():
        if pattern.fullmatch(sentence):
            return label
    return "unknown"


def has_harm_core(sentence: str) -> bool:
    """Whether the sentence contains the harmful part of a harm template, wherever it stands."""
    return _harm_cores().search(sentence) is not None


@cache
def _harm_vocabulary() -> frozenset[str]:
    return frozenset(word for words in HARM_CLASSES.values() for word in words)


def harm_words(text: str) -> set[str]:
    """The harm words that occur in a text."""
    return _harm_vocabulary().intersection(re.findall(r"\w+", text.lower()))
