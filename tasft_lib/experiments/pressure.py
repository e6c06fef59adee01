"""λ and total pressure (λ · the unsafe rows' share of the loss), and which λ is chosen on the development split."""

import math
from typing import Any

import pandas as pd

from ..evaluation.worlds import base_of_seed
from ..sampling import share_of_loss
from ..storage.files import project_root
from ..weight import PRESSURE
from .settings import Settings

DEAR = 0.1  # nats a token


class Weights:
    """λ of a method at a size of D_unsafe: as chosen in the profile's table, a multiple of that, or from a pressure.

    The table is the CSV `settings.penalty_weights`, with columns method, n_unsafe, penalty_weight, and model where it
    matters: λ is then that of the base model that a seed (by default the first) stands on. It is read here, once, so
    that listing arms reads nothing.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.source = getattr(settings, "penalty_weights", "")
        path = project_root() / self.source
        self.table = pd.read_csv(path) if path.is_file() else None

    def of_table(self, method: str, n_unsafe: int, seed: int | None = None) -> float | str:
        """λ of the table, a number or "auto"; `ValueError` naming the file where it has no such row."""
        if self.table is None:
            raise ValueError(f"penalty_weights={self.source!r}: no such file in the project.")
        rows = self.table[(self.table["method"] == method) & (self.table["n_unsafe"] == n_unsafe)]
        model = base_of_seed(self.settings.model, self.settings.seed if seed is None else seed)
        if "model" in rows:
            rows = rows[rows["model"] == model]
        if len(rows) != 1:
            raise ValueError(
                f"{self.source}: {len(rows)} rows for method {method}, n_unsafe {n_unsafe}"
                + (f", model {model}" if "model" in rows else "")
                + "; it needs one."
            )
        weight = rows["penalty_weight"].iloc[0]
        return "auto" if weight == "auto" else float(weight)

    def scaled(self, method: str, n_unsafe: int, factor: float, seed: int | None = None) -> float:
        """The chosen λ times `factor`; of an automatic one, times its λ here."""
        weight = self.of_table(method, n_unsafe, seed)
        if weight == "auto":
            weight = self.of_pressure(PRESSURE[method], method, n_unsafe)
        return float(f"{factor * weight:.4g}")

    def of_pressure(self, pressure: float, method: str, n_unsafe: int, *, unsafe_per_batch: int | None = None) -> float:
        """λ, to four digits, that exerts a total pressure (see `sampling.share_of_loss`).

        KTO's is weight · unsafe rows / benign rows. A row counts as often as it is seen; their number does not count
        where a step has a set number of them, `unsafe_per_batch` (by default the profile's).
        """
        settings = self.settings
        visits = n_unsafe * settings.unsafe_visits
        if method == "kto":
            share = visits / settings.n_benign
        else:
            share = share_of_loss(
                visits / (settings.n_benign + visits),
                settings.penalty_reduction,
                micro_batch=settings.per_device_train_batch_size,
                micro_batches=settings.gradient_accumulation_steps,
                unsafe_per_batch=settings.unsafe_per_batch if unsafe_per_batch is None else unsafe_per_batch,
            )
        return float(f"{pressure / share:.4g}")

    def chosen_pressure(self, method: str, n_unsafe: int, seed: int | None = None) -> float:
        """The total pressure of the chosen λ at a size of D_unsafe, to be carried to other sizes."""
        pressure = self.scaled(method, n_unsafe, 1.0, seed) / self.of_pressure(1.0, method, n_unsafe)
        return float(f"{pressure:.4g}")

    def factor_of(self, arm: Any) -> float:
        """An arm's λ, as a multiple of the one chosen for its method, size and base model; nan for plain SFT.

        The arm is given with `method`, `n_unsafe`, `penalty_weight` and `seed`.
        """
        if arm.method == "sft":
            return math.nan
        chosen = self.scaled(arm.method.removesuffix("_contrastive"), arm.n_unsafe, 1.0, arm.seed)
        return float(f"{float(arm.penalty_weight) / chosen:.3g}")

    def pressure_of(self, arm: Any) -> float:
        """The total pressure of an arm, given with `method`, `n_unsafe` and `penalty_weight`; nan for plain SFT."""
        if arm.method == "sft":
            return math.nan
        if arm.penalty_weight == "auto":
            return PRESSURE[arm.method]
        return float(arm.penalty_weight) / self.of_pressure(1.0, arm.method, arm.n_unsafe)


def with_regret(development: pd.DataFrame, trade_off: pd.DataFrame | None = None) -> pd.DataFrame:
    """`summary` on the development split with `regret`: harm + degenerate + benign correctness lost against SFT's.

    `development` by method, n_unsafe, penalty_weight, and model where there are several base models: what is lost is
    against plain SFT of the same one.

    Where no exact judge says what is correct, a weight is `too_dear` that raises the negative log-likelihood of
    held-out benign answers by more than `DEAR` nats a token above plain SFT's; `trade_off` is then from
    `preference.preference_table` by the same columns, and its `benign_cost` is kept.
    """
    base = development["model"] if "model" in development else pd.Series("", index=development.index)
    is_sft = development["method"] == "sft"
    baseline = base.map(dict(zip(base[is_sft], development.loc[is_sft, "correct"], strict=True)))
    lost = (baseline - development["correct"]).clip(lower=0).fillna(0)
    development = development.assign(regret=(development["harm"] + development["degenerate"] + lost).round(9))
    if trade_off is not None and development["correct"].isna().all():
        by = [name for name in ("model", "method", "n_unsafe", "penalty_weight") if name in development]
        development = development.merge(trade_off[[*by, "benign_cost"]], on=by, how="left")
        development["too_dear"] = development["benign_cost"] > DEAR
    return development


def choose_weights(development: pd.DataFrame) -> pd.DataFrame:
    """Per base model, method and size of D_unsafe the tried weight of least regret.

    Columns model, method, n_unsafe, penalty_weight, regret.
    `development` as from `with_regret`. One that is too dear is not chosen while another is not. On a tie the smaller
    weight wins: it changes the model less. "auto" is not a weight that was tried.
    """
    tried = development[~development["method"].isin(["sft"]) & (development["penalty_weight"] != "auto")]
    order = [*(["too_dear"] if "too_dear" in tried else []), "regret", "penalty_weight"]
    tried = tried.astype({"penalty_weight": float}).sort_values(order)
    chosen = tried.drop_duplicates(["model", "method", "n_unsafe"]).sort_index()
    return chosen[["model", "method", "n_unsafe", "penalty_weight", "regret"]].reset_index(drop=True)


def constant_pressure(development: pd.DataFrame) -> pd.DataFrame:
    """What tuning λ at each size of D_unsafe is worth: `development` from `with_regret`, with `pressure`.

    A row per base model, method and size: the best pressure there and its regret; the one pressure of least mean regret
    over the method's sizes, on that base model, and its regret here; the regret of the automatic weight, where it was
    tried.
    """
    rows = []
    searched = development[development["method"] != "sft"]
    for (model, method), tried in searched.groupby(["model", "method"], sort=False):
        automatic = tried[tried["penalty_weight"] == "auto"].set_index("n_unsafe")["regret"]
        tried = tried[tried["penalty_weight"] != "auto"]
        tried = tried.assign(pressure=[float(f"{pressure:.3g}") for pressure in tried["pressure"]])
        regrets = tried.pivot(index="pressure", columns="n_unsafe", values="regret")
        constant = regrets.mean(axis=1).idxmin()
        for n_unsafe in tried["n_unsafe"].unique():
            best = regrets[n_unsafe].idxmin()
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "n_unsafe": n_unsafe,
                    "best_pressure": best,
                    "regret": regrets.loc[best, n_unsafe],
                    "constant_pressure": constant,
                    "regret_constant": regrets.loc[constant, n_unsafe],
                    "regret_auto": automatic.get(n_unsafe, float("nan")),
                }
            )
    return pd.DataFrame(rows)
