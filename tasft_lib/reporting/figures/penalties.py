"""Figures of the penalties themselves: the distance, its bounds, the push on a token, where the mass goes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import NAMES, STYLES, finish, look, panels


def plot_distance(places: pd.DataFrame, *, unsafe: str, caption: str) -> Figure:
    """Level lines of the exact EMD and of Jensen's bound over the disc in which μ lies, words of a plane on its rim.

    `places` has columns word, x, y (a unit vector) and probability; `unsafe` is the word the distance is from.
    """
    figure, axes = panels(2, 8.6, 3.9, sharey=True)
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, 201)])
    target = places.set_index("word").loc[unsafe]
    mean = places[["x", "y"]].mul(places["probability"], axis=0).sum()
    exact = 1 - (x * target["x"] + y * target["y"])
    jensen = ((x - target["x"]) ** 2 + (y - target["y"]) ** 2) / 2
    levels = np.linspace(0.2, 1.8, 5)
    # How far from the centre, towards the unsafe word, a level line crosses its axis.
    sides = (("exact EMD, 1 − μ·ê", exact, 1 - levels), ("the bound, ½‖μ − ê‖²", jensen, 1 - (2 * levels) ** 0.5))
    for axis, (title, distance, crossings) in zip(axes, sides, strict=True):
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
    return finish(figure, None, caption)


def plot_push(table: pd.DataFrame, *, cosine: float, caption: str) -> Figure:
    """Gradient of each penalty by the logit of the unsafe token, against that token's probability p.

    `table` has columns method, cosine, p and push. Left: all penalties at `cosine`; right: the bound at each cosine.
    """
    figure, axes = panels(2, 9.4, 3.9, sharey=True)
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
    return finish(figure, None, caption)


def plot_bounds(table: pd.DataFrame, *, caption: str) -> Figure:
    """The closed form, Jensen's bound and the paper's against the earth mover's distance, a point per token.

    `table` from `emd_bound.bounds_table`. On the dashed line a value equals the distance.
    """
    figure, (axis,) = panels(1, 5, 3.8)
    low, high = table["emd"].min(), table["emd"].max()
    axis.plot([low, high], [low, high], color="black", linewidth=1, linestyle=(0, (4, 3)))
    series = (("exact", "1 − μ·ê (closed form)", "#009E73", "o"), ("jensen", "½‖μ − ê‖² (Jensen)", "#D55E00", "^"))
    for column, label, colour, marker in (*series, ("paper", "‖μ − ê‖² / 2|V|² (Prop. 1)", "#0072B2", "s")):
        axis.scatter(table["emd"], table[column], s=12, marker=marker, color=colour, label=label, alpha=0.7)
    axis.set(xscale="log", yscale="log", xlabel="earth mover's distance, by linear program", ylabel="value")
    return finish(figure, axis, caption)


def plot_mass(table: pd.DataFrame, *, caption: str) -> Figure:
    """Probability mass by distance from the unsafe token, a line per method and a panel per part of the answer.

    `table` has columns method, part, distance and mass (see `emd_bound.mass_by_distance`).
    """
    parts = list(dict.fromkeys(table["part"]))
    figure, axes = panels(len(parts), 4.3 * len(parts), 3.4, sharey=True)
    for axis, part in zip(axes, parts, strict=True):
        for method, rows in table[table["part"] == part].groupby("method", sort=False):
            axis.plot(rows["distance"], 100 * rows["mass"], markersize=5, **look(method))
        axis.set(title=part, xlabel="distance 1 − cos to the unsafe token", ylim=(0, 100))
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_ylabel("probability mass (%)")
    return finish(figure, axes[0], caption)


def plot_push_by_part(table: pd.DataFrame, *, caption: str) -> Figure:
    """Mean push of each penalty on the unsafe token by its place in the answer, a panel per model. Unlikelihood's is
    the token's probability itself.

    `table` from `emd_bound.push_by_part`.
    """
    models = list(dict.fromkeys(table["method"]))
    figure, axes = panels(len(models), 2.9 * len(models) + 1, 3.4, sharey=True)
    for axis, model in zip(axes, models, strict=True):
        for penalty, rows in table[table["method"] == model].groupby("penalty", sort=False):
            axis.plot(rows["part"], rows["push"], markersize=5, **look(penalty))
        axis.set(title=f"at {NAMES[model]}'s distributions", ylim=(-0.03, 1.03))
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_ylabel("|gradient| by the unsafe token's logit")
    return finish(figure, axes[0], caption)


def plot_mean_cosines(table: pd.DataFrame, *, caption: str) -> Figure:
    """A token's mean cosine with the others against its rank by frequency, a panel per geometry; the line is a median.

    `table` from `embedding_axis.mean_cosines`.
    """
    names = list(dict.fromkeys(table["geometry"]))
    figure, axes = panels(len(names), 3.6 * len(names), 3.2, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        rows = table[table["geometry"] == name]
        axis.scatter(rows["rank"], rows["mean_cosine"], s=3, color="#0072B2", alpha=0.15, linewidths=0, rasterized=True)
        bins = np.geomspace(1, rows["rank"].max() + 1, 13)
        of_bin = rows.groupby(pd.cut(rows["rank"], bins, right=False), observed=True)
        axis.plot(of_bin["rank"].median(), of_bin["mean_cosine"].median(), color="#D55E00", linewidth=2)
        axis.axhline(0, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set(title=name, xscale="log", xlabel="rank of the token by frequency")
    axes[0].set_ylabel("mean cosine with other tokens")
    return finish(figure, None, caption)


def _named_line(axis: Axes, rows: pd.DataFrame, p: float, offset: tuple[float, float], name: str, **style) -> None:
    """`push` over `p` with its name beside the point nearest to `p`, `offset` (in points) away from it."""
    axis.plot(rows["p"], rows["push"], linewidth=2, **style)
    point = rows.iloc[(rows["p"] - p).abs().argmin()]
    side = {1: "left", 0: "center", -1: "right"}[int(np.sign(offset[0]))]
    style = {"ha": side, "color": style["color"], "fontsize": 10, "textcoords": "offset points"}
    axis.annotate(name, (point["p"], point["push"]), offset, **style)
