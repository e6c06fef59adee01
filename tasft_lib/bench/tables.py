"""What the benchmarks measured, as tables."""

import pandas as pd


def bench_table(results: list[dict]) -> pd.DataFrame:
    """What `measure.head` or `measure.step` measured, a row each: settings, ratios, seconds, MB, gradient errors."""
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
