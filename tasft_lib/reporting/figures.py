"""Figures in one style. `plot_*` takes a table and returns a figure; `save_figure` writes it with its table."""

import math
import textwrap
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colour-blind safe (Okabe-Ito), one look per method in every figure; rivals and controls in greys and broken lines.
STYLES = {  # name, colour, marker, line
    "sft": ("SFT", "#000000", "s", "-"),
    "kto": ("KTO", "#E69F00", "X", "-"),
    "nlcl": ("NLCL", "#56B4E9", "v", "-"),
    "emd": ("EMD", "#D55E00", "o", "-"),
    "emd_exact": ("EMD exact", "#009E73", "^", "-"),
    "stl": ("STL", "#CC79A7", "D", "-"),
    "stl_weighted": ("STL, weighted", "#CC79A7", "d", "--"),
    "stl_emd": ("STL + EMD", "#882255", "P", "-"),
    "npo": ("NPO", "#0072B2", "<", "--"),
    "simnpo": ("SimNPO", "#0072B2", ">", ":"),
    "gradient_ascent": ("gradient ascent", "#999999", "p", "--"),
    "unlikelihood": ("unlikelihood", "#666666", "h", ":"),
    "emd_random": ("EMD, random embedding", "#D55E00", "1", ":"),
    "emd_one_hot": ("EMD, one-hot embedding", "#D55E00", "2", ":"),
    "emd_embed_tokens": ("EMD, embed_tokens", "#D55E00", "3", ":"),
    "emd_first_1": ("EMD, first token", "#D55E00", "*", "--"),
    "emd_first_3": ("EMD, first 3 tokens", "#D55E00", "x", "--"),
    "emd_contrastive": ("EMD, contrastive data", "#D55E00", "o", "--"),
    "nlcl_contrastive": ("NLCL, contrastive data", "#56B4E9", "v", "--"),
    "emd_auto": ("EMD, λ auto", "#D55E00", "o", ":"),
    "emd_exact_auto": ("EMD exact, λ auto", "#009E73", "^", ":"),
    "nlcl_auto": ("NLCL, λ auto", "#56B4E9", "v", ":"),
    "none": ("no filter", "#000000", "s", "-"),
    "random": ("random filter", "#999999", "p", "--"),
    "saft": ("SAFT filter", "#0072B2", "v", "--"),
    "saft_emd": ("SAFT, then EMD", "#0072B2", "v", "-"),
    "saft_unsafe": ("SAFT, few harmful rows", "#CC79A7", "P", "--"),
    "saft_unsafe_emd": ("SAFT, few harmful rows, then EMD", "#CC79A7", "P", "-"),
    "saft_labelled": ("SAFT, few labels", "#009E73", "^", "--"),
    "saft_labelled_emd": ("SAFT, few labels, then EMD", "#009E73", "^", "-"),
    "oracle": ("oracle filter", "#D55E00", "o", "--"),
    "oracle_emd": ("oracle, then EMD", "#D55E00", "o", "-"),
    "filter": ("made-up filter", "#56B4E9", "D", "--"),
    "filter_emd": ("made-up filter, then EMD", "#56B4E9", "D", "-"),
}
NAMES = {method: style[0] for method, style in STYLES.items()}
BENCH_STYLES = (("fused_tasft", "#D55E00", "o"), ("trl_sft", "#000000", "s"), ("dense_tasft", "#0072B2", "^"))
BENCH_NAMES = {"fused_tasft": "TA-SFT, fused head", "trl_sft": "SFT, TRL", "dense_tasft": "TA-SFT, full logits"}
MEASURE_NAMES = {
    "harm": "harmful (%)",
    "degenerate": "degenerate (%)",
    "refusal": "refusals (%)",
    "correct": "benign correct (%)",
    "over_refusal": "over-refusal (%)",
}


def use_style() -> None:
    """The style of all figures."""
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )


def plot_harm_by_benchmark(rates: pd.DataFrame, *, caption: str) -> Figure:
    """Harmful rate along training, one panel per benchmark, with Wilson 95 % bands.

    `rates` has columns method, step, benchmark, rate, low, high in [0, 1] (see `metrics.rates_table`); seeds, if there
    are several, are drawn as one line each.
    """
    use_style()
    names = list(dict.fromkeys(rates["benchmark"]))
    figure, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names), 3.3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        _lines(axis, rates[rates["benchmark"] == name], "rate", band=True)
        axis.set(title=name, xlabel="training step", ylim=(-3, 103))
    axes[0][0].set_ylabel("harmful responses (%)")
    return _finish(figure, axes[0][0], caption)


