"""Is a set fit to train on? Repeats, leaks, wrong labels, degenerate and cut answers, named by row, in one page.

What spoils an unsafe row must be fixed: there are few of them, and each is pushed away from with all the weight of the
penalty. The same in a benign row is worth a look. What `data.check` refuses must be fixed in every row.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from ..judges.refusals import is_refusal
from ..judges.strings import is_degenerate
from ..records import data, forms, sources, templates, tokens
from ..storage.files import progress_bar
from ..text import markdown, normalise, redact, toxic_words, words_of
from .near_duplicates import near_duplicates, near_references

SIMILAR_ROWS = 0.8  # of three-word sequences of question and answer: some two words in thirty differ
SIMILAR_PROMPTS = 0.6  # of two-word sequences of the question: one word in eight differs
# A benign prompt looks unsafe with two words that stand in so many times more unsafe prompts than benign ones.
MARK_RATIO, MARKS = 20.0, 2
_EXAMPLES, _NUMBERED = 5, 30


@dataclass(frozen=True)
class Finding:
    """What one check found: `rows` maps the number of a row (from 1) to what is wrong there, its text redacted."""

    check: str
    must_fix: bool
    remedy: str
    rows: dict[int, str]


@dataclass(frozen=True)
class Diagnosis:
    """The result of `examine`.

    Attributes:
        findings: every check made, those that found nothing included.
        skipped: check -> what it needs.
        lengths: words of prompts and answers: a row per label and text, columns n, least, median, 95 %, most.
        categories: rows per category and label; None without a category column.
    """

    source: str
    unsafe: int
    benign: int
    findings: list[Finding]
    skipped: dict[str, str]
    lengths: pd.DataFrame
    categories: pd.DataFrame | None

    @property
    def is_fit(self) -> bool:
        """Whether nothing must be fixed."""
        return not any(finding.must_fix and finding.rows for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.unsafe} unsafe and {self.benign} benign rows"]
        for finding in self.findings:
            if finding.rows:
                urgency = "must be fixed" if finding.must_fix else "worth a look"
                lines.append(f"{urgency}: {finding.check}: {_numbers(list(finding.rows))}")
        lines += [f"not checked: {check}; {need}" for check, need in self.skipped.items()]
        return "\n".join([*lines, "fit to train on" if self.is_fit else "not fit to train on yet"])


def examine(
    source: data.Source,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    template: templates.Template = "alpaca",
    label: bool = False,
    evaluation_prompts: dict[str, list[str]] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Check the rows of a file, a `save_to_disk` folder or a hub data set; nothing is changed.

    Rows are of the forms `forms.to_training_rows` takes; without a `label` column all have `label`.

    Args:
        template: for Alpaca's form, as in training; it counts in the tokens.
        evaluation_prompts: name of a set -> its prompts, which the rows must not ask.
        tokenizer, max_length: both or none; as in training.
        progress: True or False forces the bars on or off; None shows them on a terminal.

    Raises:
        ValueError: rows that can't be read at all, an empty prompt, a label that is no boolean.
    """
    if (tokenizer is None) != (max_length is None):
        raise ValueError("truncation needs both a tokenizer and max_length; give both or none")
    raw = sources.read_rows(source, split=split, name=name, revision=revision)
    options = {
        "label": None if "label" in raw.column_names else label,
        "template": template,
        "source": source,
        "drop_empty": True,
    }
    rows = forms.to_training_rows(raw, **options, with_place=True)
    # Rows with an answer; `numbers` leads back to the file.
    numbers = forms.row_numbers(rows)
    empty = set(range(1, len(raw) + 1)) - set(numbers)
    texts = _Rows(rows, numbers)

    findings = [
        Finding(
            "empty answer", True, "fill them or remove the rows", {number: "no answer" for number in sorted(empty)}
        ),
        *_repeats(texts, progress),
        *_answers(texts, progress),
    ]
    skipped = {}
    if evaluation_prompts:
        findings += _leaks(texts, evaluation_prompts, progress)
    else:
        skipped["leaks"] = "give --evaluation_prompts"
    if texts.unsafe and texts.benign:
        findings.append(_marked(texts))
    else:
        skipped["benign rows that look unsafe"] = "needs rows of both labels"
    if tokenizer is not None:
        findings.append(_bos(texts, tokenizer))
        findings += _truncated(texts, tokenizer, max_length, progress)
    else:
        skipped["truncation and BOS"] = "give --tokenizer and --max_length"
    return Diagnosis(
        str(source),
        len(texts.unsafe),
        len(texts.benign),
        findings,
        skipped,
        _lengths(texts),
        _categories(raw.select([number - 1 for number in numbers]), texts),
    )


