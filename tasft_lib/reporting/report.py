"""One report per profile: every table and figure with what it traces to, and a verdict per claim of the papers."""

import html
import re
from pathlib import Path

import nbformat
import pandas as pd
from markdown_it import MarkdownIt

from ..bench.tables import readme_performance
from ..storage.files import notebooks, project_root, read_json, write_text
from ..text import markdown, rate_text
from . import claims, tables
from .figures import NAMES

RATES = "A rate is given with its n, its 95 % interval and its range over seeds."
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25em .7em; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top } img { max-width: 100% } code { background: #f4f4f4 }
"""


def build(profile: str, folder: Path | None = None) -> str:
    """Write report.md and .html from the CSVs and manifests in `folder`, by default `figures/<profile>`, into it.

    Returns the verdicts as text.

    Raises `ValueError` when the profile has no figures yet.
    """
    folder = folder or project_root() / "figures" / profile
    names = [name for name in notebooks() if (folder / f"{name}_manifest.json").exists()]
    if not names:
        raise ValueError(f"{folder}: no results; run `make reproduce PROFILE={profile}` first.")
    verdicts = claims.claims_table(profile, folder)
    parts = [
        f"# Results of profile `{profile}`",
        _preface(profile),
        "## Claims and verdicts",
        _doubt(profile, folder),
        markdown(verdicts),
    ]
    parts += [_section(folder, name) for name in names]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(profile)}</title><style>{STYLE}</style>{body}"
    write_text(folder / "report.html", page)
    width = max(map(len, verdicts["claim"]))
    lines = [f"{row.claim:<{width}}  {row.verdict}" for row in verdicts.itertuples()]
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])


def fill_readme(readme: Path, profile: str) -> None:
    """Put the profile's tables between a README's `<!-- NAME:begin -->` and `<!-- NAME:end -->` marks, see `BLOCKS`.

    A mark whose table is another profile's, or is not there, is left as it is.
    """
    text = readme.read_text(encoding="utf-8")
    for name in re.findall(rf"<!-- ({'|'.join(BLOCKS)}):begin -->", text):
        if BLOCKS[name][0] != profile:
            continue
        try:
            block = readme_block(name)
        except FileNotFoundError:
            continue
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n\n{m[2]}", text)
    write_text(readme, text)


def readme_block(name: str) -> str:
    """The Markdown table of a README's block, from its profile's CSVs."""
    profile, table = BLOCKS[name]
    return table(project_root() / "figures" / profile)


def _pocket(folder: Path) -> str:
    """`safety` on the real model: greedy answers by labels of `audit_answers` and as judged, and the likelihoods that
    need no judge."""
    table, labelled = (pd.read_csv(folder / f"{name}.csv") for name in ("safety_table", "audit_answers_arms"))
    table = table[table["decoding"] == "greedy"].merge(labelled, on=["method", "n_unsafe"], suffixes=("", "_labelled"))
    harm = [_percent(row, "harm") for _, row in table.iterrows()]
    columns = {
        f"after training with {table['n_unsafe'].max()} unsafe rows": [NAMES[method] for method in table["method"]],
        f"harmful, by {table['labels'].min()} labels": _intervals(table, "direct"),
        "as judged": harm,
        "no language": [_percent(row, "degenerate") for _, row in table.iterrows()],
        "harmless refused": [_percent(row, "over_refusal") for _, row in table.iterrows()],
        "safe answer likelier": _intervals(table, "preference"),
        "benign loss above SFT's": [f"{value:+.2f}" for value in table["benign_cost"]],
    }
    return markdown(pd.DataFrame(columns))


def _results(folder: Path) -> str:
    """Six methods of `safety`, sampled answers."""
    table = pd.read_csv(folder / "safety_table.csv")
    shown = ("sft", "kto", "nlcl", "simnpo", "emd", "emd_exact")
    rows = table[(table["decoding"] == "sampled") & table["method"].isin(shown)]
    n = rows["n_unsafe"].max()
    return _short(rows, f"after training with {n} unsafe rows", seeds="base models")


def _filtered(folder: Path) -> str:
    """Filters at contamination 0.1, for dropping and for pushing away; where benign rows hold refusals, harm alone."""
    table = pd.read_csv(folder / "harmful_data_filter_table.csv")
    ways = [f"{name}{end}" for name in ("none", "saft", "saft_unsafe", "oracle") for end in ("", "_emd")]
    table = table[(table["contamination"] == 0.1) & table["method"].isin(ways)]
    plain, refusing = (table[table["n_safe"] == n].set_index("method") for n in (0, 100))
    harm = [_percent(refusing.loc[name], "harm") for name in plain.index]
    return _short(
        plain.reset_index(), "filter", seeds="base models", **{"harmful, refusals among the benign rows": harm}
    )


def _trade_off(folder: Path) -> str:
    """The trials that `trade_off` chose, on the test split, with 95 % intervals; and after the first of its attacks."""
    table, search, attacks = (pd.read_csv(folder / f"trade_off_{part}.csv") for part in ("table", "search", "attacks"))
    strengths = search[search["is_chosen"]].set_index("method")["penalty_weight"]
    attacks = attacks[attacks["attack"] == attacks["attack"].iloc[0]].set_index(["method", "adapter"])
    attacked = attacks.loc[pd.MultiIndex.from_frame(table[["method", "adapter"]])]
    columns = {
        f"with {table['n_unsafe'].max()} unsafe rows": [NAMES[method] for method in table["method"]],
        "adapters": table["adapter"],
        "λ (STL: visits)": [f"{strengths[method]:g}" if method in strengths else "" for method in table["method"]],
        "harmful": _intervals(table, "harm"),
        "no language": _intervals(table, "degenerate"),
        "SFT's harmless answers kept": _intervals(table, "still_answered"),
        "benign loss above SFT's": [f"{cost:+.2f}" for cost in table["benign_cost"]],
        f"harmful after {attacks['attack'].iloc[0]}": _intervals(attacked, "harm"),
    }
    return markdown(pd.DataFrame({name: column for name, column in columns.items() if column is not None}))


def _intervals(table: pd.DataFrame, measure: str) -> list[str] | None:
    ends = [f"{measure}{end}" for end in ("", "_low", "_high")]
    return [rate_text(*row) for row in table[ends].to_numpy()] if measure in table else None


def _short(rows: pd.DataFrame, first: str, *, seeds: str = "seeds", **further: list[str]) -> str:
    """A row of `rates.summary` each, in whole per cents: of harm with its range over seeds, for want of space."""
    n = rows["seeds"].max()
    columns = {
        first: [NAMES[method] for method in rows["method"]],
        f"harmful (range of {n} {seeds})" if n > 1 else "harmful": [
            _percent(row, "harm", seeds=n > 1) for _, row in rows.iterrows()
        ],
    }
    measures = {"degenerate": "no language", "correct": "benign correct", "over_refusal": "harmless refused"}
    for measure, name in measures.items():
        columns[name] = [_percent(row, measure) for _, row in rows.iterrows()]
    return markdown(pd.DataFrame(columns | further))


def _percent(row: pd.Series, measure: str, *, seeds: bool = False) -> str:
    low, high = (f"{100 * row[f'{measure}_{end}']:.0f}" for end in ("min", "max"))
    return f"{100 * row[measure]:.0f} %" + (f" ({low}-{high})" if seeds else "")


def _performance(folder: Path) -> str:
    """Time and memory of head and step against TRL's and against full logits."""
    heads, steps = (pd.read_csv(folder / f"performance_{part}.csv") for part in ("table", "step"))
    return readme_performance(heads, steps)


# By name: the profile whose tables it is made from, and how.
BLOCKS = {
    "pocket": ("pocket", _pocket),
    "results": ("mini", _results),
    "filtered": ("mini", _filtered),
    "trade_off": ("pocket", _trade_off),
    "trade_off_mini": ("beyond", _trade_off),
    "performance": ("bench", _performance),
}


def _preface(profile: str) -> str:
    if profile in ("mini", "smoke", "search", "beyond"):
        return (
            "**Mini-world results**: an invented language, a model of 1.2M parameters, an exact judge. They say whether"
            f" the implementation does what the equations say, and are no evidence about 7B models. {RATES}"
        )
    if profile == "pocket":
        return (
            "**A real language model of 135M parameters.** The judge errs, and not alike on all arms:"
            " rates are as judged. The corrected ones in tables suppose that it errs alike, and labels of the arms' own"
            " answers (`audit_answers`) do not bear them out: believe the labels."
            " λ is the best of four on development prompts, of those that cost at most .1 nat a token of benign"
            " likelihood."
            f" {RATES}"
        )
    return RATES


def _doubt(profile: str, folder: Path) -> str:
    """What the verdicts' intervals are over."""
    n = claims.n_bases(folder)
    several = f"{n} base models, the same for all methods" if profile == "mini" else f"{n} seeds, of one base model"
    over = "prompts alone, of one base model" if n == 1 else f"prompts and {several}"
    return (
        f"A verdict holds at both ends of 95 % intervals, which are over {over}; one that would flip between them is"
        " `open`. Where a claim names no amount, more or less is by five points."
    )


def _section(folder: Path, name: str) -> str:
    manifest = read_json(folder / f"{name}_manifest.json")
    notebook = nbformat.read(notebooks()[name], as_version=4)
    title, *prose = notebook.cells[0].source.split("\n\n")
    parts = [f"## {title.removeprefix('# ')}", prose[0], _provenance(name, manifest)]
    if (file := f"{name}_table.csv") in manifest["files"]:
        table = pd.read_csv(folder / file)
        parts.append(markdown(tables.readable(table) if "seeds" in table else table))
    drawn = sorted(file for file in manifest["files"] if file.endswith(".png"))
    parts += [f"![{file.removesuffix('.png')}]({file})" for file in drawn]
    return "\n\n".join(parts)


def _provenance(name: str, manifest: dict) -> str:
    arms = manifest.get("arms") or {}
    arms = list(arms.values()) if isinstance(arms, dict) else arms
    hardware = manifest["hardware"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cores']} cores of {hardware['cpu']}"
    seeds = manifest.get("parameters", {}).get("n_seeds", 1)
    cost = f"{len(arms)} arm(s), {sum(arm['seconds'] for arm in arms) / 60:.1f} minutes of training; " if arms else ""
    return (
        f"Commit `{(manifest['commit'] or 'unknown')[:12]}`, {device}, {seeds} seed(s); {cost}"
        f"[manifest]({name}_manifest.json)"
    )
