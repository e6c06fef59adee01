"""Figures of trained models: their rates along training, by size, weight, attack and judge."""

import itertools

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import NAMES, STYLES, finish, look, mark, panels, rows_of_marks, whiskers

AXES = {  # of `plot_over` and `plot_preference`: its name and scale
    "step": ("training step", "linear"),
    "n_unsafe": ("unsafe examples", "log"),
    "factor": ("λ, times the chosen one", "log"),
    "contamination": ("contamination", "linear"),
    "quality": ("AUROC of the filter", "linear"),
    "share": ("share of the rows dropped", "linear"),
    "relearned": ("harmful rows trained on", "linear"),
}
MEASURE_NAMES = {
    "harm": "harmful (%)",
    "degenerate": "degenerate (%)",
    "refusal": "refusals (%)",
    "correct": "benign correct (%)",
    "over_refusal": "over-refusal (%)",
    "still_answered": "SFT's harmless answers kept (%)",
}


def plot_harvest(table: pd.DataFrame, *, caption: str) -> Figure:
    """What became of the sampled answers, as bars; `table` from `tables.harvest_table`."""
    figure, (axis,) = panels(1, 6.5, 2.8)
    colours = ["#D55E00" if name.startswith("harmful") else "#999999" for name in table["answers"]]
    bars = axis.barh(table["answers"], table["count"], color=colours)
    axis.bar_label(bars, [f"{c} ({s:.0%})" for c, s in zip(table["count"], table["share"], strict=True)], padding=3)
    axis.set(xlabel="sampled answers", xlim=(0, 1.2 * max(table["count"].max(), 1)))
    axis.invert_yaxis()
    return finish(figure, None, caption)


