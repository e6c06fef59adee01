"""Run the notebooks of a profile by papermill, two at a time on a CPU, and make the report of what they found."""

import logging
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import papermill

from ..storage import files, integrity
from ..storage.files import keep_freed_memory, project_root, runs_folder
from . import engine, kernels, results, settings

# It warns of each parameter that stands in no cell; `settings` knows the shared ones and refuses unknown ones.
logging.getLogger("papermill").setLevel(logging.ERROR)

FIRST = "build_unsafe_set"  # what it makes, all others start from, so it runs alone
# The longest one goes next: it scores rows in one process, while the notebook beside it has work for the other core.
LONGEST = "harmful_data_filter"
TIMED = ("performance", "performance_filter")  # nothing may run beside them


@dataclass(frozen=True)
class Job:
    """A notebook, what papermill sets in it, and where the executed copy goes."""

    name: str
    source: Path
    parameters: dict[str, Any]
    output: Path


def jobs_of(profile: str, notebooks: list[str] | None = None, overrides: dict[str, Any] | None = None) -> list[Job]:
    """Notebooks (see `files.notebooks`) with their `params/<profile>/<name>.yaml`, all checked; default: all it has.

    `overrides` apply to every notebook that declares them. Raises `ValueError` for an unknown profile, notebook or
    parameter.
    """
    overrides, there = overrides or {}, settings.profiles()
    if profile not in there:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(there)}.")
    jobs = []
    for name in notebooks or there[profile]:
        if name not in there[profile]:
            raise ValueError(f"profile {profile} has no notebook {name!r}; it has {', '.join(there[profile])}.")
        kinds = settings.used(name)
        given = {key: settings.coerce(key, value, kinds[key]) for key, value in overrides.items() if key in kinds}
        settings.load(name, profile, given)
        source, output = files.notebooks()[name], runs_folder() / profile / f"{name}.ipynb"
        jobs.append(Job(name, source, {"profile": profile} | given, output))
    if unused := set(overrides) - {key for job in jobs for key in job.parameters}:
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
    engine.check()
    with integrity.folder_lock(runs_folder() / profile):
        return _reproduce(profile, jobs, prepare_only=prepare_only)


def _reproduce(profile: str, jobs: list[Job], *, prepare_only: bool) -> list[Path]:
    keep_freed_memory()
    # Two threads that wait for each other by turning round and round cost twice the CPU time where others want it, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if prepare_only:
        for job in jobs:
            execute(job, prepare_only=True)
        return [job.output for job in jobs]

    import torch

    from ..reporting import report

    kernels.fork_kernels()
    started, failures = time.time(), []
    first = [job for job in jobs if job.name == FIRST]
    others = sorted((job for job in jobs if job.name not in (FIRST, *TIMED)), key=lambda job: job.name != LONGEST)
    for batch in (first, others, *([job] for job in jobs if job.name in TIMED)):
        # A second notebook loads its libraries while the first one trains.
        at_once = 1 if torch.accelerator.is_available() else min(2, os.cpu_count() or 1)
        if engine.name() == "slurm":
            at_once = max(1, len(batch))  # they only wait for jobs
        shared = {engine.SHARED: "1"} if len(batch) > 1 else {}
        with engine.environment(shared), ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(execute, job): job for job in batch}
            for future in as_completed(running):
                job, error = running[future], future.exception()
                failures += [error] if error else []
                done = f"{'FAILED' if error else 'done'} after {time.time() - started:.0f} s"
                print(f"{job.source.relative_to(project_root())} ({profile}): {done} -> {job.output}", flush=True)
        if failures:
            raise failures[0]
    print(report.build(profile, results.folder_of(profile)))
    return [job.output for job in jobs]


def execute(job: Job, *, prepare_only: bool = False) -> None:
    """Run one notebook, with what an earlier run of it left out of the way, unless that is what it reads.

    `ValueError`, one line, names the cell that failed.
    """
    if not prepare_only:
        results.publish()
        if job.name not in settings.STORED:
            results.remove(job.output.parent.name, job.name)
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


# Tokens of a training row: Alpaca's 58 words in its template; a mini-world exchange.
TOKENS_PER_ROW = {"alpaca": 140, "chat": 140, "short": 40, "none": 40}
# An 80 GB data-centre GPU: bfloat16 FLOP/s reached in LoRA training, and tokens a second of batched decoding of 1B.
TRAINING_FLOPS, DECODED_TOKENS = 1.2e14, 8000
# One core of a CPU in float32 (measured on AVX2, 135M): FLOP/s in LoRA training, tokens a second of batched decoding.
CORE_FLOPS, CORE_DECODED_TOKENS = 5e10, 80


RULES = {
    "GPU": f"8 FLOP a parameter and token trained on, at {TRAINING_FLOPS:g} a second; 800 answers a decoding, of "
    f"max_new_tokens each, at {DECODED_TOKENS} tokens a second from a model of 1B",
    "core": f"4 FLOP a parameter and token trained on, at {CORE_FLOPS:g} a second; 800 answers a decoding, of "
    f"max_new_tokens each, at {CORE_DECODED_TOKENS} tokens a second",
}