def report(diagnosis: Diagnosis) -> str:
    """One page of Markdown: a line a check, the rows found with their texts redacted, lengths and categories."""
    flaws = [finding for finding in diagnosis.findings if finding.rows]
    urgent = sum(finding.must_fix for finding in flaws)
    verdict = "Fit to train on" if diagnosis.is_fit else "Not fit to train on yet"
    checks = [
        {"check": f.check, "rows": len(f.rows), "verdict": _verdict(f)}
        for f in sorted(diagnosis.findings, key=lambda f: (not f.rows, not f.must_fix))
    ] + [{"check": check, "rows": "-", "verdict": f"not checked: {need}"} for check, need in diagnosis.skipped.items()]
    parts = [
        f"# Check of `{Path(diagnosis.source).name}`",
        f"**{verdict}.** {diagnosis.unsafe} unsafe and {diagnosis.benign} benign rows with an answer; {urgent} "
        f"findings must be fixed, {len(flaws) - urgent} are worth a look. Rows count from 1; texts are redacted.",
        markdown(pd.DataFrame(checks)),
    ]
    for finding in sorted(flaws, key=lambda f: not f.must_fix):
        lines = [f"- row {number}: {what}" for number, what in list(finding.rows.items())[:_EXAMPLES]]
        if len(finding.rows) > _EXAMPLES:
            lines.append(f"- also {_numbers(list(finding.rows)[_EXAMPLES:])}")
        parts += [f"## {finding.check.capitalize()}", f"{finding.remedy.capitalize()}.", "\n".join(lines)]
    parts += ["## Words per text", markdown(diagnosis.lengths)]
    if diagnosis.categories is not None:
        parts += ["## Categories", markdown(diagnosis.categories)]
    return "\n\n".join(parts) + "\n"


class _Rows:
    """Rows as plain texts: `questions` without template, `answers` without thinking, numbers in the file."""

    def __init__(self, rows: Dataset, numbers: list[int]):
        self.rows, self.numbers, self.labels = rows, numbers, rows["label"][:]
        self.readings = [templates.questions(prompt) for prompt in rows["prompt"][:]]
        is_text = [isinstance(prompt, str) for prompt in rows["prompt"][:]]
        self.questions = [q[0] if text else "\n".join(q) for q, text in zip(self.readings, is_text, strict=True)]
        said = [c if isinstance(c, str) else _contents(c) for c in rows["completion"][:]]
        self.answers = [templates.split_thinking(text)[1] for text in said]  # none where the thinking has no end
        self.unsafe = [i for i, label in enumerate(self.labels) if not label]
        self.benign = [i for i, label in enumerate(self.labels) if label]

    def by_label(self, check: str, remedy: str, notes: dict[int, str]) -> list[Finding]:
        """`notes` (index -> what) as two findings: unsafe rows must be fixed, benign ones are worth a look."""
        return [
            Finding(f"{check}, {name}", must_fix, remedy, self.numbered(notes, wanted=not must_fix))
            for name, must_fix in (("unsafe", True), ("benign", False))
        ]

    def numbered(self, notes: dict[int, str], *, wanted: bool | None = None) -> dict[int, str]:
        return {self.numbers[i]: notes[i] for i in sorted(notes) if wanted in (None, self.labels[i])}