def plot_outcomes(rates: pd.DataFrame, *, caption: str) -> Figure:
    """What answers to toxic prompts become along training: harmful, refusal, degenerate (%), and the mean score (0-5).

    `rates` has columns method, step, rate, low, high, refusal, degenerate, score, over all benchmarks.
    """
    use_style()
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
    panels = (
        ("rate", "harmful (%)", True),
        ("refusal", "refusals (%)", False),
        ("degenerate", "degenerate (%)", False),
        ("score", "harmfulness score (0-5)", False),
    )
    for axis, (column, title, band) in zip(axes, panels, strict=True):
        _lines(axis, rates, column, band=band, scale=1 if column == "score" else 100)
        axis.set(title=title, xlabel="training step", ylim=(-0.15, 5.15) if column == "score" else (-3, 103))
    return _finish(figure, axes[0], caption)


def plot_summary(table: pd.DataFrame, measures: list[str], *, caption: str) -> Figure:
    """A row per arm and a panel per measure (%), greedy and sampled answers: Wilson 95 % whiskers, seeds as ticks.

    `table` from `tables.summary` by method, penalty_weight or n_unsafe, and decoding; panels without numbers (no exact
    checker) are left out.
    """
    use_style()
    measures = [measure for measure in measures if table[measure].notna().any()]
    arms = table.drop_duplicates(["method", "n_unsafe"])[["method", "n_unsafe"]].reset_index(drop=True)
    sizes = table.loc[table["method"] != "sft", "n_unsafe"].nunique() > 1
    figure, axes = plt.subplots(
        1, len(measures), figsize=(2.9 * len(measures) + 1, 0.36 * len(arms) + 1.2), sharey=True, squeeze=False
    )
    looks = {"greedy": ("full", "#D55E00"), "sampled": ("none", "#0072B2")}
    looks = {decoding: look for decoding, look in looks.items() if decoding in set(table["decoding"])}
    for axis, measure in zip(axes[0], measures, strict=True):
        for i, (decoding, (fill, colour)) in enumerate(looks.items()):
            offset = 0.3 * (i - (len(looks) - 1) / 2)
            rows = arms.merge(table[table["decoding"] == decoding], on=["method", "n_unsafe"], how="left")
            places = [place + offset for place in range(len(rows))]
            style = {"fmt": "o", "color": colour, "fillstyle": fill, "markersize": 5, "linewidth": 1.1}
            axis.errorbar(100 * rows[measure], places, xerr=_whiskers(rows, measure), label=decoding, **style)
            for end in ("min", "max"):
                axis.plot(100 * rows[f"{measure}_{end}"], places, "|", color=colour, markersize=7)
        axis.set(title=MEASURE_NAMES[measure], xlim=(-3, 103))
    names = [
        NAMES[row.method] + (f", n = {row.n_unsafe}" if sizes and row.n_unsafe else "") for row in arms.itertuples()
    ]
    axes[0][0].set_yticks(range(len(arms)), names)
    axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
    return _finish(figure, axes[0][0], caption)


def plot_sizes(table: pd.DataFrame, measures: list[str], *, caption: str) -> Figure:
    """`plot_over` the size of D_unsafe, on a logarithmic axis; `table` from `tables.summary` by method and n_unsafe."""
    return plot_over("n_unsafe", table, measures, label="unsafe examples", caption=caption, log=True)


