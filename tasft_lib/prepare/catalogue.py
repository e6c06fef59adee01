"""Every published data set that the experiments can use (catalogue.yaml): where it lies, its rows, its licence.

Only `fetch` downloads, one file of a fixed commit, so that a set has one form wherever it lies. Two sets whose form
`sources.read_rows` does not understand have their reader here: BeaverTails and the red-team transcripts of hh-rlhf.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import pandas as pd
import yaml
from datasets import Dataset
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

# HTTPError: of the client that huggingface_hub uses, httpx or httpx2.
from huggingface_hub.errors import GatedRepoError, HTTPError
from tqdm.auto import tqdm

from ..evaluation.prompts import (
    BENIGN_FILES,
    DEVELOPMENT_FILES,
    HARVEST_FILE,
    TOXIC_FILES,
    XSTEST_FILE,
    downloaded_file,
    locate,
)
from ..records.sources import Source, column_names, read_rows
from ..text import shown

logger = logging.getLogger(__name__)
RED_TEAM = "hh-rlhf red team"


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        role: training, toxic prompts, benign, over-refusal, safe answers, jailbreak goals or capability.
        rows: rows the file has, empty answers included.
        url: the file on the web, at a fixed commit; None for a set of the hub.
        hub, revision, file: hub id, commit and path in its repository; None for a file of the web.
        local: end of the path a local copy is looked for by.
    """

    name: str
    role: str
    rows: int
    licence: str
    local: str
    url: str | None = None
    hub: str | None = None
    revision: str | None = None
    file: str | None = None

    @property
    def address(self) -> str:
        """Where it is published, commit included."""
        return self.url or f"{self.hub}@{self.revision}"

    @property
    def remedy(self) -> str:
        """How to get it."""
        if self.url:
            return f"save {self.url} as {self.local} in --folder"
        command = f"hf download {self.hub} {self.file} --repo-type dataset --revision {self.revision}"
        return f"run `{command}`, or save it as {self.local} in --folder"


def _published(name: str, *, hub: str | None = None, url: str | None = None, **fields) -> Published:
    """An entry of catalogue.yaml."""
    if hub is None:
        url = url or _BENCHMARKS[name]
        fields.setdefault("local", url.rsplit("/", 1)[-1])
    return Published(name=name, hub=hub, url=url, **fields)


_BENCHMARKS = TOXIC_FILES | DEVELOPMENT_FILES | BENIGN_FILES
_BENCHMARKS |= {"XSTest": XSTEST_FILE, "STL safe answers": HARVEST_FILE}
_ENTRIES = yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8"))
DATA_SETS = tuple(_published(**entry) for entry in _ENTRIES)


def named(name: str) -> Published:
    """The set of that name, whatever its case. Raises `ValueError` for an unknown one."""
    for published in DATA_SETS:
        if published.name.lower() == name.lower():
            return published
    raise ValueError(f"no published set {name!r}; there are {', '.join(p.name for p in DATA_SETS)}")


def find(published: Published, folder: Path | None = None) -> Path | None:
    """The file of a set: its local copy at any depth of `folder`, else what tasft or huggingface_hub downloaded."""
    if folder is not None:
        for file in sorted(folder.rglob(published.local)):
            return file
    if published.url:
        file = downloaded_file(published.url)
        return file if file.exists() else None
    cached = try_to_load_from_cache(published.hub, published.file, revision=published.revision, repo_type="dataset")
    return Path(cached) if isinstance(cached, str) else None


def fetch(name: str, folder: Path | None = None) -> Path:
    """The file of the set called `name`: what `find` finds, else downloaded at its commit and kept where that looks.

    It is read like a local copy: `sources.read_rows`, `forms.read_prompts`, `beavertails_rows`, `red_team_prompts`.

    Raises `ValueError` for an unknown name and where the download fails, a gated set included, with the remedy.
    """
    published = named(name)
    if file := find(published, folder):
        return file
    if published.url:
        return Path(locate("stl", published.url))
    try:
        path = hf_hub_download(published.hub, published.file, repo_type="dataset", revision=published.revision)
    except GatedRepoError as error:
        raise ValueError(f"{name}: gated; {_terms(published)}") from error
    except (OSError, HTTPError) as error:
        raise ValueError(f"{name}: {type(error).__name__}; check the network, or {published.remedy}") from error
    return Path(path)


