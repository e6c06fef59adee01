"""A bad night, by hand: kills at random moments, then everything must be as if there had been none.

    python tests/soak.py FOLDER --kills 50                                     # the arms of two smoke notebooks
    python tests/soak.py FOLDER --kills 10 -- evaluate --model M --output_dir {out}    # any command of tasft

The command runs once undisturbed. Then it is started again and again, and SIGKILL falls on a worker, on the driver or
on all at once, until it comes to an end; then in a new folder, until there were so many kills. Each time every answer,
rate, table, weight and picture must be as undisturbed, byte by byte; an arm that was finished must not have been
trained again; no process may be left. Exit code 1 and a line for each that is not so.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPRODUCE = ["reproduce", "--profile", "smoke", "--notebooks", "build_unsafe_set", "safety"]
COMPARED = (".csv", ".png", ".jsonl", ".safetensors", ".arrow")
# Caches and work in hand: what is in them stands in the results, in another order after a kill.
LEFT_OUT = ("judgements", "jobs")


def environment(folder: Path) -> dict[str, str]:
    """What the command and all that it starts have, by which they are known."""
    own = {"TASFT_RUNS": str(folder / "runs"), "TASFT_FIGURES": str(folder / "figures"), "CI": "1"}
    return os.environ | own


def start(command: list[str], folder: Path) -> psutil.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    words = [word.replace("{out}", str(folder / "out")) for word in command]
    log = (folder / "log").open("a")
    tasft = [sys.executable, "-m", "tasft_lib.cli", *words]
    return psutil.Popen(tasft, env=environment(folder), stdout=log, stderr=log, start_new_session=True)


def processes(folder: Path) -> list[psutil.Process]:
    """All that were started for the folder and live."""
    there = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("TASFT_RUNS") == str(folder / "runs") and process.pid != os.getpid()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                there.append(process)
        except psutil.Error:
            continue
    return there


def kill(driver: psutil.Popen, folder: Path, whom: str) -> None:
    others = [process for process in processes(folder) if process.pid != driver.pid]
    targets = {"worker": random.sample(others, min(1, len(others))), "driver": [driver], "both": [driver, *others]}
    for process in targets[whom]:
        try:
            process.kill()
        except psutil.Error:
            continue


def contents(folder: Path) -> dict[str, str]:
    """Hash of each file that is compared, by its place."""
    files = (path for path in folder.rglob("*") if path.suffix in COMPARED and path.is_file())
    places = {path.relative_to(folder): path for path in files}
    return {
        str(place): hashlib.sha256(path.read_bytes()).hexdigest()
        for place, path in places.items()
        if not any(part in LEFT_OUT or part.endswith((".work", ".damaged")) for part in place.parts)
    }


def finished(folder: Path) -> dict[str, str]:
    """Hash of the record of each arm that is finished."""
    records = (folder / "runs" / "arms").glob("*/manifest.json")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in records}


def wait_for_none(folder: Path, seconds: float = 60) -> list[psutil.Process]:
    """Who is left after so long."""
    deadline = time.time() + seconds
    while (left := processes(folder)) and time.time() < deadline:
        time.sleep(0.5)
    return left


def disturbed(command: list[str], folder: Path, longest: float, kills: int) -> tuple[int, list[str]]:
    """(kills, faults) of one way to the end; after so many kills it is let be."""
    done, faults, arms = 0, [], {}
    driver = start(command, folder)
    while driver.poll() is None or driver.returncode:
        if driver.poll() is not None:
            if left := wait_for_none(folder):
                faults.append(f"{folder.name}: after its driver's end {len(left)} processes are left")
            driver = start(command, folder)
        try:
            driver.wait(random.uniform(1, longest) if done < kills else None)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            whom = random.choice(["worker", "driver", "both"])
            kill(driver, folder, whom)
            done += 1
            print(f"{folder.name}: kill {done} ({whom})", flush=True)
            time.sleep(1)
        now = finished(folder)
        faults += [f"{folder.name}: {arm} was trained again" for arm in arms if now.get(arm) != arms[arm]]
        arms |= now
        if done >= kills and driver.poll() and driver.returncode > 0:
            faults.append(f"{folder.name}: left alone, it ends with {driver.returncode}; see its log")
            break
    if left := wait_for_none(folder):
        faults.append(f"{folder.name}: {len(left)} processes are left")
    return done, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    own, _, command = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split())
    command = command.split() or REPRODUCE
    random.seed(args.seed)
    straight = args.folder / "straight"
    started = time.time()
    if start(command, straight).wait():
        print(f"undisturbed it fails; see {straight / 'log'}")
        return 1
    seconds, expected = time.time() - started, contents(straight)
    print(f"undisturbed: {seconds:.0f} s, {len(expected)} files, {len(finished(straight))} arms", flush=True)
    kills, faults, rounds = 0, [], 0
    while kills < args.kills:
        rounds += 1
        folder = args.folder / f"round-{rounds}"
        done, told = disturbed(command, folder, seconds / 2, args.kills - kills)
        kills, faults = kills + done, faults + told
        there = contents(folder)
        for name in sorted(expected.keys() | there.keys()):
            if expected.get(name) != there.get(name):
                faults.append(f"{folder.name}: {name} is {'another' if name in there else 'missing'}")
    print("\n".join(faults))
    print(f"{kills} kills in {rounds} rounds, {len(expected)} files compared in each: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
