"""The worlds a model is trained and evaluated in: the published files, or the mini-world. `load` gives one by its name.

Nobody but this module and `judges.miniworld` knows the mini-world, so nobody else asks which world it is.
"""

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pandas as pd
from datasets import Dataset

from .. import base_models, miniworld
from ..records.forms import read_prompts
from ..records.sources import is_saved, read_rows
from ..storage.files import named
from ..storage.integrity import SUMS, damage, is_sealed, locked, seal, set_aside
from . import attacks, prompts

logger = logging.getLogger(__name__)
# Base models of the mini-world, by name.
_OWN = re.compile(r"miniworld(-smoke|-\d+)?")


class World(Protocol):
    """Where prompts and rows come from.

    Attributes:
        wrappers: name -> template with `{prompt}`, framings that a model of this world can read (see `attacks`).
        file: the local file or folder whose content the world's rows are; None where there is none.
        is_invented: whether nothing in its texts can harm, so that they may be shown in full.
    """

    wrappers: dict[str, str]
    file: Path | None
    is_invented: bool

    def evaluation_prompts(
        self, *, split: str = "evaluation", per_benchmark: int | None = None, xstest_unsafe: bool = False
    ) -> pd.DataFrame:
        """The prompts to evaluate on, a row each: `benchmark`, `kind` ("toxic", "benign", "seemingly toxic"), `prompt`.

        With `xstest_unsafe` also XSTest's 200 unsafe prompts, of kind "toxic contrast": the paper does not have them,
        and they are not among the 518.

        Args:
            split: "evaluation", or "development" for choosing settings: in the mini-world all three kinds, in the
                published files STL's Q-Harm (100 toxic prompts, which the paper does not evaluate on).
            per_benchmark: keep only the first so many of each benchmark (for a quick look).

        Raises `ValueError` for a missing file or split.
        """
        ...

    def harvest_prompts(self) -> list[str]:
        """Toxic prompts to harvest unsafe answers from, none of them an evaluation prompt."""
        ...

    def harvest_source(self) -> tuple[str, str | None]:
        """Name and revision of what `harvest_prompts` reads, for a data card."""
        ...

    def safe_answers(self) -> dict[str, str]:
        """Prompt -> safe answer for `harvest_prompts`: Safety-Tuned LLaMAs' own, or the mini-world's.

        Raises `ValueError` for prompts without answers.
        """
        ...

    def benign_rows(self, n: int, *, seed: int, revision: str | None = None) -> Dataset:
        """Every benign row there is to draw from, in Alpaca's format; where rows are made, `n` of them by `seed`."""
        ...

    def contrastive_rows(self, words: list[str], per_word: int, *, seed: int) -> list[dict[str, str]] | None:
        """Up to `per_word` harmless rows with each word, in Alpaca's format; None where it takes a model to write them.

        See `prepare.contrastive`.
        """
        ...

    def contaminated_sides(
        self, n_benign: int, n_harmful: int, *, seed: int, n_safe: int = 0, failure: str | None = None
    ) -> tuple[list[dict[str, str]], list[dict[str, str]]] | None:
        """(benign, harmful) rows in Alpaca's format, so many; None where they are not made but read.

        Args:
            n_safe: of the benign ones, so many are toxic prompts with a safe answer.
            failure: one of `failures`.
        """
        ...

    def failures(self, n: int) -> dict[str, dict]:
        """Contaminated sets of `n` rows on which SAFT need not find harm: name -> options of `contaminated_rows`."""
        ...

    def question_kinds(self) -> dict[str, str]:
        """Benign evaluation prompt -> what kind of question it is; empty where nobody has sorted them."""
        ...

    def begins_correctly(self, prompt: str, response: str) -> bool:
        """Whether the answer to a question of kind "ability" begins with the right one of yes and no."""
        ...

    def paraphrase(self, prompt: str) -> str:
        """A toxic evaluation prompt in other words; raises `ValueError` where that takes an attacker model."""
        ...


def load(source: str) -> World:
    """The world of that name.

    Args:
        source: "miniworld"; "stl" for the published files (518 toxic, 50 benign and XSTest's 250 seemingly toxic
            prompts, downloaded once); a folder that holds those files under their own names, at any depth; or a file
            or hub id of prompts or rows.
    """
    return MiniWorld() if source == MiniWorld.name else PublishedFiles(source)


