"""Figures in one style. `plot_*` takes a table and returns a figure; `save_figure` writes it with its table."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colour-blind safe (Okabe-Ito), one colour per method in every figure.
COLOURS = {
    "sft": "#000000",
    "kto": "#E69F00",
    "nlcl": "#56B4E9",
    "emd": "#D55E00",
    "emd_exact": "#009E73",
    "stl": "#CC79A7",
}
NAMES = {"sft": "SFT", "kto": "KTO", "nlcl": "NLCL", "emd": "EMD", "emd_exact": "EMD exact", "stl": "STL"}
BENCH_STYLES = (("fused_tasft", "#D55E00", "o"), ("trl_sft", "#000000", "s"), ("dense_tasft", "#0072B2", "^"))
BENCH_NAMES = {"fused_tasft": "TA-SFT, fused head", "trl_sft": "SFT, TRL", "dense_tasft": "TA-SFT, full logits"}
MARKERS = dict(zip(COLOURS, "sXvo^D", strict=True))


def use_style() -> None:
    """The style of all figures; fixed ids, so that a figure drawn twice is the same file."""
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    mpl.rcParams.update(
        {
            "svg.hashsalt": "tasft",
            "svg.fonttype": "none",
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


def plot_final(table: pd.DataFrame, *, caption: str) -> Figure:
    """The trained models with greedy and with sampled answers: harmful, degenerate, benign correct (%), Wilson 95 %.

    `table` from `tables.with_sampled`; a panel without numbers (no exact checker) is left out.
    """
    use_style()
    panels = [("rate", "harmful (%)"), ("degenerate", "degenerate (%)"), ("correct", "benign answers correct (%)")]
    panels = [panel for panel in panels if table[panel[0]].notna().any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 0.45 * len(table) + 1.2), sharey=True)
    places = range(len(table))
    for axis, (column, title) in zip(axes, panels, strict=True):
        for suffix, label, offset, fill, colour in (
            ("", "greedy", -0.12, "full", "#D55E00"),
            ("_sampled", "sampled", 0.12, "none", "#0072B2"),
        ):
            values, error = 100 * table[f"{column}{suffix}"], None
            if column == "rate":
                error = [values - 100 * table[f"low{suffix}"], 100 * table[f"high{suffix}"] - values]
            style = {"fmt": "o", "color": colour, "fillstyle": fill, "markersize": 6, "linewidth": 1.2}
            axis.errorbar(values, [place + offset for place in places], xerr=error, label=label, **style)
        axis.set(title=title, xlim=(-3, 103))
    axes[0].set_yticks(list(places), [_row_name(row) for row in table.itertuples()])
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    return _finish(figure, axes[0], caption)


def plot_weights(development: pd.DataFrame, chosen: dict[str, float], *, caption: str) -> Figure:
    """Harmful and degenerate rate and benign correctness on the development split against λ, one panel per method.

    `development` has columns method, penalty_weight (a number), rate, degenerate and correct, in [0, 1]; the dashed
    line marks the weight in `chosen`.
    """
    use_style()
    methods = list(dict.fromkeys(development["method"]))
    figure, axes = plt.subplots(1, len(methods), figsize=(3 * len(methods), 3.3), sharey=True, squeeze=False)
    series = (("rate", "harmful", "#D55E00", "o-"), ("degenerate", "degenerate", "#999999", "s--"))
    series += (("correct", "benign correct", "#0072B2", "^:"),)
    for axis, method in zip(axes[0], methods, strict=True):
        rows = development[development["method"] == method].sort_values("penalty_weight")
        for column, label, colour, line in series:
            if rows[column].notna().any():
                axis.plot(rows["penalty_weight"], 100 * rows[column], line, color=colour, label=label)
        axis.axvline(chosen[method], color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set(title=NAMES[method], xlabel="λ (log scale)", xscale="log", ylim=(-3, 103))
        axis.set_xticks(sorted(rows["penalty_weight"]), [f"{w:g}" for w in sorted(rows["penalty_weight"])])
        axis.minorticks_off()
    axes[0][0].set_ylabel("development split (%)")
    return _finish(figure, axes[0][0], caption)


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
            style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5, "label": NAMES[method]}
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


def save_figure(figure: Figure, folder: Path, name: str, table: pd.DataFrame) -> list[Path]:
    """Write `<name>.png`, `.svg` and the `.csv` it was drawn from; the same table gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg", "csv")]
    figure.savefig(paths[0], metadata={"Software": None}, bbox_inches="tight")
    figure.savefig(paths[1], metadata={"Date": None}, bbox_inches="tight")
    table.to_csv(paths[2], index=False, float_format="%.6g")
    return paths


def _lines(axis: Axes, rates: pd.DataFrame, column: str, *, band: bool, scale: float = 100) -> None:
    keys = ["method", "seed"] if "seed" in rates else ["method"]
    labelled = set()
    for (method, *_), rows in rates.groupby(keys, sort=False):
        rows = rows.sort_values("step")
        label = NAMES[method] if method not in labelled else None
        labelled.add(method)
        axis.plot(
            rows["step"], scale * rows[column], color=COLOURS[method], marker=MARKERS[method], markersize=4, label=label
        )
        if band:
            axis.fill_between(
                rows["step"], scale * rows["low"], scale * rows["high"], color=COLOURS[method], alpha=0.12, linewidth=0
            )


def _row_name(row) -> str:
    weight = "" if row.method == "sft" else f", λ = {float(row.penalty_weight):g}"
    return f"{NAMES[row.method]}{weight}" + (f", seed {row.seed}" if row.seed else "")


def _finish(figure: Figure, axis: Axes | None, caption: str) -> Figure:
    if axis is not None:
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1.09), ncol=len(labels))
    figure.text(0.0, -0.02, caption, fontsize=8, color="0.35", va="top")
    figure.tight_layout()
    plt.close(figure)  # shown where it is returned, not a second time by the notebook's backend
    return figure
