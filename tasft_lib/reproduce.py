"""Run the notebooks of a profile by papermill, two at a time on a CPU, and make the report of what they found."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
import torch

from .machine import keep_freed_memory, project_root, runs_folder
from .parameters import check_file, coerce, declared_in

# The order of running and of reporting. What the first makes, all others start from, so it runs alone.
ORDER = (
    "build_unsafe_set",
    "safety",
    "data_efficiency",
    "stl_comparison",
    "over_alignment",
    "contrastive_augmentation",
    "response_quality",
    "jailbreak",
    "harmful_data_filter",
    "emd_bound",
    "penalty_weight",
    "degenerate_answers",
    "performance",
    "performance_filter",
    "your_model",
)
TIMED = ("performance", "performance_filter")  # nothing may run beside them


@dataclass(frozen=True)
class Job:
    """A notebook, its parameters, and where the executed copy goes."""

    name: str
    source: Path
    parameters: dict[str, Any]
    output: Path


def jobs_of(profile: str, notebooks: list[str] | None = None, overrides: dict[str, Any] | None = None) -> list[Job]:
    """`notebooks/<name>.ipynb` with `params/<profile>/<name>.yaml`, all checked; default: all the profile has.

    `overrides` apply to every notebook that declares them. Raises `ValueError` for an unknown profile, notebook or
    parameter.
    """
    root = project_root()
    folder = root / "params" / profile
    sources = {path.stem: path for path in (root / "notebooks").glob("*.ipynb")}
    profiles = {p.parent.name for p in (root / "params").glob("*/*.yaml") if p.stem in sources}
    if profile not in profiles:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(sorted(profiles))}.")
    available = sorted((path.stem for path in folder.glob("*.yaml") if path.stem in sources), key=ORDER.index)
    jobs = []
    for name in notebooks or available:
        if name not in available:
            raise ValueError(f"profile {profile} has no notebook {name!r}; it has {', '.join(available)}.")
        parameters, declared = check_file(folder / f"{name}.yaml", sources[name]), declared_in(sources[name])
        chosen = {key: coerce(key, value, declared[key]) for key, value in (overrides or {}).items() if key in declared}
        jobs.append(Job(name, sources[name], parameters | chosen, runs_folder() / profile / f"{name}.ipynb"))
    unused = set(overrides or {}) - {key for job in jobs for key in job.parameters}
    if unused:
        raise ValueError(f"no notebook declares {', '.join(sorted(unused))}.")
    return jobs


def reproduce(
    profile: str,
    notebooks: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    prepare_only: bool = False,
) -> list[Path]:
    """Execute the notebooks of `jobs_of`, write and print the report; returns the executed copies, in `runs/<profile>`.

    A notebook that fails does not stop the others; the first failure is raised in the end, as a `ValueError` of one
    line. With `prepare_only` the parameterised copies are written and nothing is run (for nbval).
    """
    jobs = jobs_of(profile, notebooks, overrides)
    keep_freed_memory()
    if prepare_only:
        for job in jobs:
            execute(job, prepare_only=True)
        return [job.output for job in jobs]
    started, failures = time.time(), []
    first = [job for job in jobs if job.name == ORDER[0]]
    others = [job for job in jobs if job.name not in (ORDER[0], *TIMED)]
    for batch in (first, others, *([job] for job in jobs if job.name in TIMED)):
        # A second notebook loads its libraries while the first one trains.
        at_once = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
        with ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(execute, job): job for job in batch}
            for future in as_completed(running):
                job, error = running[future], future.exception()
                failures += [error] if error else []
                done = f"{'FAILED' if error else 'done'} after {time.time() - started:.0f} s"
                print(f"{job.source.relative_to(project_root())} ({profile}): {done} -> {job.output}", flush=True)
        if failures:
            raise failures[0]
    from . import report  # which imports ORDER from here

    print(report.build(profile))
    return [job.output for job in jobs]


def execute(job: Job, *, prepare_only: bool = False) -> None:
    """Run one notebook; `ValueError`, one line, names the cell that failed."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(job.source),
            str(job.output),
            job.parameters,
            cwd=str(project_root()),
            kernel_name="python3",
            prepare_only=prepare_only,
            progress_bar=False,
            stderr_file=_Named(job.name),
        )
    except papermill.PapermillExecutionError as error:
        place = f"{job.name}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise ValueError(f"{place} (traceback in {job.output}; finished arms are kept)") from None


class _Named:
    """stderr with the notebook's name before each line, so that the bars of two notebooks can be told apart."""

    def __init__(self, name: str):
        self.name = name

    def write(self, text: str) -> None:
        shown = text.replace("\r", "\n").strip("\n")
        if shown:
            sys.stderr.write("".join(f"{self.name}: {line}\n" for line in shown.split("\n") if line.strip()))

    def flush(self) -> None:
        sys.stderr.flush()
