"""A driver and 100, 1,000 and 10,000 arms that take no time, by hand: `python tests/ten_thousand_arms.py [FOLDER]`.

Each arm is a folder as a training leaves it. Timed are: naming the arms, finding them finished and judged (`find`),
`tasft status`, their rates (`tasft status --rates`), and submitting as many jobs in arrays to an sbatch that is a shell
script; then, of up to 1,000 arms, reading all judged answers into one table, as a notebook does (`answers`). Written to
figures/bench are seconds (of all but `answers` CPU seconds too, which others who work here change less), memory before
the answers are read (each size in a process of its own), files an arm, and where strace is installed how often the disk
was asked for a name by all but `answers`, imports with it.
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


def finished(n: int):
    """(study, specs) of `n` arms of the smoke profile."""
    from tasft_lib.experiments import designs, settings

    study = designs.study_of(settings.load("safety", "smoke"))
    spec = study.arm("emd", study.config.n_unsafe)
    return study, [replace(spec, seed=seed) for seed in range(n)]


def prepare(n: int) -> None:
    """Train the first arm where it is not there, and make all others its copies."""
    study, specs = finished(n)
    study.answers(specs[:1], [study.greedy])
    for other in specs[1:]:
        if not other.folder.exists():
            shutil.copytree(specs[0].folder, other.folder, copy_function=os.link)


def measure(n: int, *, with_answers: bool) -> dict[str, float]:
    """Seconds of each thing that a driver does with `n` finished arms, and the process's peak memory in MB."""
    from tasft_lib.evaluation.rates import rates_table
    from tasft_lib.experiments import answers, engine, once, status
    from tasft_lib.storage.files import runs_folder

    (study, specs), seconds = finished(n), {}

    def timed(name: str, work):
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 3)
        return result

    began = time.process_time()
    timed("name", lambda: [spec.name for spec in specs])
    options = study.prompts, [study.greedy], study.config.judge
    with once.looked_at_once():
        assert all(timed("find", lambda: [answers._is_judged(spec, *options, "last") for spec in specs]))
    timed("status", lambda: status.as_text(status.status(runs_folder())))
    rates = timed("rates", lambda: status.rates(runs_folder()))
    assert rates["arm"].nunique() == n
    folder = runs_folder() / "jobs"
    folder.mkdir()
    executor = engine._executor("slurm", folder)
    tasks = [SimpleNamespace(name=spec.name) for spec in specs]

    def submit():
        for start in range(0, n, engine.ARRAY):
            engine._submit(executor, "slurm", folder, folder / "unit.pkl", tasks[start : start + engine.ARRAY])

    timed("submit", submit)
    cpu = time.process_time() - began
    shutil.rmtree(folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if with_answers and n <= 1_000:
        timed("answers", lambda: rates_table(answers.run_all(specs, *options), by=["seed", "kind"]))
    files = sum(len(names) for _, _, names in os.walk(specs[0].folder))
    about = {"answers_an_arm": len(study.prompts), "files_an_arm": files}
    return {"arms": n} | seconds | {"cpu": round(cpu, 3), "peak_mb": round(memory)} | about


def calls(command: list[str], file: Path, changed: dict[str, str]) -> int:
    """How often the command asks the system for a file by its name, or lists a folder."""
    strace = ["strace", "-f", "-c", "-U", "calls,name", "-e", "trace=%file,getdents64", "-o", str(file)]
    subprocess.run([*strace, *command], env=changed, check=True, stdout=subprocess.DEVNULL)
    return int(next(line.split()[0] for line in file.read_text().splitlines() if line.endswith("total")))


def main() -> None:
    if len(sys.argv) > 2:
        n = int(sys.argv[2])
        print(prepare(n) if sys.argv[1] == "prepare" else json.dumps(measure(n, with_answers=sys.argv[1] == "measure")))
        return
    from tasft_lib.storage.files import environment, write_json

    rows = []
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        programs = Path(folder) / "bin"
        programs.mkdir()
        for name, said in {"sbatch": "Submitted batch job $$", "srun": "", "squeue": "", "scontrol": ""}.items():
            (programs / name).write_text(f"#!/bin/sh\necho {said}\n")
            (programs / name).chmod(0o755)
        own = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CI": "1", "TASFT_ENGINE": "processes"}
        changed = os.environ | own | {"TASFT_RUNS": str(Path(folder) / "runs")}
        for n in SIZES:
            prepared, measured, counted = (
                [sys.executable, __file__, what, str(n)] for what in ("prepare", "measure", "count")
            )
            subprocess.run(prepared, env=changed, check=True)
            done = subprocess.run(measured, env=changed, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            if shutil.which("strace"):
                rows[-1]["calls"] = calls(counted, Path(folder) / "strace", changed)
            print(rows[-1], flush=True)
    place = ROOT / "figures" / "bench"
    pd.DataFrame(rows).to_csv(place / "ten_thousand_arms.csv", index=False)
    manifest = {"command": "python tests/ten_thousand_arms.py", "files": ["ten_thousand_arms.csv"]}
    write_json(place / "ten_thousand_arms_manifest.json", manifest | environment())


if __name__ == "__main__":
    main()