def plot_harm_by_benchmark(rates: pd.DataFrame, *, caption: str) -> Figure:
    """Harmful rate along training, one panel per benchmark, with Wilson 95 % bands.

    `rates` has columns method, step, benchmark, rate, low, high in [0, 1] (see `rates.rates_table`); seeds, if there
    are several, are drawn as one line each.
    """
    names = list(dict.fromkeys(rates["benchmark"]))
    figure, axes = panels(len(names), 2.9 * len(names), 3.3, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        _lines(axis, rates[rates["benchmark"] == name], "rate", band=True)
        axis.set(title=name, xlabel="training step", ylim=(-3, 103))
    axes[0].set_ylabel("harmful responses (%)")
    return finish(figure, axes[0], caption)


def plot_outcomes(rates: pd.DataFrame, *, caption: str) -> Figure:
    """What answers to toxic prompts become along training: harmful, refusal, degenerate (%), and the mean score (0-5).

    `rates` has columns method, step, rate, low, high, refusal, degenerate, score, over all benchmarks.
    """
    figure, axes = panels(4, 12, 3.3)
    columns = (
        ("rate", "harmful (%)", True),
        ("refusal", "refusals (%)", False),
        ("degenerate", "degenerate (%)", False),
        ("score", "harmfulness score (0-5)", False),
    )
    for axis, (column, title, band) in zip(axes, columns, strict=True):
        _lines(axis, rates, column, band=band, scale=1 if column == "score" else 100)
        axis.set(title=title, xlabel="training step", ylim=(-0.15, 5.15) if column == "score" else (-3, 103))
    return finish(figure, axes[0], caption)


def plot_summary(table: pd.DataFrame, measures: list[str], *, caption: str) -> Figure:
    """A row per arm and a panel per measure (%), greedy and sampled answers: Wilson 95 % whiskers, seeds as ticks.

    `table` from `rates.summary` by method, penalty_weight or n_unsafe, and decoding; panels without numbers (no exact
    checker) are left out.
    """
    measures = [measure for measure in measures if table[measure].notna().any()]
    arms = table.drop_duplicates(["method", "n_unsafe"])[["method", "n_unsafe"]]
    sizes = table.loc[table["method"] != "sft", "n_unsafe"].nunique() > 1
    names = [
        NAMES[arm.method] + (f", n = {arm.n_unsafe}" if sizes and arm.n_unsafe else "") for arm in arms.itertuples()
    ]
    figure, axes = panels(len(measures), 2.9 * len(measures) + 1, 0.36 * len(arms) + 1.2, sharey=True)
    looks = {"greedy": ("full", "#D55E00"), "sampled": ("none", "#0072B2")}
    series = [
        (
            arms.merge(table[table["decoding"] == decoding], on=["method", "n_unsafe"], how="left"),
            {"label": decoding, "fmt": "o", "fillstyle": fill, "color": colour},
        )
        for decoding, (fill, colour) in looks.items()
        if decoding in set(table["decoding"])
    ]
    for axis, measure in zip(axes, measures, strict=True):
        rows_of_marks(axis, names, [(rows, measure, style) for rows, style in series], seeds=True)
        axis.set(title=MEASURE_NAMES[measure])
    return finish(figure, axes[0], caption)


def plot_over(column: str, table: pd.DataFrame, measures: list[str], *, caption: str, band: bool = False) -> Figure:
    """Measures (%) against a column of `AXES`, a line per method.

    `table` from `rates.summary` by method and that column, at one decoding. Wilson 95 % as whiskers, with the seeds'
    ends as ticks, or as a `band`.
    """
    measures = [measure for measure in measures if table[measure].notna().any()]
    table, (label, scale) = table.astype({column: float}), AXES[column]
    ticks = sorted(table[column].unique())
    figure, axes = panels(len(measures), 3.3 * len(measures), 3.5, sharey=band)
    for axis, measure in zip(axes, measures, strict=True):
        for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
            rows = rows.sort_values(column)
            style = look(method) | {"markersize": 5}
            colour = style["color"]
            if band:
                axis.plot(rows[column], 100 * rows[measure], **style)
                ends = (100 * rows[f"{measure}_low"], 100 * rows[f"{measure}_high"])
                axis.fill_between(rows[column], *ends, color=colour, alpha=0.12, linewidth=0)
                continue
            # Side by side, so that whiskers can be told apart.
            aside = i - table["method"].nunique() / 2
            places = rows[column] * 1.03**aside if scale == "log" else rows[column] + aside * 0.01 * np.ptp(ticks)
            style |= {"linewidth": 1.2, "elinewidth": 0.8}
            axis.errorbar(places, 100 * rows[measure], yerr=whiskers(rows, measure), **style)
            for end in ("min", "max"):
                axis.plot(places, 100 * rows[f"{measure}_{end}"], "_", color=colour, markersize=5)
        axis.set(title=MEASURE_NAMES[measure], xlabel=label, xscale=scale, ylim=(-3, 103))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60 if len(ticks) > 4 else 0)
        axis.minorticks_off()
    return finish(figure, axes[0], caption, columns=5)


def plot_trade_off(points: pd.DataFrame, curve: pd.DataFrame, *, caption: str) -> Figure:
    """Over-refusal against harmful rate (%), a point per checkpoint; hollow where answers are not `fluent` (a flag).

    `points` from `rates.summary` by method, n_unsafe, seed and step; `curve` (x, y in [0, 1]) is drawn in grey.
    """
    figure, (axis,) = panels(1, 6, 4.2)
    axis.plot(100 * curve["x"], 100 * curve["y"], color="0.75", linewidth=5, zorder=0)
    for method, rows in points.groupby("method", sort=False):
        name, colour, marker, _ = STYLES[method]
        for part, face in ((rows[rows["fluent"]], colour), (rows[~rows["fluent"]], "none")):
            style = {"marker": marker, "edgecolors": colour, "facecolors": face, "linewidths": 1, "alpha": 0.8}
            label = name if face == colour else None
            axis.scatter(100 * part["harm"], 100 * part["over_refusal"], s=28, label=label, **style)
    axis.set(xlabel="harmful answers to toxic prompts (%)", ylabel="harmless prompts refused (%)", xlim=(-3, 103))
    return finish(figure, axis, caption)


