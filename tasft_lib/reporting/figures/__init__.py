"""Figures in one style: `plot_*` takes a table and returns a figure, `save_figure` writes it with its table.

`arms` draws trained models, `likelihoods` what they find likely, `penalties` the method itself, `filters` SAFT, `bench`
time and memory.
"""

from .arms import (
    plot_attacks,
    plot_audit,
    plot_comparison,
    plot_detectors,
    plot_harm_by_benchmark,
    plot_harvest,
    plot_outcomes,
    plot_over,
    plot_search,
    plot_summary,
    plot_trade_off,
)
from .bench import plot_bench, plot_scaling
from .filters import plot_detection, plot_layers, plot_scores
from .likelihoods import plot_costs, plot_depth, plot_preference, plot_preference_trade_off
from .penalties import plot_bounds, plot_distance, plot_mass, plot_mean_cosines, plot_push, plot_push_by_part
from .style import NAMES, save_figure

__all__ = [
    "NAMES",
    "plot_attacks",
    "plot_audit",
    "plot_bench",
    "plot_bounds",
    "plot_comparison",
    "plot_costs",
    "plot_depth",
    "plot_detection",
    "plot_detectors",
    "plot_distance",
    "plot_harm_by_benchmark",
    "plot_harvest",
    "plot_layers",
    "plot_mass",
    "plot_mean_cosines",
    "plot_outcomes",
    "plot_over",
    "plot_preference",
    "plot_preference_trade_off",
    "plot_push",
    "plot_push_by_part",
    "plot_scaling",
    "plot_scores",
    "plot_search",
    "plot_summary",
    "plot_trade_off",
    "save_figure",
]
