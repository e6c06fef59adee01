"""Tasks for lm-evaluation-harness from local files in LLM-Adapters' form: an instruction that lists its answers."""

import json
import re
from pathlib import Path

import yaml

from .data import read_rows
from .provenance import write_text

_FORMAT = re.compile(r"\n\nAnswer format: (\S+)\s*\Z")


def write_tasks(files: list[Path], folder: Path, *, limit: int | None = None) -> list[str]:
    """A task YAML per file in `folder` (an `include_path`), with its questions; returns the tasks' names.

    Each file has `instruction`, ending in "Answer format: true/false" or the like, and `answer`, one of those. A model
    is right where the right one of "the correct answer is true", "... is false" is the likelier. A task is called after
    the file's folder, "boolq_local"; it is not the published task, and published scores can't be compared with its own.

    Args:
        limit: only the first so many questions of each.

    Raises `ValueError` for a file of another form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for file in files:
        name = f"{file.parent.name}_local"
        questions = folder / f"{name}.jsonl"
        rows = [_question(row, file, number) for number, row in enumerate(read_rows(file), start=1)]
        write_text(questions, "".join(json.dumps(row) + "\n" for row in rows[:limit]))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        write_text(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
        names.append(name)
    return names


def _question(row: dict, file: Path, number: int) -> dict:
    listed = _FORMAT.search(row.get("instruction") or "")
    answers = listed[1].split("/") if listed else []
    if row.get("answer") not in answers:
        raise ValueError(f"{file}: row {number}: needs an instruction that ends in 'Answer format: a/b' and its answer")
    question = f"{row['instruction']}\n\n"
    return {
        "question": question,
        "choices": [f"the correct answer is {answer}" for answer in answers],
        "answer": answers.index(row["answer"]),
    }
