"""SAFT on a model and a data set: choose where to read and how to score, fit, choose the threshold."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..records import data
from ..storage.files import content_hash
from ..storage.integrity import locked
from .activations import POOLINGS, activations, check_poolings, middle_layer, n_layers
from .filter import BLOCK, SAFTFilter, SAFTFitter, check_rate, check_rows, check_share, check_threshold

SELECTION_ROWS = 2000  # rows that settings are compared on, in all layers; the best one is fitted on all rows
DIRECTIONS = (1, 2, 4, 8)
DEFAULT_POOLING, DEFAULT_DIRECTIONS = "last", 4  # where nothing and nobody chooses


class Scoring(StrEnum):
    """How directions score a row."""

    BOTH_SIDES = "both sides"  # the paper's: k singular vectors, squared projections
    ONE_SIDE = "one side"  # the first singular vector, the side that labelled harmful rows lie on
    CENTROIDS = "centroids"  # the line from the benign to the harmful labelled rows' centroid


class Setting(NamedTuple):
    """Where activations are read, and how they are scored."""

    layer: int
    pooling: str
    n_directions: int
    scoring: Scoring = Scoring.BOTH_SIDES


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is known of the harmful rows before they are looked for. Only `validation` uses labels.

    Attributes:
        contamination: share of harmful rows expected, in [0, 1]; the highest scores are dropped.
        threshold: τ itself.
        validation: rows with `label` too (False: harmful). Of `layer`, `pooling` and `n_directions` those that are not
            given are the ones of the highest AUROC on them, see `choose_setting`. Without `contamination` and
            `threshold`, τ has the best F1 on them. If all of them are harmful, the rows stand for the benign ones,
            without the share of `contamination` that scores highest, which is needed then.
        layer: from 1; by default the middle one (`activations.middle_layer`).
        pooling: by default of the last token.
        n_directions: k singular vectors; by default 4.
        steer: moves τ, see `SAFTFilter.steer`.

    Raises `ValueError`, one line, for settings that contradict each other.
    """

    contamination: float | None = None
    threshold: float | None = None
    validation: Dataset | None = None
    layer: int | None = None
    pooling: str | None = None
    n_directions: int | None = None
    steer: float = 0.0

    def __post_init__(self):
        if self.contamination is not None and self.threshold is not None:
            raise ValueError("contamination and threshold both say how many rows are dropped; give one of them.")
        if self.contamination is self.threshold is self.validation is None:
            raise ValueError("give contamination, threshold or validation.")
        if self.contamination is not None:
            check_share(self.contamination)
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.validation is not None:
            labels = set(self.validation["label"][:])
            if False not in labels:
                raise ValueError("validation: no row is harmful (label false).")
            if True not in labels and self.contamination is None:
                raise ValueError(
                    "validation: all rows are harmful (label false); say by contamination how many to drop."
                )
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer {self.layer}: layers count from 1.")
        check_poolings(() if self.pooling is None else (self.pooling,))
        check_rate(self.steer)

    def check(self, n_rows: int) -> None:
        """Refuse, in one line, so many rows where they are too few."""
        check_rows(n_rows)
        n_directions = DEFAULT_DIRECTIONS if self.n_directions is None else self.n_directions
        if not 1 <= n_directions < n_rows:
            raise ValueError(f"n_directions={n_directions}: {n_rows} rows have 1 to {n_rows - 1}.")

    @property
    def harmful(self) -> np.ndarray:
        """`[m]`, bool: the validation rows that are harmful."""
        return ~np.array(self.validation["label"][:], dtype=bool)

    @property
    def left_to_labels(self) -> tuple[str, ...]:
        """What the validation rows choose of layer, pooling and directions."""
        given = {"layer": self.layer, "pooling": self.pooling, "directions": self.n_directions}
        return () if self.validation is None else tuple(name for name, value in given.items() if value is None)


class Fit(NamedTuple):
    """A filter without a threshold, the score of each row, `[n]`, and of each validation row, `[m]`.

    A validation row that made the direction is scored as if it had no part in it.
    """

    saft: SAFTFilter
    scores: np.ndarray
    of_validation: np.ndarray | None


