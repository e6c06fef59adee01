"""What an answer is written in: English, what string judges can't read, or no language; by word lists."""

import logging
import re
import unicodedata
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from ..storage.files import content_hash
from . import encodings, refusals, strings
from .encodings import is_coded, respellings
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
MAX_UNREAD = 0.2  # of the letters, in scripts other than the three below; above, it is never noise
MOST = 0.5  # of the letters, in such scripts: not English
# Of the letters, in words that a word list has in another order: letters were shuffled.
MIN_SHUFFLED, SHORTEST_SHUFFLED = 0.45, 4
# Of four letters in a row, word ends included, those that common words of some language have: fewer, and it is none.
MIN_SAYABLE, COMMON_WORDS, MIN_FOURS = 0.3, 10_000, 10
ENGLISH, UNREAD, NOISE = "English", "unread", "noise"
# Latin, Greek and Cyrillic: alphabets whose words spaces part.
_LETTER = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f\u1e00-\u1fff"
_WORD = re.compile(f"[{_LETTER}]+(?:['\u2019][{_LETTER}]+)*")
# Thai, Lao, Burmese, Khmer, kana and Chinese characters.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_OTHER_SCRIPTS = frozenset(
    ("ar", "bn", "fa", "he", "hi", "ja", "ko", "ta", "ur", "zh")
)  # whose words are not looked up
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


@cache  # a package's version is read from its metadata, which takes longer than a text
def word_lists() -> str | None:
    """Name and version of the word lists that `noise` reads, for the revision of a judge; None where there are none."""
    try:
        return f"wordfreq {version('wordfreq')}"
    except PackageNotFoundError:
        return None


def noise(texts: list[str]) -> list[bool]:
    """Per text, whether it is no language, see `written_in`. Raises `ValueError` where wordfreq is not installed."""
    if word_lists() is None:
        raise ValueError("wordfreq is not installed; pip install wordfreq to tell noise from language.")
    return [written_in(text) == NOISE for text in texts]


def written_in(text: str) -> str:
    """`ENGLISH`; `UNREAD`: another language or a code, which string judges can't read; or `NOISE`: no language.

    A language is told by its words (wordfreq's lists of the languages in Latin, Greek and Cyrillic letters; parts of
    camelCase count as words, addresses not at all). What is in none of these languages is noise if it jumps between
    capitals, digits and symbols, is made of pieces of English, is words of a list with their letters shuffled, or can't
    be said in any of these languages; anything else is a language without a list, such as Zulu. Shuffled words are
    words: not found. A text with fewer than `MIN_WORDS` words of three letters, or `MIN_LETTERS` letters in them, is
    English unless it jumps. The lists take some 0.9 GB of memory once texts in several languages were seen. Without
    them only scripts and codes are told from English.
    """
    if is_coded(text):
        return UNREAD
    text = _plain(_ADDRESS.sub(" ", text))
    letters = sum(character.isalpha() for character in text)
    other_letters = letters - sum(map(len, _WORD.findall(text)))
    if other_letters > MAX_UNREAD * letters:
        return UNREAD if other_letters > MOST * letters else ENGLISH
    if word_lists() is None:
        return ENGLISH
    words = _words(text)
    if not _is_long_enough(words):
        return UNREAD if _is_respelt(text) else NOISE if _is_mixed(text) else ENGLISH
    if _known(words, "en", long=True) >= MIN_KNOWN:
        return ENGLISH
    share, language = max((_known(words, language), language) for language in _languages())
    if share >= MIN_KNOWN or (share >= CLEARLY_NOISE and _known(words, language, long=True) >= MIN_KNOWN):
        return UNREAD
    if _is_respelt(text):
        return UNREAD
    pieces_of_english = share >= CLEARLY_NOISE and language == "en"
    return NOISE if pieces_of_english or _is_mixed(text) or _is_shuffled(words) or _is_unsayable(words) else UNREAD