def plan(profile: str, notebooks: list[str] | None = None, overrides: dict | None = None) -> pd.DataFrame:
    """A row per arm that is trained, in the order of the notebooks, each arm once.

    Columns: notebook (the first that needs it), arm, n_unsafe, penalty_weight, seed, penalty settings, steps, tokens
    (trained on, estimated), gpu_gb and hours (training and answering; rough estimates for one 80 GB GPU) and disk_gb
    (checkpoints); the last three nan in the mini-world.
    """
    rows, seen, jobs = [], set(), jobs_of(profile, notebooks, overrides)
    for job in jobs:
        for spec, config in arms_of(job):
            if spec.name not in seen:
                seen.add(spec.name)
                rows.append({"notebook": job.name} | _row(spec, config))
    if not rows:
        raise ValueError(f"{', '.join(job.name for job in jobs)}: no arms to list, for these notebooks train none.")
    return pd.DataFrame(rows)


def arms_of(job: Job) -> list[tuple]:
    """(`ArmSpec`, parameters) by arm of a notebook, from its function in `designs`; none where it trains nothing."""
    from . import designs

    if not hasattr(designs, job.name):
        return []
    config = settings.load(job.name, given=job.parameters)
    return [(arm, config) for arm in getattr(designs, job.name)(designs.study_of(config))]


def _row(spec, config) -> dict:
    training = spec.training
    extra = spec.n_extra or (5 * (spec.n_unsafe or 0) if spec.extra else 0)
    n_rows = spec.n_benign + (spec.n_unsafe or 0) * spec.unsafe_visits + extra * spec.extra_visits
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    if per_step := training.get("unsafe_per_batch", 0):
        n_rows = spec.n_benign + per_step * -(-spec.n_benign // (batch - per_step))
    steps = -(-n_rows // batch) * training["num_train_epochs"]
    tokens = n_rows * training["num_train_epochs"] * TOKENS_PER_ROW[spec.template]
    stated = [name for name in training if name.startswith(("penalty_", "unsafe_per_batch", "branch_"))]
    settings = [f"{name.removeprefix('penalty_')} {training[name]}" for name in stated]
    if (rank := spec.lora.get("r")) not in (None, config.lora_r):
        settings.append(f"lora_r {rank}")
    if Path(spec.benign).is_relative_to(runs_folder()):  # made by a filter
        settings.append(f"rows {Path(spec.benign).parent.name}")
    row = {
        "arm": spec.display_name or spec.method,
        "n_unsafe": spec.n_unsafe or spec.n_extra or 0,
        "penalty_weight": "" if spec.method == "sft" else spec.penalty_weight,
        "seed": spec.seed,
        "settings": ", ".join(settings),
        "steps": int(steps),
        "tokens": int(tokens),
    }
    sets = len(getattr(config, "decodings", ("greedy", "sampled")))
    gpu_gb, hours = _cost(spec, tokens, sets * 800 * config.max_new_tokens)
    return row | {"gpu_gb": gpu_gb, "hours": hours, "disk_gb": _disk(spec, steps)}


def _disk(spec, steps: int) -> float:
    """GB of the arm's checkpoints: weights that are trained and Adam's two moments, in float32."""
    billions = _billions(spec)
    # Layers times width are 131,072 in Llama-7B, and grow as both do.
    adapter = 2 * spec.lora.get("r", 0) * len(spec.lora.get("target_modules", ())) * 131_072 * (billions / 7) ** (2 / 3)
    trained = adapter if spec.lora else billions * 1e9
    return round(12 * trained * -(-steps // spec.training["save_steps"]) / 1e9, 2)


def _billions(spec) -> float:
    """Parameters by the base model's name (Llama-7B, SmolLM2-135M); nan where it tells none."""
    size = re.search(r"(\d+(?:\.\d+)?)([bm])\b", Path(spec.model).name.lower())
    return float("nan") if size is None else float(size[1]) / (1 if size[2] == "b" else 1000)


def _cost(spec, trained: float, answered: float) -> tuple[float, float]:
    """GB of GPU memory and hours of an arm that is trained on so many tokens and answers with so many; see `plan`."""
    billions = _billions(spec)
    if not billions >= 0.5:  # a CPU trains it, or nobody knows its size
        # Forward and backward; LoRA has no gradients of weights.
        seconds = 4 * billions * 1e9 * trained / CORE_FLOPS + answered / CORE_DECODED_TOKENS
        return float("nan"), round(seconds / 3600, 2)
    # Weights, LoRA's states and activations with checkpointing; the loss head needs no logits.
    batch = spec.training["per_device_train_batch_size"]
    gpu_gb = billions * (0.7 if spec.load_in_4bit else 2.1) + 2 + 0.1 * batch * billions**0.5
    # Forward, recomputed forward and backward.
    hours = (8 * billions * 1e9 * trained / TRAINING_FLOPS + answered * billions / DECODED_TOKENS) / 3600
    return round(gpu_gb), round(hours, 2)
