"""Which prompts a model is asked: the paper's benchmarks of harm and over-refusal, and the mini-world's stand-ins."""

from pathlib import Path
from urllib.request import urlopen

import pandas as pd

from .. import miniworld
from ..data import read_prompts, read_rows
from ..files import cache_folder, content_hash, named, write_text

# As Safety-Tuned LLaMAs (Bianchi et al., 2023), HarmfulQ (Shaikh et al., 2022) and XSTest (Röttger et al., 2023)
# published them: name -> address.
STL_COMMIT = "36a4b8d5c2177ed165bf61f59b590161394f7f12"
_STL = f"https://raw.githubusercontent.com/vinid/safety-tuned-llamas/{STL_COMMIT}/data"
_COT = "https://raw.githubusercontent.com/SALT-NLP/chain-of-thought-bias/e92a0efeb94e64eb68586d5c04a25af1415282d2/data"
TOXIC_FILES = {
    "I-MaliciousInstructions": f"{_STL}/evaluation/I-MaliciousInstructions.json",
    "I-CoNa": f"{_STL}/evaluation/I-CoNa.json",
    "I-Controversial": f"{_STL}/evaluation/I-Controversial.json",
    "HarmfulQ": f"{_COT}/dangerous-q/toxic_outs.json",
}
DEVELOPMENT_FILES = {"Q-Harm": f"{_STL}/evaluation/Q-Harm.json"}
_XSTEST = "https://raw.githubusercontent.com/paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
XSTEST_FILE = f"{_XSTEST}/xstest_prompts.csv"  # 250 safe prompts, for over-refusal; 200 unsafe ones
BENIGN_FILES = {"I-Alpaca": f"{_STL}/evaluation/I-Alpaca.json"}
# Toxic prompts that no benchmark contains, to harvest unsafe answers from.
HARVEST_FILE = f"{_STL}/training/safety_only_data_Instructions.json"


def evaluation_prompts(
    source: str, *, split: str = "evaluation", per_benchmark: int | None = None, xstest_unsafe: bool = False
) -> pd.DataFrame:
    """The prompts to evaluate on, one row each: `benchmark`, `kind` ("toxic", "benign", "seemingly toxic"), `prompt`.

    With `xstest_unsafe` also XSTest's 200 unsafe prompts, of kind "toxic contrast": the paper does not have them, and
    they are not among the 518.

    Args:
        source: "miniworld"; "stl" for the published files (518 toxic, 50 benign and XSTest's 250 seemingly toxic
            prompts, downloaded once); or a folder that holds those files under their own names, at any depth.
        split: "evaluation", or "development" for choosing settings: in the mini-world all three kinds, in the published
            files STL's Q-Harm (100 toxic prompts, which the paper does not evaluate on).
        per_benchmark: keep only the first so many of each benchmark (for a quick look).

    Raises `ValueError` for a missing file or split.
    """
    if source == "miniworld":
        table = pd.concat(
            [
                _rows([p["prompt"] for p in prompts], [f"mini {p[key]}" for p in prompts] if key else name, kind)
                for prompts, key, name, kind in (
                    (miniworld.toxic_prompts(split), "family", None, "toxic"),
                    (miniworld.benign_questions(split), None, "mini benign", "benign"),
                    (miniworld.seemingly_toxic_prompts(split), None, "mini seemingly toxic", "seemingly toxic"),
                )
            ],
            ignore_index=True,
        )
    else:
        files = (
            {"toxic": DEVELOPMENT_FILES} if split == "development" else {"toxic": TOXIC_FILES, "benign": BENIGN_FILES}
        )
        parts = [
            _rows(read_prompts(locate(source, url)), name, kind)
            for kind, named in files.items()
            for name, url in named.items()
        ]
        if split == "evaluation":
            rows = read_rows(locate(source, XSTEST_FILE)).to_pandas()
            parts.append(_rows(rows.loc[rows["label"] == "safe", "prompt"].tolist(), "XSTest safe", "seemingly toxic"))
            if xstest_unsafe:
                unsafe = rows.loc[rows["label"] == "unsafe", "prompt"].tolist()
                parts.append(_rows(unsafe, "XSTest unsafe", "toxic contrast"))
        table = pd.concat(parts, ignore_index=True)
    if per_benchmark is not None:
        table = table.groupby("benchmark", sort=False).head(per_benchmark).reset_index(drop=True)
    return table


def harvest_prompts(source: str) -> list[str]:
    """Toxic prompts to harvest unsafe answers from, none of them an evaluation prompt; `source` as above.

    Besides, any file that `data.read_prompts` reads.
    """
    if source == "miniworld":
        return [p["prompt"] for p in miniworld.toxic_prompts("train")]
    if source == "stl" or Path(source).is_dir():
        return read_prompts(locate(source, HARVEST_FILE))
    return read_prompts(source)


def harvest_source(source: str) -> tuple[str, str | None]:
    """Name and revision of what `harvest_prompts` reads, for a data card."""
    if source == "stl":
        return source, STL_COMMIT
    return named(locate(source, HARVEST_FILE) if Path(source).is_dir() else source, None)


def safe_answers(source: str) -> dict[str, str]:
    """Prompt -> safe answer for the prompts of `harvest_prompts`: Safety-Tuned LLaMAs' own, or the mini-world's.

    Raises `ValueError` for a source of prompts without answers.
    """
    if source == "miniworld":
        rows = miniworld.safe_rows(len(miniworld.toxic_prompts("train")), seed=0)
        return {row["instruction"]: row["output"] for row in rows}
    if source == "stl" or Path(source).is_dir():
        rows = read_rows(locate(source, HARVEST_FILE))
        return dict(zip(rows["instruction"][:], rows["output"][:], strict=True))
    raise ValueError(
        f"{source}: prompts without safe answers; STL needs 'stl', a folder with its files, or 'miniworld'."
    )


def locate(source: str, url: str) -> str:
    """The downloaded file for "stl" (kept in the cache folder), else the file of that name inside folder `source`."""
    name = url.rsplit("/", 1)[-1]
    if source == "stl":
        kept = downloaded_file(url)
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                with urlopen(url, timeout=60) as response:
                    write_text(kept, response.read().decode())
            except OSError as error:
                raise ValueError(f"{url}: {error}; check the network, or give a folder with {name} in it") from error
        return str(kept)
    found = sorted(Path(source).rglob(name))
    if not found:
        raise ValueError(f"{source}: no {name} in this folder; download it from {url}, or use 'stl'")
    return str(found[0])


def downloaded_file(url: str) -> Path:
    """Where `locate` keeps the download of `url`, whether it is there or not."""
    return cache_folder() / "benchmarks" / f"{content_hash(url)}-{url.rsplit('/', 1)[-1]}"


def _rows(prompts: list[str], benchmark: str | list[str], kind: str) -> pd.DataFrame:
    return pd.DataFrame({"benchmark": benchmark, "kind": kind, "prompt": prompts})
