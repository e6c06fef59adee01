"""What a filter leaves: kept and dropped rows in files, a histogram of the scores, and a page that says how."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from ..records import data
from ..records.sources import file_format
from ..storage import files, integrity
from ..text import markdown
from .filter import SAFTFilter

LENGTH_CORRELATION, LEAST_EXPLAINED = 0.5, 0.05
USUAL_CONTAMINATION = (0.01, 0.5)
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def page(
    saft: SAFTFilter,
    scores: np.ndarray,
    rows: Dataset,
    lengths: np.ndarray,
    *,
    source: str,
    model: str,
    max_length: int | None,
    contamination: float | None = None,
    harmful: ArrayLike | None = None,
) -> str:
    """A page in Markdown, without any text of the rows: what was kept and dropped, how, and what speaks against it.

    Args:
        lengths: tokens of each row, uncut (`activations.token_lengths`).
        source, model: their names.
        max_length: tokens that were read at most; None where there was no limit.
        contamination: the share that was asked for, if one was.
        harmful: what each row is known to be, for an evaluation; it had no part in the filter.
    """
    dropped = saft.drops(scores)
    cut = 0 if max_length is None else int((lengths > max_length).sum())
    _, repeats = data.deduplicate(rows.select_columns(["prompt", "completion"]).add_column("label", [None] * len(rows)))
    k = len(saft.directions)
    directions = f"{k} direction{'s' * (k > 1)} from {saft.directions_from}{', one side' * (saft.side != 'both')}"
    facts = {
        "rows": f"{len(rows):,}",
        "kept": f"{(~dropped).sum():,}",
        "dropped": f"{dropped.sum():,} ({dropped.mean():.1%})",
        "threshold": f"{saft.threshold:.6g}, from {saft.threshold_from}",
        "activations": f"layer {saft.layer}, {saft.pooling} token{'s' * (saft.pooling == 'mean')}",
        "scored by": directions,
        "chosen with labels": ", ".join(saft.chosen_with_labels) or "nothing",
        "variance explained": f"{saft.explained:.1%} by all directions, {_first_explains(saft):.1%} by the first",
        "singular values": ", ".join(f"{value:.4g}" for value in saft.singular_values),
        f"rows cut at {max_length} tokens" if max_length else "rows cut": f"{cut:,}",
        "rows that repeat another": f"{repeats:,}",
    }
    quantiles = pd.DataFrame(
        {name: [f"{np.quantile(scores[part], q):.4g}" if part.any() else "" for q in _QUANTILES]
         for name, part in (("all", dropped | True), ("kept", ~dropped), ("dropped", dropped))},
    )  # fmt: skip
    quantiles.insert(0, "score", [f"{q:.0%}" for q in _QUANTILES])
    lines = [f"# SAFT: {source}", "", f"Model: {model}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += ["", "## Warnings", ""]
    said = warnings(saft, scores, lengths, contamination=contamination)
    if cut:
        said.append(f"{cut:,} rows are longer than {max_length} tokens: what follows was not read.")
    lines += [f"- {warning}" for warning in said or ["none"]]
    lines += ["", "## Scores", "", markdown(quantiles)]
    if harmful is not None:
        lines += ["", "## Against the rows' own labels", "", "They had no part in the filter.", ""]
        lines += [f"- {name}: {value}" for name, value in _evaluation(saft, scores, harmful).items()]
    lines += [
        "",
        "A high score is no proof of harm: look at the dropped rows before you train on them or without them.",
    ]
    return "\n".join(lines) + "\n"


def warnings(
    saft: SAFTFilter, scores: np.ndarray, lengths: np.ndarray, *, contamination: float | None = None
) -> list[str]:
    """What speaks against believing the scores, a sentence each."""
    said, dropped = [], saft.drops(scores)
    by_variance = saft.directions_from == SAFTFilter.directions_from
    if by_variance and (first := _first_explains(saft)) < LEAST_EXPLAINED:
        said.append(f"the first direction explains only {first:.1%} of the variance: no direction stands out.")
    correlation = length_correlation(scores, lengths)
    if correlation > LENGTH_CORRELATION:
        said.append(f"scores go with the length of the rows (Spearman {correlation:.2f}): the direction may be length.")
    low, high = USUAL_CONTAMINATION
    if contamination is not None and not low <= contamination <= high:
        said.append(f"a contamination of {contamination:g} is outside {low} to {high}, where SAFT has been tested.")
    if dropped.all() or not dropped.any():
        said.append(f"{'every' if dropped.all() else 'no'} row is dropped.")
    elif contamination is not None and not saft.threshold_from.count("steered"):
        expected = round(contamination * len(scores))
        if dropped.sum() != expected:
            said.append(f"{dropped.sum()} rows are dropped instead of {expected}: scores at the border are equal.")
    return said


def length_correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Spearman's correlation of scores with length, or with the distance from the middle length, the larger one.

    A squared projection is high at both ends: where the direction is length, both the short and the long score high.
    """
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return 0.0
    ranks = stats.rankdata(lengths)
    correlations = [abs(stats.spearmanr(scores, ranks)[0])]
    from_middle = abs(ranks - ranks.mean())
    if np.ptp(from_middle) > 0:
        correlations.append(stats.spearmanr(scores, from_middle)[0])
    return float(max(correlations))


