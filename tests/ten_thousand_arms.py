"""A driver and 100, 1,000 and 10,000 arms that take no time, by hand: `python tests/ten_thousand_arms.py [FOLDER]`.

Each arm is a folder as a training leaves it, but its weights. Timed are: naming and listing the arms, finding them
finished, reading their judged answers into a table, `tasft status`, and submitting as many jobs in arrays to an sbatch
that is a shell script. Written to figures/bench are times and memory (each size in a process of its own), and what is
asked of the disk: files an arm, and calls that look at names, by strace where it is installed.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

SIZES = (100, 1_000, 10_000)
ROOT = Path(__file__).parents[1]


def one_arm():
    """(spec, study) of a trained arm of the smoke profile; made where it is not there yet."""
    from tasft_lib.experiments import designs, settings

    study = designs.study_of(settings.load("safety", "smoke"))
    return study.arm("emd", study.config.n_unsafe), study


def measure(runs: Path, n: int) -> dict[str, float]:
    """Seconds of each thing that a driver does with `n` finished arms, and the process's peak memory in MB."""
    os.environ["TASFT_RUNS"] = str(runs)
    from tasft_lib.evaluation.rates import rates_table
    from tasft_lib.experiments import arms, engine, status
    from tasft_lib.experiments.answers import run_all

    spec, study = one_arm()
    study.answers([spec])  # the arm that all others are copies of
    source, seconds = spec.folder, {}

    def timed(name: str, work):
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 3)
        return result

    specs = [replace(spec, seed=seed) for seed in range(n)]
    timed("name", lambda: [other.name for other in specs])
    for other in specs[1:]:
        if not other.folder.exists():
            shutil.copytree(source, other.folder, copy_function=os.link)
    timed("find", lambda: [arms.has_ended(other) for other in specs])
    options = (study.prompts, [study.greedy], study.config.judge)
    timed("read", lambda: rates_table(run_all(specs, *options), by=["seed", "kind"]))
    timed("status", lambda: status.as_text(status.status(runs)))
    folder = runs / "jobs"
    folder.mkdir(exist_ok=True)
    executor = engine._executor("slurm", folder)
    stored = folder / "unit.pkl"
    tasks = [SimpleNamespace(name=other.name) for other in specs]

    def submit():
        for start in range(0, n, engine.ARRAY):
            engine._submit(executor, "slurm", folder, stored, tasks[start : start + engine.ARRAY])

    timed("submit", submit)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = sum(len(names) for _, _, names in os.walk(source))
    return {"arms": n} | seconds | {"peak_mb": round(memory), "files_an_arm": files}


def main() -> None:
    if len(sys.argv) > 2:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
        return
    from tasft_lib.storage.files import environment, write_json

    rows = []
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        programs = Path(folder) / "bin"
        programs.mkdir()
        for name, said in {"sbatch": "Submitted batch job $$", "srun": "", "squeue": "", "scontrol": ""}.items():
            (programs / name).write_text(f"#!/bin/sh\necho {said}\n")
            (programs / name).chmod(0o755)
        changed = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CI": "1", "TASFT_ENGINE": "processes"}
        for n in SIZES:
            command = [sys.executable, __file__, str(Path(folder) / "runs"), str(n)]
            done = subprocess.run(command, env=os.environ | changed, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    place = ROOT / "figures" / "bench"
    pd.DataFrame(rows).to_csv(place / "ten_thousand_arms.csv", index=False)
    manifest = {"command": "python tests/ten_thousand_arms.py", "files": ["ten_thousand_arms.csv"]}
    write_json(place / "ten_thousand_arms_manifest.json", manifest | environment())


if __name__ == "__main__":
    main()