def status_table(folder: Path | None = None, *, ask: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """A row per set (name, role, rows, expected, licence, state, address) and, per set that wants something, a line.

    `state` is "local", "cached", "not here", "unreadable" or "other rows" (a file with another number of rows than
    expected). With `ask` every set that is not here is asked for over the network, by the headers of its file alone, so
    that "not here" becomes "would be downloaded", "gated" or "unreachable". Raises `ValueError` for a missing folder.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one that holds the files of the data sets")
    rows, remedies = [], []
    for published in tqdm(DATA_SETS, desc="looking", unit="set", leave=False, disable=None):
        file = find(published, folder)
        if file:
            state, count, remedy = _look(published, file, folder)
        else:
            count, (state, remedy) = None, _ask(published) if ask else ("not here", published.remedy)
        row = {"name": published.name, "role": published.role, "rows": count, "expected": published.rows}
        rows.append(row | {"licence": published.licence, "state": state, "address": published.address})
        if remedy:
            remedies.append(f"{published.name}: {remedy}")
    return pd.DataFrame(rows).astype({"rows": "Int64"}), remedies


def count_rows(path: Path) -> int:
    """Rows of a published file; of STL's and HarmfulQ's JSON, prompts. Raises `ValueError`, `KeyError`, `TypeError`."""
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        return len(content["instructions"] if isinstance(content, dict) else content)
    return len(read_rows(path))


def beavertails_rows(source: Source, *, split: str = "30k_train", revision: str | None = None) -> Dataset:
    """BeaverTails as rows of `prompt` (bare), `completion` and `label` (False: unsafe).

    `source` is a file of it, or its hub id with `revision`. A pair that several people judged becomes one row: the
    majority says whether it is safe; on a tie it is left out.

    Raises:
        ValueError: a source without `prompt`, `response` and `is_safe`, or with a row that has no verdict.
    """
    is_file = Path(source).expanduser().is_file()
    rows = read_rows(source, split=None if is_file else split, revision=revision)
    _need(rows, ("prompt", "response", "is_safe"), source)
    votes: dict[tuple[str, str], Counter[bool]] = {}
    columns = (rows[name][:] for name in ("prompt", "response", "is_safe"))
    for number, (prompt, response, is_safe) in enumerate(zip(*columns, strict=True), start=1):
        if not isinstance(is_safe, bool):
            raise ValueError(f"{source}: row {number}: is_safe is {shown(is_safe)}; write true or false")
        votes.setdefault((prompt, response), Counter())[is_safe] += 1
    judged = [
        {"prompt": prompt, "completion": response, "label": given[True] > given[False]}
        for (prompt, response), given in votes.items()
        if given[True] != given[False]
    ]
    if ties := len(votes) - len(judged):
        logger.warning("%s: left out %d of %d pairs, as many call them safe as unsafe", source, ties, len(votes))
    return Dataset.from_list(judged)


def red_team_prompts(source: Source) -> list[str]:
    """The first human turn of every red-team transcript of hh-rlhf, in file order and without repetitions.

    `source` is the file `red_team_attempts.jsonl.gz`, or the hub id Anthropic/hh-rlhf, whose folder red-team-attempts
    is then read at the commit in `DATA_SETS`. Transcripts without a human turn are left out, and logged. Raises
    `ValueError` where that leaves none.
    """
    published = named(RED_TEAM)
    rows = read_rows(fetch(published.name) if str(source) == published.hub else source)
    _need(rows, ("transcript",), source)
    prompts, silent = {}, 0
    for transcript in rows["transcript"][:]:
        _, _, rest = ("\n\n" + (transcript or "").lstrip()).partition("\n\nHuman:")
        first = rest.split("\n\nAssistant:")[0].split("\n\nHuman:")[0].strip()
        silent += not first
        if first:
            prompts[first] = None
    if silent:
        logger.warning("%s: left out %d of %d transcripts, they have no human turn", source, silent, len(rows))
    if not prompts:
        raise ValueError(f"{source}: no transcript gives a prompt; check the file")
    return list(prompts)


def _look(published: Published, file: Path, folder: Path | None) -> tuple[str, int | None, str | None]:
    state = "local" if folder is not None and file.is_relative_to(folder) else "cached"
    try:
        count = count_rows(file)
    except (ValueError, KeyError, TypeError) as error:
        return "unreadable", None, f"{file}: {str(error)!r:.120}; {published.remedy}"
    if count == published.rows:
        return state, count, None
    return "other rows", count, f"{file}: {count:,} rows, {published.rows:,} expected; {published.remedy}"


def _ask(published: Published) -> tuple[str, str]:
    """Ask for the headers of the file, which says whether it would come without bringing any of it."""
    try:
        if published.url:
            urlopen(Request(published.url, method="HEAD"), timeout=30).close()
        else:
            url = hf_hub_url(published.hub, published.file, repo_type="dataset", revision=published.revision)
            get_hf_file_metadata(url, timeout=30)
    except GatedRepoError:
        return "gated", _terms(published)
    except (OSError, HTTPError) as error:
        return "unreachable", f"{type(error).__name__}; check the network, or {published.remedy}"
    return "would be downloaded", published.remedy


def _terms(published: Published) -> str:
    page = f"https://huggingface.co/datasets/{published.hub}"
    return f"accept its terms at {page} and log in (`hf auth login`); then {published.remedy}"


def _need(rows: Dataset, columns: tuple[str, ...], source: Source) -> None:
    if missing := [column for column in columns if column not in rows.column_names]:
        what = f"has the columns {column_names(rows)}; lacks {', '.join(missing)}"
        raise ValueError(f"{source}: {what}; give the published file")
