"""Figures of time and memory."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import finish, panels, whiskers

BENCH_STYLES = (("fused_tasft", "#D55E00", "o"), ("trl_sft", "#000000", "s"), ("dense_tasft", "#0072B2", "^"))
BENCH_NAMES = {"fused_tasft": "TA-SFT, fused head", "trl_sft": "SFT, TRL", "dense_tasft": "TA-SFT, full logits"}


def plot_bench(table: pd.DataFrame, *, caption: str) -> Figure:
    """Time and memory of our head over those of each contender, a row per case; whiskers are the range over rounds.

    `table` from `bench.tables.bench_table`. Left of the line at 1 ours needs less; a case out of memory has no point.
    """
    figure, axes = panels(2, 10, 0.5 * len(table) + 1.4, sharey=True)
    places = np.arange(len(table))
    for axis, measure in zip(axes, ("time", "memory"), strict=True):
        for (name, colour, marker), offset in zip(BENCH_STYLES[1:], (-0.12, 0.12), strict=True):
            ratios = table.filter(like=f"{measure}_vs_{name}").astype(float)
            style = {"fmt": marker, "color": colour, "label": f"over {BENCH_NAMES[name]}"}
            style["xerr"] = whiskers(ratios, f"time_vs_{name}", 1) if measure == "time" else None
            axis.errorbar(ratios[f"{measure}_vs_{name}"], places + offset, **style)
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
    axes[0].set_yticks(places, labels)
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    return finish(figure, axes[0], caption)


def plot_scaling(table: pd.DataFrame, *, caption: str) -> Figure:
    """Seconds and peak memory of the loss head against tokens, all contenders, both axes logarithmic.

    `table` from `bench.tables.bench_table`, one row per number of tokens.
    """
    figure, axes = panels(2, 8, 3.3)
    for axis, (prefix, title) in zip(axes, (("seconds", "seconds"), ("peak_mb", "peak memory (MB)")), strict=True):
        for name, colour, marker in BENCH_STYLES:
            values = table[f"{prefix}_{name}"]
            axis.plot(table["tokens"], values, marker=marker, color=colour, label=BENCH_NAMES[name])
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(table["tokens"], [f"{size:,}" for size in table["tokens"]])
        axis.minorticks_off()
    return finish(figure, axes[0], caption)