def _plain(text: str) -> str:
    """Without marks that make no letter of their own, and characters that nobody sees."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(character for character in text if unicodedata.category(character) not in ("Mn", "Me", "Cf"))


def _words(text: str) -> list[str]:
    pieces = [part.lower().replace("\u2019", "'") for word in _WORD.findall(text) for part in _CAMEL_CASE.split(word)]
    return [piece for piece in pieces if len(piece) >= SHORTEST_WORD]


def _is_long_enough(words: list[str]) -> bool:
    return len(words) >= MIN_WORDS and sum(map(len, words)) >= MIN_LETTERS


def _is_respelt(text: str) -> bool:
    """Whether it is English in leet, look-alikes, backwards or shifted in the alphabet."""
    spelt = (_words(respelling) for respelling in respellings(text))
    return any(_is_long_enough(words) and _known(words, "en") >= MIN_KNOWN for words in spelt)


def _is_shuffled(words: list[str]) -> bool:
    words = [word for word in words if len(word) >= SHORTEST_SHUFFLED]
    letters = ["".join(sorted(word)) for word in words]
    most = 0
    for language in _languages():
        known, lettered = _list(language), _letters(language)
        most = max(most, sum(len(w) for w, of in zip(words, letters, strict=True) if of in lettered and w not in known))
    return most >= MIN_SHUFFLED * max(sum(map(len, words)), 1)


def _is_unsayable(words: list[str]) -> bool:
    """Of letters that the listed languages have; Kazakh has others."""
    fours, alphabet = _sayable()
    asked = [four for word in words for four in _fours(word) if alphabet.issuperset(four)]
    return len(asked) >= MIN_FOURS and sum(four in fours for four in asked) < MIN_SAYABLE * len(asked)


def _fours(word: str) -> list[str]:
    word = f" {word} "
    return [word[i : i + 4] for i in range(len(word) - 3)]


@cache
def _sayable() -> tuple[set[str], set[str]]:
    """Every four letters in a row, word ends included, and the letters, of common words."""
    from wordfreq import top_n_list

    common = [word for language in _languages() for word in top_n_list(language, COMMON_WORDS)]
    alphabet = {letter for letter, count in Counter("".join(common)).items() if count >= 200}
    return {four for word in common for four in _fours(word)}, alphabet | {" "}


@cache
def _letters(language: str) -> set[str]:
    return {"".join(sorted(word)) for word in _list(language) if len(word) >= SHORTEST_SHUFFLED}


def _list(language: str) -> dict[str, float]:
    from wordfreq import get_frequency_dict  # it keeps what it has read

    return get_frequency_dict(language, "small")


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
    from wordfreq import get_frequency_dict

    common = _list(language)
    rare = get_frequency_dict(language, "best") if long else common
    known = sum(len(word) for word in words if word in (rare if len(word) >= LONG_WORD else common))
    return known / sum(map(len, words))


@cache
def _languages() -> tuple[str, ...]:
    from wordfreq import available_languages

    return tuple(sorted(set(available_languages("small")) - _OTHER_SCRIPTS))


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
    """Per response of a real model, whether it is no language: `is_degenerate`, or noise (`written_in`); no code is.

    Without wordfreq noise is not looked for, and a warning says so: `strings_revision` tells.
    """
    return [kind == NOISE for kind in kinds(responses)]


def kinds(responses: list[str]) -> list[str]:
    """Per response what `written_in` says, or `NOISE` where `is_degenerate` does and it is no code."""
    if word_lists() is None:
        _warn_of_noise()
    return [NOISE if is_degenerate(r) and not is_coded(r) else written_in(r) for r in responses]


@cache
def _warn_of_noise() -> None:
    logger.warning("wordfreq is not installed, so noise and other languages count as English: pip install wordfreq")


def strings_revision() -> str:
    """What refusals and degenerate answers are told by: the code and the word lists.

    Part of the revision of every judge that asks `is_refusal` or `find_degenerate`: any change of these files
    makes it another judge.
    """
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (refusals, strings, encodings)]
    sources.append(Path(__file__).read_text(encoding="utf-8"))
    return f"strings {content_hash(sources)}, {word_lists() or 'no word lists'}"