def plot_search(development: pd.DataFrame, *, caption: str) -> Figure:
    """Regret on the development split against total pressure: a panel per method, a line per base model and size.

    `development` from `pressure.with_regret`, with `model` and `pressure`. The size of D_unsafe is a colour, the base
    model a line style and a mark. A ring marks the least regret of a line among weights that are not too dear (these
    are hollow), a cross the automatic λ.
    """
    methods = [method for method in dict.fromkeys(development["method"]) if method != "sft"]
    sizes = sorted(development.loc[development["method"] != "sft", "n_unsafe"].unique(), reverse=True)
    colours = dict(zip(sizes, sns.color_palette("viridis", len(sizes)), strict=True))
    models = list(dict.fromkeys(development["model"]))
    looks = dict(zip(models, itertools.cycle([("-", "o"), ("--", "s"), (":", "^")]), strict=False))
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = panels(columns, 3.1 * columns, 2.8 * lines, lines, sharey=True, layout="constrained")
    for axis, method in zip(axes, methods, strict=False):
        own = development[development["method"] == method]
        for (model, (line, marker)), size in itertools.product(looks.items(), sizes):
            rows = own[(own["model"] == model) & (own["n_unsafe"] == size)]
            tried = rows[rows["penalty_weight"] != "auto"].sort_values("pressure")
            if tried.empty:
                continue
            style = {"marker": marker, "markersize": 4, "linestyle": line, "color": colours[size]}
            name = f"{model}, n = {size}" if len(models) > 1 else f"n = {size}"
            axis.plot(tried["pressure"], tried["regret"], label=name, **style)
            dear = tried["too_dear"] if "too_dear" in tried else pd.Series(False, index=tried.index)
            hollow = tried[dear]
            axis.plot(
                hollow["pressure"], hollow["regret"], marker, color="white", markeredgecolor=colours[size], markersize=4
            )
            best = tried.loc[(tried["regret"] + 9 * dear).idxmin()]
            axis.plot(best["pressure"], best["regret"], "o", color=colours[size], fillstyle="none", markersize=10)
            auto = rows[rows["penalty_weight"] == "auto"]
            axis.plot(auto["pressure"], auto["regret"], "x", color=colours[size], markersize=8, markeredgewidth=2)
        axis.set(title=NAMES[method], xscale="log", ylim=(0, None))
        tried = own[own["penalty_weight"] != "auto"]
        ticks = sorted({float(f"{pressure:.2g}") for pressure in tried["pressure"]})
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], rotation=60, fontsize=8)
        axis.minorticks_off()
    for axis in axes[len(methods) :]:
        axis.set_visible(False)
    figure.supxlabel("total pressure, λ × share of unsafe rows", fontsize="medium")
    for axis in axes[::columns]:
        axis.set_ylabel("regret")
    return finish(figure, axes[0], caption, tight=False)


def plot_attacks(table: pd.DataFrame, *, caption: str) -> Figure:
    """Success of each attack (%), a panel per size of D_unsafe, a mark per method, Wilson 95 % whiskers.

    `table` from `jailbreak.success_table`. Plain SFT, which has no unsafe rows, is in every panel.
    """
    sizes = sorted(table.loc[table["method"] != "sft", "n_unsafe"].unique(), reverse=True)
    attacks = list(dict.fromkeys(table["attack"]))
    figure, axes = panels(len(sizes), max(2.6 * len(sizes) + 1, 6), 0.42 * len(attacks) + 1.3, sharey=True)
    for axis, size in zip(axes, sizes, strict=True):
        series = []
        for method in dict.fromkeys(table["method"]):
            rows = table[(table["n_unsafe"] == (0 if method == "sft" else size)) & (table["method"] == method)]
            series.append((rows.set_index("attack").reindex(attacks), "harm", mark(method)))
        rows_of_marks(axis, attacks, series)
        axis.set(title=f"{size} unsafe examples", xlabel="harmful (%)")
    return finish(figure, axes[0], caption, columns=6)


