"""The tables that notebooks show: judged answers in, one row per thing compared out."""

import pandas as pd

from .judges import LABELS, redact
from .metrics import mcnemar, rates_table, wilson_interval


def harvest_table(report: dict) -> pd.DataFrame:
    """What became of the sampled answers: columns `answers` (a label or why it was dropped), `count`, `share`."""
    judged = report["judged"]
    counts = {
        "harmful: kept": report["kept"],
        "harmful: enough already": report["surplus"],
        "harmful: same text again": report["duplicates"],
        **{label: judged.get(label, 0) for label in LABELS if label != "harmful"},
        "cut off": report["unfinished"],
    }
    table = pd.DataFrame({"answers": counts.keys(), "count": counts.values()})
    return table.assign(share=table["count"] / report["generated"])


def development_table(judged: pd.DataFrame) -> pd.DataFrame:
    """One row per method and weight on the development split: rates on toxic prompts and benign correctness."""
    return _outcomes(judged, ["method", "penalty_weight"])


def choose_weights(development: pd.DataFrame) -> dict[str, float]:
    """Per method the weight with the least harmful + degenerate rate plus benign correctness lost against SFT.

    `development` as from `development_table`, with a row for "sft". On a tie the smaller weight wins: it changes the
    model less. A missing correctness (no exact checker) counts as nothing lost.
    """
    baseline = development.loc[development["method"] == "sft", "correct"].iloc[0]
    tried = development[development["method"] != "sft"].astype({"penalty_weight": float})
    lost = (baseline - tried["correct"]).clip(lower=0).fillna(0)
    ranked = tried.assign(regret=(tried["rate"] + tried["degenerate"] + lost).round(9))
    ranked = ranked.sort_values(["regret", "penalty_weight"]).drop_duplicates("method")
    return dict(zip(ranked["method"], ranked["penalty_weight"], strict=True))


def final_table(judged: pd.DataFrame) -> pd.DataFrame:
    """One row per method and seed at its last step, all toxic benchmarks together."""
    last = judged.groupby(["method", "seed"])["step"].transform("max")
    return _outcomes(judged[judged["step"] == last], ["method", "penalty_weight", "seed", "step"])


def with_sampled(final: pd.DataFrame, sampled: pd.DataFrame) -> pd.DataFrame:
    """`final_table` of greedy answers beside that of sampled ones, whose columns end in `_sampled`."""
    keys = ["method", "penalty_weight", "seed", "step"]
    columns = ["harmful", "rate", "low", "high", "degenerate", "refusal", "correct"]
    return final.merge(sampled[[*keys, *columns]], on=keys, suffixes=("", "_sampled"), validate="one_to_one")


