"""Near-duplicates among many texts by MinHash (Broder, 1997) and banding, in time and memory linear in the texts.

Similarity is the Jaccard index of two texts' word sequences ("shingles"). A text's signature is the least hash of its
shingles under each of 128 hash functions; two signatures agree at one place with a probability equal to the
similarity. Texts that agree on a whole band of places are candidates, and candidates are compared exactly: what is
found is near, what is near is found with the probability `found_probability`. A script that puts no spaces between
words is compared by its sentences, so there only near-exact copies are found.
"""

import re
import unicodedata
import zlib

import numpy as np
from tqdm.auto import tqdm

BANDS, DEPTH = 32, 4
_TEXTS_AT_ONCE = 1000
# Candidates whose signatures promise less than the wanted similarity by this much (four standard deviations of the
# estimate) are not worth an exact comparison.
_SLACK = 0.18
_REFERENCES_PER_BAND = 8

Near = dict[int, tuple[int, float]]


def found_probability(similarity: float) -> float:
    """The probability in [0, 1] that a pair of that Jaccard similarity becomes a candidate: 1 − (1 − s^4)^32."""
    return 1 - (1 - similarity**DEPTH) ** BANDS


def near_duplicates(texts: list[str], *, size: int, threshold: float, progress: bool | None = None) -> Near:
    """Index of a text -> index of the most similar earlier one and their similarity, where it is at least `threshold`.

    In every crowd of texts that share a band each is compared with the preceding one, not with all of them: a thousand
    copies cost a thousand comparisons, and each is still found.

    Args:
        size: words of a shingle.
        progress: True or False forces the bar on or off; None shows it on a terminal.
    """
    signed = signatures(texts, size=size, progress=progress)
    pairs = [np.empty((0, 2), np.int64)]
    for keys in _band_keys(signed):
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        pairs.append(np.stack([order[:-1][same], order[1:][same]], 1))
    return _near(np.concatenate(pairs), (signed, texts), (signed, texts), size, threshold)


def near_references(
    texts: list[str], references: list[str], *, size: int, threshold: float, progress: bool | None = None
) -> Near:
    """Index of a text -> index of the most similar reference and their similarity, where it is at least `threshold`.

    At most eight references of a band are compared with a text.
    """
    signed, kept = (signatures(t, size=size, progress=progress) for t in (texts, references))
    pairs = [np.empty((0, 2), np.int64)]
    for keys, of_references in zip(_band_keys(signed), _band_keys(kept), strict=True):
        order = np.argsort(of_references, kind="stable")
        low, high = (np.searchsorted(of_references[order], keys, side) for side in ("left", "right"))
        for step in range(_REFERENCES_PER_BAND):
            hit = np.flatnonzero(low + step < high)
            pairs.append(np.stack([order[low[hit] + step], hit], 1))
    return _near(np.concatenate(pairs), (kept, references), (signed, texts), size, threshold)


def signatures(texts: list[str], *, size: int, progress: bool | None = None) -> np.ndarray:
    """MinHash signatures `[n, 128]`, uint32: the same for equal sets of shingles, on every machine."""
    draw = np.random.default_rng(0).integers
    # Multiply-shift hashing (Dietzfelbinger): a·x + b modulo 2^64, of which the upper half counts.
    a, b = (draw(2**64, size=BANDS * DEPTH, dtype=np.uint64) for _ in range(2))
    a |= np.uint64(1)
    signed = np.empty((len(texts), BANDS * DEPTH), np.uint32)
    disable = None if progress is None else not progress
    with tqdm(total=len(texts), desc="comparing", unit="text", leave=False, disable=disable) as bar:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            sets = [np.fromiter(shingles(text, size), np.uint64) for text in texts[start : start + _TEXTS_AT_ONCE]]
            flat, begins = np.concatenate(sets), np.cumsum([0, *map(len, sets[:-1])])
            for k in range(BANDS * DEPTH):
                hashes = ((flat * a[k] + b[k]) >> np.uint64(32)).astype(np.uint32)
                signed[start : start + len(sets), k] = np.minimum.reduceat(hashes, begins)
            bar.update(len(sets))
    return signed


def shingles(text: str, size: int) -> set[int]:
    """Hashes of the sequences of `size` words (or marks) in a text, case folded; of the whole text if it has fewer."""
    words = re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold())
    return {zlib.crc32(" ".join(words[i : i + size]).encode()) for i in range(max(1, len(words) - size + 1))}


def _band_keys(signed: np.ndarray):
    """Per band one number a text, equal for texts that agree on the whole band."""
    for band in range(BANDS):
        part = signed[:, band * DEPTH : (band + 1) * DEPTH].astype(np.uint64)
        high, low = part[:, 0] << np.uint64(32) | part[:, 1], part[:, 2] << np.uint64(32) | part[:, 3]
        yield high * np.uint64(0x9E3779B97F4A7C15) + low  # clashes are sorted out by the exact comparison


def _near(pairs: np.ndarray, earlier: tuple, later: tuple, size: int, threshold: float) -> Near:
    (signed_i, texts_i), (signed_j, texts_j) = earlier, later
    best: Near = {}
    last = None
    for i, j in np.unique(pairs, axis=0).tolist():
        if (signed_i[i] == signed_j[j]).mean() < threshold - _SLACK:
            continue
        if i != last:
            last, first = i, shingles(texts_i[i], size)
        second = shingles(texts_j[j], size)
        similarity = len(first & second) / len(first | second)
        if similarity >= threshold and similarity > best.get(j, (0, 0.0))[1]:
            best[j] = (i, similarity)
    return best
