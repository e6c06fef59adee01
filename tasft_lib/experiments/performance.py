"""The cases that `performance` measures, and how time and memory grow with the number of tokens."""

import inspect
from typing import Any

import pandas as pd

from ..bench import measure
from ..storage.files import environment


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
