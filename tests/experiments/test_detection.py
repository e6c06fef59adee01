"""Detection measures against scikit-learn, detectors on activations whose structure is planted, and their figure."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from tasft_lib.experiments import row_detectors
from tasft_lib.reporting import figures


def planted(seed: int, n: int = 400, shift: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Activations, `[n, 12]`, and which rows are harmful: those are shifted along one direction."""
    rng = np.random.default_rng(seed)
    harmful = rng.random(n) < 0.25
    direction = rng.standard_normal(12)
    return rng.standard_normal((n, 12)) + 3 + shift * harmful[:, None] * direction / np.linalg.norm(direction), harmful


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_measures_are_scikit_learns(seed, ties):
    rng = np.random.default_rng(seed)
    harmful = rng.random(200) < 0.3
    scores = rng.standard_normal(200) + harmful
    scores = np.round(scores) if ties else scores
    found = row_detectors.measures(harmful, scores)
    assert found["auroc"] == pytest.approx(roc_auc_score(harmful, scores), abs=1e-12)
    if not ties:  # which scikit-learn counts as one threshold
        assert found["auprc"] == pytest.approx(average_precision_score(harmful, scores), abs=1e-12)
        top = np.argsort(scores)[::-1][: harmful.sum()]
        assert found["precision"] == pytest.approx(harmful[top].mean())


def test_measures_are_undefined_for_one_kind_or_broken_scores():
    scores = np.arange(4.0)
    for harmful, values in (
        (np.zeros(4), scores),
        (np.ones(4), scores),
        (np.array([0, 1, 0, 1]), np.array([1, np.nan, 2, 3])),
    ):
        assert all(np.isnan(value) for value in row_detectors.measures(harmful, values).values())


def test_intervals_cover_the_truth_and_shrink_with_rows():
    expected = stats.norm.cdf(1 / np.sqrt(2))  # AUROC of two normals one standard deviation apart
    covered, widths = 0, {}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        harmful = np.arange(300) < 100
        table = row_detectors.detection_table(
            harmful, {"shift": (rng.standard_normal(300) + harmful, 0)}, n_resamples=200
        )
        row = table.iloc[0]
        covered += row["auroc_low"] <= expected <= row["auroc_high"]
    assert covered >= 33  # of 40; at 95 % fewer have a probability below 0.01
    for n in (100, 1600):
        rng = np.random.default_rng(0)
        harmful = np.arange(n) % 4 == 0
        row = row_detectors.detection_table(harmful, {"s": (rng.standard_normal(n) + harmful, 0)}).iloc[0]
        widths[n] = row["auroc_high"] - row["auroc_low"]
    assert widths[1600] < 0.5 * widths[100]


@pytest.mark.parametrize("seed", range(3))
def test_labelled_detectors_find_a_planted_direction_and_the_centre_does_not_matter(seed):
    z, harmful = planted(seed)
    few = np.r_[np.flatnonzero(harmful)[:10], np.flatnonzero(~harmful)[:10]]
    rest = np.setdiff1d(np.arange(len(z)), few)
    for detector in (row_detectors.anchor_similarity, row_detectors.nearest_centroid):
        scores = detector(z[rest], z[few], harmful[few])
        assert row_detectors.measures(harmful[rest], scores)["auroc"] > 0.95
        np.testing.assert_allclose(detector(z[rest] + 100, z[few] + 100, harmful[few]), scores, atol=1e-8)
    assert row_detectors.measures(harmful, row_detectors.logistic_probe(z, harmful))["auroc"] > 0.97


def test_the_probe_never_sees_the_label_of_the_row_it_scores():
    rng = np.random.default_rng(0)
    harmful = np.arange(300) % 3 == 0
    noise = rng.standard_normal((300, 100))  # enough to learn every label by heart
    assert 0.35 < row_detectors.measures(harmful, row_detectors.logistic_probe(noise, harmful))["auroc"] < 0.65
    assert np.isnan(
        row_detectors.logistic_probe(noise, np.arange(300) == 0)
    ).all()  # one harmful row: no fold has another


@pytest.mark.parametrize("quality", [0.5, 0.7, 0.95])
def test_made_up_scores_have_the_quality_asked_for(quality):
    harmful = np.arange(1000) % 5 == 0
    found = [
        row_detectors.measures(harmful, row_detectors.scores_of_quality(harmful, quality, seed=seed))["auroc"]
        for seed in range(30)
    ]
    assert np.mean(found) == pytest.approx(quality, abs=0.01)


def test_perfect_made_up_scores_and_impossible_ones():
    harmful = np.arange(50) % 7 == 0
    assert row_detectors.measures(harmful, row_detectors.scores_of_quality(harmful, 1.0, seed=3))["auroc"] == 1
    with pytest.raises(ValueError, match=r"auroc=0\.4"):
        row_detectors.scores_of_quality(harmful, 0.4, seed=0)


def test_lines_over_contamination_go_from_left_to_right_whatever_the_order_of_the_table():
    shares = [0.1, 0.3, 0.05, 0.2]
    ends = {f"{name}{end}": 0.5 for name in ("auroc", "precision") for end in ("", "_low", "_high")}
    table = pd.DataFrame([{"detector": name, "labels": 0, "contamination": c} | ends for name in "ab" for c in shares])
    for axis in figures.plot_detection(table, caption="").axes[:2]:
        places = [bars.lines[0].get_xdata() for bars in axis.containers]
        assert len(places) == 2 and all((np.diff(x) > 0).all() for x in places)
