"""Verdicts and headline rates of a profile on four machines, three of them emulated: `make machines`.

    python -m tasft_lib.experiments.machines [--machines [NAME ...]] [options of tasft reproduce]

Emulated machines have folders of their own in runs/machines; a killed run goes on. Leaves figures/machines.csv and its
manifest: of every notebook that has been run on a machine, by this call or an earlier one. `--machines` without a name
runs nothing and writes them again.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from ..reporting import claims, tables
from ..storage import files
from ..storage.files import runs_folder
from . import settings

# Kernels for older CPUs round otherwise, and so does every other CPU.
MACHINES = {
    "as it is": {},
    "PyTorch without AVX": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "MKL, compatible": {"MKL_CBWR": "COMPATIBLE"},
}
NOTEBOOKS = ("build_unsafe_set", "safety", "data_efficiency", "stl_comparison", "jailbreak", "over_alignment")
NOTEBOOKS += ("harmful_data_filter", "contrastive_augmentation")
MEASURED = ("harm", "degenerate", "correct", "over_refusal")


def main(argv: list[str]) -> None:
    """Run the notebooks on every machine and write the table."""
    parser = argparse.ArgumentParser("machines", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--notebooks", nargs="+", default=NOTEBOOKS)
    parser.add_argument("--machines", nargs="*", default=list(MACHINES), choices=MACHINES, metavar="NAME")
    args, options = parser.parse_known_args(argv)
    command = ["reproduce", "--profile", args.profile, "--notebooks", *args.notebooks, *options]
    own = {name: runs_folder() / "machines" / name.replace(" ", "_") for name in MACHINES}
    # As it is, its arms are those of any other run.
    runs = {name: own[name] if environment else runs_folder() for name, environment in MACHINES.items()}
    for name in args.machines:
        environment = MACHINES[name]
        places = {"TASFT_RUNS": str(runs[name]), "TASFT_FIGURES": str(own[name] / "figures")}
        print(f"{name}: {environment or 'no change'}", flush=True)
        run = subprocess.run([sys.executable, "-m", "tasft_lib.cli", *command], env=os.environ | environment | places)
        if run.returncode:  # it has said why
            sys.exit(run.returncode)
    figures = {name: folder / "figures" / args.profile for name, folder in own.items()}
    table = compared(args.profile, figures)
    out = Path(os.environ.get("TASFT_FIGURES") or files.project_root() / "figures")
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "machines.csv", index=False)
    told = {
        name: {
            "environment": MACHINES[name],
            "weights": weights(runs[name], figures[name]),
            "commits": {notebook: manifest["commit"] for notebook, manifest in _manifests(figures[name]).items()},
        }
        for name in MACHINES
    }
    record = {"parameters": parameters(list(figures.values())), "machines": told, "files": ["machines.csv"]}
    files.write_json(out / "machines_manifest.json", record | files.environment())
    print(table.to_string(index=False), *changed(table), sep="\n")


def compared(profile: str, folders: dict[str, Path]) -> pd.DataFrame:
    """Columns kind ("verdict", "evidence" or one of `MEASURED`), name and one per machine; from a folder of tables of
    each.

    A row per verdict that was run, then the rates that it rests on; and one per rate of plain SFT and of every method
    at its largest and smallest D_unsafe (sampled answers; greedy ones where none were sampled). "-": not run on that
    machine.
    """
    columns = {name: _verdicts(profile, folder) | _rates(folder) for name, folder in folders.items()}
    table = pd.DataFrame(columns, dtype=object).dropna(how="all").fillna("-")
    return table.rename_axis(["kind", "name"]).reset_index()


def changed(table: pd.DataFrame) -> list[str]:
    """Names of verdicts that are not the same on all machines that have them, "open" aside."""
    verdicts = table[table["kind"] == "verdict"].set_index("name").drop(columns="kind")
    return [f"changes: {name}" for name, row in verdicts.iterrows() if len({*row} - {"open", "-"}) > 1]


def weights(runs: Path, folder: Path) -> dict[str, str | None]:
    """Notebook -> a hash of the adapters of the arms that its manifest in `folder` names; another one shows other
    rounding. None where one of them is no longer in `runs`."""
    hashes = {}
    for name, manifest in _manifests(folder).items():
        steps = {arm: told["steps"] for arm, told in sorted(manifest.get("arms", {}).items())}
        folders = [runs / "arms" / arm / "trainer" / f"checkpoint-{step}" for arm, step in steps.items()]
        saved = [folder / "adapter_model.safetensors" for folder in folders]
        is_whole = all(file.exists() for file in saved)
        hashes[name] = files.content_hash([files.file_hash(file) for file in saved]) if is_whole else None
    return hashes


def parameters(folders: list[Path]) -> dict[str, dict]:
    """Notebook -> what it was given beside its profile's parameters, by its manifests in `folders`.

    Raises `ValueError` where it was not the same in all of them: such tables can't be compared.
    """
    given: dict[str, dict] = {}
    for folder in folders:
        for name, manifest in _manifests(folder).items():
            usual = vars(settings.load(name, manifest["parameters"]["profile"]))
            own = {key: value for key, value in manifest["parameters"].items() if value != usual.get(key)}
            if given.setdefault(name, own) != own:
                raise ValueError(f"{folder}: {name} was run with other parameters than elsewhere; run it again.")
    return given


def _manifests(folder: Path) -> dict[str, dict]:
    """Notebook -> its manifest."""
    return {
        file.name.removesuffix("_manifest.json"): files.read_json(file)
        for file in sorted(folder.glob("*_manifest.json"))
    }


def _verdicts(profile: str, folder: Path) -> dict[tuple[str, str], str]:
    table = claims.claims_table(profile, folder).set_index("claim").query("verdict != 'not run'")
    verdicts = {("verdict", claim): verdict for claim, verdict in table["verdict"].items()}
    return verdicts | {("evidence", claim): evidence for claim, evidence in table["here"].items()}


def _rates(folder: Path) -> dict[tuple[str, str], str]:
    rates = {}
    for notebook in ("safety", "data_efficiency", "stl_comparison"):
        file = folder / f"{notebook}_table.csv"
        if not file.exists():
            continue
        table = pd.read_csv(file)
        table = table[table["decoding"] == max(table["decoding"])]  # "sampled" > "greedy"
        sizes = table.groupby("method")["n_unsafe"]
        ends = (table["n_unsafe"] == sizes.transform("min")) | (table["n_unsafe"] == sizes.transform("max"))
        for _, row in table[ends].iterrows():
            place = f"{tables.NAMES[row['method']]}{f', {row.n_unsafe} unsafe rows' if row.n_unsafe else ''}"
            rates |= {(measure, place): tables.rate_text(row, measure) for measure in MEASURED}
    return rates


if __name__ == "__main__":
    main(sys.argv[1:])
