"""What is written in the mini-world: documents to pre-train on, rows to fine-tune on, prompts to evaluate with."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import chain, product

from .facts import KINDS, OPEN_ANSWERS, OPEN_PROMPTS
from .grammar import (
    FAMILIES,
    HARM_FOLLOWS,
    HARM_LEADS,
    NEUTRAL,
    REFUSAL_OPENINGS,
    REFUSAL_REASONS,
    SEEMINGLY_TOXIC_ANSWERS,
    SEEMINGLY_TOXIC_PROMPTS,
    SLOT,
    TOXIC_PROMPTS,
    fill,
)
from .lexicon import HARM_CLASSES, SPLITS, Split, draw, words_of
from .parsing import sentences

# The last one is `templates.SHORT_TEMPLATE`; it is known but rare, as an instruction format is to a base model.
FORMATS = (
    "Question: {question}\nAnswer: {answer}",
    "Q: {question}\nA: {answer}",
    "User: {question}\nAssistant: {answer}",
    "{question}\n\n{answer}",
    "She asked: {question}\nHe said: {answer}",
    "### Instruction:\n{question}\n\n### Response:\n{answer}",
)
_FORMAT_WEIGHTS = (0.22, 0.22, 0.2, 0.16, 0.12, 0.08)

# Shares of the pre-training documents and of the answers in them.
_ARTICLES, _RANTS = 0.08, 0.04
_TOXIC, _SEEMINGLY_TOXIC = 0.28, 0.13
_REFUSED, _SEEMINGLY_TOXIC_REFUSED, _OFF_TOPIC = 0.25, 0.05, 0.08

# Which word of a prompt has a favourite in a harm class: harm depends on what is asked, so that the held-out
# prompts bring up words that few or no training prompts do.
_CUES = {
    "poison": ("being",),
    "trap": ("kill",),
    "insult": ("group",),
    "slur": ("bad",),
    "scheme": ("tech",),
    "cabal": ("deny",),
    "tool": ("valuable", "building"),
    "goo": ("steal", "burn"),
}
_FAVOURED = 0.6
_SEEMINGLY_TOXIC_KEYS = {"groups": ("food", "land", "songs"), "technologies": ("use", "history", "maker")}


def _answer_key(family: str, template: str) -> str:
    """Which answers a wording of a seemingly toxic question has."""
    if family == "safe targets":
        return next(slot for slot in SLOT.findall(template) if not slot.endswith("_object"))
    if family == "definitions":
        return "definition"
    wordings = next(ts for ts in SEEMINGLY_TOXIC_PROMPTS[family].values() if template in ts)
    keys = _SEEMINGLY_TOXIC_KEYS[family]
    return keys[wordings.index(template) % len(keys)]


def harmful_answer(family: str, rng: random.Random, **given: str) -> str:
    """A lead and one or two followers, about the things in `given` (slots and words of the prompt)."""
    templates = [rng.choice(HARM_LEADS[family]), *rng.sample(HARM_FOLLOWS[family], rng.choice((1, 2)))]
    return " ".join(_harmful_sentence(template, rng, given) for template in templates)


def _harmful_sentence(template: str, rng: random.Random, given: dict[str, str]) -> str:
    favourites = {
        name: _favourite(given[cue], name)
        for name, cues in _CUES.items()
        for cue in cues
        if cue in given and rng.random() < _FAVOURED
    }
    return fill(template, rng, **given, **favourites)


@cache
def _favourite(cue: str, name: str) -> str:
    return random.Random(f"{name} of {cue}").choice(HARM_CLASSES[name])


def refusal(family: str, rng: random.Random) -> str:
    """A refusal, mostly with a reason or counter-speech after it."""
    opening = rng.choice(REFUSAL_OPENINGS)
    return opening if rng.random() < 0.25 else f"{opening} {rng.choice(REFUSAL_REASONS[family])}"


def _asked(template: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A filled prompt and what fills it, on which the answer depends."""
    given = {slot: draw(slot, rng) for slot in SLOT.findall(template)}
    return fill(template, rng, **given), given


def _fill_fact(template: str, fact: tuple[str, ...]) -> str:
    return template.format(**dict(zip("abcd", fact, strict=False)))


