"""Every engine leaves the same files, by hand: `python tests/engines_agree.py FOLDER [ENGINE ...]` (default: all four).

The arms of smoke notebooks are run by `processes`, then by each engine in a folder of its own. `slurm` is a cluster of
one node (see `slurm_cluster`) that has a bad night: while jobs run, one is cancelled, slurmd and slurmctld are ended
and started again, and the node dies with all that runs on it; where the command fails it is run again, until it comes
to an end. Every CSV, PNG, answer and weight must then be that of `processes`, byte by byte, no finished arm trained
again, and no process left. Exit code 1 and a line for each that is not so.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import slurm_cluster
import soak

NOTEBOOKS = ("build_unsafe_set", "safety", "stl_comparison")
STARTS = 8  # of the command, at most


def jobs(folder: Path) -> list[psutil.Process]:
    """The processes of the folder that Slurm started."""
    there = []
    for process in soak.processes(folder):
        with suppress(psutil.Error):
            if "SLURM_JOB_ID" in process.environ():
                there.append(process)
    return there


def cancel(folder: Path, conf: Path) -> None:
    """Slurm ends a running job."""
    subprocess.run(["scancel", jobs(folder)[0].environ()["SLURM_JOB_ID"]], check=True)


def restart_slurmd(folder: Path, conf: Path) -> None:
    slurm_cluster.end(conf.with_name("slurmd.pid"))
    slurm_cluster.start("slurmd", conf)


def restart_slurmctld(folder: Path, conf: Path) -> None:
    slurm_cluster.end(conf.with_name("slurmctld.pid"))
    slurm_cluster.start("slurmctld", conf)


def node_dies(folder: Path, conf: Path) -> None:
    """SIGKILL for the node's daemon, for who watches its jobs, and for these; then the node is back."""
    running = jobs(folder)
    watching = {parent for job in running for parent in job.parents() if parent.name() == "slurmstepd"}
    for process in (psutil.Process(int(conf.with_name("slurmd.pid").read_text())), *watching, *running):
        with suppress(psutil.Error):
            process.kill()
    time.sleep(30)  # of a job that was seen within the last twenty seconds Slurm does not ask whether it is gone
    slurm_cluster.start("slurmd", conf)


def run(engine: str, folder: Path, conf: Path | None) -> list[str]:
    """Run the command until it comes to an end; what is not as it must be, a line each."""
    faults: list[Callable] = [cancel, restart_slurmd, restart_slurmctld, node_dies] if conf else []
    command = ["reproduce", "--profile", "smoke", "--notebooks", *NOTEBOOKS, "--engine", engine]
    wrong, arms, starts, started = [], {}, 0, time.time()
    for _ in range(STARTS):
        starts, driver = starts + 1, soak.start(command, folder)
        while driver.poll() is None:
            time.sleep(1)
            if faults and jobs(folder):
                time.sleep(8)  # it is at work
                with suppress(IndexError, psutil.Error):  # over by now: the next one then
                    faults[0](folder, conf)
                    print(f"{engine}, {time.time() - started:.0f} s: {faults.pop(0).__name__}", flush=True)
            now = soak.finished(folder)
            wrong += [f"{engine}: {arm} was trained again" for arm in arms if now.get(arm) != arms[arm]]
            arms |= now
        if driver.returncode == 0:
            break
        print(f"{engine}, {time.time() - started:.0f} s: ends with {driver.returncode}", flush=True)
        if not conf:
            return [f"{engine}: fails, see {folder / 'log'}"]
    else:
        wrong.append(f"{engine}: fails {STARTS} times, see {folder / 'log'}")
    if left := soak.wait_for_none(folder):
        wrong.append(f"{engine}: {len(left)} processes are left")
    wrong += [f"{engine}: there was no time for {fault.__name__}" for fault in faults]
    print(f"{engine}: {time.time() - started:.0f} s, {len(arms)} arms, started {starts} times", flush=True)
    return wrong


def main() -> int:
    place, engines = Path(sys.argv[1]).absolute(), sys.argv[2:] or ["local", "debug", "slurm"]
    wrong = run("processes", place / "processes", None)
    expected = soak.contents(place / "processes")
    for engine in engines:
        folder = place / engine
        cluster = slurm_cluster.cluster(place / "cluster") if engine == "slurm" else nullcontext()
        with cluster as conf:
            wrong += run(engine, folder, conf)
        there = soak.contents(folder)
        names = sorted(expected.keys() | there.keys())
        different = [name for name in names if expected.get(name) != there.get(name)]
        wrong += [f"{engine}: {name} is {'another' if name in there else 'missing'}" for name in different]
        print(f"{engine}: {len(there)} files, {len(different)} differ", flush=True)
    print("\n".join(wrong) or "all agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