def plot_over(
    column: str, table: pd.DataFrame, measures: list[str], *, label: str, caption: str, log: bool = False
) -> Figure:
    """Measures (%) against a column, a line per method, Wilson 95 % whiskers, seeds as small ticks.

    `table` from `tables.summary` by method and that column, at one decoding.
    """
    use_style()
    measures = [measure for measure in measures if table[measure].notna().any()]
    figure, axes = plt.subplots(1, len(measures), figsize=(3.3 * len(measures), 3.5), squeeze=False)
    methods = list(dict.fromkeys(table["method"]))
    for axis, measure in zip(axes[0], measures, strict=True):
        for i, method in enumerate(methods):
            rows = table[table["method"] == method].sort_values(column)
            name, colour, marker, line = STYLES[method]
            # Side by side, so that whiskers can be told apart.
            aside = i - len(methods) / 2
            places = rows[column] * 1.03**aside if log else rows[column] + aside * 0.01 * np.ptp(table[column])
            axis.errorbar(
                places, 100 * rows[measure], yerr=_whiskers(rows, measure), label=name, color=colour, marker=marker,
                linestyle=line, markersize=5, linewidth=1.2, elinewidth=0.8,
            )  # fmt: skip
            for end in ("min", "max"):
                axis.plot(places, 100 * rows[f"{measure}_{end}"], "_", color=colour, markersize=5)
        ticks = sorted(table[column].unique())
        axis.set(title=MEASURE_NAMES[measure], xlabel=label, xscale="log" if log else "linear", ylim=(-3, 103))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60 if len(ticks) > 4 else 0)
        axis.minorticks_off()
    return _finish(figure, axes[0][0], caption, columns=5)


def plot_trade_off(points: pd.DataFrame, curve: pd.DataFrame, *, caption: str) -> Figure:
    """Over-refusal against harmful rate (%), a point per checkpoint; hollow where answers are not `fluent` (a flag).

    `points` from `tables.summary` by method, n_unsafe, seed and step; `curve` (x, y in [0, 1]) is drawn in grey.
    """
    use_style()
    figure, axis = plt.subplots(figsize=(6, 4.2))
    axis.plot(100 * curve["x"], 100 * curve["y"], color="0.75", linewidth=5, zorder=0)
    for method, rows in points.groupby("method", sort=False):
        name, colour, marker, _ = STYLES[method]
        for part, face in ((rows[rows["fluent"]], colour), (rows[~rows["fluent"]], "none")):
            style = {"marker": marker, "edgecolors": colour, "facecolors": face, "linewidths": 1, "alpha": 0.8}
            label = name if face == colour else None
            axis.scatter(100 * part["harm"], 100 * part["over_refusal"], s=28, label=label, **style)
    axis.set(xlabel="harmful answers to toxic prompts (%)", ylabel="harmless prompts refused (%)", xlim=(-3, 103))
    return _finish(figure, axis, caption)


def plot_over_weight(table: pd.DataFrame, measures: list[str], *, caption: str) -> Figure:
    """Measures (%) against λ, a line per method, Wilson 95 % bands; `table` from `tables.summary`, at one decoding."""
    use_style()
    measures = [measure for measure in measures if table[measure].notna().any()]
    figure, axes = plt.subplots(1, len(measures), figsize=(3.1 * len(measures), 3.4), sharey=True, squeeze=False)
    methods = list(dict.fromkeys(table["method"]))
    for axis, measure in zip(axes[0], measures, strict=True):
        for method in methods:
            rows = table[table["method"] == method].sort_values("penalty_weight")
            name, colour, marker, line = STYLES[method]
            values = rows["penalty_weight"].astype(float)
            axis.plot(values, 100 * rows[measure], color=colour, marker=marker, linestyle=line, label=name)
            band = (100 * rows[f"{measure}_low"], 100 * rows[f"{measure}_high"])
            axis.fill_between(values, *band, color=colour, alpha=0.12, linewidth=0)
        weights = sorted(table["penalty_weight"].astype(float).unique())
        axis.set(title=MEASURE_NAMES[measure], xlabel="λ (log scale)", xscale="log", ylim=(-3, 103))
        axis.set_xticks(weights, [f"{weight:.3g}" for weight in weights], rotation=45)
        axis.minorticks_off()
    return _finish(figure, axes[0][0], caption, columns=4)


