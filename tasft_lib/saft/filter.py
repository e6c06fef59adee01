"""SAFT (Choi, Du and Li, arXiv:2410.10014): harmful rows of a fine-tuning set, found by a model's own activations.

Of all rows' activations z (centred), v₁ is the first right singular vector; a row's score is ⟨z, v₁⟩², and rows with a
score above τ are dropped. No labels are needed. Some functions take them, and a filter records which of its
parts were chosen with their help.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.linalg
from datasets import Dataset
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from sklearn.metrics import precision_recall_curve

from ..storage.files import whole, write_json

Side = Literal["both", "+", "-"]
SCORE = "saft_score"
BLOCK = 1024  # rows taken to float64 at a time
# Activations are float32 at best: differences below its resolution are rounding.
RESOLUTION = float(np.finfo(np.float32).eps)


def check_rows(n: int) -> None:
    """Refuse fewer than two rows."""
    if n < 2:
        raise ValueError(f"SAFT compares rows with each other and got {n}; give at least two.")


def check_share(contamination: float) -> None:
    """Refuse a share outside [0, 1]."""
    if not 0 <= contamination <= 1:
        raise ValueError(f"contamination={contamination}: the share of harmful rows lies between 0 and 1.")


def check_threshold(threshold: float) -> None:
    """Refuse a τ that is no number."""
    if np.isnan(threshold):
        raise ValueError("threshold=nan: give a number.")


def check_rate(rate: float) -> None:
    """Refuse a steering rate outside [-1, 1]."""
    if not -1 <= rate <= 1:
        raise ValueError(f"steering by {rate}: give a rate between -1 (drop nothing) and 1 (drop everything).")


class SAFTFitter:
    """Accumulates batches of activations; `filter` is what they give.

    Holds the mean and the scatter matrix in float64, merged batch by batch (Chan et al.), so memory is `8·d²` bytes
    whatever the number of rows, and the result is that of an SVD of all rows at once, up to rounding: the right
    singular vectors of the centred matrix are the eigenvectors of the scatter matrix.

    Args:
        n_directions: k, how many singular vectors the score uses.

    Example:

    ```python
    fitter = SAFTFitter()
    for batch in batches:  # [n, d]
        fitter.update(batch)
    saft = fitter.filter
    saft = saft.at_contamination(saft.scores(activations), 0.1)
    ```
    """

    def __init__(self, n_directions: int = 1):
        if n_directions < 1:
            raise ValueError(f"n_directions={n_directions}: SAFT needs at least one singular vector.")
        self.n_directions = n_directions
        self.n_rows = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def update(self, activations: ArrayLike) -> "SAFTFitter":
        """Add rows, `[n, d]` (any float type); an array larger than memory may be a `numpy.memmap`.

        Raises `ValueError` naming the row (of all rows so far, from 1) for NaN or infinite activations.
        """
        for block in _blocks(activations, None if self._mean is None else len(self._mean), first_row=self.n_rows):
            if self._mean is None:
                self._mean, self._scatter = np.zeros(block.shape[1]), np.zeros((block.shape[1],) * 2)
            n, total, mean = len(block), self.n_rows + len(block), block.mean(0)
            shift = mean - self._mean
            # One row more stands for the distance of the two means.
            centred = np.vstack([block - mean, shift * np.sqrt(self.n_rows * n / total)])
            self._scatter += centred.T @ centred
            self._mean = self._mean + shift * (n / total)
            self.n_rows = total
        return self

    @property
    def filter(self) -> "SAFTFilter":
        """The filter of the rows so far, without a threshold yet.

        Raises `ValueError` with fewer than two rows, with no variance at all (every row the same) and for more
        directions than there can be.
        """
        variance = self._variance()
        k, size = self.n_directions, len(self._mean)
        if k > min(self.n_rows - 1, size):
            raise ValueError(f"n_directions={k}, but {self.n_rows} rows of size {size} have fewer; lower it.")
        values, vectors = scipy.linalg.eigh(self._scatter, subset_by_index=(size - k, size - 1))
        values = values[::-1].clip(min=0)
        return SAFTFilter(
            mean=self._mean,
            directions=np.ascontiguousarray(vectors[:, ::-1].T),
            singular_values=np.sqrt(values),
            explained=min(float(values.sum()) / variance, 1.0),
            n_rows=self.n_rows,
        )

    def toward(self, labelled: ArrayLike, harmful: ArrayLike) -> "SAFTFilter":
        """The filter that scores by the projection on the line from the benign to the harmful labelled rows' centroid.

        Ours, for where the largest variance is not harm: of all directions a few labels say which one is. The
        projection orders rows by squared distance to the one centroid minus that to the other. Where all labelled rows
        are harmful the centroid of the unlabelled ones stands for the benign: it lies on the same line, as far as the
        labelled rows are like the harmful ones among them.

        Args:
            labelled: activations, `[m, d]`.
            harmful: `[m]`, whether each is harmful; one is at least.

        Raises `ValueError` with fewer than two unlabelled rows, for activations that are not finite or all the same,
        without a harmful row and where the centroids coincide.
        """
        variance = self._variance()
        labelled, harmful, away = self._towards_harm(labelled, harmful)
        if (length := np.linalg.norm(away)) <= RESOLUTION * np.linalg.norm(self._mean):
            raise ValueError("harmful and benign rows have the same centroid; give more labelled rows, or other ones.")
        direction = away / length
        along = float(direction @ self._scatter @ direction)
        return SAFTFilter(
            mean=self._mean,
            directions=direction[None],
            singular_values=np.sqrt([along]),
            explained=min(along / variance, 1.0),
            n_rows=self.n_rows,
            side="+",
            directions_from=f"centroids of {len(harmful)} labelled rows",
            chosen_with_labels=("directions",),
        )

    def left_out(self, labelled: ArrayLike, harmful: ArrayLike) -> np.ndarray:
        """`[m]`: the score that `toward` gives each labelled row when that row has no part in its centroid.

        Scores of rows that made the direction flatter it. Raises `ValueError` for fewer than two rows of a kind.
        """
        labelled, harmful, away = self._towards_harm(labelled, harmful)
        counts = np.where(harmful, harmful.sum(), (~harmful).sum())
        if counts.min() < 2:
            raise ValueError("one labelled row of a kind: without it there is no centroid; give two at least.")
        own = np.where(harmful[:, None], labelled[harmful].mean(0), 0.0)
        if not harmful.all():
            own[~harmful] = labelled[~harmful].mean(0)
        # The centroid of n rows without row i lies (centroid - row) / (n - 1) from it.
        away = away + np.where(harmful, 1, -1)[:, None] * (own - labelled) / (counts - 1)[:, None]
        return ((labelled - self._mean) * away).sum(1) / np.linalg.norm(away, axis=1)

    def _towards_harm(self, labelled: ArrayLike, harmful: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labelled activations and labels, checked, and the harmful ones' centroid minus the benign ones', `[d]`."""
        labelled = np.concatenate(list(_blocks(labelled, len(self._mean))))
        harmful = np.asarray(harmful, dtype=bool)
        if not harmful.any():
            raise ValueError(f"none of {len(harmful)} labelled rows is harmful, so there is no direction towards harm.")
        benign = self._mean if harmful.all() else labelled[~harmful].mean(0)
        return labelled, harmful, labelled[harmful].mean(0) - benign

    def _variance(self) -> float:
        """Sum of squares around the mean; raises where there is nothing to compare."""
        check_rows(self.n_rows)
        variance = float(np.trace(self._scatter))
        if variance <= RESOLUTION**2 * self.n_rows * float(self._mean @ self._mean):
            raise ValueError("all rows have the same activation, so nothing sets harmful ones apart; check the data.")
        return variance


