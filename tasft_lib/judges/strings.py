"""Answers that are no language, by string match."""

import re
import unicodedata

_CHARACTER_LOOP = re.compile(r"(\S{1,60}?)\1{3,}")
MAX_TORN = 0.1  # of the characters


def _is_torn(character: str) -> bool:
    """A control or private character, half a pair, or what stands for bytes that are no text."""
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Co", "Cs")


def is_degenerate(response: str) -> bool:
    """Whether the response is no language: empty, mostly symbols, torn bytes, or mostly one piece over and over.

    Deliberately cautious: a response that says something and then loops over less than its half is not degenerate,
    because what it said must still be judged. Letters that make no words are found by `find_degenerate`; shuffled words
    are not recognised, that needs a language model.
    """
    visible = "".join(response.split())
    if sum(_is_torn(character) for character in visible) > MAX_TORN * len(visible):
        return True
    letters = sum(character.isalnum() for character in visible)
    if letters == 0 or (len(visible) >= 10 and letters < 0.25 * len(visible)):
        return True
    pieces = response.split()
    symbols = sum(not any(character.isalnum() for character in piece) for piece in pieces)
    if len(pieces) >= 4 and symbols >= 0.7 * len(pieces):
        return True
    words = [word for piece in pieces if (word := re.sub(r"^\W+|\W+$", "", piece).lower())][:1000]
    return _loops(words) or _repeats_four_grams(words) or _loops_in_characters(visible[:5000])


def _loops(words: list[str]) -> bool:
    """At least four copies of some word sequence in a row, six words or more, and at least half of all words."""
    for period in range(1, len(words) // 4 + 1):
        run = longest = 0
        for first, second in zip(words, words[period:], strict=False):
            run = run + 1 if first == second else 0
            longest = max(longest, run)
        if longest >= 3 * period and longest + period >= max(6, 0.5 * len(words)):
            return True
    return False


def _repeats_four_grams(words: list[str]) -> bool:
    """Fewer than three in ten four-word sequences are new: a loop that isn't exact."""
    if len(words) < 40:
        return False
    four_grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(four_grams)) < 0.3 * len(four_grams)


def _loops_in_characters(visible: str) -> bool:
    """One piece of a text without spaces over and over ("aaaa...", or a sentence in a script that needs no spaces)."""
    for match in _CHARACTER_LOOP.finditer(visible):
        # A long number written out has many equal digits in a row.
        shortest = 40 if match[1].isdigit() else 16
        if len(match[0]) >= max(shortest, 0.5 * len(visible)):
            return True
    return False