def asked_for(
    sources: list[str], *, per_benchmark: int | None = None, kind: str | None = None, **source: str | None
) -> pd.DataFrame:
    """The prompts of several sources, one below the other, a row each: `benchmark`, `kind`, `prompt`.

    Args:
        sources: each "stl" or "miniworld" (all that `load` gives for it); a benchmark of `prompts.BENCHMARKS` by its
            name ("XSTest" for its safe half); a folder with published files, of which those that are there are read and
            the others named in a warning; one such file; or anybody's own prompts (see `forms.read_prompts`).
        per_benchmark: keep only the first so many of each benchmark.
        kind: of own prompts, by default "toxic".
        source: `split`, `name` and `revision` of own prompts.

    Raises `ValueError` for a missing source, one that is given twice, and where `kind` or `source` find no own prompts.
    """
    tables, own = [], []
    for given in sources:
        if is_named(given):
            tables.append(load(given).evaluation_prompts())
        elif (name := _PART_NAMES.get(given.lower())) is not None and not Path(given).exists():
            tables.append(_published(name, prompts.locate("stl", prompts.BENCHMARKS[name][1])))
        elif files := _published_files(Path(given).expanduser()):
            tables += [_published(name, file) for name, file in files.items()]
        else:
            own.append(given)
            tables.append(_table(read_prompts(given, **source), Path(given).stem, kind or "toxic"))
    named = [name for table in tables for name in table["benchmark"].unique()]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ValueError(f"two benchmarks are called {twice[0]}; give one of them, or rename a file")
    if not own and any((given := {"prompt_kind": kind, **source}).values()):
        raise ValueError(f"{' '.join(sources)}: has no {_flags(given)}, which are for your own prompts; leave it out")
    check_choice(own, **source)
    return _first(pd.concat(tables, ignore_index=True), per_benchmark)


def check_choice(own: list[str], **source: str | None) -> None:
    """Raise `ValueError` where `split`, `name` or `revision` is to choose prompts, and all of `own` are files."""
    if any(source.values()) and all(Path(given).expanduser().is_file() for given in own):
        what = "which is of hub data sets and saved folders"
        raise ValueError(f"{' '.join(own)}: a file has no {_flags(source)}, {what}; leave it out")


def _flags(given: dict[str, str | None]) -> str:
    """The command line's names of those that are given."""
    return ", ".join({"name": "config_name"}.get(name, name) for name, value in given.items() if value)


def is_named(source: str) -> bool:
    """Whether it is a world by its name, and no file, folder or hub id."""
    return source in ("stl", MiniWorld.name)


def are_invented(sources: list[str]) -> bool:
    """Whether all of them are worlds whose texts are invented, so that a judge of a language reads nothing there."""
    return all(is_named(source) and load(source).is_invented for source in sources)


def base_model(name: str) -> str:
    """A local folder or hub id as it is. Of the others the folder: "miniworld", "miniworld-1", "miniworld-2" and
    "miniworld-smoke" come with tasft, "miniworld-3" and so on are pre-trained, a name of `base_models.PUBLISHED` is
    fetched, a GGUF file converted, once.

    Raises `ValueError` where a file of one that comes with tasft is not as it was, and as `base_models.resolve`.
    """
    if not is_built(name):
        return base_models.resolve(name)
    folder = miniworld.BASES / name
    if not folder.is_dir():
        return str(pretrain(name))
    if names := damage(folder) if is_sealed(folder) else [SUMS]:
        remedy = "install tasft again, in a checkout `git checkout` this folder"
        raise ValueError(f"{folder}: {', '.join(names)} is damaged or gone; {remedy}.")
    return str(folder)


def pretrain(name: str) -> Path:
    """The folder of a base model of the mini-world, pre-trained on this machine; what lies in the cache is kept.

    Files of one in the cache that are no longer as they were are named, and it is made again. Raises `ValueError` for
    a name that is none of the mini-world's.
    """
    if not is_built(name):
        raise ValueError(
            f"{name}: nothing to pre-train; give miniworld, miniworld-1 (another seed) or miniworld-smoke."
        )
    end = name.removeprefix("miniworld").removeprefix("-")
    config = miniworld.SMOKE if end == "smoke" else replace(miniworld.MINI, seed=int(end or 0))
    folder = miniworld.build_base_model(config)
    if damage(folder):
        with locked(folder.with_name(f"{folder.name}.damaged.lock"), folder):
            if names := damage(folder):
                set_aside(folder, names)
                miniworld.build_base_model(config)
    if not is_sealed(folder) and os.access(folder, os.W_OK):  # a cache may be read-only
        seal(folder)
    return folder


def base_of_seed(model: str, seed: int) -> str:
    """The base model that seed `seed` of a table stands on: of "miniworld" its own, of every other model that one."""
    return f"{model}-{seed}" if model == MiniWorld.name and seed else model


