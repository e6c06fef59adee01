"""The cases that `performance` measures, and how time and memory grow with the number of tokens."""

import inspect
import json
from datetime import datetime
from typing import Any

import pandas as pd

from ..bench import measure
from ..storage.files import environment, notebooks, runs_folder


def check_cases(config: Any) -> None:
    """Raise `ValueError`, one line, for a case of `head_cases` or `step_cases` that `measure` would not take."""
    for name, function in (("head_cases", measure.head), ("step_cases", measure.step)):
        options = list(inspect.signature(function).parameters)
        for number, case in enumerate(getattr(config, name), start=1):
            if unknown := set(case) - set(options):
                keys = ", ".join(sorted(unknown))
                raise ValueError(f"{name}, case {number}: {keys} is no option; there are {', '.join(options)}.")


def machine(threads: int) -> str:
    """GPUs, or CPU and threads, in words."""
    hardware = environment()["hardware"]
    return ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {threads} thread(s)"


def linear_fits(scaling: pd.DataFrame) -> pd.DataFrame:
    """A line through time and peak memory of every contender by tokens: `measure.linear_fit` by contender and `of`."""
    tokens = scaling["tokens"].tolist()
    fits = [
        {"contender": name, "of": of, **measure.linear_fit(tokens, scaling[f"{of}_{name}"].tolist())}
        for of in ("seconds", "peak_mb")
        for name in measure.CONTENDERS
    ]
    return pd.DataFrame(fits)


def whole_run(profile: str) -> pd.DataFrame:
    """Where the time of a profile's last `tasft reproduce` went, by the notebooks' own clocks: a row each, in order.

    Columns (s): notebook; begin, after the first one's; seconds; start, until its libraries are there (kernel, imports,
    settings); longest, its longest other cell, and which (its first line); rest. Empty where it has not run.
    """
    rows = []
    for name in notebooks():
        copy = runs_folder() / profile / f"{name}.ipynb"
        notebook = json.loads(copy.read_text(encoding="utf-8")) if copy.exists() else {"metadata": {}}
        whole = notebook["metadata"].get("papermill", {})
        if not whole.get("duration"):  # never run, or stopped
            continue
        begin = datetime.fromisoformat(whole["start_time"])
        clocks = [(cell, cell["metadata"]["papermill"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        given = {"parameters", "injected-parameters"}
        ready = next(i for i, (cell, _) in enumerate(clocks) if not given & set(cell["metadata"].get("tags", [])))
        start = (datetime.fromisoformat(clocks[ready][1]["end_time"]) - begin).total_seconds()
        cell, clock = max(clocks[ready + 1 :], key=lambda pair: pair[1]["duration"])
        row = {"notebook": name, "begin": begin, "seconds": whole["duration"], "start": start}
        row |= {"longest": clock["duration"], "rest": whole["duration"] - start - clock["duration"]}
        rows.append(row | {"cell": "".join(cell["source"]).split("\n")[0]})
    table = pd.DataFrame(rows, columns=["notebook", "begin", "seconds", "start", "longest", "rest", "cell"])
    table["begin"] = [(begin - table["begin"].min()).total_seconds() for begin in table["begin"]]
    return table.sort_values("begin", ignore_index=True).round(1)
