"""What a notebook leaves: tables, figures, and a manifest that names them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from ..storage import files
from ..storage.files import notebooks, project_root, runs_folder
from ..storage.integrity import keep_if_whole, seal

Result = TypeVar("Result", pd.DataFrame, Figure)


class Results:
    """Tables and figures of one notebook, saved by name.

    Attributes:
        config: the notebook's parameters (`settings.resolve`).
        folder: see `folder_of`.
        names: the files saved so far, `<notebook>_<name>.csv` and `.png`.
    """

    def __init__(self, config: Any):
        self.config = config
        self.folder = folder_of(config.profile)
        self.names: list[str] = []

    def save(self, result: Result, name: str) -> Result:
        """Write a table (CSV, six digits) or a figure (PNG); returns it, for the cell to show."""
        self.folder.mkdir(parents=True, exist_ok=True)
        is_table = isinstance(result, pd.DataFrame)
        path = self.folder / f"{self.config.notebook}_{name}.{'csv' if is_table else 'png'}"
        with files.whole(path) as temporary:
            if is_table:
                result.to_csv(temporary, index=False, float_format="%.6g")
            else:
                result.savefig(temporary, format="png", metadata={"Software": None}, bbox_inches="tight")
        self.names = [*self.names, path.name]
        return result

    def record(self, **entries: Any) -> None:
        """Write `<notebook>_manifest.json`, what every number of the notebook traces to; prints the files' names."""
        names = sorted(set(self.names))
        given = files.travelling(vars(self.config))
        lists = {name: value for name, value in given.items() if isinstance(value, list)}
        given |= {name: list(files.travelling(dict(enumerate(value))).values()) for name, value in lists.items()}
        record = {"parameters": given, **entries, "files": names} | files.environment()
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.folder / f"{self.config.notebook}_manifest.json", record)
        print(*(self.folder / name for name in names), sep="\n")


def table_in(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in `path`, made where it is missing or damaged."""
    if not keep_if_whole(path):
        table = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, table.to_csv(index=False))
        seal(path)
    return pd.read_csv(path)


def folder_of(profile: str) -> Path:
    """`figures/<profile>` for `publish`; else, run by hand, `runs/figures/<profile>`, so that git sees no change."""
    return Path(os.environ.get("TASFT_FIGURES") or runs_folder() / "figures") / profile


def publish() -> None:
    """Let notebooks that this process starts write to `figures/`, unless `$TASFT_FIGURES` names another folder."""
    os.environ.setdefault("TASFT_FIGURES", str(project_root() / "figures"))


def remove(profile: str, notebook: str) -> None:
    """Remove what an earlier run of the notebook left, so that nothing old is published under a new manifest."""
    folder = folder_of(profile)
    manifest = folder / f"{notebook}_manifest.json"
    try:
        named = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that is damaged
        named = []
    longer = tuple(f"{name}_" for name in notebooks() if name.startswith(f"{notebook}_"))  # performance_filter
    leftovers = [path for path in folder.glob(f"{notebook}_*") if not path.name.startswith(longer)]
    for path in {*leftovers, *(folder / name for name in named)}:
        path.unlink(missing_ok=True)
