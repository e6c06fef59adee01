"""Where units of work run: in processes of this machine, or as jobs that submitit starts here or on a Slurm cluster.

    runs/jobs/<spec>.<unit>.json    the job that a unit was submitted as: a second driver waits for it, too
    runs/jobs/<unit>.pkl            the function, and what it is given besides the spec; once for all jobs
    runs/jobs/<job>_*               submitit's: call, log and result

A unit is a function and one spec. It leaves files that are found ever after, so it may be begun anew anywhere, and two
at once wait for each other. `TASFT_ENGINE` names the engine, `TASFT_ENGINE_OPTIONS` a YAML file for submitit.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from ..models import quiet
from ..storage.files import KERNEL, end_with_parent, keep_freed_memory, read_object, runs_folder, whole
from ..storage.integrity import locked
from . import once

ENGINES = ("processes", "local", "debug", "slurm")
AGAIN = "run the same command again: it goes on from its last checkpoint"
ARRAY = 1000  # jobs; Slurm takes 1001 in an array where nobody has set MaxArraySize
SHARED = "TASFT_SHARED"  # set for a notebook that another one runs beside
ASKED_EVERY = {"local": 1.0, "slurm": 15.0}  # seconds after which it is asked again which jobs live


def name() -> str:
    """The engine of `$TASFT_ENGINE`, by default "processes"; `ValueError` for one that is not in `ENGINES`."""
    engine = os.environ.get("TASFT_ENGINE") or "processes"
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not known; choose one of {', '.join(ENGINES)}.")
    return engine


def check() -> None:
    """Raise what would stop the first unit that is submitted, before anything is begun."""
    if submits():
        _executor(name(), runs_folder().absolute() / "jobs")


def submits() -> bool:
    """Whether units become jobs. Within a job they do not."""
    return name() in ("local", "slurm") and "SUBMITIT_EXECUTOR" not in os.environ


def default_workers() -> int:
    """How many units run at once on this machine: `$TASFT_WORKERS`, else one per GPU or else per core."""
    there = torch.accelerator.device_count() if torch.accelerator.is_available() else os.cpu_count()
    return int(os.environ.get("TASFT_WORKERS") or there or 1)


def is_alone() -> bool:
    """Whether this process has the machine for itself, as far as this run goes: it is neither a worker nor a job."""
    is_worker = multiprocessing.current_process().name not in ("MainProcess", KERNEL)
    return not (is_worker or "SUBMITIT_EXECUTOR" in os.environ or os.environ.get(SHARED))


def results(work: Callable[[Any], Any], specs: list, workers: int) -> Iterator[tuple[int, Any]]:
    """(i, what `work` makes of `specs[i]`, or the exception), as they are finished.

    Specs have a `name`. At most `workers` run at once on this machine; on a cluster as many as it lets. A unit that
    fails, or whose worker is lost, does not stop the others.
    """
    if submits():
        yield from _jobs(work, specs, workers)
    elif name() == "debug":
        yield from ((i, work(spec)) for i, spec in enumerate(specs))
    elif workers == 1:
        yield from ((i, attempt(work, spec)) for i, spec in enumerate(specs))
    else:
        yield from _processes(work, specs, workers)


def call(work: Callable[[Any], Any], spec: Any) -> Any:
    """What `work` makes of one spec; raises what it raises."""
    ((_, result),) = results(work, [spec], 1)
    if isinstance(result, BaseException):
        raise result
    return result


def attempt(work: Callable[[Any], Any], spec: Any) -> Any:
    """What `work` makes of the spec, or the exception."""
    try:
        return work(spec)
    except Exception as error:
        return error


def _processes(work: Callable[[Any], Any], specs: list, workers: int) -> Iterator[tuple[int, Any]]:
    """Each worker is a pool of its own, so that a lost one takes nobody's unit but its own with it."""
    # Small models gain nothing from a second thread, arms do.
    keep_freed_memory()
    # Workers are forked from a process that has only imported the libraries, which takes seconds, and does so once;
    # Windows has no fork, and a GPU that was looked at survives none.
    gpus = _gpus()
    forks = "forkserver" in multiprocessing.get_all_start_methods() and not gpus
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["tasft_lib.experiments.answers"])
    own, pools, numbers, starts = threading.local(), [], queue.SimpleQueue(), threading.Lock()
    for number in range(workers):
        numbers.put(number)

    def start() -> None:
        own.number, own.pool = numbers.get(), None

    def attempt(spec: Any) -> Any:
        if own.pool is None:
            with starts, environment({"CUDA_VISIBLE_DEVICES": gpus[own.number % len(gpus)]} if gpus else {}):
                own.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker)
                own.pool.submit(int)  # starts the process
            pools.append(own.pool)
        before = _killed_for_memory()
        try:
            return own.pool.submit(work, spec).result()
        except BrokenProcessPool:
            own.pool = None
            cause = ", for memory ran out: set TASFT_WORKERS lower" if _killed_for_memory() > before else ""
            return ChildProcessError(f"its worker was killed{cause}; {AGAIN}")
        except Exception as error:
            return error

    threads = ThreadPoolExecutor(workers, initializer=start)
    try:
        futures = {threads.submit(attempt, spec): i for i, spec in enumerate(specs)}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        threads.shutdown(cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def _gpus() -> list[str]:
    """The GPUs of CUDA that this process may use, one for each worker in turn."""
    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """With these variables, for a process that is started now."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _start_worker() -> None:
    end_with_parent()
    quiet()
    once.begin()
    gc.freeze()  # letting a model go then searches what was made since, not the million objects of the libraries


def _killed_for_memory() -> int:
    """How many processes of this machine, or container, the kernel has killed for memory so far."""
    count = 0
    for file in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError):
            count += sum(map(int, re.findall(r"^oom_kill (\d+)", Path(file).read_text(), re.MULTILINE)))
    return count


@dataclass(frozen=True)
class _Unit:
    """What a job calls."""

    work: Path
    spec: Any

    def __call__(self) -> Any:
        if "SLURM_ARRAY_JOB_ID" in os.environ:  # jobs of an array are named alike
            rename = ["scontrol", "update", f"JobId={os.environ['SLURM_JOB_ID']}", f"JobName={self.spec.name}"]
            subprocess.run(rename, check=False, capture_output=True)
        quiet()
        return pickle.loads(self.work.read_bytes())(self.spec)

    def checkpoint(self) -> Any:
        """What submitit submits again before a time limit; see `arms.train` for what is saved."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _jobs(work: Callable[[Any], Any], specs: list, workers: int) -> Iterator[tuple[int, Any]]:
    """Submit what no job does yet and wait for all, by the files that jobs leave: not every cluster keeps accounts."""
    engine, folder = name(), runs_folder().absolute() / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    executor = _executor(engine, folder)
    pickled = pickle.dumps(work)
    stored = folder / f"{hashlib.sha256(pickled).hexdigest()[:12]}.pkl"
    if not stored.exists():
        with whole(stored) as temporary:
            temporary.write_bytes(pickled)
    waiting, running, missed = list(range(len(specs))), {}, set()
    asked, pause = time.monotonic(), 0.2
    while waiting or running:
        while waiting and (n := ARRAY if engine == "slurm" else workers - len(running)):
            batch, waiting = waiting[:n], waiting[n:]
            jobs = _submit(executor, engine, folder, stored, [specs[i] for i in batch])
            running |= dict(zip(batch, jobs, strict=True))
        ended = {name for name in os.listdir(folder) if name.endswith("_result.pkl")}
        done = [i for i, job in running.items() if _result_file(job) in ended]
        for i in done:
            yield i, _outcome(folder, running.pop(i))
        if running and time.monotonic() - asked > ASKED_EVERY[engine]:
            lost = _lost(engine, running)
            for i in lost & missed:  # twice: what a job wrote last may be seen late on a shared disk
                job = running.pop(i)
                yield i, _outcome(folder, job) if (folder / _result_file(job)).exists() else _why_lost(engine, job)
            missed, asked = lost, time.monotonic()
        pause = 0.2 if done else min(1.3 * pause, 10 if engine == "slurm" else 1)
        if running:
            time.sleep(pause)


def _executor(engine: str, folder: Path) -> Any:
    import submitit

    options = {"timeout_min": 1_440 if engine == "slurm" else 525_600}  # submitit's own is five minutes
    file = os.environ.get("TASFT_ENGINE_OPTIONS")
    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else {}
        executor = submitit.AutoExecutor(folder, cluster=engine)
        executor.update_parameters(**options | (given or {}))
    except RuntimeError as error:
        raise ValueError(f"engine slurm: {error} Run it where sbatch is, or take --engine processes.") from error
    except (NameError, AssertionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: submitit takes no such options: {error}") from error
    return executor


def _submit(executor: Any, engine: str, folder: Path, stored: Path, specs: list) -> list[str]:
    """The job of each spec, submitted unless one lives. One driver does so at a time."""
    files = [folder / f"{spec.name}.{stored.stem}.json" for spec in specs]
    with locked(folder / "lock", folder):
        jobs = {i: _recorded(file, engine) for i, file in enumerate(files)}
        jobs = {i: job for i, job in jobs.items() if job and not (folder / _result_file(job)).exists()}
        for i in _lost(engine, jobs):
            del jobs[i]
        if new := [i for i in range(len(specs)) if i not in jobs]:
            executor.update_parameters(name=specs[new[0]].name if len(new) == 1 else "tasft")
            with executor.batch():
                submitted = [executor.submit(_Unit(stored, specs[i])) for i in new]
            for i, job in zip(new, submitted, strict=True):
                jobs[i] = job.job_id
                record = {"engine": engine, "job": job.job_id, "log": str(job.paths.stderr)}
                # Not by `whole`, which lists the folder: of a torn record the unit is submitted again, and waits.
                files[i].write_text(json.dumps(record), encoding="utf-8")
    return [jobs[i] for i in range(len(specs))]


def _recorded(file: Path, engine: str) -> str | None:
    try:
        record = read_object(file)
    except (OSError, ValueError):
        return None
    return record.get("job") if record.get("engine") == engine else None


def _result_file(job: str) -> str:
    return f"{job}_0_result.pkl"


def _lost(engine: str, jobs: dict[int, str]) -> set[int]:
    """Which of the jobs neither wait nor run; none where the cluster does not answer."""
    if not jobs:
        return set()
    if engine == "local":
        return {i for i, job in jobs.items() if not _lives(int(job))}
    try:
        listed = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return set()
    there = set(listed.stdout.split())
    return {i for i, job in jobs.items() if job not in there}


def _lives(pid: int) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and any("submitit" in word for word in process.cmdline())
    return False


def _outcome(folder: Path, job: str) -> Any:
    state, value = pickle.loads((folder / _result_file(job)).read_bytes())
    if state == "success":
        return value
    said = value.strip().splitlines()[-1]
    return ValueError(f"{said} (log: {folder / f'{job}_0_log.err'})")


def _why_lost(engine: str, job: str) -> ChildProcessError:
    """What Slurm remembers of a job for some minutes; out of memory has a remedy of its own."""
    state = ""
    if engine == "slurm":
        with suppress(OSError):
            shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
            state = next(iter(re.findall(r"JobState=(\w+)", shown)), "")
    more = "give it more memory (mem_gb in the engine's options) and " if state == "OUT_OF_MEMORY" else ""
    ended = f" ({state})" if state else ""
    return ChildProcessError(f"its job {job} was lost{ended}; {more}{AGAIN}; log: {job}_0_log.err in runs/jobs")
