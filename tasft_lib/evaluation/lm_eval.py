"""Capability by lm-evaluation-harness: its own tasks, or local files as tasks."""

import copy
import json
import logging
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import evaluating
from ..records.sources import read_rows
from ..storage.files import write_text
from ..storage.integrity import set_aside

# Task -> commit of the hub data set that the harness reads for it (aps/super_glue, baber/piqa, allenai/openbookqa).
TASKS = {
    "boolq": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
}


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, str | None] = TASKS,
    *,
    num_fewshot: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    cache: Path | None = None,
) -> pd.DataFrame:
    """lm-evaluation-harness on a model, PEFT adapter included; questions are put without our template.

    Args:
        tasks: name -> commit of the task's hub data set; None for a task that reads local files. The names are those
            of single tasks, since the parts of a group have data sets of their own.
        limit: only the first so many questions of each task.
        include_path: folder of your own task YAMLs.
        apply_chat_template: put questions in the tokenizer's chat template, with the switches `chat_template_kwargs`.
        cache: beginning of the name of the harness's own cache, in which each answer of the model is kept as it comes:
            a run that was killed goes on. Name it after the model. One that cannot be read is named and made again.

    Returns:
        One row per task and metric: `task`, `metric` (as the harness names it, such as "acc_norm"; with the answer
        filter in brackets where there is one), `value`, `stderr` (nan where there is none) and `n` (questions).

    Raises ValueError where `lm_eval` is missing or does not know a task, before the model is used.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is missing ({error.name}): pip install 'tasft[harness]'") from error
    if not tasks:
        raise ValueError(f"no task to evaluate on: give some, such as {', '.join(TASKS)}")
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_subtasks]:
        raise ValueError(f"lm-evaluation-harness has no single task {unknown[0]!r}: `lm_eval ls subtasks` lists them")
    options = {}
    if apply_chat_template:
        options |= {"apply_chat_template": True}
    if cache is not None:
        options |= {"use_cache": str(_readable(cache))}
    switches = {"chat_template_args": chat_template_kwargs} if chat_template_kwargs else {}
    with evaluating(model), _quiet(), tempfile.TemporaryDirectory() as folder:
        results = lm_eval.simple_evaluate(
            # The harness may give the tokenizer a pad token.
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, **switches),
            tasks=[_pinned(task, commit, manager, Path(folder)) for task, commit in tasks.items()],
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            **options,
        )
    return _tidy(results)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness warns of in each such run (a model that is loaded, a task without `num_fewshot`)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _readable(cache: Path) -> Path:
    """`cache`, after its file was taken away if it is no whole data base."""
    file = cache.with_name(f"{cache.name}_rank0.db")
    try:
        if file.exists():
            with closing(sqlite3.connect(file)) as base:
                (state,) = base.execute("PRAGMA quick_check(1)").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(state)
    except sqlite3.DatabaseError:
        set_aside(file)
    return cache


def _pinned(task: str, commit: str | None, manager, folder: Path) -> str:
    """The task, or a YAML file that says the same and which commit of its data set to read."""
    if commit is None:
        return task
    file = folder / f"{task}.yaml"
    lines = {"include": str(manager.task_index[task].yaml_path), "dataset_kwargs": {"revision": commit}}
    file.write_text(yaml.safe_dump(lines), encoding="utf-8")
    return str(file)


def _tidy(results: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for task, metrics in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{answer_filter}")
            shown = metric if answer_filter == "none" else f"{metric} ({answer_filter})"
            rows.append({"task": task, "metric": shown, "value": value, "stderr": stderr, "n": n})
    table = pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n"])
    # The harness writes "N/A" where it has no error.
    return table.assign(stderr=pd.to_numeric(table["stderr"], errors="coerce"), n=table["n"].astype("Int64"))


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
            # Not of the question, which in a chat template is a user's message, and the choice an answer.
            "target_delimiter": "\n\n ",
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
    return {
        "question": row["instruction"].rstrip(),
        "choices": [f"the correct answer is {answer}" for answer in answers],
        "answer": answers.index(row["answer"]),
    }