def find_harmful(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    search: Search,
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    folder: Path | None = None,
    progress: bool = True,
) -> tuple[SAFTFilter, np.ndarray]:
    """The filter of `rows`, threshold included, and the score of each row, `[n]`: what it drops is thought harmful.

    Rows with the same text get the same score, so that they end on the same side.

    Args:
        rows: `prompt` and `completion` (see `forms.to_training_rows`); a `label` is not looked at.
        max_length: tokens read of a row; by default the model's context.
        folder: where activations are kept, so that a run that was cut off goes on and another threshold costs nothing.
            Files are named by the model's weights, the rows and what is read of them. By default a temporary folder:
            activations are on disk in any case, so that memory does not grow with the rows.

    Raises `ValueError` for rows that are too few or all the same, and naming the row for activations that are not
    finite.
    """
    search.check(len(rows))
    if not _first_occurrence(rows).any():
        raise ValueError(
            f"all {len(rows)} rows have the same text, so nothing sets harmful ones apart; check the data."
        )
    with _kept_in(folder) as kept_in:
        identity = _identity(model, tokenizer) if folder is not None else ""  # a temporary folder has one model's alone
        read = Reader(model, tokenizer, kept_in, identity, max_length, batch_size, progress)
        fitted = fit(read, rows, choose_setting(read, rows, search), search)
    return choose_threshold(fitted, search), fitted.scores


@dataclass(frozen=True)
class Reader:
    """Activations of rows by one model, `[n, layers · poolings, d]`, kept in files of `folder`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    identity: str
    max_length: int | None
    batch_size: int
    progress: bool

    def __call__(self, rows: Dataset, layers: list[int], poolings: tuple[str, ...]) -> np.ndarray:
        columns = ("prompt", "completion", "tools", "chat_template_kwargs")
        text = data.fingerprint(rows.select_columns([name for name in columns if name in rows.column_names]))
        name = content_hash([self.identity, text, layers, poolings, self.max_length])
        return activations(
            self.model,
            self.tokenizer,
            rows,
            layers=layers,
            poolings=poolings,
            max_length=self.max_length,
            batch_size=self.batch_size,
            file=self.folder / f"activations-{name}.f32",
            progress=self.progress,
        )


def choose_setting(read: Reader, rows: Dataset, search: Search) -> Setting:
    """What the search gives, the rest by the highest AUROC on its validation rows, without any the defaults.

    2,000 rows at most are read in all layers for that. With no `n_directions` the side of the first singular vector and
    the direction between the labelled centroids compete too (each row judged by the centroids of the others).
    """
    if not search.left_to_labels:
        return Setting(
            search.layer or middle_layer(read.model),
            search.pooling or DEFAULT_POOLING,
            search.n_directions or DEFAULT_DIRECTIONS,
        )
    layers = [search.layer] if search.layer else list(range(1, n_layers(read.model) + 1))
    poolings = (search.pooling,) if search.pooling else POOLINGS
    sample = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SELECTION_ROWS)).astype(int))
    embedded, labelled = read(rows.select(sample), layers, poolings), read(search.validation, layers, poolings)
    best, setting = (-1.0, 0.0), None
    for column, (layer, pooling) in enumerate(product(layers, poolings)):
        z = _finite(embedded[:, column], "row", sample)
        of_validation = _finite(labelled[:, column], "validation row")
        k, scoring, apart = best_scoring(z, of_validation, search)
        if apart > best:
            best, setting = apart, Setting(layer, pooling, k, scoring)
    return setting


def best_scoring(rows: np.ndarray, labelled: np.ndarray, search: Search) -> tuple[int, Scoring, tuple[float, float]]:
    """(k, scoring, how far apart) that sets the harmful rows of `labelled`, `[m, d]`, apart best.

    Best is the highest AUROC, of equal ones the largest distance of the two kinds. Singular vectors are those of the
    unlabelled `rows`, `[n, d]`. Where all labels are harmful, those rows that would be kept stand for the benign ones.
    """
    harmful = search.harmful
    n_kept = max(1, len(rows) - round((search.contamination or 0.0) * len(rows)))
    most = search.n_directions or min(DIRECTIONS[-1], len(rows) - 1, rows.shape[1])
    candidates = [(k, Scoring.BOTH_SIDES) for k in ([search.n_directions] if search.n_directions else DIRECTIONS)]
    if not search.n_directions:
        candidates.insert(1, (1, Scoring.ONE_SIDE))
        if 1 not in (harmful.sum(), (~harmful).sum()):
            candidates.append((1, Scoring.CENTROIDS))
    fitter = SAFTFitter(most).update(rows)
    widest = fitter.filter
    best, winner = (-1.0, 0.0), None
    for k, scoring in (c for c in candidates if c[0] <= most):
        narrow = replace(widest, directions=widest.directions[:k], singular_values=widest.singular_values[:k])
        saft, scores = _scored(fitter, narrow, scoring, labelled, harmful)
        benign = np.sort(saft.scores(rows))[:n_kept] if harmful.all() else scores[~harmful]
        apart = _apart(scores[harmful], benign)
        if apart > best:
            best, winner = apart, (k, scoring)
    return *winner, best


def fit(read: Reader, rows: Dataset, setting: Setting, search: Search) -> Fit:
    """SAFT on all rows in that setting; memory does not grow with them."""
    embedded = read(rows, [setting.layer], (setting.pooling,))
    fitter = SAFTFitter(setting.n_directions)
    for block in blocks(embedded):
        fitter.update(block)
    saft, of_validation = fitter.filter, None
    if search.validation is not None:
        labelled = _finite(read(search.validation, [setting.layer], (setting.pooling,))[:, 0], "validation row")
        saft, of_validation = _scored(fitter, saft, setting.scoring, labelled, search.harmful)
        by_labels = tuple(dict.fromkeys([*search.left_to_labels, *saft.chosen_with_labels]))
        saft = replace(saft, chosen_with_labels=by_labels)
    saft = replace(saft, layer=setting.layer, pooling=setting.pooling)
    scores = np.concatenate([saft.scores(block) for block in blocks(embedded)])
    return Fit(saft, scores[_first_occurrence(rows)], of_validation)


def choose_threshold(fitted: Fit, search: Search) -> SAFTFilter:
    """The filter with τ by the contamination, as given, or of the best F1 on the validation rows; then steered."""
    if search.contamination is not None:
        saft = fitted.saft.at_contamination(fitted.scores, search.contamination)
    elif search.threshold is not None:
        saft = fitted.saft.at_threshold(search.threshold)
    else:
        saft = fitted.saft.at_best_f1(fitted.of_validation, search.harmful)
    return saft.steer(fitted.scores, search.steer)


def _scored(
    fitter: SAFTFitter, saft: SAFTFilter, scoring: Scoring, labelled: np.ndarray, harmful: np.ndarray
) -> tuple[SAFTFilter, np.ndarray]:
    """The filter that scores so, and the labelled rows' scores by it."""
    if scoring is Scoring.CENTROIDS:
        return fitter.toward(labelled, harmful), fitter.left_out(labelled, harmful)
    if scoring is Scoring.ONE_SIDE:
        saft = saft.one_sided(labelled, harmful)
    return saft, saft.scores(labelled)


