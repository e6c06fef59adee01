"""How far the arms of a runs folder are, from files alone: no scheduler is asked, so it works from any host."""

import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..storage.files import read_object, read_records

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("arm", "state", "step", "host", "started", "left", "log")


def status(runs: Path) -> list[dict[str, str]]:
    """A row per arm, and per unit that was submitted as a job and is no arm, in the order of their names.

    `state` is trained, answered, running, stopped (its process is gone; only known on its own host), failed or waiting;
    `step` of how many, where it is stopped the newest checkpoint's; `left` an estimate; `log` a job's log, or why the
    arm failed.
    """
    folder, jobs, ended = runs / "arms", {}, set()
    if (runs / "jobs").is_dir():
        names = os.listdir(runs / "jobs")
        ended = {name for name in names if name.endswith("_result.pkl")}
        for name in names:
            if name.endswith(".json"):
                jobs[name.partition(".")[0]] = _read(runs / "jobs" / name)
    arms = _arms(runs)
    rows = [_arm(folder / name, jobs.get(name, {})) for name in arms]
    for name in sorted(set(jobs) - set(arms)):
        is_done = f"{jobs[name].get('job')}_0_result.pkl" in ended
        rows.append(_row(arm=name, state="ended" if is_done else "waiting", log=jobs[name].get("log", "")))
    return rows


def rates(runs: Path) -> "pd.DataFrame":
    """The rates of every arm that was judged, see `rates.of_counts`: a row per set of prompts and decoding (`answers`,
    the folder of the answers), step, kind of prompt and judge. No answer is read, so thousands of arms take seconds.
    """
    import pandas as pd

    from ..evaluation.rates import of_counts
    from ..judges.base import VERDICTS

    rows = []
    for name in _arms(runs):
        counted = list(read_records(runs / "arms" / name / "counts.jsonl"))
        spec = _read(runs / "arms" / name / "spec.json") if counted else {}
        of = {"arm": name} | {key: spec.get(key) for key in ("method", "n_unsafe", "n_extra", "penalty_weight", "seed")}
        rows += [of | record for record in counted]
    return of_counts(pd.DataFrame(rows, columns=None if rows else [*VERDICTS, "score"]))


def as_text(rows: list[dict[str, str]]) -> str:
    """The rows as a table, then how many arms are in which state."""
    if not rows:
        return "no arms here yet; tasft reproduce makes them."
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS]
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    table = ["  ".join(row[name].ljust(width) for name, width in zip(COLUMNS, widths, strict=True)) for row in lines]
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return "\n".join([*(line.rstrip() for line in table), counts])


def _arms(runs: Path) -> list[str]:
    """Neither what was set aside nor the answers of a base model."""
    folder = runs / "arms"
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()] if folder.is_dir() else []
    return sorted(name for name in names if "." not in name and not name.startswith("base-"))


def _arm(folder: Path, job: dict[str, Any]) -> dict[str, str]:
    log = str(job.get("log", ""))
    there = set(os.listdir(folder))
    if "failed.json" in there:
        return _row(arm=folder.name, state="failed", log=str(_read(folder / "failed.json").get("error", "")))
    if "manifest.json" in there:
        return _row(arm=folder.name, state="answered" if "responses" in there else "trained", log=log)
    running = _read(folder / "running.json")
    if not running:
        return _row(arm=folder.name, state="waiting", log=log)
    is_here = running.get("host") == socket.gethostname()
    state = "stopped" if is_here and not psutil.pid_exists(running["pid"]) else "running"
    if state == "running" and "step" in running:
        step, left = running["step"], _left(running)
    else:  # stopped, or by a version that did not tell the step
        step, left = _newest(folder / "trainer"), ""
    started = datetime.fromtimestamp(running["started"]).strftime("%d %b %H:%M")
    step = f"{step} of {running['steps']}"
    return _row(arm=folder.name, state=state, step=step, host=running["host"], started=started, left=left, log=log)


def _newest(trainer: Path) -> int:
    """The step of the newest checkpoint, from which the training will go on."""
    steps = [int(name[11:]) for name in os.listdir(trainer) if name[11:].isdecimal()] if trainer.is_dir() else []
    return max(steps, default=0)


def _left(running: dict[str, Any]) -> str:
    """The time left at the speed so far."""
    done = running["step"] - running["from_step"]
    if done <= 0:
        return ""
    seconds = (running["steps"] - running["step"]) * (running["at"] - running["started"]) / done
    return f"{max(seconds - (time.time() - running['at']), 0) / 60:.0f} min"


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def _row(**values: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | values