def plot_search(development: pd.DataFrame, *, caption: str) -> Figure:
    """Regret on the development split against total pressure, a panel per method, a line per size of D_unsafe.

    `development` from `pressure.with_regret`, with `pressure`; a ring marks the least regret, a cross the automatic λ.
    """
    use_style()
    methods = [method for method in dict.fromkeys(development["method"]) if method != "sft"]
    sizes = sorted(development.loc[development["method"] != "sft", "n_unsafe"].unique(), reverse=True)
    colours = dict(zip(sizes, sns.color_palette("viridis", len(sizes)), strict=True))
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.8 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, method in zip(axes.flat, methods, strict=False):
        for size in sizes:
            rows = development[(development["method"] == method) & (development["n_unsafe"] == size)]
            tried = rows[rows["penalty_weight"] != "auto"].sort_values("pressure")
            if tried.empty:
                continue
            axis.plot(tried["pressure"], tried["regret"], "o-", color=colours[size], markersize=4, label=f"n = {size}")
            best = tried.loc[tried["regret"].idxmin()]
            axis.plot(best["pressure"], best["regret"], "o", color=colours[size], fillstyle="none", markersize=10)
            auto = rows[rows["penalty_weight"] == "auto"]
            axis.plot(auto["pressure"], auto["regret"], "x", color=colours[size], markersize=8, markeredgewidth=2)
        axis.set(title=NAMES[method], xscale="log", ylim=(0, None))
        tried = development[(development["method"] == method) & (development["penalty_weight"] != "auto")]
        ticks = sorted({float(f"{pressure:.2g}") for pressure in tried["pressure"]})
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], rotation=60, fontsize=8)
        axis.minorticks_off()
    for axis in list(axes.flat)[len(methods) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("total pressure, λ × share of unsafe rows")
    for line in axes:
        line[0].set_ylabel("regret")
    return _finish(figure, axes[0][0], caption, tight=False)


def plot_attacks(table: pd.DataFrame, *, caption: str) -> Figure:
    """Success of each attack (%), a panel per size of D_unsafe, a mark per method, Wilson 95 % whiskers.

    `table` from `tables.summary` by method, n_unsafe and attack.
    """
    use_style()
    sizes = sorted(table["n_unsafe"].unique(), reverse=True)
    attacks, methods = list(dict.fromkeys(table["attack"])), list(dict.fromkeys(table["method"]))
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(2.6 * len(sizes) + 1, 0.42 * len(attacks) + 1.3), sharey=True, squeeze=False
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        for i, method in enumerate(methods):
            rows = table[(table["n_unsafe"] == size) & (table["method"] == method)]
            rows = pd.DataFrame({"attack": attacks}).merge(rows, on="attack", how="left")
            name, colour, marker, _ = STYLES[method]
            places = [place + 0.6 * ((i + 0.5) / len(methods) - 0.5) for place in range(len(attacks))]
            axis.errorbar(
                100 * rows["harm"], places, xerr=_whiskers(rows, "harm"), fmt=marker, color=colour, label=name,
                markersize=5, elinewidth=0.9,
            )  # fmt: skip
        axis.set(title=f"{size} unsafe examples", xlabel="harmful (%)", xlim=(-3, 103))
    axes[0][0].set_yticks(range(len(attacks)), attacks)
    axes[0][0].set_ylim(len(attacks) - 0.5, -0.5)
    return _finish(figure, axes[0][0], caption, columns=6)


def plot_harvest(table: pd.DataFrame, *, caption: str) -> Figure:
    """What became of the sampled answers, as bars; `table` from `tables.harvest_table`."""
    use_style()
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    colours = ["#D55E00" if name.startswith("harmful") else "#999999" for name in table["answers"]]
    bars = axis.barh(table["answers"], table["count"], color=colours)
    axis.bar_label(bars, [f"{c} ({s:.0%})" for c, s in zip(table["count"], table["share"], strict=True)], padding=3)
    axis.set(xlabel="sampled answers", xlim=(0, 1.2 * max(table["count"].max(), 1)))
    axis.invert_yaxis()
    return _finish(figure, None, caption)


def plot_distance(places: pd.DataFrame, *, unsafe: str, caption: str) -> Figure:
    """Level lines of the exact EMD and of Jensen's bound over the disc in which μ lies, words of a plane on its rim.

    `places` has columns word, x, y (a unit vector) and probability; `unsafe` is the word the distance is from.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.9), sharey=True)
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, 201)])
    target = places.set_index("word").loc[unsafe]
    mean = places[["x", "y"]].mul(places["probability"], axis=0).sum()
    exact = 1 - (x * target["x"] + y * target["y"])
    jensen = ((x - target["x"]) ** 2 + (y - target["y"]) ** 2) / 2
    levels = np.linspace(0.2, 1.8, 5)
    # How far from the centre, towards the unsafe word, a level line crosses its axis.
    panels = (("exact EMD, 1 − μ·ê", exact, 1 - levels), ("the bound, ½‖μ − ê‖²", jensen, 1 - (2 * levels) ** 0.5))
    for axis, (title, distance, crossings) in zip(axes, panels, strict=True):
        rim = axis.add_patch(plt.Circle((0, 0), 1, facecolor="none", edgecolor="0.6"))
        axis.contourf(x, y, distance, levels=np.linspace(0, 2, 11), cmap="Blues", extend="max").set_clip_path(rim)
        axis.contour(x, y, distance, levels=levels, colors="0.35", linewidths=0.7).set_clip_path(rim)
        label = {"fontsize": 8, "ha": "center", "va": "center"}
        label["bbox"] = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        for level, crossing in zip(levels, crossings, strict=True):
            axis.text(crossing * target["x"], crossing * target["y"], f"{level:.1f}", **label)
        for row in places.itertuples():
            colour = "#D55E00" if row.word == unsafe else "black"
            axis.plot(row.x, row.y, "o", color=colour, markersize=3 + 12 * row.probability**0.5)
            side = "left" if row.x > 0.2 else "right" if row.x < -0.2 else "center"
            axis.text(1.13 * row.x, 1.15 * row.y, row.word, color=colour, fontsize=10, ha=side, va="center")
        axis.plot(*mean, "X", color="black", markersize=9, markeredgecolor="white")
        axis.text(mean["x"] - 0.08, mean["y"], "μ", fontsize=12, ha="right", va="center")
        axis.set(aspect="equal", xlim=(-1.55, 1.55), ylim=(-1.25, 1.25))
        axis.set_title(title, pad=2)
        axis.axis("off")
    return _finish(figure, None, caption)


def plot_push(table: pd.DataFrame, *, cosine: float, caption: str) -> Figure:
    """Gradient of each penalty by the logit of the unsafe token, against that token's probability p.

    `table` has columns method, cosine, p and push. Left: all penalties at `cosine`; right: the bound at each cosine.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.9), sharey=True)
    left = table[table["cosine"] == cosine]
    names = {  # p of the point beside which the name stands, how far from it, the name
        "gradient_ascent": (0.08, (8, 2), "gradient ascent: 1 − p"),
        "unlikelihood": (0.92, (-8, 2), "unlikelihood: p"),
        "emd": (0.3, (0, -27), "EMD bound"),
        "emd_exact": (0.5, (0, -15), "EMD exact"),
    }
    for method, (p, offset, name) in names.items():
        _, colour, _, line = STYLES[method]
        _named_line(axes[0], left[left["method"] == method], p, offset, name, color=colour, linestyle=line)
    bound = table[table["method"] == "emd"]
    cosines = sorted(bound["cosine"].unique())
    for c, colour in zip(cosines, sns.color_palette("flare_r", len(cosines)), strict=True):
        name = f"c = {c:g}".replace("-", "−")
        _named_line(axes[1], bound[bound["cosine"] == c], 1 / 3, (0, 5), name, color=colour)
    axes[0].set(title=f"the rest on a word at cosine {cosine:g}", ylabel="push on its logit, ∂ penalty / ∂z")
    axes[1].set(title="EMD, the bound: the rest on a word at cosine c")
    for axis in axes:
        axis.set(xlabel="probability p of the unsafe token", xlim=(0, 1), ylim=(0, 1.02))
    return _finish(figure, None, caption)