def _apart(harmful: np.ndarray, benign: np.ndarray) -> tuple[float, float]:
    """(AUROC, distance of the means in standard deviations) of the scores of both kinds."""
    auroc = roc_auc_score([True] * len(harmful) + [False] * len(benign), np.concatenate([harmful, benign]))
    spread = np.sqrt((harmful.var() + benign.var()) / 2)
    return float(auroc), float((harmful.mean() - benign.mean()) / max(spread, np.finfo(float).tiny))


def blocks(embedded: np.ndarray) -> Iterator[np.ndarray]:
    """`[n, d]` blocks of a file of activations in one setting, each mapped by itself: its memory is given back."""
    for start in range(0, len(embedded), BLOCK):
        shape = (min(BLOCK, len(embedded) - start), *embedded.shape[1:])
        yield np.memmap(embedded.filename, np.float32, "r", offset=start * embedded[0].nbytes, shape=shape)[:, 0]


def _finite(activations: np.ndarray, what: str, numbers: np.ndarray | None = None) -> np.ndarray:
    activations = np.array(activations)
    if len(broken := np.flatnonzero(~np.isfinite(activations).all(1))):
        number = broken[0] if numbers is None else numbers[broken[0]]
        raise ValueError(
            f"{what} {number + 1}: its activation is not finite; load the model in float32 or bfloat16, or remove the "
            "row."
        )
    return activations


def _first_occurrence(rows: Dataset) -> np.ndarray:
    """`[n]`: for each row the place of the first one with the same text."""
    seen: dict[str, int] = {}
    pairs = zip(rows["prompt"][:], rows["completion"][:], strict=True)
    return np.array([seen.setdefault(json.dumps(pair, sort_keys=True), i) for i, pair in enumerate(pairs)], dtype=int)


@contextmanager
def _kept_in(folder: Path | None) -> Iterator[Path]:
    """The folder, locked: two processes must not write one file; or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", folder):
        yield folder


def _identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all weights and of the tokenizer: an adapter or further training makes another model."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())

    add(model.config.to_json_string(use_diff=False), sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        add(name, tensor.dtype, tensor.shape)
        if not tensor.is_meta:  # offloaded to disk: the configuration names the model
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
