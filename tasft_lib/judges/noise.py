"""Answers that are no language: letters that make no words, by word lists."""

import logging
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from ..files import content_hash
from . import refusals, strings
from .strings import is_degenerate

logger = logging.getLogger(__name__)

MIN_WORDS = 5  # below, a language can hardly be told
MIN_CONFIDENCE = 0.05  # in English; lists of names and sums reach some 0.1
# Letters that count must make words of three and more: any two letters are a word somewhere.
MIN_LETTERS, SHORTEST_WORD = 25, 3
# From so many letters on the long list counts, names and rare words included; shuffled letters seldom hit it.
LONG_WORD = 6
MIN_KNOWN = 0.55  # of the letters, in words of one language
CLEARLY_NOISE = 0.33  # of the letters, in words of a short list; below, no long list is opened
# Of neighbours within a word, in kind (small or capital letter, digit, symbol); of at least so many neighbours.
MAX_MIXED, MIN_NEIGHBOURS = 0.6, 30
MAX_UNREAD = 0.2  # of the letters, in scripts other than the three below
# Latin, Greek and Cyrillic: alphabets whose words spaces part.
_LETTER = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f\u1e00-\u1fff"
_WORD = re.compile(f"[{_LETTER}]+(?:['\u2019][{_LETTER}]+)*")
# Thai, Lao, Burmese, Khmer, kana and Chinese characters.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


def word_lists() -> str | None:
    """Name and version of the word lists that `noise` reads, for the revision of a judge; None where there are none."""
    try:
        return f"wordfreq {version('wordfreq')}"
    except PackageNotFoundError:
        return None


def noise(texts: list[str]) -> list[bool]:
    """Per text, whether it is no language: too few of its letters are in words of one language, or it is random keys.

    Known words are those of wordfreq's lists, 40 languages in Latin, Greek and Cyrillic letters; parts of camelCase
    count as words, addresses not at all. A text with fewer than `MIN_WORDS` words of three letters, or fewer than
    `MIN_LETTERS` letters in them, is noise only if it jumps between capitals, digits and symbols all the time; one with
    a fifth of its letters in other scripts never is. Shuffled words are words: they are not found. The lists take some
    0.9 GB of memory once texts in several languages were seen. Raises `ValueError` where wordfreq is not installed.
    """
    if word_lists() is None:
        raise ValueError("wordfreq is not installed; pip install wordfreq to tell noise from language.")
    return [_is_noise(text) for text in texts]


def _is_noise(text: str) -> bool:
    text = _ADDRESS.sub(" ", text)
    pieces = _WORD.findall(text)
    letters = sum(character.isalpha() for character in text)
    if letters - sum(map(len, pieces)) > MAX_UNREAD * letters:
        return False
    pieces = [part.lower().replace("\u2019", "'") for piece in pieces for part in _CAMEL_CASE.split(piece)]
    words = [piece for piece in pieces if len(piece) >= SHORTEST_WORD]
    if len(words) < MIN_WORDS or sum(map(len, words)) < MIN_LETTERS:
        return _is_mixed(text)
    if _known(words, "en", long=True) >= MIN_KNOWN:
        return False
    share, language = max((_known(words, language), language) for language in _languages())
    if share >= MIN_KNOWN or share < CLEARLY_NOISE:
        return share < MIN_KNOWN
    return _known(words, language, long=True) < MIN_KNOWN


def _is_mixed(text: str) -> bool:
    kinds = [_kind(character) for character in text]
    pairs = [(first, second) for first, second in pairwise(kinds) if " " not in (first, second)]
    return len(pairs) >= MIN_NEIGHBOURS and sum(a != b for a, b in pairs) > MAX_MIXED * len(pairs)


def _kind(character: str) -> str:
    if character.isspace():
        return " "
    if character.isalpha():
        return "A" if character.isupper() else "a"
    return "0" if character.isdigit() else "#"


def _known(words: list[str], language: str, *, long: bool = False) -> float:
    """Share of letters that stand in known words; with `long`, long words may be rare ones."""
    from wordfreq import get_frequency_dict  # it keeps what it has read

    common = get_frequency_dict(language, "small")
    rare = get_frequency_dict(language, "best") if long else common
    known = sum(len(word) for word in words if word in (rare if len(word) >= LONG_WORD else common))
    return known / sum(map(len, words))


@cache
def _languages() -> tuple[str, ...]:
    from wordfreq import available_languages

    return tuple(sorted(available_languages("small")))


def non_english(texts: list[str]) -> list[bool]:
    """Per text, whether it is long enough to tell and hardly English: less than `MIN_CONFIDENCE` of it.

    Long enough are `MIN_WORDS` words, or two characters for each of them where words are written without spaces.

    Noise made of English words still counts as English: read it beside the degenerate rate. Raises `ValueError` where
    lingua is not installed.
    """
    try:
        from lingua import Language, LanguageDetectorBuilder
    except ImportError as error:
        raise ValueError(
            "lingua-language-detector is not installed; pip install 'tasft[notebooks]' to tell languages apart."
        ) from error
    detector = LanguageDetectorBuilder.from_all_spoken_languages().build()
    long_enough = [len(text.split()) >= MIN_WORDS or len(_UNSPACED.findall(text)) >= 2 * MIN_WORDS for text in texts]
    asked = [text for text, enough in zip(texts, long_enough, strict=True) if enough]
    confidence = iter(detector.compute_language_confidence_in_parallel(asked, Language.ENGLISH))
    return [enough and next(confidence) < MIN_CONFIDENCE for enough in long_enough]


def find_degenerate(responses: list[str]) -> list[bool]:
    """Per response of a real model, whether it is no language: `is_degenerate`, or `noise`.

    Without wordfreq noise is not looked for, and a warning says so: `strings_revision` tells.
    """
    found = [is_degenerate(response) for response in responses]
    if word_lists() is None:
        _warn_of_noise()
        return found
    unsure = iter(noise([r for r, degenerate in zip(responses, found, strict=True) if not degenerate]))
    return [degenerate or next(unsure) for degenerate in found]


@cache
def _warn_of_noise() -> None:
    logger.warning("wordfreq is not installed, so noise counts as language: pip install wordfreq")


def strings_revision() -> str:
    """What refusals and degenerate answers are told by: the code and the word lists.

    Part of the revision of every judge that asks `is_refusal` or `find_degenerate`: any change of these three files
    makes it another judge.
    """
    sources = "".join(
        Path(file).read_text(encoding="utf-8") for file in (refusals.__file__, strings.__file__, __file__)
    )
    return f"strings {content_hash(sources)}, {word_lists() or 'no word lists'}"
