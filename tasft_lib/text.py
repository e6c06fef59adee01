"""Texts: when two are the same, how one is shown without being shown, a table in Markdown."""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from typing import Any

import pandas as pd

_MARKS = re.compile("[.,;:!?\"'‘’‚“”„«»‹›¿¡。、]+")
# Values of a label column that a message may quote; any other text may be one that got into the wrong column.
_LABEL_WORDS = ("true", "false", "yes", "no", "safe", "unsafe", "benign", "harmful", "good", "bad", "")


def normalise(text: str) -> str:
    """What two texts have in common that are the same: all but case, width, white space and sentence marks.

    Signs count: "2 + 2" is not "2 - 2", nor C++ C#. A text of nothing but marks stands for itself.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_MARKS.sub(" ", folded).split()) or " ".join(folded.split())


def shown(value: Any) -> str:
    """A value for a message: numbers and usual labels as they are, a text redacted, of all else the type."""
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value!r:.60}"
    if isinstance(value, str):
        is_label = value.strip().lower() in _LABEL_WORDS or re.fullmatch(r"[\d.+-]{1,9}", value)
        return repr(value) if is_label else f"the text {redact(value, words=0)}"
    return f"a {type(value).__name__}"


def shown_name(name: str) -> str:
    """A column's name for a message; redacted where it is a text, as in a CSV file without header."""
    if not re.fullmatch(r"[\w.:/-]{1,40}", name.strip()):
        return redact(name, words=0)
    return name if name == name.strip() else repr(name)


def is_whole(text: str) -> bool:
    """Whether it holds no half of a character (a lone surrogate, as JSON can write it), which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def redact(text: str, *, words: int = 3) -> str:
    """Show that a text exists without showing it: its first words, then "… [first 8 of its sha256, N words]".

    At most half of the words are shown, so a short answer never stands there whole.
    """
    pieces = text.split()
    shown = " ".join(pieces[: min(words, len(pieces) // 2)])[:60]
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{shown}… [{digest}, {len(pieces)} word{'' if len(pieces) == 1 else 's'}]"


def toxic_words(toxic: list[str], benign: list[str], *, ratio: float = 3.0, at_least: int = 2) -> list[str]:
    """The words that mark toxic prompts, the most frequent first.

    A word counts once per prompt. It is toxic when it stands in `at_least` toxic prompts, and in a share of them that
    is more than `ratio` times its share of benign prompts (with one prompt added to each count of benign ones, so that
    a word never seen there needs some weight of evidence).
    """
    in_toxic, in_benign = (Counter(word for p in prompts for word in words_of(p)) for prompts in (toxic, benign))

    def is_toxic(word: str) -> bool:
        return in_toxic[word] / len(toxic) > ratio * (in_benign[word] + 1) / (len(benign) + 1)

    words = [word for word, count in in_toxic.items() if count >= at_least and is_toxic(word)]
    return sorted(words, key=lambda word: (-in_toxic[word], word))


def words_of(text: str) -> set[str]:
    """The distinct words of a text, in lower case."""
    return set(re.findall(r"[^\W\d_]+", text.lower()))


def markdown(table: pd.DataFrame) -> str:
    """A table of texts and numbers in Markdown."""
    lines = [f"| {' | '.join(map(str, table.columns))} |", "|" + "---|" * table.shape[1]]
    for row in table.itertuples(index=False):
        lines.append(f"| {' | '.join(_cell(value) for value in row)} |")
    return "\n".join(lines)


def rate_text(rate: float, low: float, high: float, *, n: int | None = None, unit: str = " %") -> str:
    """A rate in [0, 1] with its interval, in percent: "3.1 % of 400 (1.8-5.3)", or without "of n"; "-" for nan."""
    if math.isnan(rate):
        return "-"
    of = "" if n is None else f" of {n}"
    return f"{100 * rate:.1f}{unit}{of} ({100 * low:.1f}-{100 * high:.1f})"


def _cell(value) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.3g}"
    return str(value).replace("|", "\\|")
