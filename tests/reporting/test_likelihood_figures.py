"""Likelihoods in tables and figures: nothing that was measured is left out, and what is far off is told."""

import pandas as pd
import pytest
from test_tables import judged

from tasft_lib.evaluation.preference import MEASURES, with_preference
from tasft_lib.evaluation.rates import summary
from tasft_lib.reporting import figures, tables

BY = ["method", "n_unsafe", "penalty_weight"]


def measured(method: str, n: int, weight: float | str, cost: float, **more) -> dict:
    """A row of `preference_table`: half of the safe answers are likelier."""
    ends = {f"{name}_{end}": 0.0 for name in MEASURES for end in ("low", "high", "min", "max")}
    counts = {f"{name}_n": 8 for name in MEASURES}
    row = {"method": method, "n_unsafe": n, "penalty_weight": weight, "seeds": 1, "preference": 0.5, "margin": -0.25}
    return row | ends | counts | {"benign_nll": 2.0, "benign_cost": cost} | more


def test_a_table_of_rates_takes_them_in_and_shows_them_once_measured():
    rates = summary(judged({("emd", 9, 0): "hhrr", ("sft", 0, 0): "hhhh"}), [*BY, "decoding"])
    assert with_preference(rates, None, BY) is rates and "margin" not in tables.readable(rates)
    rows = [
        {"kind": "toxic", "row": i, "safe": -1.0, "unsafe_0": -1.0 - margin, "nll": None, "method": method}
        | {"n_unsafe": n, "penalty_weight": 1.0, "seed": 0, "step": 3}
        for method, n in (("emd", 9), ("sft", 0))
        for i, margin in enumerate((0.5, 0.25, -0.5, -0.25) if n else (-1.0,) * 4)
    ]
    likelihoods = pd.concat([pd.DataFrame(rows), pd.DataFrame(rows).assign(kind="benign", safe=None, nll=2.0)])
    shown = tables.readable(with_preference(rates, likelihoods.astype({"safe": float, "nll": float}), BY))
    assert shown["safe likelier"].str.startswith(("50.0 % of 4 (", "0.0 % of 4 (")).all()
    assert shown["margin"].tolist()[1] == "-1.00 (-1.00 to -1.00)" and shown["benign NLL"].tolist()[0].startswith(
        "2.00"
    )


def test_an_arm_far_off_language_stands_hollow_at_the_edge():
    rows = [("sft", 0, "auto", 0.0), ("emd", 20, 1.0, 0.2), ("emd", 20, 4.0, 9.0), ("emd", 20, "auto", 0.1)]
    table = pd.DataFrame([measured(*row) for row in rows])
    for axis in figures.plot_preference_trade_off(table, caption="c").axes:
        marks = [line for line in axis.get_lines() if line.get_linestyle() == "None" and len(line.get_xdata())]
        places = {float(line.get_xdata()[0]): line.get_markerfacecolor() != "none" for line in marks}
        assert places == {0.2: True, 1.0: False, 0.1: False}
        assert [text.get_text() for text in axis.texts] == ["λ = 4"]


@pytest.mark.parametrize("column", ["step", "n_unsafe"])
def test_a_curve_has_every_measure_and_plain_sft(column):
    rows = [measured("emd", n, 1.0, 0.2, step=n) for n in (20, 40)] + [measured("sft", 0, "auto", 0.0, step=0)]
    axes = figures.plot_preference(column, pd.DataFrame(rows), caption="c").axes
    assert [axis.get_ylabel() for axis in axes] == [
        "held-out toxic prompts (%)",
        "safe − unsafe, nats a token",
        "nats a token",
    ]
    for axis, expected in zip(axes, (50, -0.25, 0.0), strict=True):
        sft = next(line for line in axis.get_lines() if line.get_label() == "SFT")
        assert set(sft.get_ydata()) == {expected}
        assert (len(sft.get_xdata()) == 2) == (column == "n_unsafe"), "a line from edge to edge among sizes"


def test_depth_is_drawn_for_every_method():
    rows = [
        {"method": m, "k": k, "rest": -1.0, "rest_low": -1.1, "rest_high": -0.9, "rest_n": 9 - k}
        for m in ("sft", "emd")
        for k in (0, 4)
    ]
    (axis,) = figures.plot_depth(pd.DataFrame(rows), caption="c").axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0\nn = 9", "4\nn = 5"]
    assert set(axis.get_legend_handles_labels()[1]) == {"SFT", "EMD"}
