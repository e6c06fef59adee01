"""From prompts to judged answers: what a model is given, answers asked for once, verdicts of several judges."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ..files import write_text
from ..generation import Response
from ..judges.base import ExactJudge, Judge, judge_responses
from ..templates import Template, format_prompt
from .agreement import agreement_table


def asked_and_begun(prompts: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Per row what is `asked` (by default the `prompt`) and how the answer has `begun` (by default not at all).

    Both are columns of an attack, see `attacks`.
    """
    asked = prompts["asked"].fillna(prompts["prompt"]) if "asked" in prompts else prompts["prompt"]
    begun = prompts["begun"].fillna("").tolist() if "begun" in prompts else [""] * len(prompts)
    return asked.tolist(), begun


def questions(prompts: pd.DataFrame, template: Template) -> list[str]:
    """What the model is given for each row: what is asked, in the template, then what the answer begins with."""
    both = zip(*asked_and_begun(prompts), strict=True)
    return [format_prompt(asked, template=template) + begun for asked, begun in both]


def read_or_ask(prompts: pd.DataFrame, ask: Callable[[], list[Response]], file: Path) -> pd.DataFrame:
    """`prompts` with `response` and `finished`, read from `file` (JSONL) if it is there, else from `ask()` and kept."""
    if not file.exists():
        answers = ask()
        table = prompts.assign(response=[a.text for a in answers], finished=[a.finished for a in answers])
        write_text(file, table.to_json(orient="records", lines=True, force_ascii=False))
    return pd.read_json(file, orient="records", lines=True, dtype=False)


def judge_answers(answers: pd.DataFrame, judges: list[Judge], *, cache: Path | None = None) -> pd.DataFrame:
    """`answers` (`kind`, `prompt`, `response`) once per judge, one below the other, with `judge`, `verdict`, `score`.

    A judge sees the bare prompt and what the model itself wrote, whatever was asked or begun. An exact judge also says
    whether benign answers are `correct` (missing for all others), and is faster than a cache.

    Args:
        cache: folder in which every judge keeps what it said, `<judge>.jsonl`, by hash and without text.
    """
    prompts, responses = answers["prompt"].tolist(), answers["response"].tolist()
    tables = []
    for judge in judges:
        is_exact = isinstance(judge, ExactJudge)
        file = None if cache is None or is_exact else cache / f"{judge.name}.jsonl"
        judgements = judge_responses(judge, prompts, responses, cache=file)
        table = answers.assign(judge=judge.name, verdict=[j.verdict for j in judgements])
        table["score"] = [j.score for j in judgements]
        tables.append(table.assign(correct=_correct(answers, judge)) if is_exact else table)
    return pd.concat(tables)


def agreement(judged: pd.DataFrame) -> pd.DataFrame:
    """How the judges of a `judge_answers` agree, see `agreement.agreement_table`."""
    return agreement_table(
        pd.DataFrame({judge: rows["verdict"].tolist() for judge, rows in judged.groupby("judge", sort=False)})
    )


def _correct(answers: pd.DataFrame, judge: ExactJudge) -> pd.Series:
    benign = answers[answers["kind"] == "benign"]
    flags = judge.are_correct(benign["prompt"].tolist(), benign["response"].tolist())
    correct = pd.Series(pd.NA, index=answers.index, dtype="boolean")
    correct[(answers["kind"] == "benign").to_numpy()] = pd.array(flags, dtype="boolean")
    return correct