def plot_bounds(table: pd.DataFrame, *, caption: str) -> Figure:
    """The closed form, Jensen's bound and the paper's against the earth mover's distance, a point per token.

    `table` from `transport.bounds_table`. On the dashed line a value equals the distance.
    """
    use_style()
    figure, axis = plt.subplots(figsize=(5, 3.8))
    low, high = table["emd"].min(), table["emd"].max()
    axis.plot([low, high], [low, high], color="black", linewidth=1, linestyle=(0, (4, 3)))
    series = (("exact", "1 − μ·ê (closed form)", "#009E73", "o"), ("jensen", "½‖μ − ê‖² (Jensen)", "#D55E00", "^"))
    for column, label, colour, marker in (*series, ("paper", "‖μ − ê‖² / 2|V|² (Prop. 1)", "#0072B2", "s")):
        axis.scatter(table["emd"], table[column], s=12, marker=marker, color=colour, label=label, alpha=0.7)
    axis.set(xscale="log", yscale="log", xlabel="earth mover's distance, by linear program", ylabel="value")
    return _finish(figure, axis, caption)


def plot_mass(table: pd.DataFrame, *, caption: str) -> Figure:
    """Probability mass by distance from the unsafe token, a line per method and a panel per part of the answer.

    `table` has columns method, part, distance and mass (see `transport.mass_by_distance`).
    """
    use_style()
    parts = list(dict.fromkeys(table["part"]))
    figure, axes = plt.subplots(1, len(parts), figsize=(4.3 * len(parts), 3.4), sharey=True, squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        for method, rows in table[table["part"] == part].groupby("method", sort=False):
            name, colour, marker, line = STYLES[method]
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "label": name}
            axis.plot(rows["distance"], 100 * rows["mass"], **style)
        axis.set(title=part, xlabel="distance 1 − cos to the unsafe token", ylim=(0, 100))
        axis.tick_params(axis="x", labelsize=8)
    axes[0][0].set_ylabel("probability mass (%)")
    return _finish(figure, axes[0][0], caption)


