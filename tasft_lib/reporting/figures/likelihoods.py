"""Figures of what models find likely: held-out safe, unsafe and benign answers; tables of `evaluation.preference`."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .arms import AXES
from .style import finish, look, panels, whiskers

MEASURES = {  # title, unit, scale
    "preference": ("safe answer likelier than unsafe", "held-out toxic prompts (%)", 100),
    "margin": ("by how much", "safe − unsafe, nats a token", 1),
    "benign_cost": ("benign NLL above plain SFT's", "nats a token", 1),
}
FAR = 1.0  # nats a token above plain SFT's benign NLL: hardly language
CHEAP = 0.2  # nats a token up to which the axis of costs is linear, and logarithmic beyond


def plot_preference(column: str, table: pd.DataFrame, *, caption: str) -> Figure:
    """Preference, margin and what they cost in benign NLL against a column of `AXES`, a line per method.

    `table` from `preference.preference_table` by method and that column. 95 % as a band, or as whiskers on a log axis;
    there a method at 0, plain SFT among sizes of D_unsafe, is a horizontal line.
    """
    label, scale = AXES[column]
    figure, axes = panels(len(MEASURES), 3.6 * len(MEASURES), 3.5)
    for axis, measure in zip(axes, MEASURES, strict=True):
        _, _, factor = MEASURES[measure]
        for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
            rows, style = rows.sort_values(column), look(method) | {"markersize": 4, "linewidth": 1.2}
            if scale == "linear":
                axis.plot(rows[column], factor * rows[measure], **style)
                ends = (factor * rows[f"{measure}_{end}"] for end in ("low", "high"))
                axis.fill_between(rows[column], *ends, color=style["color"], alpha=0.12, linewidth=0)
            elif (rows[column] == 0).all():
                axis.axhline(factor * rows[measure].iloc[0], **style | {"marker": ""})
            else:
                # Side by side, so that whiskers can be told apart.
                places = rows[column] * 1.03 ** (i - table["method"].nunique() / 2)
                lengths = whiskers(rows, measure, factor)
                axis.errorbar(places, factor * rows[measure], yerr=lengths, elinewidth=0.8, **style)
        _panel(axis, measure)
        axis.set(xlabel=label, xscale=scale)
        if scale == "log":
            ticks = sorted(set(table[column]) - {0})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
    return finish(figure, axes[0], caption)


def plot_depth(table: pd.DataFrame, *, caption: str) -> Figure:
    """Log-likelihood per token of the rest of the unsafe answer after k of its tokens, a line per method.

    `table` from `preference.depth_table` by method, 95 % whiskers.
    """
    depths = sorted(table["k"].unique())
    methods = list(dict.fromkeys(table["method"]))
    figure, (axis,) = panels(1, 6.5, 3.8)
    for i, method in enumerate(methods):
        rows = table[table["method"] == method].sort_values("k")
        # Side by side, so that whiskers can be told apart.
        places = [depths.index(k) + 0.5 * ((i + 0.5) / len(methods) - 0.5) for k in rows["k"]]
        style = look(method) | {"markersize": 5, "linewidth": 1.2, "elinewidth": 0.8}
        axis.errorbar(places, rows["rest"], yerr=whiskers(rows, "rest", 1), **style)
    longer = [table.loc[table["k"] == k, "rest_n"].min() for k in depths]
    axis.set_xticks(range(len(depths)), [f"{k}\nn = {n}" for k, n in zip(depths, longer, strict=True)])
    axis.set(
        xlabel="unsafe tokens that are given, k; n answers are longer",
        ylabel="rest of the unsafe answer\n(log-likelihood, nats a token)",
    )
    return finish(figure, axis, caption, columns=5)


def plot_preference_trade_off(table: pd.DataFrame, *, caption: str) -> Figure:
    """Preference and margin against their cost in benign NLL, a line per method along λ, a panel per size of D_unsafe.

    `table` from `preference.preference_table` by method, n_unsafe and penalty_weight, with plain SFT (dashed lines).
    The automatic λ is a hollow mark off the line. What costs more than `FAR` stands hollow at the right edge. The
    largest λ is named.
    """
    plain = table[table["method"] == "sft"].iloc[0]
    arms = table[table["method"] != "sft"]
    sizes = sorted(arms["n_unsafe"].unique(), reverse=True)
    measures = ("preference", "margin")
    figure, axes = panels(len(sizes), 3.4 * len(sizes) + 1, 6.2, len(measures), sharex=True, sharey="row")
    for place, axis in enumerate(axes):
        measure, size = measures[place // len(sizes)], sizes[place % len(sizes)]
        title, unit, factor = MEASURES[measure]
        axis.axhline(factor * plain[measure], color="0.4", linewidth=0.8, linestyle="--")
        axis.axvline(0, color="0.4", linewidth=0.8, linestyle="--", label="SFT")
        for method, rows in arms[arms["n_unsafe"] == size].groupby("method", sort=False):
            tried = rows[rows["penalty_weight"] != "auto"].astype({"penalty_weight": float})
            tried, auto = tried.sort_values("penalty_weight"), rows[rows["penalty_weight"] == "auto"]
            style = look(method)
            x = tried["benign_cost"].clip(upper=FAR)
            axis.plot(x, factor * tried[measure], color=style["color"], linestyle=style["linestyle"], linewidth=1)
            for part, is_full in ((tried, tried["benign_cost"] <= FAR), (auto, auto["penalty_weight"] != "auto")):
                for rows_of, face in ((part[is_full], style["color"]), (part[~is_full], "none")):
                    costs = rows_of["benign_cost"].clip(upper=FAR)
                    axis.plot(costs, factor * rows_of[measure], **_marks(style, face))
            last, at = tried.iloc[-1], (x.iloc[-1], factor * tried[measure].iloc[-1])
            text = {"textcoords": "offset points", "color": style["color"], "fontsize": 7, "ha": "right"}
            axis.annotate(f"λ = {last['penalty_weight']:g}", at, (-5, 3), **text)
        axis.set_title(f"{size} unsafe examples" if place < len(sizes) else "")
        axis.set(xlabel="benign NLL above plain SFT's, nats a token" if place >= len(sizes) else "")
        axis.locator_params("x", nbins=5)
        if place % len(sizes) == 0:
            axis.set_ylabel(f"{title}\n{unit}")
        if measure == "preference":
            axis.set_ylim(-3, 103)
    return finish(figure, axes[0], caption, columns=6)


def plot_costs(table: pd.DataFrame, *, dear: float, caption: str) -> Figure:
    """Harm and preference (%) against cost in benign NLL, a line per method along its strength, a column per adapter.

    `table` from `trade_off.searched`. A ring marks the chosen trials, a dotted line what is too `dear` (nats a token);
    hollow are trials with more than 5 % degenerate answers. Dashed: plain SFT. The axis of costs is logarithmic above
    `CHEAP`: what can be paid for lies close together.
    """
    adapters = list(dict.fromkeys(table["adapter"]))
    measures = {"harm": "toxic prompts answered (%)", "preference": "safe answer likelier (%)"}
    size = (4.2 * len(adapters) + 3, 7.0)
    figure, axes = panels(len(adapters), *size, len(measures), sharex=True, sharey="row")
    for method in dict.fromkeys(table.loc[table["method"] != "sft", "method"]):
        axes[0].plot([], [], markersize=5, **look(method))  # the legend's; not every method has every adapter
    ticks = [tick for tick in (-0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5) if tick <= max(table["benign_cost"].max(), CHEAP)]
    for place, axis in enumerate(axes):
        measure, adapter = list(measures)[place // len(adapters)], adapters[place % len(adapters)]
        own = table[table["adapter"] == adapter]
        axis.set_xscale("symlog", linthresh=CHEAP, linscale=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.axhline(100 * own.loc[own["method"] == "sft", measure].iloc[0], color="0.4", linewidth=0.8, linestyle="--")
        axis.axvline(dear, color="0.4", linewidth=0.8, linestyle=":")
        for method, rows in own[own["method"] != "sft"].groupby("method", sort=False):
            rows, style = rows.sort_values("penalty_weight"), look(method)
            axis.plot(rows["benign_cost"], 100 * rows[measure], markersize=0, **style | {"linewidth": 1, "label": None})
            for part, face in ((rows["degenerate"] <= 0.05, style["color"]), (rows["degenerate"] > 0.05, "none")):
                axis.plot(rows.loc[part, "benign_cost"], 100 * rows.loc[part, measure], **_marks(style, face))
            ring = rows[rows["is_chosen"]]
            circle = {"marker": "o", "linestyle": "", "fillstyle": "none", "markersize": 11, "color": style["color"]}
            axis.plot(ring["benign_cost"], 100 * ring[measure], **circle)
        left, right = axis.get_xlim()
        axis.set_xlim(min(left, 0), max(right, 2 * dear))  # no cost and what is too dear stand in every figure
        axis.set_title(adapter if place < len(adapters) else "")
        axis.set(xlabel="benign NLL above plain SFT's, nats a token" if place >= len(adapters) else "", ylim=(-3, 103))
        if place % len(adapters) == 0:
            axis.set_ylabel(measures[measure])
    return finish(figure, axes[0], caption, columns=5)


def _marks(style: dict, face: str) -> dict:
    """Options of `plot` for points without a line, filled with `face`."""
    own = {"marker": style["marker"], "color": style["color"]}
    return own | {"markerfacecolor": face, "markersize": 5, "linestyle": "none", "zorder": 3}


def _panel(axis: Axes, measure: str) -> None:
    title, unit, _ = MEASURES[measure]
    axis.set_title(title)
    axis.set_ylabel(unit)
    if measure == "preference":
        axis.set_ylim(-3, 103)
    else:
        axis.axhline(0, color="0.4", linewidth=0.8)