@dataclass(frozen=True, kw_only=True, eq=False)
class SAFTFilter:
    """Scores activations, and drops rows whose score is above a threshold. Made by `SAFTFitter`.

    Attributes:
        mean: `[d]`, subtracted from activations.
        directions: `[k, d]`, unit vectors: right singular vectors of the centred activations, or see `directions_from`.
        singular_values: `[k]`, the length of all rows' projections on each direction.
        explained: share of the variance along the directions, in (0, 1].
        n_rows: rows it was fitted on.
        side: "both" for the paper's squared projection; "+" or "-" for the projection on one side alone, which needs
            labels to be chosen (the sign of a singular vector is arbitrary) and exists for k = 1.
        directions_from: "singular vectors", or the labelled rows of `SAFTFitter.toward`.
        threshold: τ; infinite until one is chosen, which drops nothing.
        threshold_from: how τ was chosen.
        chosen_with_labels: what of this filter was chosen with labels: any of layer, pooling, directions, side and
            threshold.
        layer, pooling: where the activations come from (see `activations.activations`); None where nobody said.
    """

    mean: np.ndarray
    directions: np.ndarray
    singular_values: np.ndarray
    explained: float
    n_rows: int
    side: Side = "both"
    directions_from: str = "singular vectors"
    threshold: float = np.inf
    threshold_from: str = "none"
    chosen_with_labels: tuple[str, ...] = ()
    layer: int | None = None
    pooling: str | None = None

    def __post_init__(self):
        if self.side not in ("both", "+", "-") or (self.side != "both" and len(self.directions) > 1):
            raise ValueError(
                f"side={self.side!r} with {len(self.directions)} directions; use 'both', or one direction."
            )

    def scores(self, activations: ArrayLike) -> np.ndarray:
        """`[n]`, from activations `[n, d]`: ⟨z, v₁⟩², for k > 1 the mean of ⟨z, v_j⟩² weighted by σ_j; 0 and more.

        One-sided: the signed projection. Raises `ValueError` naming the row for activations that are not finite.
        """
        parts = [np.empty(0)]
        for block in _blocks(activations, len(self.mean)):
            projections = (block - self.mean) @ self.directions.T
            if self.side == "both":
                parts.append(projections**2 @ (self.singular_values / self.singular_values.sum()))
            else:
                parts.append(projections[:, 0] * (1 if self.side == "+" else -1))
        return np.concatenate(parts)

    def drops(self, scores: ArrayLike) -> np.ndarray:
        """`[n]`, bool: the rows with a score above the threshold. Raises `ValueError` for a score that is NaN."""
        return _checked(scores) > self.threshold

    def at_threshold(self, threshold: float) -> "SAFTFilter":
        """With a fixed τ; infinite ones drop nothing or everything. Raises `ValueError` for NaN."""
        check_threshold(threshold)
        return replace(self, threshold=float(threshold), threshold_from="fixed")

    def at_contamination(self, scores: ArrayLike, contamination: float) -> "SAFTFilter":
        """With the τ that drops the expected share of harmful rows, the highest scores first; no labels needed.

        Of `n` scores `round(contamination · n)` are dropped, fewer where the score at the border occurs several times.
        Raises `ValueError` for a share outside [0, 1] and for no scores.
        """
        check_share(contamination)
        how = f"expected contamination {contamination:g}"
        return replace(self, threshold=_quantile(scores, contamination), threshold_from=how)

    def at_best_f1(self, scores: ArrayLike, harmful: ArrayLike) -> "SAFTFilter":
        """With the τ of the best F1 on a labelled validation set: scores `[n]` and whether each row is harmful.

        Raises `ValueError` unless both kinds occur.
        """
        harmful, scores = _both_kinds(harmful), _checked(scores)
        precision, recall, thresholds = precision_recall_curve(harmful, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        # The curve's thresholds are scores that are still dropped; ours is halfway to the largest one kept.
        lowest_dropped = thresholds[np.argmax(f1[:-1])]
        below = scores[scores < lowest_dropped]
        highest_kept = float(below.max()) if len(below) else -np.inf
        halfway = (highest_kept + lowest_dropped) / 2
        threshold = float(halfway) if halfway < lowest_dropped else highest_kept
        how = f"best F1 on {len(harmful)} labelled rows"
        chosen = (*self.chosen_with_labels, "threshold")
        return replace(self, threshold=threshold, threshold_from=how, chosen_with_labels=chosen)

    def steer(self, scores: ArrayLike, rate: float) -> "SAFTFilter":
        """τ moved (SAFT, Fig 5): a rate above 0 drops that share of the rows kept so far too, below 0 keeps that share
        of the dropped ones; −1 drops nothing, 1 everything. (The paper does not define its rate; this one is ours.)
        """
        check_rate(rate)
        if rate == 0:
            return self
        scores = _checked(scores)
        dropped = float(self.drops(scores).mean()) if len(scores) else 0.0
        share = dropped + rate * (1 - dropped if rate > 0 else dropped)
        how = f"{self.threshold_from}, steered by {rate:+g}"
        return replace(self, threshold=_quantile(scores, share), threshold_from=how)

    def one_sided(self, scores_of: ArrayLike, harmful: ArrayLike) -> "SAFTFilter":
        """The side of v₁ that labelled harmful rows lie on: activations `[n, d]` and whether each is harmful.

        It is the side away from the benign ones, without any from the mean. Raises `ValueError` without harmful rows.
        """
        harmful = np.asarray(harmful, dtype=bool)
        if not harmful.any():
            raise ValueError(f"none of {len(harmful)} labelled rows is harmful, so no side is.")
        projections = replace(self, side="+").scores(scores_of)
        benign = 0.0 if harmful.all() else projections[~harmful].mean()
        side = "+" if projections[harmful].mean() > benign else "-"
        return replace(self, side=side, chosen_with_labels=(*self.chosen_with_labels, "side"))

    def filter(self, rows: Dataset, scores: ArrayLike) -> tuple[Dataset, Dataset]:
        """(kept, dropped) rows in their order, each with its score in the column `saft_score`."""
        scores = np.asarray(scores, dtype=np.float64)
        if len(scores) != len(rows):
            raise ValueError(f"{len(rows)} rows and {len(scores)} scores; give one score per row.")
        scored = (rows.remove_columns(SCORE) if SCORE in rows.column_names else rows).add_column(SCORE, scores)
        dropped = self.drops(scores)
        return scored.select(np.flatnonzero(~dropped)), scored.select(np.flatnonzero(dropped))

    def save(self, folder: Path) -> Path:
        """`saft_filter.safetensors` and `saft_filter.json` in `folder`, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "saft_filter.safetensors") as temporary:
            temporary.write_bytes(save({name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}))
        rest = {name: value for name, value in asdict(self).items() if name not in _ARRAYS}
        if np.isinf(self.threshold):  # JSON has no word for it
            rest["threshold"] = str(self.threshold)
        write_json(folder / "saft_filter.json", rest)
        return folder

    @classmethod
    def load(cls, folder: Path) -> "SAFTFilter":
        """What `save` wrote. Raises `ValueError` where it did not."""
        try:
            arrays = load_file(folder / "saft_filter.safetensors")
            if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
                raise ValueError(f"{broken[0]} is not finite")
            rest = json.loads((folder / "saft_filter.json").read_text(encoding="utf-8"))
            rest["threshold"] = float(rest["threshold"])
            rest["chosen_with_labels"] = tuple(rest["chosen_with_labels"])
            return cls(**arrays, **{f.name: rest[f.name] for f in fields(cls) if f.name not in _ARRAYS})
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: no filter that SAFTFilter.save wrote ({str(error)!r:.100}).") from error


_ARRAYS = ("mean", "directions", "singular_values")


def _blocks(activations: ArrayLike, size: int | None, first_row: int = 0) -> Iterator[np.ndarray]:
    """Float64 blocks of `[n, d]`, checked, so that memory does not grow with n; `size` is the d expected."""
    activations = activations if isinstance(activations, np.ndarray) else np.asarray(activations)
    if activations.ndim != 2 or size not in (None, activations.shape[1]):
        raise ValueError(f"activations of shape {activations.shape}; give [rows, {size or 'd'}].")
    for start in range(0, len(activations), BLOCK):
        block = np.asarray(activations[start : start + BLOCK], dtype=np.float64)
        if len(broken := np.flatnonzero(~np.isfinite(block).all(1))):
            raise ValueError(
                f"row {first_row + start + broken[0] + 1}: its activation is not finite; load the model in float32 or "
                "bfloat16, or remove the row."
            )
        yield block


def _checked(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if len(broken := np.flatnonzero(np.isnan(scores))):
        raise ValueError(f"row {broken[0] + 1}: its score is nan; give a number for every row.")
    return scores


def _quantile(scores: ArrayLike, share: float) -> float:
    """The τ above which `round(share · n)` of the scores lie."""
    descending = np.sort(_checked(scores))[::-1]
    if len(descending) == 0:
        raise ValueError("no scores: there is nothing to filter.")
    dropped = round(share * len(descending))
    return float(descending[dropped]) if dropped < len(descending) else -np.inf


def _both_kinds(harmful: ArrayLike) -> np.ndarray:
    harmful = np.asarray(harmful, dtype=bool)
    if harmful.all() or not harmful.any():
        raise ValueError(f"all {len(harmful)} labelled rows are of one kind; harmful and benign ones are needed.")
    return harmful
