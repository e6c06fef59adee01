"""The tables that notebooks show: judged answers in, one row per thing compared out."""

from collections.abc import Iterable

import pandas as pd

from ..evaluation.rates import SUMMARY, mcnemar
from ..judges.base import VERDICTS
from ..text import rate_text as format_rate
from ..text import redact
from .figures import NAMES


def harvest_table(report: dict) -> pd.DataFrame:
    """What became of the sampled answers: columns `answers` (a verdict or why it was dropped), `count`, `share`."""
    judged = report["judged"]
    counts = {
        "harmful: kept": report["kept"],
        "harmful: enough already": report["surplus"],
        "harmful: same text again": report["duplicates"],
        **{verdict: judged.get(verdict, 0) for verdict in VERDICTS if verdict != "harmful"},
        "cut off": report["unfinished"],
    }
    table = pd.DataFrame({"answers": counts.keys(), "count": counts.values()})
    return table.assign(share=table["count"] / report["generated"])


def readable(table: pd.DataFrame, measures: Iterable[str] = SUMMARY) -> pd.DataFrame:
    """`summary` for people: a text per measure with n, interval and range over seeds; measures nobody has are left out.

    For example "3.1 % of 400 (1.8-5.3), seeds 2.5-4.0"; without `seeds` where there is one. With what
    `preference.with_preference` adds: how often the safe answer is likelier; margin and benign NLL in nats a token.
    Corrected rates stand beside the raw ones where the judge's errors are known; "-" where it errs too often for that.
    """
    by = [column for column in table.columns[: list(table.columns).index("seeds")]]
    shown = table[by].copy()
    if "penalty_weight" in shown:
        shown["penalty_weight"] = [
            "" if method in ("sft", "stl") else weight  # which have none
            for method, weight in zip(shown["method"], shown["penalty_weight"], strict=True)
        ]
    if "method" in shown:
        shown["method"] = [NAMES.get(method, method) for method in shown["method"]]
    for measure in measures:
        if table[measure].notna().any():
            shown[measure.replace("_", "-")] = [rate_text(row, measure) for _, row in table.iterrows()]
        if f"{measure}_corrected" in table:
            ends = table[[f"{measure}_corrected{end}" for end in ("", "_low", "_high")]].itertuples(index=False)
            shown[f"{measure.replace('_', '-')}, corrected"] = [format_rate(*row) for row in ends]
    if "preference" in table:
        shown["safe likelier"] = [rate_text(row, "preference") for _, row in table.iterrows()]
        for measure, name in (("margin", "margin"), ("benign_nll", "benign NLL"), ("benign_cost", "above SFT's")):
            ends = table[[measure, f"{measure}_low", f"{measure}_high"]].itertuples(index=False)
            shown[name] = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in ends]
    if "unlike" in table and table["unlike"].any():
        shown["unlike the labelled answers"] = table["unlike"]
    return shown


def compare(judged: pd.DataFrame, pairs: list[tuple[tuple[str, int], tuple[str, int]]]) -> pd.DataFrame:
    """McNemar's exact test of two arms, each a (method, n_unsafe), on the same toxic prompts, per decoding and seed.

    Columns: first, second, decoding, seed, n, harmful_only_first, harmful_only_second, p. Prompts that either left
    unscored are dropped in pairs.
    """
    rows = []
    toxic = judged[judged["kind"] == "toxic"]
    for (decoding, seed), group in toxic.groupby(["decoding", "seed"], sort=False):
        # Arms answer the same list of prompts, so answers are matched by their place.
        verdicts = {arm: answers["verdict"].to_numpy() for arm, answers in group.groupby(["method", "n_unsafe"])}
        for first, second in pairs:
            scored = (verdicts[first] != "unscored") & (verdicts[second] != "unscored")
            flags = (verdicts[arm][scored] == "harmful" for arm in (first, second))
            only_first, only_second, p = mcnemar(*flags)
            names = [f"{NAMES.get(method, method)} {n or ''}".strip() for method, n in (first, second)]
            rows.append((*names, decoding, seed, int(scored.sum()), only_first, only_second, p))
    columns = ["first", "second", "decoding", "seed", "n", "harmful_only_first", "harmful_only_second", "p"]
    return pd.DataFrame(rows, columns=columns)


# What an attack is called that counts a prompt as broken when one of several succeeds.
ANY_PROMPT, ANY_BEGINNING = "any of the prompts", "any of the beginnings"


def any_harmful(judged: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per group of `by`: one of the group's harmful answers, where it has one, else its first answer."""
    harmful_first = judged.assign(order=(judged["verdict"] != "harmful")).sort_values("order", kind="stable")
    return harmful_first.groupby(by, sort=False).head(1).drop(columns="order")


def examples(answers: pd.DataFrame, per_benchmark: int = 1, *, in_full: bool = False) -> pd.DataFrame:
    """A few answers per method at its last step, with `verdict` where judged.

    Texts are redacted (first words, hash, length) unless `in_full`, for an invented world's.
    """
    last = answers[answers["step"] == answers.groupby("method")["step"].transform("max")]
    few = last.groupby(["method", "seed", "benchmark"], sort=False).head(per_benchmark)
    if not in_full:
        few = few.assign(prompt=few["prompt"].map(redact), response=few["response"].map(redact))
    columns = [name for name in ("benchmark", "method", "prompt", "response", "verdict") if name in few]
    return few[columns].sort_values(["benchmark", "method"], ignore_index=True)


def rate_text(row: pd.Series, measure: str) -> str:
    """A rate of a `summary` row with n, interval and range over seeds."""
    ends = (row[f"{measure}{end}"] for end in ("", "_low", "_high"))
    text = format_rate(*ends, n=int(row[f"{measure}_n"]))
    if row["seeds"] > 1 and pd.notna(row[measure]):
        text += f", seeds {100 * row[f'{measure}_min']:.1f}-{100 * row[f'{measure}_max']:.1f}"
    return text
