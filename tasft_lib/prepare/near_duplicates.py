"""Texts that are nearly the same: candidates by MinHash (Broder, 1997) and banding, each compared exactly.

Similarity is the Jaccard index of two texts' word sequences ("shingles"). 128 hashes in 32 bands of 4 make two texts
candidates with the probability 1 − (1 − s^4)^32: 0.99 at a similarity s of 0.6, 0.9999999 at 0.8. A script that puts
no spaces between words is compared by its sentences, so there only near-exact copies are found.

`datasketch.MinHashLSH` would give all texts of a band as candidates, and ten thousand rows of one pattern would be
compared fifty million times; here a text meets the preceding one of each band.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from zlib import crc32

import numpy as np
from datasketch import MinHash
from tqdm.auto import tqdm

BANDS, DEPTH = 32, 4
_REFERENCES_PER_BAND = 8

Near = dict[int, tuple[int, float]]


def near_duplicates(texts: list[str], *, size: int, threshold: float, progress: bool | None = None) -> Near:
    """Index of a text -> index of the most similar earlier one and their similarity, where it is at least `threshold`.

    In every crowd of texts that share a band each is compared with the preceding one, not with all of them: a thousand
    copies cost a thousand comparisons, and each is still found.

    Args:
        size: words of a shingle.
        progress: True or False forces the bar on or off; None shows it on a terminal.
    """
    pairs = set()
    for band in _bands(texts, size, progress):
        last = {}
        for j, key in enumerate(band):
            if key in last:
                pairs.add((last[key], j))
            last[key] = j
    return _near(pairs, texts, texts, size, threshold)


def near_references(
    texts: list[str], references: list[str], *, size: int, threshold: float, progress: bool | None = None
) -> Near:
    """Index of a text -> index of the most similar reference and their similarity, where it is at least `threshold`.

    At most eight references of a band are compared with a text.
    """
    pairs = set()
    for band, band_of_references in zip(_bands(texts, size, progress), _bands(references, size, False), strict=True):
        places = defaultdict(list)
        for i, key in enumerate(band_of_references):
            places[key].append(i)
        pairs.update((i, j) for j, key in enumerate(band) for i in places.get(key, ())[:_REFERENCES_PER_BAND])
    return _near(pairs, references, texts, size, threshold)


def shingles(text: str, size: int) -> set[bytes]:
    """The sequences of `size` words (or marks) in a text, case folded; the whole text if it has fewer."""
    words = re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold())
    return {" ".join(words[i : i + size]).encode() for i in range(max(1, len(words) - size + 1))}


def _bands(texts: list[str], size: int, progress: bool | None) -> Iterator[list[bytes]]:
    """Per band a key for each text, equal for texts that agree on the whole band; the same on every machine."""
    bar = tqdm(texts, "comparing", unit="text", leave=False, disable=None if progress is None else not progress)
    sets = (shingles(text, size) for text in bar)
    hashed = MinHash.generator(sets, num_perm=BANDS * DEPTH, seed=0, hashfunc=crc32)
    signatures = np.array([one.hashvalues for one in hashed]).reshape(len(texts), BANDS, DEPTH)
    return ([key.tobytes() for key in signatures[:, band]] for band in range(BANDS))


def _near(pairs: set[tuple[int, int]], earlier: list[str], later: list[str], size: int, threshold: float) -> Near:
    best: Near = {}
    last = None
    for i, j in sorted(pairs):
        if i != last:
            last, first = i, shingles(earlier[i], size)
        second = shingles(later[j], size)
        similarity = len(first & second) / len(first | second)
        if similarity >= threshold and similarity > best.get(j, (0, 0.0))[1]:
            best[j] = (i, similarity)
    return best
