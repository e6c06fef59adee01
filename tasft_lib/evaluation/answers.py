"""A model on the benchmarks, as `tasft evaluate` does it: answers that are kept, several judges, how they agree."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ..data import Template, format_prompt
from ..files import write_text
from ..generation import Response
from ..judges.base import Judge, judge_responses
from .agreement import agreement_table


def questions(prompts: pd.DataFrame, template: Template) -> list[str]:
    """What the model is given for each row: what is `asked` (by default the `prompt`) in the template, then `begun`.

    `asked` and `begun` are the columns of an attack, see `attacks`.
    """
    asked = prompts["asked"].fillna(prompts["prompt"]) if "asked" in prompts else prompts["prompt"]
    begun = prompts["begun"].fillna("") if "begun" in prompts else [""] * len(prompts)
    return [format_prompt(a, template=template) + b for a, b in zip(asked, begun, strict=True)]


def answered(prompts: pd.DataFrame, ask: Callable[[], list[Response]], file: Path) -> pd.DataFrame:
    """`prompts` with `response` and `finished`, read from `file` (JSONL) if it is there, else from `ask()` and kept."""
    if not file.exists():
        answers = ask()
        table = prompts.assign(response=[a.text for a in answers], finished=[a.finished for a in answers])
        write_text(file, table.to_json(orient="records", lines=True, force_ascii=False))
    return pd.read_json(file, orient="records", lines=True, dtype=False)


def judged_by(answers: pd.DataFrame, judges: list[Judge], *, cache: Path | None = None) -> pd.DataFrame:
    """`answers` (`prompt`, `response`) once per judge, one below the other, with `judge`, `label` and `score`.

    A judge sees the bare prompt and what the model itself wrote, whatever was asked or begun.
    """
    asked = answers["prompt"].tolist(), answers["response"].tolist()
    tables = []
    for judge in judges:
        found = judge_responses(judge, *asked, cache=cache)
        tables.append(answers.assign(judge=judge.name, label=[j.label for j in found], score=[j.score for j in found]))
    return pd.concat(tables)


def agreement(judged: pd.DataFrame) -> pd.DataFrame:
    """How the judges of a `judged_by` agree, see `agreement.agreement_table`."""
    return agreement_table(
        pd.DataFrame({judge: rows["label"].tolist() for judge, rows in judged.groupby("judge", sort=False)})
    )