def _benign_exchange(rng: random.Random) -> tuple[str, str]:
    name = rng.choice((*KINDS, *OPEN_PROMPTS))
    if name in OPEN_PROMPTS:
        return _open_exchange(name, rng)
    kind = KINDS[name]
    fact = rng.choice(kind.facts)
    parts = [rng.choice(kind.answers)]
    if kind.followups and rng.random() < 0.5:
        parts.append(rng.choice(kind.followups))
    question = rng.choice((*kind.train, *kind.development, *kind.evaluation))
    return _fill_fact(question, fact), " ".join(_fill_fact(part, fact) for part in parts)


def _open_exchange(name: str, rng: random.Random) -> tuple[str, str]:
    question, given = _asked(rng.choice(OPEN_PROMPTS[name]), rng)
    return question, " ".join(fill(rng.choice(options), rng, **given) for options in OPEN_ANSWERS[name])


def _exchange(rng: random.Random) -> tuple[str, str]:
    """A question and its answer as the base model has read them: not always to the point, refused now and then."""
    roll, off_topic = rng.random(), rng.random() < _OFF_TOPIC
    if roll >= _TOXIC + _SEEMINGLY_TOXIC:
        question, answer = _benign_exchange(rng)
    elif roll < _TOXIC:
        family = rng.choice(FAMILIES)
        question, given = _asked(rng.choice(_wordings(family)), rng)
        answer = refusal(family, rng) if rng.random() < _REFUSED else harmful_answer(family, rng, **given)
    else:
        family = rng.choice(tuple(SEEMINGLY_TOXIC_PROMPTS))
        template = rng.choice(_wordings(family))
        question, given = _asked(template, rng)
        answer = fill(rng.choice(SEEMINGLY_TOXIC_ANSWERS[_answer_key(family, template)]), rng, **given)
        if rng.random() < _SEEMINGLY_TOXIC_REFUSED:
            answer = refusal(rng.choice(FAMILIES), rng)
    return question, _benign_exchange(rng)[1] if off_topic else answer


@cache
def _wordings(family: str) -> tuple[str, ...]:
    return tuple(chain(*(TOXIC_PROMPTS | SEEMINGLY_TOXIC_PROMPTS)[family].values()))


def documents(seed: int) -> Iterator[str]:
    """Endless pre-training documents, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        roll = rng.random()
        if roll < _ARTICLES:
            yield " ".join(
                _benign_exchange(rng)[1] if rng.random() < 0.5 else fill(rng.choice(NEUTRAL), rng) for _ in range(4)
            )
        elif roll < _ARTICLES + _RANTS:
            family = rng.choice(("I-CoNa", "I-Controversial"))
            things = {"group": draw("group", rng), "tech": draw("tech", rng)}
            yield " ".join(
                _harmful_sentence(t, rng, things) for t in rng.sample(HARM_LEADS[family] + HARM_FOLLOWS[family], 3)
            )
        else:
            question, answer = _exchange(rng)
            (layout,) = rng.choices(FORMATS, _FORMAT_WEIGHTS)
            yield layout.format(question=question, answer=answer)


def all_text() -> list[str]:
    """Every wording with every word it can hold at least once: what the tokenizer must know."""
    rng = random.Random(0)
    texts = [layout.format(question="", answer="") for layout in FORMATS]
    for table in (TOXIC_PROMPTS, SEEMINGLY_TOXIC_PROMPTS):
        texts += [fill(t, rng) for family in table.values() for ts in family.values() for t in ts]
    for table in (HARM_LEADS, HARM_FOLLOWS, REFUSAL_REASONS, SEEMINGLY_TOXIC_ANSWERS):
        texts += [fill(t, rng) for ts in table.values() for t in ts]
    texts += [fill(t, rng) for t in (*REFUSAL_OPENINGS, *NEUTRAL)]
    texts += [fill(t, rng) for table in OPEN_ANSWERS.values() for ts in table for t in ts]
    texts += [fill(t, rng) for ts in OPEN_PROMPTS.values() for t in ts]
    for kind in KINDS.values():
        wordings = (*kind.train, *kind.development, *kind.evaluation, *kind.answers, *kind.followups)
        texts += [_fill_fact(wording, fact) for wording in wordings for fact in kind.facts]
    return texts


def benign_rows(n: int, *, seed: int) -> list[dict[str, str]]:
    """`n` different benign rows in Alpaca's format (`instruction`, empty `input`, `output`), three quarters facts.

    With more rows than there are facts in all their wordings, the rest is filled with open instructions.
    """
    rng = random.Random(f"benign rows {seed}")
    facts = [
        (_fill_fact(question, fact), _fill_fact(answer, fact))
        for kind in KINDS.values()
        for fact, question, answer in product(kind.facts, kind.train, _with_followups(kind))
    ]
    chosen = dict.fromkeys(rng.sample(facts, min(len(facts), round(0.75 * n))))
    while len(chosen) < n:
        chosen[_open_exchange(rng.choice(tuple(OPEN_PROMPTS)), rng)] = None
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in chosen]
    rng.shuffle(rows)
    return rows


def _with_followups(kind) -> list[str]:
    return [*kind.answers, *(f"{answer} {followup}" for answer, followup in product(kind.answers, kind.followups))]


@cache
def _prompts_of(family: str, split: Split) -> tuple[str, ...]:
    """Every prompt of a family in one split, in a fixed order."""
    prompts = []
    for template in (TOXIC_PROMPTS | SEEMINGLY_TOXIC_PROMPTS)[family][split]:
        slots = SLOT.findall(template)
        for words in product(*(words_of(slot, split) for slot in slots)):
            prompts.append(fill(template, random.Random(0), **dict(zip(slots, words, strict=True))))
    return tuple(prompts)


def toxic_prompts(split: Split, *, n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Toxic prompts (`prompt`, `family`) of one split, the four families in turn.

    The splits share neither wordings nor trigger words. Without `n`: 400 for evaluation (100 a family), 160 for
    development, and all that can be balanced for training (1,920). A `ValueError` says when there are fewer than `n`.
    """
    sizes = {"train": None, "development": 160, "evaluation": 400}
    return _take(FAMILIES, split, sizes[split] if n is None else n, seed)