def readme_table(table: pd.DataFrame) -> str:
    """The rows of `with_sampled` as the Markdown table of README: no percentage without its count or interval."""
    lines = [
        "| method | λ | harmful, greedy | harmful, sampled | degenerate | benign correct | over-refusal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        greedy = f"{row.harmful}/{row.n} ({100 * row.low:.1f}-{100 * row.high:.1f} %)"
        sampled = f"{row.harmful_sampled}/{row.n} ({100 * row.low_sampled:.1f}-{100 * row.high_sampled:.1f} %)"
        degenerate = f"{100 * row.degenerate:.1f} / {100 * row.degenerate_sampled:.1f} %"
        correct = f"{100 * row.correct:.1f} / {100 * row.correct_sampled:.1f} %"
        refused = f"{100 * row.over_refusal:.1f} %"
        weight = "" if row.method == "sft" else f"{float(row.penalty_weight):g}"
        lines.append(f"| {row.method} | {weight} | {greedy} | {sampled} | {degenerate} | {correct} | {refused} |")
    return "\n".join(lines)


def compare(toxic: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """McNemar's exact test for pairs of methods on the same toxic prompts, at the last step of the first seed.

    Columns: first, second, n, harmful_only_first, harmful_only_second, p. Unscored prompts are dropped in pairs.
    """
    toxic = toxic[toxic["seed"] == toxic["seed"].min()]
    last = toxic[toxic["step"] == toxic.groupby("method")["step"].transform("max")]
    # A prompt may stand in a benchmark twice, so prompts are matched by their place.
    last = last.sort_values("benchmark", kind="stable")
    labels = {method: rows["label"].to_numpy() for method, rows in last.groupby("method")}
    rows = []
    for first, second in pairs:
        scored = (labels[first] != "unscored") & (labels[second] != "unscored")
        only_first, only_second, p = mcnemar(labels[first][scored] == "harmful", labels[second][scored] == "harmful")
        rows.append((first, second, int(scored.sum()), only_first, only_second, p))
    return pd.DataFrame(rows, columns=["first", "second", "n", "harmful_only_first", "harmful_only_second", "p"])


def redacted_examples(toxic: pd.DataFrame, per_benchmark: int = 1) -> pd.DataFrame:
    """A few answers per method at its last step, redacted: first words, hash and length, with the judge's label."""
    last = toxic[toxic["step"] == toxic.groupby("method")["step"].transform("max")]
    few = last.groupby(["method", "seed", "benchmark"], sort=False).head(per_benchmark)
    return few.assign(prompt=few["prompt"].map(redact), response=few["response"].map(redact))[
        ["benchmark", "method", "prompt", "response", "label"]
    ].sort_values(["benchmark", "method"], ignore_index=True)


def _outcomes(judged: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Rates on toxic prompts, with benign correctness (its interval and n) and over-refusal where there are any."""
    table = rates_table(judged[judged["kind"] == "toxic"], by)
    rows = []
    for key in table[by].itertuples(index=False):
        group = judged
        for name, value in zip(by, key, strict=True):
            group = group[group[name] == value]
        checked = group["correct"].dropna() if "correct" in group else pd.Series(dtype=bool)
        low, high = wilson_interval(int(checked.sum()), len(checked))
        alarming = group[group["kind"] == "seemingly toxic"]
        rows.append(
            {
                "correct": checked.mean() if len(checked) else float("nan"),
                "correct_low": low,
                "correct_high": high,
                "n_benign": len(checked),
                "over_refusal": (alarming["label"] == "refusal").mean() if len(alarming) else float("nan"),
                "n_alarming": len(alarming),
            }
        )
    return pd.concat([table, pd.DataFrame(rows).astype({"correct": float})], axis=1)


def bench_table(results: list[dict]) -> pd.DataFrame:
    """What `bench.head` or `bench.step` measured, a row each: settings, ratios, seconds, peak MB, gradient errors."""
    rows = []
    for result in results:
        row = {k: v for k, v in result["settings"].items() if k not in ("device", "threads", "repeats")}
        for against in ("trl_sft", "dense_tasft"):
            ratio = f"time_ratio_vs_{against}"
            row[f"time_vs_{against}"] = result[ratio]
            row[f"time_vs_{against}_low"], row[f"time_vs_{against}_high"] = result["spread"][ratio] or (None, None)
            row[f"memory_vs_{against}"] = result[f"memory_ratio_vs_{against}"]
        row["grad_error"] = result["max_relative_grad_error"]
        row["grad_error_trl_sft"] = result["max_relative_grad_error_trl_sft"]
        for name, peak in result["peak_bytes"].items():
            row[f"seconds_{name}"] = result["seconds"].get(name)
            row[f"peak_mb_{name}"] = None if peak is None else peak / 2**20
        for key, short in (("tokens_per_second", "tokens_per_second"), ("fraction_of_matmul_ceiling", "fraction")):
            row |= {f"{short}_{name}": value for name, value in result.get(key, {}).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def readme_performance(heads: pd.DataFrame, steps: pd.DataFrame) -> str:
    """The README's performance table, in Markdown; both tables from `bench_table`."""
    lines = [
        "| | time against TRL's SFT | memory | time against full logits | memory | gradient error (TRL's) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in [
        *((f"head, V = {r['vocab']:,}, H = {r['hidden']}, {bench_case(r)}", r) for _, r in heads.iterrows()),
        *((f"step, {r['geometry']} Llama, {bench_case(r)}", r) for _, r in steps.iterrows()),
    ]:
        cells = [name]
        for against in ("trl_sft", "dense_tasft"):
            time, low, high = (row[f"time_vs_{against}{end}"] for end in ("", "_low", "_high"))
            cells += [f"{time:.2f} ({low:.2f}-{high:.2f})", f"{row[f'memory_vs_{against}']:.2f}"]
        cells.append(f"{row['grad_error']:.0e} ({row['grad_error_trl_sft']:.0e})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bench_case(row: pd.Series) -> str:
    """A benchmark row in words: penalty, share of unsafe tokens or rows, dtype."""
    kept = ", freed memory kept" if row["keep_freed_memory"] else ""
    return f"{row['penalty']} on {row['unsafe']:.0%}, {row['dtype']}{kept}"
