"""One report per profile: every table and figure with what it traces to, and a verdict per claim of the papers."""

import html
import json
import re
from pathlib import Path

import nbformat
import pandas as pd
from markdown_it import MarkdownIt

from ..bench.tables import readme_performance
from ..files import notebooks, project_root, write_text
from ..text import markdown
from . import tables
from .claims import claims_table

RATES = "A rate is given with its n, its Wilson 95 % interval over prompts and its range over seeds."
README_MEASURES = ("harm", "degenerate", "correct", "over_refusal")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25em .7em; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top } img { max-width: 100% } code { background: #f4f4f4 }
"""


def build(profile: str) -> str:
    """Write `figures/<profile>/report.md` and `.html` from the CSVs and manifests there; returns the verdicts as text.

    Raises `ValueError` when the profile has no figures yet.
    """
    folder = project_root() / "figures" / profile
    found = [name for name in notebooks() if (folder / f"{name}_manifest.json").exists()]
    if not found:
        raise ValueError(f"{folder}: no results; run `make reproduce PROFILE={profile}` first.")
    verdicts = claims_table(profile)
    parts = [
        f"# Results of profile `{profile}`",
        _preface(profile),
        "## Claims and verdicts",
        markdown(verdicts),
    ]
    parts += [_section(folder, name) for name in found]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(profile)}</title><style>{STYLE}</style>{body}"
    write_text(folder / "report.html", page)
    width = max(map(len, verdicts["claim"]))
    lines = [f"{row.claim:<{width}}  {row.verdict}" for row in verdicts.itertuples()]
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])


def fill_readme(readme: Path, profile: str) -> None:
    """Put the profile's tables between README's `<!-- NAME:begin -->` and `<!-- NAME:end -->` marks.

    NAME is "results" (the trained models of `safety`), "verdicts" or "performance"; a mark whose table the profile does
    not have is left as it is.
    """
    text = readme.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- (results|verdicts|performance):begin -->", text):
        try:
            block = readme_block(name, profile)
        except FileNotFoundError:
            continue
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n\n{m[2]}", text)
    write_text(readme, text)


def readme_block(name: str, profile: str) -> str:
    """The Markdown table of a README block, from the profile's CSVs."""
    folder = project_root() / "figures" / profile
    if name == "verdicts":
        if not (folder / "safety_table.csv").exists():
            raise FileNotFoundError(folder / "safety_table.csv")
        return markdown(claims_table(profile)[["claim", "paper", "verdict"]])
    if name == "performance":
        heads, steps = (pd.read_csv(folder / f"performance_{part}.csv") for part in ("table", "step"))
        return readme_performance(heads, steps)
    table = pd.read_csv(folder / "safety_table.csv")
    sampled = tables.readable(table[table["decoding"] == "sampled"], README_MEASURES)
    greedy = tables.readable(table[table["decoding"] == "greedy"], ["harm"])
    sampled.insert(3, "harm, greedy", greedy["harm"].tolist())
    return markdown(sampled.drop(columns=["n_unsafe", "decoding"]).rename(columns={"penalty_weight": "λ"}))


def _preface(profile: str) -> str:
    if profile in ("mini", "smoke", "search"):
        return (
            "**Mini-world results**: an invented language, a model of 1.2M parameters, an exact judge. They say whether"
            f" the implementation does what the equations say, and are no evidence about 7B models. {RATES}"
        )
    return RATES


def _section(folder: Path, name: str) -> str:
    manifest = json.loads((folder / f"{name}_manifest.json").read_text())
    notebook = nbformat.read(notebooks()[name], as_version=4)
    title, *prose = notebook.cells[0].source.split("\n\n")
    files = manifest.get("files", [])
    parts = [f"## {title.removeprefix('# ')}", prose[0], _provenance(name, manifest)]
    if (file := f"{name}_table.csv") in files:
        table = pd.read_csv(folder / file)
        parts.append(markdown(tables.readable(table) if "seeds" in table else table))
    drawn = sorted(file for file in files if file.endswith(".png"))
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
