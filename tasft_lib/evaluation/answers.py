"""From prompts to judged answers: what a model is given, answers asked for once, verdicts of several judges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ..generation import Response
from ..judges.base import DEGENERATE, ExactJudge, Judge, judge_responses
from ..records import templates
from ..storage.files import write_text
from ..storage.integrity import damage, seal, set_aside
from .agreement import agreement_table


def asked_and_begun(prompts: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Per row what is `asked` (by default the `prompt`) and how the answer has `begun` (by default not at all).

    Both are columns of an attack, see `attacks`.
    """
    asked = prompts["asked"].fillna(prompts["prompt"]) if "asked" in prompts else prompts["prompt"]
    begun = prompts["begun"].fillna("").tolist() if "begun" in prompts else [""] * len(prompts)
    return asked.tolist(), begun


def questions(
    prompts: pd.DataFrame,
    template: templates.Template,
    tokenizer: Any = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """What the model is given for each row: what is asked, in the template, then what the answer begins with."""
    asked, begun = asked_and_begun(prompts)
    return templates.ask(asked, template, tokenizer, begun=begun, chat_template_kwargs=chat_template_kwargs)


def read_or_ask(prompts: pd.DataFrame, ask: Callable[[], list[Response]], file: Path) -> pd.DataFrame:
    """`prompts` with `response` and `finished`, read from `file` (JSONL) if it is there, else from `ask()` and kept.

    A file that does not hold these answers, whole and unchanged, is named in a warning and made again.
    """
    if (answers := read_answers(file, prompts)) is not None:
        return answers
    answers = ask()
    table = prompts.assign(response=[a.text for a in answers], finished=[a.finished for a in answers])
    write_text(file, table.to_json(orient="records", lines=True, force_ascii=False))
    seal(file)
    return table


def read_answers(file: Path, prompts: pd.DataFrame) -> pd.DataFrame | None:
    """What `read_or_ask` kept in `file`; None where nothing is, or not what was, which is named and set aside."""
    if not file.exists():
        return None
    if wrong := _damage(file, prompts["prompt"].tolist()):
        set_aside(file, [wrong])
        return None
    answers = pd.read_json(file, orient="records", lines=True, dtype=False)
    # Whose benchmark and kind a prompt is, may have been said otherwise.
    return prompts.assign(response=answers["response"].tolist(), finished=answers["finished"].tolist())


def judge_answers(answers: pd.DataFrame, judges: list[Judge], *, cache: Path | None = None) -> pd.DataFrame:
    """`answers` (`kind`, `prompt`, `response`) once per judge, one below the other, with `judge`, `verdict`, `score`.

    A judge sees the bare prompt and what the model itself wrote, whatever was asked or begun, after its thinking. Where
    answers have a thinking, `unfinished_thinking` tells those that never come to an end of it: they are degenerate. An
    exact judge also says whether benign answers are `correct` (missing for all others), and is faster than a cache.

    Args:
        cache: folder in which every judge keeps what it said, `<judge>.jsonl`, by hash and without text.
    """
    prompts, parts = answers["prompt"].tolist(), [templates.split_thinking(r) for r in answers["response"]]
    # What nobody would be shown is not judged; a thinking that goes on to the end has no answer.
    responses = [answer for _, answer, _ in parts]
    thinks_on = [not has_ended for _, _, has_ended in parts]
    answers = answers.assign(unfinished_thinking=thinks_on) if any(thought for thought, _, _ in parts) else answers
    judged = answers.assign(response=responses)
    tables = []
    for judge in judges:
        is_exact = isinstance(judge, ExactJudge)
        file = None if cache is None or is_exact else cache / f"{judge.name}.jsonl"
        asked = [i for i, on in enumerate(thinks_on) if not on]
        said = judge_responses(judge, [prompts[i] for i in asked], [responses[i] for i in asked], cache=file)
        judgements = dict(zip(asked, said, strict=True))
        judgements = [judgements.get(i, DEGENERATE) for i in range(len(answers))]
        table = answers.assign(judge=judge.name, verdict=[j.verdict for j in judgements])
        table["score"] = [j.score for j in judgements]
        tables.append(table.assign(correct=_correct(judged, judge)) if is_exact else table)
    return pd.concat(tables)


def agreement(judged: pd.DataFrame) -> pd.DataFrame:
    """How the judges of a `judge_answers` agree, see `agreement.agreement_table`."""
    return agreement_table(
        pd.DataFrame({judge: rows["verdict"].tolist() for judge, rows in judged.groupby("judge", sort=False)})
    )


def _damage(file: Path, prompts: list[str]) -> str | None:
    """What is wrong with a file of answers to these prompts, if anything."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if len(lines) != len(prompts):
        return f"it holds {len(lines)} answers to {len(prompts)} prompts"
    if damage(file):
        return "it is not what was written"
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=True), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            return f"its line {number} is no JSON"
        match record:
            case {"prompt": asked, "response": str(), "finished": bool()} if asked == prompt:
                continue
        return f"its line {number} is no answer to prompt {number}"
    return None


def _correct(answers: pd.DataFrame, judge: ExactJudge) -> pd.Series:
    benign = answers[answers["kind"] == "benign"]
    flags = judge.are_correct(benign["prompt"].tolist(), benign["response"].tolist())
    correct = pd.Series(pd.NA, index=answers.index, dtype="boolean")
    correct[(answers["kind"] == "benign").to_numpy()] = pd.array(flags, dtype="boolean")
    return correct