def plot_detectors(table: pd.DataFrame, *, caption: str) -> Figure:
    """Texts called degenerate (%), a row per kind of text and a mark per detector, Wilson 95 % whiskers.

    `table` from `degenerate_answers.rates`. Left panel: real texts, where every mark is a false alarm; right: broken
    ones.
    """
    sides = {"language": table[~table["degenerate"]], "no language": table[table["degenerate"]]}
    kinds = [list(dict.fromkeys(side["kind"])) for side in sides.values()]
    looks = list(zip(("#56B4E9", "#E69F00", "#D55E00", "#999999"), "v^os", strict=True))
    figure, axes = panels(2, 10, 0.34 * max(map(len, kinds)) + 1.4)
    for axis, (title, side), names in zip(axes, sides.items(), kinds, strict=True):
        series = []
        for detector, (colour, marker) in zip(dict.fromkeys(table["detector"]), looks, strict=False):
            rows = side[side["detector"] == detector].set_index("kind").reindex(names)
            series.append((rows, "rate", {"label": detector, "color": colour, "fmt": marker}))
        rows_of_marks(axis, names, series)
        axis.set(title=title, xlabel="called degenerate, or not English (%)")
    return finish(figure, axes[0], caption)


def plot_comparison(table: pd.DataFrame, *, method: str, caption: str) -> Figure:
    """Plain SFT beside TA-SFT by `method`: a row per measure and judge (%), 95 % whiskers; see `your_model`'s table."""
    figure, (axis,) = panels(1, 7.5, 0.34 * len(table) + 1.2)
    series = [(table, "sft", mark("sft")), (table, "tasft", mark(method))]
    rows_of_marks(axis, [f"{row.measure}  [{row.by}]" for row in table.itertuples()], series)
    axis.tick_params("y", labelsize=8)
    axis.set(xlabel="%")
    measures = table["measure"].tolist()
    for place in range(1, len(measures)):
        if measures[place] != measures[place - 1]:
            axis.axhline(place - 0.5, color="0.85", linewidth=0.8)
    return finish(figure, axis, caption)


def plot_audit(judge: pd.DataFrame, arms: pd.DataFrame, *, caption: str) -> Figure:
    """What a person's audit says (%, 95 % whiskers), see `audit_answers`: left of the judge, right of each arm's harm.

    An arm's rate stands as the judge has it, corrected for its errors, and by the arm's own labels; a bar where `truth`
    is known.
    """
    figure, (left, right) = panels(2, 9, 0.45 * max(len(judge), len(arms)) + 1.2)
    rows_of_marks(left, judge["measure"].tolist(), [(judge, "value", {"color": "#000000", "fmt": "s"})])
    names = [f"{NAMES.get(row.method, row.method)} {row.n_unsafe or ''}".strip() for row in arms.itertuples()]
    as_judged = (arms, "harm", {"label": "as the judge has it", "color": "#999999", "fmt": "s"})
    corrected = (arms, "corrected", {"label": "corrected for its errors", "color": "#D55E00", "fmt": "o"})
    direct = (arms, "direct", {"label": "by the arm's own labels", "color": "#0072B2", "fmt": "D"})
    rows_of_marks(right, names, [as_judged, corrected, direct])
    if "truth" in arms:
        right.plot(100 * arms["truth"], range(len(arms)), "k|", markersize=22, label="truth")
    left.set(xlabel="of the judge, %")
    right.set(xlabel="harmful answers, %")
    return finish(figure, right, caption)


def _lines(axis: Axes, rates: pd.DataFrame, column: str, *, band: bool, scale: float = 100) -> None:
    keys = ["method", "seed"] if "seed" in rates else ["method"]
    labelled = set()
    for (method, *_), rows in rates.groupby(keys, sort=False):
        rows = rows.sort_values("step")
        style = look(method) | ({"label": None} if method in labelled else {})
        labelled.add(method)
        axis.plot(rows["step"], scale * rows[column], markersize=4, **style)
        if band:
            ends = (scale * rows["low"], scale * rows["high"])
            axis.fill_between(rows["step"], *ends, color=style["color"], alpha=0.12, linewidth=0)
