"""How well scores find harmful rows, and the other ways to score that SAFT is compared with."""

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def detection_table(
    harmful: ArrayLike, scores: dict[str, tuple[ArrayLike, int]], *, n_resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """A row per detector: how well its scores set harmful rows apart, with 95 % bootstrap intervals over rows.

    Args:
        harmful: `[n]`, whether each row is harmful.
        scores: name -> (scores `[n]`, the higher the more harmful; number of labelled rows the detector was given).

    Returns:
        Columns detector, labels, n, n_harmful; auroc, auprc and precision (among as many rows of the highest scores as
        there are harmful ones), each with `_low` and `_high`. Rows are resampled within harmful and benign ones. All
        are nan unless both kinds occur.
    """
    harmful = np.asarray(harmful, dtype=bool)
    kinds = [np.flatnonzero(harmful), np.flatnonzero(~harmful)]
    rng = np.random.default_rng(seed)
    draws = np.stack([np.concatenate([rng.choice(kind, len(kind)) for kind in kinds]) for _ in range(n_resamples)])
    rows = []
    for name, (values, labels) in scores.items():
        values = np.asarray(values, dtype=np.float64)
        row = {"detector": name, "labels": labels, "n": len(harmful), "n_harmful": len(kinds[0])}
        resampled = _measures(harmful[draws], values[draws])
        for measure, value in measures(harmful, values).items():
            low, high = np.quantile(resampled[measure], (0.025, 0.975))
            row |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def measures(harmful: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """auroc, auprc and precision (see `detection_table`) of scores `[n]`; nan unless both kinds of rows occur.

    Equal scores count half in auroc; in the others the earlier row comes first.
    """
    harmful, scores = np.asarray(harmful, dtype=bool), np.asarray(scores, dtype=np.float64)
    return {name: float(values[0]) for name, values in _measures(harmful[None], scores[None]).items()}


def anchor_similarity(activations: ArrayLike, anchors: ArrayLike, anchors_harmful: ArrayLike) -> np.ndarray:
    """`[n]`: mean cosine to the harmful anchors minus mean cosine to the benign ones, from `[n, d]` and `[m, d]`.

    Few labelled examples, as in LARF-like detectors; activations are centred by the anchors' mean first, for raw ones
    all point the same way.
    """
    anchors, anchors_harmful = np.asarray(anchors, dtype=np.float64), np.asarray(anchors_harmful, dtype=bool)
    centre = anchors.mean(0)
    unit = _unit(np.asarray(activations, dtype=np.float64) - centre)
    harmful, benign = (_unit(anchors[chosen] - centre).mean(0) for chosen in (anchors_harmful, ~anchors_harmful))
    return unit @ (harmful - benign)


def nearest_centroid(activations: ArrayLike, labelled: ArrayLike, labelled_harmful: ArrayLike) -> np.ndarray:
    """`[n]`: distance to the centroid of labelled benign rows minus that to the harmful ones' centroid."""
    z, labelled = np.asarray(activations, dtype=np.float64), np.asarray(labelled, dtype=np.float64)
    labelled_harmful = np.asarray(labelled_harmful, dtype=bool)
    harmful, benign = (labelled[chosen].mean(0) for chosen in (labelled_harmful, ~labelled_harmful))
    return np.linalg.norm(z - benign, axis=1) - np.linalg.norm(z - harmful, axis=1)


def logistic_probe(activations: ArrayLike, harmful: ArrayLike, *, folds: int = 5) -> np.ndarray:
    """`[n]`: a linear probe's probability of harm, each row scored by a probe fitted on the other folds.

    It has all labels but the row's own: an upper bound on what one linear direction of these activations can tell.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    harmful = np.asarray(harmful, dtype=bool)
    folds = min(folds, int(harmful.sum()), int((~harmful).sum()))
    if folds < 2:
        return np.full(len(harmful), math.nan)
    found = cross_val_predict(probe, np.asarray(activations, np.float64), harmful, cv=folds, method="predict_proba")
    return found[:, 1]


def scores_of_quality(harmful: ArrayLike, auroc: float, *, seed: int) -> np.ndarray:
    """Made-up scores with a given AUROC in expectation: normal, shifted by √2 Φ⁻¹(AUROC) for harmful rows.

    0.5 is chance; 1 scores every harmful row above every benign one.
    """
    if not 0.5 <= auroc <= 1:
        raise ValueError(f"auroc={auroc}: give a quality from 0.5 (chance) to 1 (perfect).")
    harmful = np.asarray(harmful, dtype=bool)
    noise = np.random.default_rng(seed).standard_normal(len(harmful))
    shift = np.ptp(noise) + 1 if auroc == 1 else math.sqrt(2) * stats.norm.ppf(auroc)
    return noise + shift * harmful


def _measures(harmful: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    """`measures` of many resamples at once, `[resamples, n]`: by sklearn, a bootstrap takes minutes."""
    n, n_harmful = harmful.shape[1], harmful.sum(1)
    defined = (n_harmful > 0) & (n_harmful < n) & np.isfinite(scores).all(1)
    hits = np.take_along_axis(harmful, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    precision_at = hits.cumsum(1) / np.arange(1, n + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rank_sum = (stats.rankdata(scores, axis=1) * harmful).sum(1)
        found = {
            "auroc": (rank_sum - n_harmful * (n_harmful + 1) / 2) / (n_harmful * (n - n_harmful)),
            "auprc": (precision_at * hits).sum(1) / n_harmful,
            "precision": np.take_along_axis(precision_at, np.maximum(n_harmful - 1, 0)[:, None], axis=1)[:, 0],
        }
    return {name: np.where(defined, values, math.nan) for name, values in found.items()}


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