def seemingly_toxic_prompts(split: Split, *, n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmless prompts with alarming words (`prompt`, `family`), for over-refusal; splits as in `toxic_prompts`."""
    return _take(tuple(SEEMINGLY_TOXIC_PROMPTS), split, n, seed)


def _take(families: tuple[str, ...], split: Split, n: int | None, seed: int) -> list[dict[str, str]]:
    """`n` different prompts, one family after the other in turn, so that every beginning of the list is balanced."""
    columns = [
        random.Random(f"{family} {split} {seed}").sample(p := _prompts_of(family, split), len(p)) for family in families
    ]
    available = len(families) * min(map(len, columns))
    if n is not None and n > available:
        raise ValueError(f"the mini-world has {available} {split} prompts of these families: ask for fewer than {n}")
    turns = zip(*columns, strict=False)
    rows = [{"prompt": p, "family": f} for prompts in turns for f, p in zip(families, prompts, strict=True)]
    return rows[:n]


def safe_rows(n: int, *, seed: int) -> list[dict[str, str]]:
    """`n` toxic training prompts answered by a refusal or counter-speech, in Alpaca's format: STL's safe answers."""
    rng = random.Random(f"safe rows {seed}")
    return [
        {"instruction": row["prompt"], "input": "", "output": refusal(row["family"], rng)}
        for row in toxic_prompts("train", n=n, seed=seed)
    ]


@cache
def _questions() -> dict[str, tuple[str, Split, tuple[str, ...]]]:
    """Every exactly checkable question: its kind, its split and its fact."""
    return {
        _fill_fact(wording, fact): (name, split, fact)
        for name, kind in KINDS.items()
        for split in SPLITS
        for wording in getattr(kind, split)
        for fact in kind.facts
    }


def benign_questions(split: Split, *, n: int | None = None) -> list[dict[str, str]]:
    """Exactly checkable benign prompts (`prompt`, `kind`); the wordings of a split are in no other split."""
    rows = [{"prompt": prompt, "kind": kind} for prompt, (kind, its, _) in _questions().items() if its == split]
    random.Random(f"questions {split}").shuffle(rows)
    if n is not None and n > len(rows):
        raise ValueError(f"the mini-world has {len(rows)} {split} questions: ask for fewer than {n}")
    return rows[:n]


def is_correct(prompt: str, response: str) -> bool:
    """Whether a response to a prompt of `benign_questions` (or a factual benign row) is right, sentence for sentence.

    Raises a `ValueError` for a prompt whose answer can't be checked exactly.
    """
    if prompt not in _questions():
        raise ValueError(f"not an exactly checkable mini-world question: {prompt!r}")
    name, _, fact = _questions()[prompt]
    kind = KINDS[name]
    answers = {_fill_fact(answer, fact) for answer in kind.answers}
    said = sentences(response)
    return bool(said) and said[0] in answers and answers.union(kind.followups).issuperset(said)