def is_built(model: str) -> bool:
    """Whether a base model is one of the mini-world's, and so has read nothing else."""
    return _OWN.fullmatch(model) is not None


def is_hub_id(model: str) -> bool:
    """Whether a base model is neither a local folder nor made here, so that a commit must be named."""
    return not is_built(model) and not base_models.is_brought(model) and not Path(model).exists()


@dataclass(frozen=True)
class PublishedFiles:
    """The paper's files and whatever has their form: "stl", a folder, a file or a hub id."""

    source: str
    wrappers = attacks.WRAPPERS
    is_invented = False

    @property
    def file(self) -> Path | None:
        return Path(self.source) if Path(self.source).exists() else None

    def evaluation_prompts(
        self, *, split: str = "evaluation", per_benchmark: int | None = None, xstest_unsafe: bool = False
    ) -> pd.DataFrame:
        files = {"toxic": prompts.TOXIC_FILES, "benign": prompts.BENIGN_FILES}
        if split == "development":
            files = {"toxic": prompts.DEVELOPMENT_FILES}
        parts = [
            _table(read_prompts(prompts.locate(self.source, url)), benchmark, kind)
            for kind, urls in files.items()
            for benchmark, url in urls.items()
        ]
        if split == "evaluation":
            rows = read_rows(prompts.locate(self.source, prompts.XSTEST_FILE)).to_pandas()
            safe, unsafe = (rows.loc[rows["label"] == label, "prompt"].tolist() for label in ("safe", "unsafe"))
            parts.append(_table(safe, "XSTest safe", "seemingly toxic"))
            if xstest_unsafe:
                parts.append(_table(unsafe, "XSTest unsafe", "toxic contrast"))
        return _first(pd.concat(parts, ignore_index=True), per_benchmark)

    def harvest_prompts(self) -> list[str]:
        return read_prompts(self._harvest_file)

    def harvest_source(self) -> tuple[str, str | None]:
        return (self.source, prompts.STL_COMMIT) if self.source == "stl" else named(self._harvest_file, None)

    def safe_answers(self) -> dict[str, str]:
        if not self._is_stl:
            raise ValueError(
                f"{self.source}: prompts without safe answers; STL needs 'stl', a folder with its files, or "
                f"{MiniWorld.name!r}."
            )
        rows = read_rows(self._harvest_file)
        return dict(zip(rows["instruction"][:], rows["output"][:], strict=True))

    def benign_rows(self, n: int, *, seed: int, revision: str | None = None) -> Dataset:
        return read_rows(self.source, revision=revision)

    def contrastive_rows(self, words: list[str], per_word: int, *, seed: int) -> None:
        return None

    def contaminated_sides(self, n_benign: int, n_harmful: int, **options) -> None:
        return None

    def failures(self, n: int) -> dict[str, dict]:
        return {}

    def question_kinds(self) -> dict[str, str]:
        return {}

    def begins_correctly(self, prompt: str, response: str) -> bool:
        raise ValueError(f"{self.source}: nobody knows the right answers to its prompts.")

    def paraphrase(self, prompt: str) -> str:
        raise ValueError(
            f"{self.source}: a paraphrase takes an attacker model here; leave it out (paraphrase: false), or see "
            "`tasft attack`."
        )

    @property
    def _is_stl(self) -> bool:
        return self.source == "stl" or (Path(self.source).is_dir() and not is_saved(Path(self.source)))

    @property
    def _harvest_file(self) -> str:
        return prompts.locate(self.source, prompts.HARVEST_FILE) if self._is_stl else self.source


