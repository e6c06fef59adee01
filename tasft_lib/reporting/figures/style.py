"""What all figures share: a look per method, panels, whiskers, legend and caption."""

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

from ...storage.files import whole, write_text

# Colour-blind safe (Okabe-Ito), one look per method in every figure; rivals and controls in greys and broken lines.
STYLES = {  # name, colour, marker, line
    "sft": ("SFT", "#000000", "s", "-"),
    "base": ("base model", "#999999", "*", ":"),
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
    "emd_isotropic": ("EMD, isotropic", "#D55E00", "o", "--"),
    "emd_exact_isotropic": ("EMD exact, isotropic", "#009E73", "^", "--"),
    "emd_one_hot": ("EMD, one-hot embedding", "#D55E00", "2", ":"),
    "emd_embed_tokens": ("EMD, embed_tokens", "#D55E00", "3", ":"),
    "emd_first_1": ("EMD, first token", "#D55E00", "*", "--"),
    "emd_first_4": ("EMD, first 4 tokens", "#D55E00", "x", "--"),
    "nlcl_first_2": ("NLCL, first 2 tokens", "#56B4E9", "+", "--"),
    "nlcl_first_4": ("NLCL, first 4 tokens", "#56B4E9", "x", "--"),
    "emd_first_3": ("EMD, first 3 tokens", "#D55E00", "x", "--"),
    "emd_contrastive": ("EMD, contrastive data", "#D55E00", "s", "--"),
    "nlcl_first_4_contrastive": ("NLCL, first 4 tokens, contrastive data", "#0072B2", "X", "--"),
    "nlcl_contrastive": ("NLCL, contrastive data", "#56B4E9", "D", "--"),
    "emd_auto": ("EMD, λ auto", "#D55E00", "o", ":"),
    "emd_exact_auto": ("EMD exact, λ auto", "#009E73", "^", ":"),
    "nlcl_auto": ("NLCL, λ auto", "#56B4E9", "v", ":"),
    "recover": ("branch and recover", "#009E73", "H", "-"),
    "recover_no_push": ("recover, no push", "#999933", "s", "--"),
    "recover_one": ("recover, one sentence", "#332288", "D", ":"),
    "recover_parity": ("recover, λ by parity", "#009E73", "X", ":"),
    "emd_floor": ("EMD, a floor per row", "#D55E00", "s", "--"),
    "nlcl_floor": ("NLCL, a floor per row", "#56B4E9", "s", "--"),
    "nlcl_stratified": ("NLCL, stratified", "#56B4E9", "v", "--"),
    "simnpo_stratified": ("SimNPO, stratified", "#0072B2", ">", "--"),
    "emd_stratified": ("EMD, stratified", "#D55E00", "o", "--"),
    "stl_weighted_stratified": ("STL, weighted, stratified", "#CC79A7", "d", ":"),
    "emd_shallow": ("EMD, first token at λ/T", "#D55E00", "4", "--"),
    "emd_deep": ("EMD, all tokens at λT", "#D55E00", "+", ":"),
    "nlcl_two": ("NLCL, two Adam states", "#56B4E9", "^", "--"),
    "emd_two": ("EMD, two Adam states", "#D55E00", "s", "--"),
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


def panels(columns: int, width: float, height: float, lines: int = 1, **options) -> tuple[Figure, list[Axes]]:
    """A figure of that size (inches) in the style of all, and its panels line by line; `options` of `plt.subplots`."""
    use_style()
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, **options)
    return figure, list(axes.flat)


def look(method: str) -> dict:
    """How a line of the method is drawn."""
    name, colour, marker, line = STYLES[method]
    return {"label": name, "color": colour, "marker": marker, "linestyle": line}


def mark(method: str) -> dict:
    """How a mark of the method without a line is drawn by `errorbar`."""
    name, colour, marker, _ = STYLES[method]
    return {"label": name, "color": colour, "fmt": marker}


def rows_of_marks(
    axis: Axes, names: list[str], series: list[tuple[pd.DataFrame, str, dict]], *, seeds: bool = False
) -> None:
    """A row per name, from the top; in each row a mark per series (%), one above the other, with its whiskers.

    A series is a table of as many rows as there are names, its measure, and how it looks; with `seeds`, ticks at the
    lowest and the highest of them.
    """
    for i, (rows, measure, style) in enumerate(series):
        places = np.arange(len(names)) + 0.6 * ((i + 0.5) / len(series) - 0.5)
        axis.errorbar(100 * rows[measure], places, xerr=whiskers(rows, measure), markersize=5, elinewidth=1, **style)
        for end in ("min", "max") if seeds else ():
            axis.plot(100 * rows[f"{measure}_{end}"], places, "|", color=style["color"], markersize=7)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(-3, 103), ylim=(len(names) - 0.5, -0.5))


def whiskers(rows: pd.DataFrame, measure: str, scale: float = 100) -> list[pd.Series]:
    """An interval as the lengths that errorbar wants; a rate's in %."""
    below, above = rows[measure] - rows[f"{measure}_low"], rows[f"{measure}_high"] - rows[measure]
    return [scale * below.clip(lower=0), scale * above.clip(lower=0)]


def finish(
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


def save_figure(figure: Figure, folder: Path, name: str, table: pd.DataFrame) -> list[Path]:
    """Write `<name>.png` and the `.csv` it was drawn from; the same table gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "csv")]
    with whole(paths[0]) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None}, bbox_inches="tight")
    write_text(paths[1], table.to_csv(index=False, float_format="%.6g"))
    return paths
