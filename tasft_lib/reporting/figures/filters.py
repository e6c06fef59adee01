"""Figures of SAFT: scores, layers, and how well harmful rows are found."""

import math
import re

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import finish, panels, whiskers

DETECTORS = {
    "saft": "SAFT",
    "saft_labelled": "SAFT",
    "saft_unsafe": "SAFT, harmful only",
    "centroid": "nearest centroid",
    "probe": "linear probe",
    "loss": "loss of the base",
}


def plot_scores(table: pd.DataFrame, threshold: float, *, caption: str) -> Figure:
    """Rows by SAFT score, kept and dropped, with τ as a line; a logarithmic axis where all scores are positive.

    `table` from `saft.report.histogram`; with a column `harmful`, rows known to be so are drawn as an outline.
    """
    figure, (axis,) = panels(1, 6.5, 3.2)
    widths = table["high"] - table["low"]
    for name, colour in (("kept", "#0072B2"), ("dropped", "#D55E00")):
        axis.bar(table["low"], table[name], widths, align="edge", color=colour, label=name, linewidth=0)
    if "harmful" in table:
        edges = [*table["low"], table["high"].iloc[-1]]
        axis.stairs(table["harmful"], edges, color="black", linewidth=1.2, label="known to be harmful")
    if math.isfinite(threshold):
        axis.axvline(threshold, color="black", linewidth=1, linestyle=(0, (4, 3)), label=f"τ = {threshold:.3g}")
    axis.set(xlabel="SAFT score", ylabel="rows", xscale="log" if table["low"].min() > 0 else "linear")
    return finish(figure, axis, caption)


def plot_layers(table: pd.DataFrame, *, caption: str) -> Figure:
    """AUROC by layer, a panel per pooling, a line per detector; `table` from `harmful_data_filter.layer_table`."""
    poolings = list(dict.fromkeys(table["pooling"]))
    figure, axes = panels(len(poolings), 3.4 * len(poolings), 3.2, sharey=True)
    names = list(dict.fromkeys(table["detector"]))
    colours = dict(zip(names, [*sns.color_palette("viridis", len(names) - 1), "#999999"], strict=True))
    for axis, pooling in zip(axes, poolings, strict=True):
        for name, rows in table[table["pooling"] == pooling].groupby("detector", sort=False):
            axis.plot(rows["layer"], rows["auroc"], "o-", color=colours[name], markersize=4, label=detector_name(name))
        axis.axhline(0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set(title=f"activation: {pooling}", xlabel="layer", ylim=(0, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("AUROC")
    return finish(figure, axes[0], caption)


def plot_detection(table: pd.DataFrame, *, caption: str) -> Figure:
    """AUROC and precision by contamination, a line per detector, broken where it has labels; bootstrap whiskers.

    `table` has the columns of `row_detectors.detection_table` and contamination, in any order.
    """
    table = table.sort_values("contamination", kind="stable")
    figure, axes = panels(2, 9, 3.6)
    names = list(dict.fromkeys(table["detector"]))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    titles = {"auroc": "AUROC", "precision": "precision at the contamination"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for i, (name, rows) in enumerate(table.groupby("detector", sort=False)):
            labels = int(rows["labels"].iloc[0])
            style = {"color": colours[name], "marker": "o", "linestyle": ":" if labels else "-", "markersize": 4}
            style |= {"linewidth": 1.2, "elinewidth": 0.8, "label": detector_name(name, labels)}
            places = rows["contamination"] + 0.002 * (i - len(names) / 2)
            axis.errorbar(places, rows[measure], yerr=whiskers(rows, measure, 1), **style)
        axis.set(title=title, xlabel="contamination", ylim=(-0.03, 1.03))
        axis.set_xticks(sorted(table["contamination"].unique()))
    return finish(figure, axes[0], caption, columns=5)


def detector_name(name: str, labels: int = 0) -> str:
    """A detector of `row_detectors` in words, with the number of labels it has."""
    words = DETECTORS.get(name) or re.sub(r"^saft_", "SAFT, k = ", name)
    return f"{words} ({labels} labels)" if labels else words
