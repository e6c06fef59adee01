"""From rows to scores and a threshold: SAFT on a model and a data set."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import data
from ..files import content_hash
from .activations import POOLINGS, activations, middle_layer, n_layers
from .filter import BLOCK, SAFTFilter, SAFTFitter

SELECTION_ROWS = 2000  # rows that settings are compared on, in all layers; the chosen one is fitted on all rows
DIRECTIONS = (1, 2, 4, 8)
DEFAULT_POOLING, DEFAULT_DIRECTIONS = "last", 4  # where nothing and nobody chooses


def find_harmful(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    contamination: float | None = None,
    threshold: float | None = None,
    validation: Dataset | None = None,
    layer: int | None = None,
    pooling: str | None = None,
    n_directions: int | None = None,
    steer: float = 0.0,
    max_length: int | None = None,
    batch_size: int = 16,
    folder: Path | None = None,
    progress: bool = True,
) -> tuple[SAFTFilter, np.ndarray]:
    """The filter of `rows`, threshold included, and the score of each row, `[n]`: what it drops is thought harmful.

    `contamination` or `threshold` says how τ is chosen, or else `validation` does; only `validation` uses labels.
    Rows with the same text get the same score, so that they end on the same side.

    Args:
        rows: `prompt` and `completion` (see `data.to_training_rows`); a `label` is not looked at.
        contamination: share of harmful rows expected, in [0, 1]; the highest scores are dropped.
        threshold: τ itself.
        validation: rows with `label` too (False: harmful). Of `layer`, `pooling` and `n_directions` those that are not
            given are the ones of the highest AUROC on them, and with no `n_directions` the direction between their
            centroids competes with the singular vectors (each row judged by the centroids of the others). For that
            2,000 of the rows are read in all layers at most. Without `contamination` and `threshold`, τ has the best
            F1 on them. If all of them are harmful, the rows stand for the benign ones, without the share of
            `contamination` that scores highest, which is needed then.
        layer: from 1; by default the middle one (`activations.middle_layer`).
        pooling: by default of the last token.
        n_directions: k singular vectors; by default 4.
        steer: moves τ, see `SAFTFilter.steer`.
        max_length: tokens read of a row; by default the model's context.
        folder: where activations are kept, so that a run that was cut off goes on and another threshold costs nothing.
            Files are named by the model's weights, the rows and what is read of them. By default a temporary folder:
            activations are on disk in any case, so that memory does not grow with the rows.

    Raises `ValueError` for settings that contradict each other or the rows, and naming the row for activations that
    are not finite.
    """
    check_settings(
        len(rows), contamination=contamination, threshold=threshold, validation=validation, layer=layer,
        pooling=pooling, n_directions=n_directions, steer=steer,
    )  # fmt: skip
    first_of = _first_occurrence(rows)
    if not first_of.any():
        raise ValueError(
            f"all {len(rows)} rows have the same text, so nothing sets harmful ones apart; check the data."
        )
    with _kept_in(folder) as kept_in:
        identity = _identity(model, tokenizer) if folder is not None else ""  # a temporary folder has one model's alone

        def read(part: Dataset, layers: list[int], poolings: tuple[str, ...]) -> np.ndarray:
            text = data.fingerprint(part.select_columns(["prompt", "completion"]))
            named = content_hash([identity, text, layers, poolings, max_length])
            return activations(
                model,
                tokenizer,
                part,
                layers=layers,
                poolings=poolings,
                max_length=max_length,
                batch_size=batch_size,
                file=kept_in / f"activations-{named}.f32",
                progress=progress,
            )

        setting = _Setting(
            layer or middle_layer(model), pooling or DEFAULT_POOLING, n_directions or DEFAULT_DIRECTIONS, "both sides"
        )
        if validation is not None:
            harmful = ~np.array(validation["label"][:], dtype=bool)
            given = {"layer": layer, "pooling": pooling, "directions": n_directions}
            if chosen := tuple(name for name, value in given.items() if value is None):
                layers = [layer] if layer else list(range(1, n_layers(model) + 1))
                poolings = (pooling,) if pooling else POOLINGS
                sample = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SELECTION_ROWS)).astype(int))
                setting = _best_setting(
                    read(rows.select(sample), layers, poolings),
                    read(validation, layers, poolings),
                    harmful,
                    settings=list(product(layers, poolings)),
                    n_directions=n_directions,
                    contamination=contamination or 0.0,
                    row_numbers=sample,
                )
        embedded = read(rows, [setting.layer], (setting.pooling,))
        fitter = SAFTFitter(setting.n_directions)
        for block in blocks(embedded):
            fitter.update(block)
        if validation is None:
            found = fitter.filter
        else:
            labelled = _finite(read(validation, [setting.layer], (setting.pooling,))[:, 0], "validation row")
            if setting.by == "centroids":
                found = fitter.toward(labelled, harmful)
            else:
                found = fitter.filter if setting.by == "both sides" else fitter.filter.one_sided(labelled, harmful)
            found = replace(found, chosen_with_labels=tuple(dict.fromkeys([*chosen, *found.chosen_with_labels])))
            if contamination is None and threshold is None:
                by_others = fitter.left_out(labelled, harmful) if setting.by == "centroids" else found.scores(labelled)
                found = found.at_best_f1(by_others, harmful)
        found = replace(found, layer=setting.layer, pooling=setting.pooling)
        scores = np.concatenate([found.scores(block) for block in blocks(embedded)])[first_of]
    if contamination is not None:
        found = found.at_contamination(scores, contamination)
    elif threshold is not None:
        found = found.at_threshold(threshold)
    return found.steer(scores, steer), scores


def check_settings(
    n_rows: int,
    *,
    contamination: float | None = None,
    threshold: float | None = None,
    validation: Dataset | None = None,
    layer: int | None = None,
    pooling: str | None = None,
    n_directions: int | None = None,
    steer: float = 0.0,
) -> None:
    """Refuse, in one line, what `find_harmful` could not do; before a model is loaded."""
    if contamination is not None and threshold is not None:
        raise ValueError("contamination and threshold both say how many rows are dropped; give one of them.")
    if contamination is None and threshold is None and validation is None:
        raise ValueError("give contamination, threshold or validation.")
    if contamination is not None and not 0 <= contamination <= 1:
        raise ValueError(f"contamination={contamination}: the share of harmful rows lies between 0 and 1.")
    if threshold is not None and np.isnan(threshold):
        raise ValueError("threshold=nan: give a number.")
    if validation is not None:
        labels = set(validation["label"][:])
        if False not in labels:
            raise ValueError("validation: no row is harmful (label false).")
        if True not in labels and contamination is None:
            raise ValueError("validation: all rows are harmful (label false); say by contamination how many to drop.")
    if layer is not None and layer < 1:
        raise ValueError(f"layer {layer}: layers count from 1.")
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}.")
    if n_rows < 2:
        raise ValueError(f"SAFT compares rows with each other and got {n_rows}; give at least two.")
    n_directions = DEFAULT_DIRECTIONS if n_directions is None else n_directions
    if not 1 <= n_directions < n_rows:
        raise ValueError(f"n_directions={n_directions}: {n_rows} rows have 1 to {n_rows - 1}.")
    if not -1 <= steer <= 1:
        raise ValueError(f"steering by {steer}: give a rate between -1 (drop nothing) and 1 (drop everything).")


class _Setting(NamedTuple):
    """Where activations are read, and which directions score them: k singular vectors, or the labelled centroids'."""

    layer: int
    pooling: str
    n_directions: int
    by: Literal["both sides", "one side", "centroids"]


