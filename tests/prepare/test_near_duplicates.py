"""Near-duplicates are found as often as banding promises, with exact similarities; copies and patterns cost little."""

import time
import tracemalloc

import numpy as np
import pytest

from tasft_lib.prepare import near_duplicates


def pairs(similarity: float, n: int, words: int = 120, seed: int = 0) -> tuple[list[str], list[str], float]:
    """`n` pairs of texts without repeated words, and the exact Jaccard index of the two word sets of each pair."""
    rng = np.random.default_rng(seed)
    common = round(similarity * words)
    half = (words - common) // 2
    left, right = [], []
    for _ in range(n):
        names = [f"w{i}" for i in rng.choice(10**7, common + 2 * half, replace=False)]
        left.append(" ".join(names[: common + half]))
        right.append(" ".join(names[:common] + names[common + half :]))
    return left, right, common / (common + 2 * half)


@pytest.mark.parametrize("similarity", [0.3, 0.4, 0.5, 0.6, 0.8])
def test_pairs_are_found_as_often_as_banding_promises(similarity):
    n = 600
    left, right, exact = pairs(similarity, n, seed=1)
    texts = [text for pair in zip(left, right, strict=True) for text in pair]
    found = near_duplicates.near_duplicates(texts, size=1, threshold=exact - 1e-9)
    assert all(j == i + 1 and i % 2 == 0 for j, (i, _) in found.items())
    assert all(value == pytest.approx(exact) for _, value in found.values()), "similarities are exact, not estimated"
    expected = 1 - (1 - exact**near_duplicates.DEPTH) ** near_duplicates.BANDS
    assert abs(len(found) / n - expected) <= 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-3
    of_references = near_duplicates.near_references(right, left, size=1, threshold=exact - 1e-9)
    assert of_references == {j // 2: (i // 2, value) for j, (i, value) in found.items()}


def test_what_is_less_similar_than_the_threshold_is_never_named():
    left, right, exact = pairs(0.7, 100)
    assert not near_duplicates.near_duplicates([*left, *right], size=1, threshold=exact + 0.01)
    assert not near_duplicates.near_references(left, right, size=1, threshold=exact + 0.01)


def test_shingles_are_word_sequences_without_case():
    one = near_duplicates.shingles("Blorp the GRUE, twice", 2)
    assert one == near_duplicates.shingles("blorp  the grue , TWICE", 2) and len(one) == 4
    assert near_duplicates.shingles("the blorp grue, twice", 2) != one, "order counts"
    assert near_duplicates.shingles("blorp", 3) == near_duplicates.shingles("BLORP", 1)
    assert near_duplicates.shingles("2 + 2", 3) != near_duplicates.shingles("2 - 2", 3), (
        "marks count: sums differ by them"
    )


def test_all_copies_in_a_crowd_are_found():
    rng = np.random.default_rng(0)
    base = [f"w{i}" for i in rng.integers(0, 10**6, 60)]
    texts = [" ".join([*base, f"copy{i}"]) for i in range(300)]
    found = near_duplicates.near_duplicates(texts, size=3, threshold=0.8)
    assert sorted(found) == list(range(1, 300)) and all(i < j for j, (i, _) in found.items())


def test_rows_of_one_pattern_are_not_all_compared_with_each_other(monkeypatch):
    rng = np.random.default_rng(0)
    pattern = " ".join(f"w{i}" for i in range(25))
    texts = [" ".join([pattern, *(f"v{k}" for k in rng.integers(0, 10**6, 12))]) for _ in range(2000)]
    pairs = []
    near = near_duplicates._near
    monkeypatch.setattr(near_duplicates, "_near", lambda found, *rest: pairs.append(len(found)) or near(found, *rest))
    assert near_duplicates.near_duplicates(texts, size=3, threshold=0.8) == {}
    assert pairs[0] <= near_duplicates.BANDS * len(texts)


def test_nothing_and_one_text():
    assert near_duplicates.near_duplicates([], size=3, threshold=0.8) == {}
    assert near_duplicates.near_duplicates(["blorp"], size=3, threshold=0.8) == {}
    assert near_duplicates.near_references(["blorp"], [], size=2, threshold=0.6) == {}
    assert near_duplicates.near_references([], ["blorp"], size=2, threshold=0.6) == {}
    assert near_duplicates.near_references(["Blorp"], ["zib", "blorp"], size=2, threshold=0.6) == {0: (1, 1.0)}


def test_twenty_thousand_texts_take_seconds_and_memory_in_proportion():
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(5000)])
    texts = [" ".join(row) for row in vocabulary[rng.integers(0, 5000, (20_000, 25))]]
    texts[17_000] = texts[40] + " again"
    start = time.process_time()
    assert set(near_duplicates.near_duplicates(texts, size=3, threshold=0.8)) == {17_000}
    assert time.process_time() - start < 30

    def peak(n: int) -> int:
        tracemalloc.start()
        near_duplicates.near_duplicates(texts[:n], size=3, threshold=0.8)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(1000), peak(3000)
    assert large < 4 * small