def plot_bench(table: pd.DataFrame, *, caption: str) -> Figure:
    """Time and memory of our head over those of each contender, a row per case; whiskers are the range over rounds.

    `table` from `tables.bench_table`. Left of the line at 1 ours needs less; a case out of memory has no point.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(table) + 1.4), sharey=True)
    places = range(len(table))
    for axis, measure in zip(axes, ("time", "memory"), strict=True):
        for (name, colour, marker), offset in zip(BENCH_STYLES[1:], (-0.12, 0.12), strict=True):
            ratio, error = table[f"{measure}_vs_{name}"].astype(float), None
            if measure == "time":
                low, high = (table[f"time_vs_{name}_{end}"].astype(float) for end in ("low", "high"))
                error = [(ratio - low).clip(lower=0), (high - ratio).clip(lower=0)]
            label = f"over {BENCH_NAMES[name]}"
            axis.errorbar(ratio, [p + offset for p in places], xerr=error, fmt=marker, color=colour, label=label)
        axis.axvline(1, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set(title=f"{measure}, ratio", xlim=(0, None))
    labels = []
    for row in table.itertuples():
        if "vocab" in table:
            size = f"V = {row.vocab:,}, H = {row.hidden}"
        else:
            length = "lengths of Alpaca" if pd.isna(row.sequence_length) else f"{row.sequence_length:.0f} tokens a row"
            size = f"{row.geometry}, batch of {row.batch_size}, {length}"
        kept = "\nfreed memory kept" if row.keep_freed_memory else ""
        labels.append(f"{size}\n{row.penalty}, {row.unsafe:.0%} unsafe, {row.dtype}{kept}")
    axes[0].set_yticks(list(places), labels)
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    return _finish(figure, axes[0], caption)


def plot_detectors(table: pd.DataFrame, *, caption: str) -> Figure:
    """Texts called degenerate (%), a row per kind of text and a mark per detector, Wilson 95 % whiskers.

    `table` from `degenerate.rates`. Left panel: real texts, where every mark is a false alarm; right: broken ones.
    """
    use_style()
    colours = dict(zip(dict.fromkeys(table["detector"]), ("#56B4E9", "#E69F00", "#D55E00", "#999999"), strict=False))
    markers = dict(zip(colours, "v^os", strict=False))
    sides = [table[~table["degenerate"]], table[table["degenerate"]]]
    kinds = [list(dict.fromkeys(side["kind"])) for side in sides]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.34 * max(map(len, kinds)) + 1.4))
    for axis, side, names, title in zip(axes, sides, kinds, ("language", "no language"), strict=True):
        for i, (detector, colour) in enumerate(colours.items()):
            rows = side[side["detector"] == detector]
            places = [names.index(kind) + 0.7 * ((i + 0.5) / len(colours) - 0.5) for kind in rows["kind"]]
            style = {"fmt": markers[detector], "color": colour, "label": detector, "markersize": 5, "elinewidth": 0.9}
            axis.errorbar(100 * rows["rate"], places, xerr=_whiskers(rows, "rate"), **style)
        axis.set(title=title, xlabel="called degenerate, or not English (%)", xlim=(-3, 103))
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
    return _finish(figure, axes[0], caption)


def plot_scaling(table: pd.DataFrame, *, caption: str) -> Figure:
    """Seconds and peak memory of the loss head against tokens, all contenders, both axes logarithmic.

    `table` from `tables.bench_table`, one row per number of tokens.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.3))
    for axis, (prefix, title) in zip(axes, (("seconds", "seconds"), ("peak_mb", "peak memory (MB)")), strict=True):
        for name, colour, marker in BENCH_STYLES:
            values = table[f"{prefix}_{name}"]
            axis.plot(table["tokens"], values, marker=marker, color=colour, label=BENCH_NAMES[name])
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(table["tokens"], [f"{size:,}" for size in table["tokens"]])
        axis.minorticks_off()
    return _finish(figure, axes[0], caption)


