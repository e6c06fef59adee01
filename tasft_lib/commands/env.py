"""`tasft env`: versions and hardware, for a bug report; `--runs`: whether the disk of runs/ keeps what arms rely on."""

import argparse
import json


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("tasft env", description="Versions and hardware, for a bug report.")
    parser.add_argument(
        "--runs", action="store_true", help="instead: do locks and renames hold on the disk of runs/ ($TASFT_RUNS)?"
    )
    args = parser.parse_args(argv)
    if not args.runs:
        from ..storage.files import environment

        print(json.dumps(environment(), indent=2))
        return 0

    from ..storage.files import runs_folder
    from ..storage.integrity import disk_faults

    folder = runs_folder()
    folder.mkdir(parents=True, exist_ok=True)
    faults = disk_faults(folder)
    print("\n".join(faults) or f"{folder}: locks hold between processes of this host, and renames are whole.")
    return 1 if faults else 0