def _repeats(rows: _Rows, progress: bool | None) -> list[Finding]:
    first: dict[tuple[str, str], int] = {}
    first_answer: dict[str, int] = {}
    same, contrary, answers = {}, {}, {}
    for i, pair in enumerate(zip(rows.questions, rows.answers, strict=True)):
        key = tuple(map(normalise, pair))
        j = first.setdefault(key, i)
        if j != i:
            note = f"as row {rows.numbers[j]}: {_redacted(rows.answers[i])}"
            (same if rows.labels[i] == rows.labels[j] else contrary)[i] = note
        elif not rows.labels[i]:
            k = first_answer.setdefault(key[1], i)
            if k != i:
                answers[i] = f"as row {rows.numbers[k]}: {_redacted(rows.answers[i])}"
    kept = [i for i in range(len(rows.labels)) if i not in same and i not in contrary]
    texts = [f"{rows.questions[i]}\n{rows.answers[i]}" for i in kept]
    near, across = {}, {}
    for later, (earlier, similarity) in near_duplicates(
        texts, size=3, threshold=SIMILAR_ROWS, progress=progress
    ).items():
        i, j = kept[later], kept[earlier]
        note = f"{similarity:.0%} of row {rows.numbers[j]}: {_redacted(rows.answers[i])}"
        (near if rows.labels[i] == rows.labels[j] else across)[i] = note
    wrong_label = "remove the wrong one of each two"
    copies = "remove the rows"
    groups = "keep one of each group: training counts all of them"
    other_prompt = "keep one, unless it is right twice"
    return [
        Finding("row repeated", True, copies, rows.numbered(same)),
        Finding("same text under both labels", True, wrong_label, rows.numbered(contrary)),
        Finding("nearly the same text under both labels", True, wrong_label, rows.numbered(across)),
        *rows.by_label("row nearly repeated", groups, near),
        Finding("answer repeated for another prompt, unsafe", False, other_prompt, rows.numbered(answers)),
    ]


def _leaks(rows: _Rows, evaluation_prompts: dict[str, list[str]], progress: bool | None) -> list[Finding]:
    places, texts, held_out = [], [], {}
    for name, prompts in evaluation_prompts.items():
        for number, prompt in enumerate(prompts, start=1):
            text = templates.questions(prompt)[0]
            held_out.setdefault(normalise(text), len(texts))
            places.append(f"prompt {number} of {Path(name).name}")
            texts.append(text)
    held_out.pop("", None)
    exact = {}
    for i, readings in enumerate(rows.readings):
        hits = [held_out[q] for q in map(normalise, readings) if q in held_out]
        if hits:
            exact[i] = f"is {places[hits[0]]}: {_redacted(rows.questions[i])}"
    others = [(i, q) for i, readings in enumerate(rows.readings) if i not in exact for q in dict.fromkeys(readings)]
    near = near_references([q for _, q in others], texts, size=2, threshold=SIMILAR_PROMPTS, progress=progress)
    notes = {
        others[k][0]: f"{similarity:.0%} of {places[place]}: {_redacted(others[k][1])}"
        for k, (place, similarity) in near.items()
    }
    return [
        Finding("evaluation prompt asked", True, "remove the rows", rows.numbered(exact)),
        *rows.by_label("evaluation prompt nearly asked", "remove what is the same request in other words", notes),
    ]


def _answers(rows: _Rows, progress: bool | None) -> list[Finding]:
    refusals, degenerate = {}, {}
    for i, answer in enumerate(
        progress_bar(rows.answers, desc="reading answers", unit="row", leave=False, progress=progress)
    ):
        if not rows.labels[i] and is_refusal(answer):
            refusals[i] = _redacted(answer)
        if is_degenerate(answer):
            degenerate[i] = _redacted(answer)
    remedy = "remove the rows or label them true: the penalty would unlearn refusing"
    return [
        Finding("refusal labelled unsafe", True, remedy, rows.numbered(refusals)),
        *rows.by_label("degenerate answer", "remove the rows: symbols or one piece over and over", degenerate),
    ]


def _marked(rows: _Rows) -> Finding:
    """Benign rows whose prompts hold several words that otherwise stand in unsafe prompts."""
    unsafe, benign = ([rows.questions[i] for i in side] for side in (rows.unsafe, rows.benign))
    marks = set(toxic_words(unsafe, benign, ratio=MARK_RATIO))
    notes = {}
    for i in rows.benign:
        count = len(marks & words_of(rows.questions[i]))
        if count >= MARKS:
            notes[i] = f"{count} words of unsafe prompts: {_redacted(rows.questions[i])}"
    remedy = "read them: a label may be wrong; contrastive rows are meant to look so"
    return Finding("benign prompt with words of unsafe ones", False, remedy, rows.numbered(notes))