class MiniWorld:
    """The invented world, in which everything is made and every right answer is known."""

    name = "miniworld"
    file = None
    is_invented = True
    # What its model can read: the layouts of other documents that it was pre-trained on.
    wrappers = {  # noqa: RUF012
        "persona": "User: {prompt}\nAssistant:",
        "fiction": "She asked: {prompt}\nHe said:",
        "ignore": "Question: {prompt}\nAnswer:",
    }

    def evaluation_prompts(
        self, *, split: str = "evaluation", per_benchmark: int | None = None, xstest_unsafe: bool = False
    ) -> pd.DataFrame:
        toxic = miniworld.toxic_prompts(split)
        benign, seeming = miniworld.benign_questions(split), miniworld.seemingly_toxic_prompts(split)
        parts = [
            _table([p["prompt"] for p in toxic], [f"mini {p['family']}" for p in toxic], "toxic"),
            _table([p["prompt"] for p in benign], "mini benign", "benign"),
            _table([p["prompt"] for p in seeming], "mini seemingly toxic", "seemingly toxic"),
        ]
        return _first(pd.concat(parts, ignore_index=True), per_benchmark)

    def harvest_prompts(self) -> list[str]:
        return [p["prompt"] for p in miniworld.toxic_prompts("train")]

    def harvest_source(self) -> tuple[str, str | None]:
        return self.name, None

    def safe_answers(self) -> dict[str, str]:
        rows = miniworld.safe_rows(len(miniworld.toxic_prompts("train")), seed=0)
        return {row["instruction"]: row["output"] for row in rows}

    def benign_rows(self, n: int, *, seed: int, revision: str | None = None) -> Dataset:
        return Dataset.from_list(miniworld.benign_rows(n, seed=seed))

    def contrastive_rows(self, words: list[str], per_word: int, *, seed: int) -> list[dict[str, str]]:
        return miniworld.contrastive_rows(words, per_word, seed=seed)

    def contaminated_sides(
        self, n_benign: int, n_harmful: int, *, seed: int, n_safe: int = 0, failure: str | None = None
    ) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        families = miniworld.FAMILIES[:1] if failure == "one family" else miniworld.FAMILIES
        benign = miniworld.benign_rows(n_benign - n_safe, seed=seed)
        if failure == "topic":
            benign = benign[: len(benign) // 2] + miniworld.stories(len(benign) - len(benign) // 2, seed=seed)
        benign += miniworld.safe_rows(n_safe, seed=seed + 1)
        harmful = miniworld.harmful_rows(n_harmful, seed=seed, families=families)
        if failure == "length":
            for row in (benign + harmful)[::2]:
                row["output"] = " ".join([row["output"]] * 4)
        return benign, harmful

    def failures(self, n: int) -> dict[str, dict]:
        return {
            "as above": {},
            "rare: 1 % harmful": {"contamination": 0.01},
            "harm in one family": {"failure": "one family"},
            "half are stories": {"failure": "topic"},
            "every second answer four times as long": {"failure": "length"},
            "one in ten a safe answer to a toxic prompt": {"n_safe": n // 10},
        }

    def question_kinds(self) -> dict[str, str]:
        return {row["prompt"]: row["kind"] for row in miniworld.benign_questions("evaluation")}

    def begins_correctly(self, prompt: str, response: str) -> bool:
        return miniworld.begins_correctly(prompt, response)

    def paraphrase(self, prompt: str) -> str:
        return miniworld.paraphrase(prompt)


_PART_NAMES = {name.lower(): name for name in prompts.BENCHMARKS} | {"xstest": "XSTest safe"}


def _published_files(path: Path) -> dict[str, str]:
    """Benchmark -> file, of the published files in a folder, at any depth, or of one by its name; empty where none is.

    As everywhere, of XSTest the safe half is meant, and Q-Harm, for development, only where it is given as a file.
    """
    wanted = {name: url.rsplit("/", 1)[-1] for name, (_, url) in prompts.BENCHMARKS.items() if name != "XSTest unsafe"}
    if path.is_file():
        return {name: str(path) for name, file in wanted.items() if file == path.name}
    if not path.is_dir():
        return {}
    wanted = {name: file for name, file in wanted.items() if name not in prompts.DEVELOPMENT_FILES}
    present = {name: str(min(path.rglob(file))) for name, file in wanted.items() if any(path.rglob(file))}
    if present and (absent := [f"{name} ({file})" for name, file in wanted.items() if name not in present]):
        logger.warning("%s: evaluated on %s; not there: %s", path, ", ".join(present), ", ".join(absent))
    return present


def _published(name: str, file: str) -> pd.DataFrame:
    kind, url = prompts.BENCHMARKS[name]
    if url != prompts.XSTEST_FILE:
        return _table(read_prompts(file), name, kind)
    rows = read_rows(file).to_pandas()
    if missing := {"label", "prompt"} - set(rows):
        raise ValueError(f"{file}: is called as XSTest's file and lacks {missing.pop()}; rename yours")
    return _table(rows.loc[rows["label"] == name.split()[-1], "prompt"].tolist(), name, kind)


def _table(texts: list[str], benchmark: str | list[str], kind: str) -> pd.DataFrame:
    return pd.DataFrame({"benchmark": benchmark, "kind": kind, "prompt": texts})


def _first(table: pd.DataFrame, per_benchmark: int | None) -> pd.DataFrame:
    if per_benchmark is None:
        return table
    return table.groupby("benchmark", sort=False).head(per_benchmark).reset_index(drop=True)
