"""Answers of several models to the same prompts, side by side: read from what `tasft evaluate` leaves, and joined.

Nothing is asked and nothing judged here: verdicts are those that each evaluation kept. Only an exact judge, which
keeps none, says them again.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..judges import base, load
from ..records.templates import split_thinking
from ..storage import files, integrity


def read_results(path: Path) -> list[dict[str, Any]]:
    """The judged answers of one evaluation, in its order.

    Args:
        path: a folder of `tasft evaluate`, the responses-*.jsonl in it, or a JSONL file of one's own with `prompt` and
            `response` and, if one likes, `benchmark`, `kind`, `attack` and `verdict`.

    Returns:
        Rows of `benchmark`, `kind`, `prompt`, `response` and `verdicts`, judge -> verdict.

    Raises:
        ValueError: nothing is there, a file is torn or isn't what was written, a line holds no answer; one line.
    """
    file = _answers_file(path)
    if file.name.startswith("responses-") and integrity.damage(file):
        raise ValueError(f"{file}: is not what was written; run its tasft evaluate again, which makes it anew.")
    rows = [_answer(line, f"{file}, line {n}") for n, line in enumerate(_lines(file), start=1)]
    if not rows:
        raise ValueError(f"{file}: holds no answer; run its tasft evaluate again, or leave it out.")
    manifest = file.parent / "manifest.json"
    if file.name.startswith("responses-") and manifest.exists():
        for judge in _judges(manifest):
            for row, verdict in zip(rows, _verdicts(judge, rows, file.parent / "judgements"), strict=True):
                row["verdicts"][judge["name"]] = verdict
    return rows


def of_table(judged: Any) -> list[dict[str, Any]]:
    """The same rows from a table of one arm's answers, once per judge, as `answers.judge_answers` makes it."""
    parts = dict(iter(judged.groupby("judge", sort=False)))
    rows = next(iter(parts.values()))[["benchmark", "kind", "prompt", "response"]].to_dict("records")
    verdicts = {judge: part["verdict"].tolist() for judge, part in parts.items()}
    return [row | {"verdicts": {judge: said[i] for judge, said in verdicts.items()}} for i, row in enumerate(rows)]


def side_by_side(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Answers of `results` (name -> rows of `read_results`) prompt by prompt, in the order of the first.

    Returns:
        `names`; `judges`, all there are; `rows`, each with `benchmark`, `kind`, `prompt` and `answers`: for each name
        {`response`, `verdicts`}, or None where that one was not asked.

    Raises:
        ValueError: two results have no prompt in common.
    """
    joined: dict[tuple, dict[str, Any]] = {}
    for place, (name, rows) in enumerate(results.items()):
        repeats: Counter = Counter()
        before = len(joined)
        for row in rows:
            key = (row["benchmark"], row["prompt"])
            repeats[key] += 1  # a prompt that stands there twice is answered twice
            there = joined.setdefault(
                (*key, repeats[key]),
                {n: row[n] for n in ("benchmark", "kind", "prompt")} | {"answers": [None] * len(results)},
            )
            there["answers"][place] = {"response": row["response"], "verdicts": row["verdicts"]}
        if place and len(joined) == before + len(rows):
            raise ValueError(
                f"{name}: answers none of the prompts of {', '.join(list(results)[:place])}; "
                "give results on the same benchmarks."
            )
    answers = [answer for row in joined.values() for answer in row["answers"] if answer]
    judges = list(dict.fromkeys(judge for answer in answers for judge in answer["verdicts"]))
    return {"names": list(results), "judges": judges, "rows": list(joined.values())}


def coverage(table: dict[str, Any]) -> dict[str, int]:
    """Name -> prompts of `side_by_side` that it alone answers."""
    alone = [[i for i, answer in enumerate(row["answers"]) if answer] for row in table["rows"]]
    counts = Counter(places[0] for places in alone if len(places) == 1)
    return {name: counts[i] for i, name in enumerate(table["names"])}


def _answers_file(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give the folder of a tasft evaluate.")
    if path.is_file():
        return path
    found = sorted(path.glob("responses-*.jsonl"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path}: holds {len(found)} files of answers; name one of them, {found[0].name} or another.")
    if list(path.glob("partial-*.jsonl")) or (path / "served.jsonl").exists():
        raise ValueError(f"{path}: its tasft evaluate has not ended; run the same command again.")
    raise ValueError(f"{path}: holds no answers (responses-*.jsonl); give the folder of a tasft evaluate.")


def _lines(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines[:-1] if not lines[-1].strip() else lines


def _answer(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON, so it is torn; run its tasft evaluate again.") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(n), str) for n in ("prompt", "response")):
        raise ValueError(f"{place}: no answer; give lines with the texts prompt and response.")
    verdict = record.get("verdict")
    if verdict not in (None, *base.VERDICTS):
        raise ValueError(f"{place}: its verdict is none of {', '.join(base.VERDICTS)}; correct it.")
    attack = record.get("attack") or "none"
    benchmark = str(record.get("benchmark") or "prompts") + (f" ({attack})" if attack != "none" else "")
    row = {"benchmark": benchmark, "kind": str(record.get("kind") or "toxic")}
    row |= {"prompt": record["prompt"], "response": record["response"]}
    return row | {"verdicts": {"file": verdict} if verdict else {}}


def _judges(manifest: Path) -> list[dict[str, str]]:
    judges = files.read_object(manifest).get("judges")
    if not isinstance(judges, list) or not all(isinstance(j, dict) and {"name", "revision"} <= set(j) for j in judges):
        raise ValueError(f"{manifest}: names no judges, so it is damaged; run its tasft evaluate again.")
    return judges


def _verdicts(judge: dict[str, str], rows: list[dict[str, Any]], cache: Path) -> list[str]:
    """What the judge said of each answer; "unscored" where it said nothing, which is not kept."""
    parts = [split_thinking(row["response"]) for row in rows]
    prompts, answers = [row["prompt"] for row in rows], [answer for _, answer, _ in parts]
    if judge.get("errors") == "exact":
        said = load.load_judge(judge["name"]).judge(prompts, answers)
    else:
        said = base.cached_judgements(
            judge["name"], judge["revision"], prompts, answers, cache / f"{judge['name']}.jsonl"
        )
    ended = [has_ended for _, _, has_ended in parts]
    return [(one or base.UNSCORED).verdict if on else "degenerate" for one, on in zip(said, ended, strict=True)]
