"""λ that nobody chooses: the rules against a grid of fixed λ, cell by cell (a base model and a size of D_unsafe)."""

import pandas as pd

from ..evaluation.rates import summary
from ..storage.files import read_json
from . import beyond
from .pressure import with_regret
from .specs import ArmSpec

BY = ["method", "n_unsafe", "penalty_weight"]


def searched(answers: pd.DataFrame) -> pd.DataFrame:
    """`pressure.with_regret` of each seed's arms against its own plain SFT, with `seed`: a row per arm."""
    return pd.concat(
        [with_regret(summary(own, BY)).assign(seed=seed) for seed, own in answers.groupby("seed")], ignore_index=True
    )


def against_grid(search: pd.DataFrame, rule: str, fixed: str, *, within: float = 0.02) -> pd.DataFrame:
    """A row per cell: the regret of `rule`, the least of `fixed` and its λ; holds where it is `within` of that."""
    cells = search[search["method"] == rule].set_index(["seed", "n_unsafe"])[["regret", "degenerate", "harm"]]
    grid = search[search["method"] == fixed].sort_values("regret").groupby(["seed", "n_unsafe"])
    best = grid[["penalty_weight", "regret"]].first().rename(columns={"regret": "least"})
    table = cells.join(best).assign(excess=lambda t: (t["regret"] - t["least"]).round(9)).reset_index()
    return table.assign(verdict=["holds" if excess <= within else "fails" for excess in table["excess"]])


def followed(arms: list[ArmSpec]) -> pd.DataFrame:
    """λ of trained arms by parity, along their log: `seed`, `n_unsafe`, `step`, `penalty_weight`, `pull`, `nll`."""
    logs = [(arm, log) for arm in arms for log in read_json(arm.folder / "manifest.json")["log_history"]]
    rows = [
        (arm.seed, arm.n_unsafe, log["step"], log["penalty_weight"], -log["unsafe_log_prob"], log["nll"])
        for arm, log in logs
        if "penalty_weight" in log and "unsafe_log_prob" in log
    ]
    return pd.DataFrame(rows, columns=["seed", "n_unsafe", "step", "penalty_weight", "pull", "nll"])


def spread(search: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Per method, seed and size tried at several λ: the least and the largest regret, and their difference."""
    regrets = search[search["method"].isin(methods)].groupby(["method", "seed", "n_unsafe"], sort=False)["regret"]
    table = regrets.agg(weights="size", least="min", largest="max").reset_index()
    return table.assign(spread=(table["largest"] - table["least"]).round(9))


def verdict(search: pd.DataFrame, parity: pd.DataFrame, spreads: pd.DataFrame) -> list[dict]:
    """Rows as of `beyond.at_most`, in percent and points: the criteria of the notebook, and no interval.

    Args:
        search: as from `searched`, with the fixed λ of `recover`.
        parity: as from `against_grid`.
        spreads: as from `spread`, of `emd_floor`.
    """
    worst = search[search["method"] == "recover"].groupby("penalty_weight")["regret"].max()
    floored = spreads[spreads["method"] == "emd_floor"]["spread"]
    return [
        beyond.counted_cells("parity within 2 points of the grid: cells", parity["verdict"] == "holds", 30 / 36),
        beyond.below("parity's most degenerate cell", parity["degenerate"].max(), 0.03, len(parity)),
        beyond.below(
            "parity's worst cell: the worst of the best one λ", parity["regret"].max(), worst.min(), len(parity)
        ),
        beyond.below("EMD with a floor: largest regret less the least, over λ", floored.max(), 0.03, len(floored)),
    ]