def histogram(
    scores: np.ndarray, threshold: float, harmful: ArrayLike | None = None, *, bins: int = 40
) -> pd.DataFrame:
    """Rows per bin of the score, for `figures.plot_scores`: low, high, kept, dropped; with labels, harmful too.

    τ is an edge, so each bin is on one side. Bins are equal on a logarithmic scale where all scores are positive.
    """
    low, high = float(scores.min()), float(scores.max())
    inside = [threshold] if low < threshold < high else []
    if low > 0 and high > low:
        # What is far below all else would take most of the axis.
        low = max(low, float(np.quantile(scores, 0.01)) / 10)
        edges = np.geomspace(low, high, bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    edges = np.unique([*edges, *[t for t in inside if t > edges[0]]])
    # Bins include their upper edge, as a score at τ is kept.
    place = np.clip(np.searchsorted(edges, scores, side="left") - 1, 0, len(edges) - 2)
    dropped = scores > threshold

    def count(part: np.ndarray) -> np.ndarray:
        return np.bincount(place[part], minlength=len(edges) - 1)

    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "kept": count(~dropped), "dropped": count(dropped)})
    return table if harmful is None else table.assign(harmful=count(np.asarray(harmful, bool)))


@dataclass(frozen=True)
class Output:
    """The folder of a filtered set: kept and dropped rows in the format of `source`, and what was asked for.

    Raises `ValueError`, one line, where writing would touch the source.
    """

    folder: Path
    source: str
    settings: dict[str, Any]

    def __post_init__(self):
        path = Path(self.source).expanduser()
        if not path.exists():
            return
        for part in self.parts:
            if part.resolve() == path.resolve() or (part.exists() and part.samefile(path)):
                raise ValueError(f"{part}: is the input itself; choose another --output_dir.")
        if path.is_dir() and path.resolve() in (self.folder.resolve(), *self.folder.resolve().parents):
            raise ValueError(f"{self.folder}: lies in the input folder; choose another --output_dir.")

    @property
    def parts(self) -> tuple[Path, Path]:
        """The files of the (kept, dropped) rows: those of a compressed file are not, of a hub id they are folders."""
        path = Path(self.source)
        suffix = "" if path.is_dir() else {".tsv": ".csv"}.get(of_file := file_format(path), of_file)
        suffix = suffix if suffix in (".json", ".jsonl", ".csv", ".parquet") else ""
        return self.folder / f"kept{suffix}", self.folder / f"dropped{suffix}"

    def is_finished(self) -> bool:
        """Whether this result is there. Raises `ValueError` where another one is, or anything else."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return False
        if not (self.folder / "settings.json").exists() and not integrity.is_sealed(self.folder):
            raise ValueError(f"{self.folder}: holds other files; choose a new --output_dir.")
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            return False
        damaged = integrity.damage(self.folder)
        for name in damaged:
            integrity.set_aside(self.folder / name)
        if manifest.name in damaged:
            return False
        try:
            theirs = files.read_json(manifest)["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest}: not one of tasft filter; choose a new --output_dir.") from error
        ours = json.loads(json.dumps(self.settings))
        if theirs != ours:
            changed = ", ".join(name for name in ours if theirs.get(name) != ours[name])
            raise ValueError(
                f"{self.folder}: holds a result with another {changed}; choose a new --output_dir or remove it."
            )
        return not damaged and all(path.exists() for path in (*self.parts, self.folder / "report.md"))

    def begin(self) -> None:
        """Make the folder and write the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.folder / "settings.json", self.settings)

    def finish(self, saft: SAFTFilter, facts: dict[str, Any]) -> None:
        """Write the manifest, which says that everything is there."""
        of_filter = {
            "layer": saft.layer,
            "pooling": saft.pooling,
            "n_directions": len(saft.directions),
            "threshold": str(saft.threshold),
            "directions_from": saft.directions_from,
            "threshold_from": saft.threshold_from,
            "chosen_with_labels": saft.chosen_with_labels,
        }
        manifest = {"settings": self.settings} | facts | of_filter | files.environment()
        files.write_json(self.folder / "manifest.json", manifest)
        integrity.seal(self.folder, without="activations")


def save_rows(rows: Dataset, path: Path) -> Path:
    """Write rows whole or not at all, in the format of the suffix; without one a `save_to_disk` folder.

    An older file or folder of that name is replaced. Formats: .json, .jsonl, .csv and .parquet.
    """
    with files.whole(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(rows.with_format("arrow")[:], temporary)
        elif path.suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows.column_names)
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix in (".json", ".jsonl"):
            begin, between, end = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
            with temporary.open("w", encoding="utf-8") as file:
                file.write(begin)
                for i, row in enumerate(rows):
                    file.write(between * (i > 0) + json.dumps(row, ensure_ascii=False))
                file.write(end * (len(rows) > 0 or path.suffix == ".json"))
        else:
            rows.save_to_disk(temporary, num_shards=None if len(rows) else 1)
            shutil.rmtree(path, ignore_errors=True)
    return path


def _first_explains(saft: SAFTFilter) -> float:
    squared = saft.singular_values**2
    return float(saft.explained * squared[0] / squared.sum())


def _evaluation(saft: SAFTFilter, scores: np.ndarray, harmful: ArrayLike) -> dict[str, str]:
    harmful, dropped = np.asarray(harmful, dtype=bool), saft.drops(scores)
    known = {"harmful rows": f"{harmful.sum():,} of {len(harmful):,}"}
    if harmful.all() or not harmful.any():
        return known
    return known | {
        "AUROC": f"{roc_auc_score(harmful, scores):.3f}",
        "precision (dropped rows that are harmful)": f"{precision_score(harmful, dropped, zero_division=0):.3f}",
        "recall (harmful rows that are dropped)": f"{recall_score(harmful, dropped):.3f}",
        "benign rows dropped": f"{(dropped & ~harmful).sum():,}",
        "harmful rows kept": f"{(~dropped & harmful).sum():,}",
    }
