"""Answers in code: what can be turned back into text, without asking whether that text is language."""

import base64
import binascii
import re
from collections.abc import Iterator

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_BASE32 = re.compile(r"[A-Z2-7]{16,}={0,6}")
_HEX = re.compile(r"(?:(?:0x|\\x|%)?[0-9A-Fa-f]{2}[\s,:]*){8,}")
_BITS = re.compile(r"(?:[01]{8}\s*){4,}")
_MORSE = re.compile(r"(?:[.\u00b7_\u2013\u2014-]{1,6}(?:\s+|\s*[/|]\s*)){7,}[.\u00b7_\u2013\u2014-]{1,6}")
_SPELT_OUT = re.compile(r"(?:[^\W\d_][\W_]{1,3}){15,}[^\W\d_]")
_HALF = 0.5  # of the visible characters must be code
_LEET = str.maketrans("013457@$!|", "oieastasil")
# Cyrillic letters that look like Latin ones.
_LOOKALIKES = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0445\u0443\u0456\u0458\u0455", "aeopcxyijs")
_LEET_WORD = re.compile(r"(?=\S*[A-Za-z])(?=\S*[013457@$!|]\S*\w)\S+")
MIN_LEET = 0.3  # of the words


def is_coded(text: str) -> bool:
    """Whether at least half of it is Morse, letters one by one, or readable UTF-8 in base64, base32, digits or bits."""
    visible = len("".join(text.split()))
    pieces = [piece for piece in _BASE64.findall(text) if _is_readable(_from_base64(piece))]
    for code, base in ((_HEX, 16), (_BITS, 2)):
        pieces += [piece for piece in (m[0] for m in code.finditer(text)) if _is_readable(_from_digits(piece, base))]
    pieces += [piece for piece in _BASE32.findall(text) if _is_readable(_from_base32(piece))]
    pieces += [m[0] for m in _MORSE.finditer(text)]
    pieces += [m[0] for m in _SPELT_OUT.finditer(text) if _is_varied(m[0])]
    return visible > 0 and sum(len("".join(piece.split())) for piece in pieces) >= _HALF * visible


def respellings(text: str) -> Iterator[str]:
    """What a text says if it is leet, of other letters, backwards, or shifted in the alphabet: to be looked up."""
    words = text.split()
    if sum(_LEET_WORD.fullmatch(word) is not None for word in words) >= MIN_LEET * max(len(words), 1):
        yield text.lower().translate(_LEET)
    yield text.lower().translate(_LOOKALIKES)
    yield text[::-1]
    for shift in range(1, 26):
        yield "".join(_shifted(character, shift) for character in text)


def _shifted(character: str, shift: int) -> str:
    if not (character.isascii() and character.isalpha()):
        return character
    first = ord("a" if character.islower() else "A")
    return chr(first + (ord(character) - first + shift) % 26)


def _from_base64(piece: str) -> bytes:
    piece = piece.rstrip("=").replace("-", "+").replace("_", "/")
    piece = piece[: len(piece) - (len(piece) % 4 == 1)]  # an answer may be cut
    try:
        return base64.b64decode(piece + "=" * (-len(piece) % 4), validate=True)
    except binascii.Error:
        return b""


def _from_base32(piece: str) -> bytes:
    piece = piece.rstrip("=")
    piece = piece[: len(piece) - len(piece) % 8]
    return base64.b32decode(piece)


def _from_digits(piece: str, base: int) -> bytes:
    digits = re.sub(r"0x|\\x|[%\s,:]", "", piece)
    width = 2 if base == 16 else 8
    return bytes(int(digits[i : i + width], base) for i in range(0, len(digits) - width + 1, width))


def _is_readable(data: bytes) -> bool:
    """Whether it is UTF-8 of printable characters, most of them letters and spaces; a character may be cut off."""
    text = data.decode("utf-8", "ignore")
    if not _is_varied(text) or len(text.encode()) < len(data) - 3:
        return False
    return text.replace("\n", " ").isprintable() and sum(c.isalpha() or c == " " for c in text) >= 0.7 * len(text)


def _is_varied(text: str) -> bool:
    """Whether it is no loop of a few letters."""
    return len({character for character in text if character.isalpha()}) >= 5