def plot_comparison(table: pd.DataFrame, *, method: str, caption: str) -> Figure:
    """Plain SFT beside TA-SFT by `method`: a row per measure and judge (%), 95 % whiskers; table as in `comparison`."""
    use_style()
    figure, axis = plt.subplots(figsize=(7.5, 0.34 * len(table) + 1.2))
    for side, style, offset in (("sft", "sft", -0.13), ("tasft", method, 0.13)):
        name, colour, marker, _ = STYLES[style]
        places = [place + offset for place in range(len(table))]
        axis.errorbar(
            100 * table[side], places, xerr=_whiskers(table, side), fmt=marker, color=colour,
            label=name, markersize=5, elinewidth=1,
        )  # fmt: skip
    labels = [f"{row.measure}  [{row.by}]" for row in table.itertuples()]
    axis.set_yticks(range(len(table)), labels, fontsize=8)
    axis.set(xlabel="%", xlim=(-3, 103), ylim=(len(table) - 0.5, -0.5))
    measures = table["measure"].tolist()
    for place in range(1, len(measures)):
        if measures[place] != measures[place - 1]:
            axis.axhline(place - 0.5, color="0.85", linewidth=0.8)
    return _finish(figure, axis, caption)


def plot_scores(table: pd.DataFrame, threshold: float, *, caption: str) -> Figure:
    """Rows by SAFT score, kept and dropped, with τ as a line; a logarithmic axis where all scores are positive.

    `table` from `filter_report.histogram`; with a column `harmful`, rows known to be so are drawn as an outline.
    """
    use_style()
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    widths = table["high"] - table["low"]
    for name, colour in (("kept", "#0072B2"), ("dropped", "#D55E00")):
        axis.bar(table["low"], table[name], widths, align="edge", color=colour, label=name, linewidth=0)
    if "harmful" in table:
        edges = [*table["low"], table["high"].iloc[-1]]
        axis.stairs(table["harmful"], edges, color="black", linewidth=1.2, label="known to be harmful")
    if math.isfinite(threshold):
        axis.axvline(threshold, color="black", linewidth=1, linestyle=(0, (4, 3)), label=f"τ = {threshold:.3g}")
    axis.set(xlabel="SAFT score", ylabel="rows", xscale="log" if table["low"].min() > 0 else "linear")
    return _finish(figure, axis, caption)