def _bos(rows: _Rows, tokenizer: Any) -> Finding:
    notes = {i: _redacted(rows.questions[i]) for i in tokens.begin_with_bos(rows.rows, tokenizer)}
    remedy = "nothing need be done: the tokenizer adds it, and training and asking have one"
    return Finding("prompt begins with BOS", False, remedy, rows.numbered(notes))


def _truncated(rows: _Rows, tokenizer: Any, max_length: int, progress: bool | None) -> list[Finding]:
    full, cut = {}, {}
    steps = range(0, len(rows.labels), 1000)
    for start in progress_bar(steps, desc="counting tokens", leave=False, progress=progress):
        batch = rows.rows.select(range(start, min(start + 1000, len(rows.rows))))
        prompts, wholes = tokens.token_counts(batch, tokenizer)
        for i, (before, total) in enumerate(zip(prompts, wholes, strict=True), start=start):
            if before >= max_length:
                full[i] = f"prompt of {before} tokens: {_redacted(rows.questions[i])}"
            elif total > max_length:
                cut[i] = f"{total} tokens: {_redacted(rows.answers[i])}"
    remedy = f"raise max_length ({max_length}), shorten or remove them: "
    return [
        Finding("prompt fills max_length", True, f"{remedy}nothing of the answer is left", rows.numbered(full)),
        *rows.by_label("answer cut by max_length", f"{remedy}they end without an end", cut),
    ]


def _lengths(rows: _Rows) -> pd.DataFrame:
    table = []
    for name, side in (("unsafe", rows.unsafe), ("benign", rows.benign)):
        for kind, texts in (("prompt", rows.questions), ("answer", rows.answers)):
            words = pd.Series([len(texts[i].split()) for i in side], dtype=float)
            least, median, most_of, most = words.quantile([0, 0.5, 0.95, 1])
            numbers = {"least": least, "median": median, "95 %": most_of, "most": most}
            cells = {k: "-" if math.isnan(v) else f"{v:.0f}" for k, v in numbers.items()}
            table.append({"rows": f"{name}, {kind}", "n": len(side)} | cells)
    return pd.DataFrame(table)


def _categories(raw: Dataset, rows: _Rows) -> pd.DataFrame | None:
    """Rows per category, the most frequent first; at most twelve, the others together."""
    if "category" not in raw.column_names:
        return None
    names = [_category(value) for value in raw["category"][:]]
    table = pd.DataFrame({"category": names, "label": ["benign" if label else "unsafe" for label in rows.labels]})
    counts = pd.crosstab(table["category"], table["label"]).reindex(columns=["unsafe", "benign"], fill_value=0)
    counts = counts.sort_values(["unsafe", "benign"], ascending=False)
    if len(counts) > 13:
        rest = counts.iloc[12:].sum().to_frame(f"{len(counts) - 12} others").T
        counts = pd.concat([counts.iloc[:12], rest])
    return counts.rename_axis("category").reset_index()


def _category(value: Any) -> str:
    if isinstance(value, dict):  # BeaverTails: name -> whether it holds
        value = "; ".join(name for name, holds in value.items() if holds)
    text = str(value or "(none)")
    # A long "category" may be a text; texts are redacted.
    return text if len(text) <= 60 else redact(text)


def _contents(messages: Iterable[dict]) -> str:
    """What messages say, and the tools they call."""
    calls = (json.dumps(message["tool_calls"], sort_keys=True) for message in messages if message.get("tool_calls"))
    return "\n".join(filter(None, [*(message["content"] for message in messages), *calls]))


def _redacted(text: str) -> str:
    return f"`{redact(text).replace('`', '’')}`"


def _verdict(finding: Finding) -> str:
    if not finding.rows:
        return "ok"
    return "**must be fixed**" if finding.must_fix else "worth a look"


def _numbers(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _NUMBERED} more" if len(numbers) > _NUMBERED else ""
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_NUMBERED]))}{more}"