def _best_setting(
    embedded: np.ndarray,
    labelled: np.ndarray,
    harmful: np.ndarray,
    *,
    settings: list[tuple[int, str]],
    n_directions: int | None,
    contamination: float,
    row_numbers: np.ndarray,
) -> _Setting:
    """The one of the highest AUROC on labelled rows; of equal ones that with the largest distance of the two kinds.

    Singular vectors are those of the unlabelled rows. Where all labels are harmful, those of them that would be kept
    stand for the benign ones.
    """
    n_kept = max(1, len(embedded) - round(contamination * len(embedded)))
    best, chosen = (-1.0, 0.0), None
    most = n_directions or min(DIRECTIONS[-1], len(embedded) - 1, embedded.shape[2])
    for column, (layer, pooling) in enumerate(settings):
        rows = _finite(embedded[:, column], "row", row_numbers)
        z = _finite(labelled[:, column], "validation row")
        fitter = SAFTFitter(most).update(rows)
        widest = fitter.filter
        tried = []
        for k in [n_directions] if n_directions else [k for k in DIRECTIONS if k <= most]:
            found = replace(widest, directions=widest.directions[:k], singular_values=widest.singular_values[:k])
            tried.append((k, "both sides", found, found.scores(z)))
            if k == 1 and n_directions is None:
                found = found.one_sided(z, harmful)
                tried.append((1, "one side", found, found.scores(z)))
        if n_directions is None and 1 not in (harmful.sum(), (~harmful).sum()):
            tried.append((1, "centroids", fitter.toward(z, harmful), fitter.left_out(z, harmful)))
        for k, by, found, scores in tried:
            benign = np.sort(found.scores(rows))[:n_kept] if harmful.all() else scores[~harmful]
            apart = _apart(scores[harmful], benign)
            if apart > best:
                best, chosen = apart, _Setting(layer, pooling, k, by)
    return chosen


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
    with FileLock(folder / "lock"):
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