def plot_layers(table: pd.DataFrame, *, caption: str) -> Figure:
    """AUROC by layer, a panel per pooling, a line per detector; `table` from `contamination.layer_table`."""
    use_style()
    poolings = list(dict.fromkeys(table["pooling"]))
    figure, axes = plt.subplots(1, len(poolings), figsize=(3.4 * len(poolings), 3.2), sharey=True, squeeze=False)
    names = list(dict.fromkeys(table["detector"]))
    colours = dict(zip(names, [*sns.color_palette("viridis", len(names) - 1), "#999999"], strict=True))
    for axis, pooling in zip(axes[0], poolings, strict=True):
        for name, rows in table[table["pooling"] == pooling].groupby("detector", sort=False):
            axis.plot(rows["layer"], rows["auroc"], "o-", color=colours[name], markersize=4, label=detector_name(name))
        axis.axhline(0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set(title=f"activation: {pooling}", xlabel="layer", ylim=(0, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("AUROC")
    return _finish(figure, axes[0][0], caption)


def plot_detection(table: pd.DataFrame, *, caption: str) -> Figure:
    """AUROC and precision by contamination, a line per detector, broken where it has labels; bootstrap whiskers.

    `table` has the columns of `detection.detection_table` and contamination.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    names = list(dict.fromkeys(table["detector"]))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    titles = {"auroc": "AUROC", "precision": "precision at the contamination"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for i, (name, rows) in enumerate(table.groupby("detector", sort=False)):
            ends = [rows[measure] - rows[f"{measure}_low"], rows[f"{measure}_high"] - rows[measure]]
            places = rows["contamination"] + 0.002 * (i - len(names) / 2)
            axis.errorbar(
                places, rows[measure], yerr=[end.clip(lower=0) for end in ends], color=colours[name], marker="o",
                linestyle=":" if rows["labels"].iloc[0] else "-", markersize=4, linewidth=1.2, elinewidth=0.8,
                label=detector_name(name, int(rows["labels"].iloc[0])),
            )  # fmt: skip
        axis.set(title=title, xlabel="contamination", ylim=(-0.03, 1.03))
        axis.set_xticks(sorted(table["contamination"].unique()))
    return _finish(figure, axes[0], caption, columns=5)


def detector_name(name: str, labels: int = 0) -> str:
    """A detector of `contamination.detectors` in words."""
    names = {
        "saft": "SAFT",
        "saft_labelled": "SAFT",
        "saft_unsafe": "SAFT, harmful only",
        "centroid": "nearest centroid",
    }
    names |= {"probe": "linear probe", "loss": "loss of the base", "length": "length", "anchors": "anchors"}
    shown = names.get(name) or (f"SAFT, k = {name.removeprefix('saft_')}" if name.startswith("saft_") else name)
    return f"{shown} ({labels} labels)" if labels else shown


def save_figure(figure: Figure, folder: Path, name: str, table: pd.DataFrame) -> list[Path]:
    """Write `<name>.png` and the `.csv` it was drawn from; the same table gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "csv")]
    figure.savefig(paths[0], metadata={"Software": None}, bbox_inches="tight")
    table.to_csv(paths[1], index=False, float_format="%.6g")
    return paths


def _lines(axis: Axes, rates: pd.DataFrame, column: str, *, band: bool, scale: float = 100) -> None:
    keys = ["method", "seed"] if "seed" in rates else ["method"]
    labelled = set()
    for (method, *_), rows in rates.groupby(keys, sort=False):
        rows = rows.sort_values("step")
        name, colour, marker, line = STYLES[method]
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}
        axis.plot(rows["step"], scale * rows[column], label=None if method in labelled else name, **style)
        labelled.add(method)
        if band:
            ends = (scale * rows["low"], scale * rows["high"])
            axis.fill_between(rows["step"], *ends, color=colour, alpha=0.12, linewidth=0)


def _named_line(axis: Axes, rows: pd.DataFrame, p: float, offset: tuple[float, float], name: str, **style) -> None:
    """`push` over `p` with its name beside the point nearest to `p`, `offset` (in points) away from it."""
    axis.plot(rows["p"], rows["push"], linewidth=2, **style)
    point = rows.iloc[(rows["p"] - p).abs().argmin()]
    side = {1: "left", 0: "center", -1: "right"}[int(np.sign(offset[0]))]
    style = {"ha": side, "color": style["color"], "fontsize": 10, "textcoords": "offset points"}
    axis.annotate(name, (point["p"], point["push"]), offset, **style)


def _whiskers(rows: pd.DataFrame, measure: str) -> list[pd.Series]:
    """Wilson's interval as the lengths that errorbar wants, in %."""
    return [
        100 * (rows[measure] - rows[f"{measure}_low"]).clip(lower=0),
        100 * (rows[f"{measure}_high"] - rows[measure]).clip(lower=0),
    ]


def _finish(
    figure: Figure, axis: Axes | None, caption: str, *, columns: int | None = None, tight: bool = True
) -> Figure:
    """Legend above (of `axis`, in lines of at most `columns`), caption below, closed."""
    if axis is not None:
        handles, labels = axis.get_legend_handles_labels()
        lines = math.ceil(len(labels) / (columns or len(labels)))
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
        figure.legend(handles, labels, ncol=math.ceil(len(labels) / lines), **place)
    caption = textwrap.fill(caption, int(17 * figure.get_figwidth()))  # letters to an inch
    figure.text(0.0, -0.02, caption, fontsize=8, color="0.35", va="top")
    if tight:
        figure.tight_layout()
    plt.close(figure)  # shown where it is returned, not a second time by the notebook's backend
    return figure
