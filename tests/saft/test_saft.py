"""The filter's mathematics: what is planted is found, the stream is the SVD, thresholds drop what they say."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from sklearn.metrics import f1_score, roc_auc_score

from tasft_lib.saft.filter import SCORE, SAFTFilter, SAFTFitter

RNG = np.random.default_rng


def noise(n=300, d=24, *, seed=0, mean=0.0, decay=0.9):
    """Rows whose directions have well separated variances."""
    rng = RNG(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * decay ** np.arange(d)) @ basis + mean


def fit(z, k=1, batch=None):
    fitter = SAFTFitter(k)
    for start in range(0, len(z), batch or max(len(z), 1)):
        fitter.update(z[start : start + (batch or len(z))])
    return fitter.filter


def svd_scores(z, k=1):
    """The definition (eq. of method.md), from NumPy's SVD of the centred matrix."""
    centred = np.asarray(z, np.float64) - np.asarray(z, np.float64).mean(0)
    _, sigma, vh = np.linalg.svd(centred, full_matrices=False)
    return (centred @ vh[:k].T) ** 2 @ (sigma[:k] / sigma[:k].sum())


# --- what is planted is found


@pytest.mark.parametrize("contamination", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_planted_rank_1_is_recovered(contamination, sign):
    rng = RNG(1)
    harmful = np.arange(400) < contamination * 400
    direction = rng.standard_normal(32)
    direction /= np.linalg.norm(direction)
    z = rng.standard_normal((400, 32)) * 0.3 + 7 + sign * np.outer(harmful * 12.0, direction)
    found = fit(z)
    assert abs(found.directions[0] @ direction) > 0.99
    scores = found.scores(z)
    assert roc_auc_score(harmful, scores) == 1
    assert (found.at_contamination(scores, contamination).drops(scores) == harmful).all()
    z[:, :] = rng.standard_normal((400, 32)) + 7
    assert roc_auc_score(harmful, fit(z).scores(z)) < 0.75, "without anything planted there is nothing to find"


@pytest.mark.parametrize("k", [2, 4])
def test_planted_rank_k_needs_k_directions(k):
    """Harm in k families, each its own orthogonal direction: one direction misses families that k find."""
    rng = RNG(2)
    directions = np.linalg.qr(rng.standard_normal((40, k)))[0].T
    family = np.where(np.arange(600) < 120, np.arange(600) % k, -1)
    z = rng.standard_normal((600, 40)) * 0.2
    for j in range(k):
        side = rng.choice([-1, 1], (family == j).sum())
        z[family == j] += np.outer(side, (9 - j) * directions[j])
    harmful = family >= 0
    found = fit(z, k)
    assert roc_auc_score(harmful, found.scores(z)) == 1
    assert roc_auc_score(harmful, fit(z, 1).scores(z)) < 0.9
    # Their span is that of the planted directions.
    assert np.linalg.norm(found.directions @ directions.T) ** 2 > 0.99 * k


# --- the stream is the SVD of the whole


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("mean", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("batch", [1, 7, 64, 299, 300])
def test_streaming_equals_the_full_svd(k, mean, batch):
    z = noise(mean=mean)
    found, (_, sigma, vh) = fit(z, k, batch), np.linalg.svd(z - z.mean(0), full_matrices=False)
    assert found.n_rows == 300
    np.testing.assert_allclose(found.mean, z.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.singular_values, sigma[:k], rtol=1e-6)
    np.testing.assert_allclose(abs((found.directions * vh[:k]).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(found.explained, (sigma[:k] ** 2).sum() / (sigma**2).sum(), rtol=1e-6)
    expected = svd_scores(z, k)
    np.testing.assert_allclose(found.scores(z), expected, rtol=1e-6, atol=1e-6 * expected.max())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_low_precision_input_is_accumulated_in_float64(dtype):
    z = noise(4000, 12, mean=30.0).astype(dtype)
    expected = svd_scores(z, 2)
    np.testing.assert_allclose(fit(z, 2, 33).scores(z), expected, rtol=1e-6, atol=1e-6 * expected.max())


@pytest.mark.parametrize("n, d", [(50, 8), (8, 50), (2, 5), (3000, 6)])
def test_one_direction_is_numpys_svd_exactly(n, d):
    z = noise(n, d, seed=n)
    expected = svd_scores(z)
    np.testing.assert_allclose(fit(z, batch=16).scores(z), expected, rtol=1e-9, atol=1e-12 * expected.max())


def test_neither_sign_nor_order_matters():
    z = noise()
    found = fit(z, 3, 50)
    scores = found.scores(z)
    np.testing.assert_allclose(fit(-z, 3, 50).scores(-z), scores, rtol=1e-8)
    order = RNG(3).permutation(len(z))
    np.testing.assert_allclose(fit(z[order], 3, 50).scores(z[order]), scores[order], rtol=1e-8)
    assert (scores >= 0).all()


def test_scores_do_not_depend_on_how_rows_are_put_together(tmp_path):
    z = noise(2500, 10).astype(np.float32)
    found = fit(z, 2)
    parts = np.concatenate([found.scores(z[i : i + 77]) for i in range(0, len(z), 77)])
    np.testing.assert_allclose(parts, found.scores(z), rtol=1e-10)
    z.tofile(tmp_path / "z")
    mapped = np.memmap(tmp_path / "z", np.float32, "r", shape=z.shape)
    assert (found.scores(mapped) == found.scores(z)).all()
    assert (fit(mapped, 2).scores(z) == found.scores(z)).all()
    assert found.scores(z[:0]).shape == (0,)


def test_duplicates_weigh_as_many_rows():
    z = noise(60, 6)
    twice = np.concatenate([z, z[:20]])
    np.testing.assert_allclose(fit(twice, 2, 9).scores(z), svd_scores(twice, 2)[:60], rtol=1e-8)


def test_sizes_of_the_numbers_do_not_matter():
    z = noise(mean=3.0)
    for scale in (1e-12, 1e9):
        np.testing.assert_allclose(fit(z * scale, 2).scores(z * scale), fit(z, 2).scores(z) * scale**2, rtol=1e-8)


# --- what cannot be filtered is refused


def test_one_row_equal_rows_and_too_many_directions():
    z = noise(20, 6)
    for rows in (z[:1], z[:0].reshape(0, 6)):
        with pytest.raises(ValueError, match="at least two"):
            fit(rows if len(rows) else np.empty((0, 6)))
    for row in (z[0], np.zeros(6), z[0] * 1e6, z[0] * 1e-6):
        for batch in (1, 3, 20):
            with pytest.raises(ValueError, match="all rows have the same activation"):
                fit(np.tile(row, (20, 1)), 1, batch)
    with pytest.raises(ValueError, match="n_directions=7, but 20 rows of size 6"):
        fit(z, 7)
    with pytest.raises(ValueError, match="n_directions=3, but 3 rows"):
        fit(z[:3], 3)
    assert fit(z, 6).explained == pytest.approx(1) and len(fit(z[:3], 2).directions) == 2
    with pytest.raises(ValueError, match="n_directions=0"):
        SAFTFitter(0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_names_its_row(value):
    z = noise(3000, 6)
    found = fit(z)
    z[2222, 3] = value
    with pytest.raises(ValueError, match="row 2223: its activation is not finite"):
        found.scores(z)
    with pytest.raises(ValueError, match="row 2223:"):
        fit(z, 1, 100)
    with pytest.raises(ValueError, match="row 2223:"):
        fit(z)


def test_shapes_are_checked():
    fitter = SAFTFitter().update(noise(10, 6))
    with pytest.raises(ValueError, match=r"shape \(10, 5\); give \[rows, 6\]"):
        fitter.update(noise(10, 5))
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        fitter.filter.scores(np.zeros(6))
    with pytest.raises(ValueError, match=r"give \[rows, d\]"):
        SAFTFitter().update(np.zeros(6))


# --- thresholds


@pytest.fixture
def found():
    return fit(noise(40, 5))


def test_contamination_drops_exactly_so_many(found):
    scores = RNG(0).permutation(40) / 7
    for dropped in range(41):
        drops = found.at_contamination(scores, dropped / 40).drops(scores)
        assert drops.sum() == dropped and set(np.flatnonzero(drops)) == set(np.argsort(-scores)[:dropped])
    assert found.drops(scores).sum() == 0, "a filter without a threshold drops nothing"
    assert found.at_contamination(scores, 0).drops(scores + 1e-9).sum() <= 1
    chosen = found.at_contamination(scores, 0.1)
    assert chosen.threshold_from == "expected contamination 0.1" and not chosen.chosen_with_labels
    for share in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            found.at_contamination(scores, share)
    with pytest.raises(ValueError, match="no scores"):
        found.at_contamination([], 0.1)


def test_ties_at_the_border_are_all_kept(found):
    scores = np.array([5, 4, 3, 3, 3, 1.0])
    assert [found.at_contamination(scores, i / 6).drops(scores).sum() for i in range(7)] == [0, 1, 2, 2, 2, 5, 6]
    equal = np.ones(6)
    assert [found.at_contamination(equal, i / 6).drops(equal).sum() for i in (0, 3, 5, 6)] == [0, 0, 0, 6]


def test_a_fixed_threshold_is_taken_as_it_is(found):
    scores = np.arange(6.0)
    assert found.at_threshold(3).drops(scores).tolist() == [False] * 4 + [True] * 2
    assert found.at_threshold(-np.inf).drops(scores).all() and not found.at_threshold(np.inf).drops(scores).any()
    with pytest.raises(ValueError, match="threshold=nan"):
        found.at_threshold(np.nan)
    with pytest.raises(ValueError, match="row 2: its score is nan"):
        found.drops([1, np.nan])


@pytest.mark.parametrize("seed", range(8))
def test_best_f1_equals_brute_force(found, seed):
    rng = RNG(seed)
    harmful = rng.random(50) < 0.3
    scores = np.round(rng.standard_normal(50) + harmful, 1 if seed % 2 else 6)  # with and without ties
    chosen = found.at_best_f1(scores, harmful)
    best = max(f1_score(harmful, scores > tau) for tau in (-np.inf, *scores))
    assert f1_score(harmful, chosen.drops(scores)) == pytest.approx(best)
    assert chosen.chosen_with_labels == ("threshold",) and chosen.threshold_from == "best F1 on 50 labelled rows"
    assert chosen.threshold == -np.inf or chosen.threshold not in scores, "between two scores"


def test_f1_needs_both_kinds_and_may_drop_everything(found):
    with pytest.raises(ValueError, match="all 3 labelled rows are of one kind"):
        found.at_best_f1([1, 2, 3], [True] * 3)
    chosen = found.at_best_f1([1, 1, 1], [True, True, False])
    assert chosen.drops([1, 1, 1]).all() and chosen.threshold == -np.inf


def test_steering_is_monotone_and_has_its_ends(found):
    scores = RNG(5).standard_normal(200) ** 2
    chosen = found.at_contamination(scores, 0.25)
    rates = np.linspace(-1, 1, 41)
    dropped = [chosen.steer(scores, rate).drops(scores) for rate in rates]
    counts = [drops.sum() for drops in dropped]
    assert counts[0] == 0 and counts[-1] == 200 and counts[20] == 50
    assert counts == sorted(counts) and len(set(counts)) == 41
    for fewer, more in pairwise(dropped):
        assert (more | ~fewer).all(), "what was dropped stays dropped"
    assert chosen.steer(scores, -0.5).drops(scores).sum() == 25
    assert chosen.steer(scores, 0.5).drops(scores).sum() == 50 + 75
    assert chosen.steer(scores, 0).threshold == chosen.threshold
    assert chosen.steer(scores, 0.5).threshold_from == "expected contamination 0.25, steered by +0.5"
    assert found.steer(scores, 0.1).drops(scores).sum() == 20, "from a filter that drops nothing"
    for rate in (-1.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="between -1"):
            chosen.steer(scores, rate)
    with pytest.raises(ValueError, match="no scores"):
        chosen.steer([], 0.5)


def test_one_side_is_chosen_with_labels():
    rng = RNG(7)
    z = rng.standard_normal((300, 4)) * [5, 1, 1, 1]
    harmful = z[:, 0] > 6
    for data in (z, -z):
        two, one = fit(data), fit(data).one_sided(data, harmful)
        assert one.chosen_with_labels == ("side",) and two.chosen_with_labels == ()
        assert fit(data).one_sided(data[harmful], [True] * harmful.sum()).side == one.side, "harmful rows alone say it"
        assert roc_auc_score(harmful, one.scores(data)) > 0.99 > 0.97 > roc_auc_score(harmful, two.scores(data))
    with pytest.raises(ValueError, match="one direction"):
        fit(z, 2).one_sided(z, harmful)
    with pytest.raises(ValueError, match="none of 300 labelled rows is harmful"):
        fit(z).one_sided(z, np.zeros(300, bool))


# --- the direction between labelled centroids


def hidden_harm(n, contamination, *, seed, d=20):
    """Harm shifts one direction of little variance, beside larger ones that have nothing to do with it."""
    rng = RNG(seed)
    harmful = np.arange(n) < contamination * n
    z = rng.standard_normal((n, d)) * np.where(np.arange(d) < 5, 2.5, 0.3) + 4
    z[harmful, 12] += 4
    return z, harmful


@pytest.mark.parametrize("contamination", [0.05, 0.1, 0.3])
def test_a_few_labels_find_what_has_little_variance(contamination):
    z, harmful = hidden_harm(600, contamination, seed=0)
    labelled, theirs = hidden_harm(400, 0.5, seed=1)
    assert roc_auc_score(harmful, fit(z, 4).scores(z)) < 0.65, "its variance is not the largest"
    for given, labels in ((labelled, theirs), (labelled[theirs], np.ones(200, bool))):
        found = SAFTFitter().update(z).toward(given, labels)
        assert roc_auc_score(harmful, found.scores(z)) > 0.99 and found.side == "+"
        assert found.chosen_with_labels == ("directions",)
        assert found.directions_from == f"centroids of {len(given)} labelled rows"


def test_its_scores_order_rows_by_distance_to_the_two_centroids():
    z, _ = hidden_harm(200, 0.1, seed=2)
    labelled, harmful = hidden_harm(40, 0.5, seed=3)
    found = SAFTFitter().update(z).toward(labelled, harmful)
    to_harmful, to_benign = (((z - labelled[kind].mean(0)) ** 2).sum(1) for kind in (harmful, ~harmful))
    distance = np.linalg.norm(labelled[harmful].mean(0) - labelled[~harmful].mean(0))
    np.testing.assert_allclose(np.diff(found.scores(z)), np.diff(to_benign - to_harmful) / (2 * distance), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(found.directions), 1)
    along = (z - z.mean(0)) @ found.directions[0]
    np.testing.assert_allclose(found.singular_values, np.linalg.norm(along))
    np.testing.assert_allclose(found.explained, (along**2).sum() / ((z - z.mean(0)) ** 2).sum())


@pytest.mark.parametrize("kinds", ["both", "harmful alone"])
def test_a_row_left_out_is_scored_by_the_others(kinds):
    z, _ = hidden_harm(200, 0.1, seed=4)
    labelled, harmful = hidden_harm(30, 0.5, seed=5)
    if kinds == "harmful alone":
        labelled, harmful = labelled[harmful], harmful[harmful]
    fitter = SAFTFitter().update(z)
    expected = []
    for i in range(len(labelled)):
        others = np.arange(len(labelled)) != i
        expected.append(fitter.toward(labelled[others], harmful[others]).scores(labelled[i : i + 1])[0])
    np.testing.assert_allclose(fitter.left_out(labelled, harmful), expected, rtol=1e-9)


def test_labels_of_noise_are_worth_nothing_when_rows_are_left_out():
    rng = RNG(6)
    z, labelled, harmful = rng.standard_normal((500, 200)), rng.standard_normal((40, 200)), np.arange(40) < 20
    fitter = SAFTFitter().update(z)
    assert roc_auc_score(harmful, fitter.toward(labelled, harmful).scores(labelled)) > 0.95, "they made the direction"
    assert roc_auc_score(harmful, fitter.left_out(labelled, harmful)) < 0.75


def test_labelled_rows_without_a_direction_are_refused():
    z = noise(40, 6)
    fitter = SAFTFitter().update(z)
    with pytest.raises(ValueError, match="none of 40 labelled rows is harmful"):
        fitter.toward(z, np.zeros(40, bool))
    with pytest.raises(ValueError, match="the same centroid"):
        fitter.toward(np.tile(z[:1], (4, 1)), [True, False] * 2)
    with pytest.raises(ValueError, match="give two at least"):
        fitter.left_out(z[:3], [True, False, False])
    with pytest.raises(ValueError, match=r"shape \(4, 5\)"):
        fitter.toward(z[:4, :5], [True, False] * 2)
    with pytest.raises(ValueError, match="at least two"):
        SAFTFitter().update(z[:1]).toward(z[:4], [True, False] * 2)
    labelled = z[:4].copy()
    labelled[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 3: its activation is not finite"):
        fitter.toward(labelled, [True, False] * 2)


# --- rows and files


def test_kept_and_dropped_are_the_rows_in_order_with_their_scores(found):
    rows = Dataset.from_dict({"text": list("abcdef"), SCORE: [9.0] * 6})
    scores = [0, 5, 1, 7, 2, 3.0]
    kept, dropped = found.at_threshold(2).filter(rows, scores)
    assert kept["text"][:] == ["a", "c", "e"] and kept[SCORE][:] == [0, 1, 2]
    assert dropped["text"][:] == ["b", "d", "f"] and dropped[SCORE][:] == [5, 7, 3]
    kept, dropped = found.at_threshold(99).filter(rows, scores)
    assert len(kept) == 6 and len(dropped) == 0
    kept, dropped = found.at_threshold(-1).filter(rows, scores)
    assert len(kept) == 0 and len(dropped) == 6 and dropped.column_names == kept.column_names
    with pytest.raises(ValueError, match="6 rows and 5 scores"):
        found.filter(rows, scores[:5])


@pytest.mark.parametrize("threshold", [1.5, np.inf, -np.inf])
def test_a_saved_filter_is_the_same_filter(tmp_path, threshold):
    z = noise()
    saved = replace(fit(z, 3).at_threshold(threshold), chosen_with_labels=("layer", "threshold"))
    loaded = SAFTFilter.load(saved.save(tmp_path / "filter"))
    assert (loaded.scores(z) == saved.scores(z)).all() and loaded.threshold == threshold
    for name in (
        "explained",
        "n_rows",
        "side",
        "directions_from",
        "threshold_from",
        "chosen_with_labels",
        "layer",
        "pooling",
    ):
        assert getattr(loaded, name) == getattr(saved, name), name
    text = (tmp_path / "filter" / "saft_filter.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert {p.name for p in (tmp_path / "filter").iterdir()} == {"saft_filter.json", "saft_filter.safetensors"}


def test_what_is_no_filter_is_said(tmp_path):
    with pytest.raises(ValueError, match="no filter that"):
        SAFTFilter.load(tmp_path)
    fit(noise()).save(tmp_path)
    arrays = load_file(tmp_path / "saft_filter.safetensors")
    save_file(arrays | {"mean": np.full_like(arrays["mean"], np.nan)}, tmp_path / "saft_filter.safetensors")
    with pytest.raises(ValueError, match="mean is not finite"):
        SAFTFilter.load(tmp_path)
    (tmp_path / "saft_filter.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no filter that"):
        SAFTFilter.load(tmp_path)
    with pytest.raises(ValueError, match="side='left'"):
        SAFTFilter(mean=np.zeros(2), directions=np.eye(2)[:1], singular_values=np.ones(1), explained=1, n_rows=2,
                   side="left")  # fmt: skip
